"""Segmenters without a foundation model, for comparison."""
