"""A model's prediction for one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SegmentedImage:
    """One model's prediction for one image, at the image's own size."""

    classes: np.ndarray
    """(H, W) uint8: the most probable class of each pixel."""
    cell: np.ndarray | None = None
    """(H, W) uint8: the probability of not being background, 0..255; None for a method without probabilities."""
    fields: np.ndarray | None = None
    """(F, H, W) uint8, 0..255: what the model predicts to find cells, if it learned a target for it (``cellbench.data.cell_targets``)."""
    foreground: np.ndarray | None = None
    """(K-1, H, W) uint8, 0..255: the probability of each class but the background, where it was asked for."""
    finite: bool = True
    """Whether all scores are finite. If not, the other fields are invalid."""
