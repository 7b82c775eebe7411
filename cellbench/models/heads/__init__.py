"""Trainable decoders from a backbone's feature maps to class scores of each pixel; ``base`` is their interface."""
