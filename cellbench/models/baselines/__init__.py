"""Segmenters without a backbone of ours, which a foundation model must beat."""
