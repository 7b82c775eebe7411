"""Training, validation and test of heads on frozen features."""
