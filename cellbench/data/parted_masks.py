"""Cells of masks that part touching cells by a thin line, as in BCCD: the line belongs to the cells, and cells that a few pixels join are parted.

Letters: H x W image.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from cellbench.metrics.instances import near_two_cells
from cellbench.metrics.pixel import IGNORE


def parted_cells(classes: np.ndarray, cut_px: int, min_area_px: int) -> np.ndarray:
    """The cell numbers (H, W) int32 of a class map (H, W) uint8, those of each class separately.

    Cells are the regions that remain if the mask loses its outermost ``cut_px / 2`` pixels, rounded up: joints up to ``cut_px`` wide part cells.
    What was lost goes to the nearest region, and so do lines between two cells up to ``cut_px`` wide. Regions below ``min_area_px`` part nothing.
    """
    ids = np.zeros(classes.shape, np.int32)
    for label in np.unique(classes):
        if label not in (0, IGNORE):
            one = _parted(classes == label, cut_px, min_area_px)
            ids[one > 0] = one[one > 0] + int(ids.max())
    return _lines_closed(ids, classes == 0, cut_px)


def _parted(mask: np.ndarray, cut_px: int, min_area_px: int) -> np.ndarray:
    """The numbers of a mask's cells, before lines are closed."""
    depth = ndimage.distance_transform_cdt(np.pad(mask, cut_px, mode="edge"), "taxicab")[cut_px:-cut_px, cut_px:-cut_px]
    cores, num = ndimage.label(depth > (cut_px + 1) // 2)
    small = np.bincount(cores.ravel(), minlength=num + 1) < min_area_px
    cores[small[cores]] = 0
    # A region without a core of its own is one cell.
    regions, num_regions = ndimage.label(mask)
    with_core = np.zeros(num_regions + 1, bool)
    with_core[regions[cores > 0]] = True
    seeds = np.where(cores > 0, cores, np.where(with_core[regions], 0, regions + num))
    seeds[~mask] = 0
    from skimage.segmentation import watershed

    out: np.ndarray = watershed(-depth, seeds, mask=mask).astype(np.int32)
    return out


def _lines_closed(ids: np.ndarray, free: np.ndarray, cut_px: int) -> np.ndarray:
    """The numbers with the ``free`` pixels between two cells given to the nearest one, where a line is at most ``cut_px`` wide."""
    padded = np.pad(ids, cut_px, mode="edge")
    closed = ndimage.binary_closing(padded > 0, np.ones((cut_px + 1, cut_px + 1)))[cut_px:-cut_px, cut_px:-cut_px] & free
    line = closed & near_two_cells(ids, cut_px)
    if not line.any():
        return ids
    nearest = ndimage.distance_transform_edt(ids == 0, return_distances=False, return_indices=True)
    return np.where(line, ids[tuple(nearest)], ids)
