"""Otsu's threshold with filled holes: no training, and on blood smears hard to beat."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_fill_holes
from skimage.filters import threshold_multiotsu, threshold_otsu

from cellbench.errors import CellbenchError


def otsu(image: np.ndarray, num_classes: int, *, cells: str) -> np.ndarray:
    """Class numbers (H, W) uint8 of an RGB image (H, W, 3) uint8, from the green channel, where Giemsa and H&E stain darkest.

    Two classes: the ``cells`` side (``dark`` or ``bright``) of Otsu's threshold, with holes filled (the pale centres of red cells). More
    classes: multi-level Otsu, each class darker (or brighter) than the one before. An image of one colour is all background.
    """
    if cells not in ("dark", "bright"):
        raise CellbenchError(f"[baseline.otsu] cells = {cells!r}: 'dark' or 'bright' is expected.")
    green = image[..., 1] if cells == "bright" else 255 - image[..., 1]
    if len(np.unique(green)) < num_classes:
        return np.zeros(green.shape, np.uint8)
    if num_classes == 2:
        return binary_fill_holes(green > threshold_otsu(green)).astype(np.uint8)
    return np.digitize(green, threshold_multiotsu(green, classes=num_classes), right=True).astype(np.uint8)
