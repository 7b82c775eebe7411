"""Whether a dataset is fit to compare models on."""
