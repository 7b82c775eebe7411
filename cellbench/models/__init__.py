"""The models that are compared: backbones, heads and baselines, built from their cards."""
