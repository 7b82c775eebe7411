"""Frozen feature extractors: their interface (``base``), how they are built, and where their weights come from."""
