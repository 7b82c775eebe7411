"""Otsu's threshold with filled holes: no training, and on blood smears hard to beat."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_fill_holes
from skimage.filters import threshold_multiotsu, threshold_otsu

from cellbench.dark_field import is_dark_field
from cellbench.errors import CellbenchError


def otsu(image: np.ndarray, num_classes: int, *, cells: str) -> np.ndarray:
    """Class numbers (H, W) uint8 of an RGB image (H, W, 3) uint8, from the green channel, where Giemsa and H&E stain darkest.

    Two classes: the ``cells`` side (``dark`` or ``bright``) of Otsu's threshold, with holes filled (the pale centres of red cells). More
    classes: multi-level Otsu, each class darker (or brighter) than the one before. An image of one colour is all background.
    ``auto`` takes the bright side of images in dark field, from the brightest channel of each pixel, as dyes fluoresce in any colour.
    """
    if cells not in ("auto", "dark", "bright"):
        raise CellbenchError(f"[baseline.otsu] cells = {cells!r}: 'auto', 'dark' or 'bright' is expected.")
    grey = _amount(image, cells)
    if len(np.unique(grey)) < num_classes:
        return np.zeros(grey.shape, np.uint8)
    if num_classes == 2:
        return binary_fill_holes(grey > threshold_otsu(grey)).astype(np.uint8)
    # skimage tries every set of thresholds: fast for two of them, minutes for six.
    thresholds = threshold_multiotsu(grey, classes=3) if num_classes == 3 else multi_level_thresholds(grey, num_classes)
    return np.digitize(grey, thresholds, right=True).astype(np.uint8)


def _amount(image: np.ndarray, cells: str) -> np.ndarray:
    """Of cell in each pixel (H, W) uint8: high where stain is dark, or where light is bright."""
    if cells == "auto":
        brightest = image.max(axis=-1)
        if np.ptp(brightest) and is_dark_field(brightest, float(threshold_otsu(brightest))):
            return brightest
    return image[..., 1] if cells == "bright" else 255 - image[..., 1]


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
