"""Frozen feature extractors: how each is built, where its weights come from, and what it promises (``base``)."""
