"""MLflow, and the only package that knows it."""
