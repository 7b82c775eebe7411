"""Drawn blood smears, for tests and a first run without data."""
