"""Cells that the frame of an image cuts: annotators often leave out those of which little is seen, and a model cannot know where the frame is."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from cellbench.metrics.pixel import confusion_matrix, pixel_scores, pooled_classes

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
"""The shares of a cell that are tried, below which regions at the frame are dropped."""
SPECK = 0.1
"""Regions below this share of the one that holds the middle of all foreground are specks, which do not count for the size of a cell."""


def small_edge_regions(classes: np.ndarray, least_share: float) -> np.ndarray:
    """The pixels (H, W) bool of regions at the frame that are smaller than a share of the median region inside.

    ``classes``: (H, W) uint8, 0 the background. None are without a region inside, since the size of a cell is then unknown.
    """
    numbers, num = ndimage.label(classes > 0)
    areas = np.bincount(numbers.ravel(), minlength=num + 1)
    at_edge = np.zeros(num + 1, bool)
    at_edge[np.concatenate([numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]])] = True
    at_edge[0] = False
    inside = np.sort(areas[1:][~at_edge[1:]])
    if not len(inside):
        return np.zeros(classes.shape, bool)
    middle = inside[np.searchsorted(np.cumsum(inside), inside.sum() / 2)]  # a median by area: thousands of specks do not change it
    cell = np.median(inside[inside >= SPECK * middle])
    return np.asarray((at_edge & (areas < least_share * cell))[numbers])


def without_small_edge_regions(classes: np.ndarray, least_share: float) -> np.ndarray:
    """A class map without :func:`small_edge_regions`; the same one at a share of 0."""
    return np.where(small_edge_regions(classes, least_share), np.uint8(0), classes) if least_share else classes


class EdgeShareTuner:
    """Chooses the share from images with their truth: the one with the best Dice over all pixels, of equal ones the smallest."""

    def __init__(self, num_classes: int) -> None:
        self._counts = np.zeros((len(SHARES), num_classes, num_classes), np.int64)

    def add(self, truth: np.ndarray, classes: np.ndarray) -> None:
        """An image's truth and predicted classes, (H, W) uint8."""
        for counts, share in zip(self._counts, SHARES, strict=True):
            counts += confusion_matrix(truth, without_small_edge_regions(classes, share), len(counts))

    def best(self) -> float:
        return SHARES[int(np.argmax([pixel_scores(counts).of(pooled_classes(counts))["dice"] for counts in self._counts]))]
