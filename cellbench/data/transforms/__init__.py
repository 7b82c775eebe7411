"""Transforms of images between file and model."""
