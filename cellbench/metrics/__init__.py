"""Scores of one image: pixels, boundaries, single cells; no torch."""
