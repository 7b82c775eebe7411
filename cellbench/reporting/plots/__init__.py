"""Figures: of one run, of a comparison, of its tests, of a dataset."""
