"""Cells that the frame of an image cuts: annotators often leave out those of which little is seen, and a model cannot know where the frame is."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

LEAST_PX = 100
"""Smaller regions are specks, which do not count for the size of a cell."""


def small_edge_regions(classes: np.ndarray, least_share: float) -> np.ndarray:
    """The pixels (H, W) bool of regions at the frame that are smaller than a share of the median region inside.

    ``classes``: (H, W) uint8, 0 the background. None are without a region inside, since the size of a cell is then unknown.
    """
    numbers, num = ndimage.label(classes > 0)
    areas = np.bincount(numbers.ravel(), minlength=num + 1)
    at_edge = np.zeros(num + 1, bool)
    at_edge[np.concatenate([numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]])] = True
    at_edge[0] = False
    inside = areas[1:][(areas[1:] >= LEAST_PX) & ~at_edge[1:]]
    if not len(inside):
        return np.zeros(classes.shape, bool)
    return np.asarray((at_edge & (areas < least_share * np.median(inside)))[numbers])
