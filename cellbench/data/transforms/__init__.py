"""What happens to an image between the file and the model."""
