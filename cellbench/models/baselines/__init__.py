"""Whole segmenters with no backbone of ours in them: what a foundation model must beat."""
