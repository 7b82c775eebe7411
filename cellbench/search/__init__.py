"""Hyperparameter search, and the only package that knows Optuna."""
