"""What is compared: backbones, heads and baselines, built from their cards."""
