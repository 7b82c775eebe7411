"""Checks whether a dataset is suitable for comparing models."""
