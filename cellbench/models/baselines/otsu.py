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
    # skimage tries every set of thresholds: fast for two of them, minutes for six.
    thresholds = threshold_multiotsu(green, classes=3) if num_classes == 3 else multi_level_thresholds(green, num_classes)
    return np.digitize(green, thresholds, right=True).astype(np.uint8)


def multi_level_thresholds(grey: np.ndarray, num_classes: int) -> np.ndarray:
    """The ``num_classes`` - 1 thresholds with the largest variance between classes, each the highest grey level of its class.

    Exact, by dynamic programming over the grey levels of the image, of which there must be ``num_classes`` or more. The time is proportional to the
    number of classes. Of equally good thresholds the lowest are taken.

    >>> multi_level_thresholds(np.array([0, 1, 1, 100, 101, 200, 255]), 4)
    array([  1, 101, 200])
    """
    levels, counts = np.unique(grey, return_counts=True)
    num = len(levels)
    weight, moment = (np.concatenate([[0.0], np.cumsum(values)]) for values in (counts, counts * levels.astype(float)))
    start, end = np.indices((num, num))
    with np.errstate(divide="ignore", invalid="ignore"):
        # The share of one class, of the levels from `start` to `end`. Their sum is largest where the variance between classes is.
        share = np.where(start <= end, (moment[end + 1] - moment[start]) ** 2 / (weight[end + 1] - weight[start]), -np.inf)
    best, firsts = share[0], []
    for _ in range(num_classes - 1):
        # By the first level of the last class, the best division of the levels below it, and by its last level, which is an end of all.
        total = np.concatenate([[-np.inf], best[:-1]])[:, None] + share
        firsts.append(total.argmax(0))
        best = total.max(0)
    last, thresholds = num - 1, []
    for first in reversed(firsts):
        last = first[last] - 1
        thresholds.append(levels[last])
    return np.array(thresholds[::-1])
