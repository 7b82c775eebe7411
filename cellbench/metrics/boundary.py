"""Boundary scores: normalised surface dice and boundary Dice."""

from __future__ import annotations

import math

import numpy as np

TOLERANCE_PX = 2.0
"""Tolerance for contours: the difference between two careful annotators on a cell of 100 px."""


class MaskBoundary:
    """A mask (H, W) bool with its contour, the neighbourhood of that, and its band; without what lies in ``ignored`` pixels (H, W) bool."""

    def __init__(self, mask: np.ndarray, tolerance_px: float, ignored: np.ndarray | None = None) -> None:
        self.is_empty = not (mask.any() if ignored is None else mask[~ignored].any())
        if ignored is not None:
            mask = mask | ignored  # an ignored neighbour does not count as outside
        self.mask = mask
        self.contour = boundary_pixels(mask)
        if ignored is not None:
            self.contour &= ~ignored
        self.near = dilate(self.contour, tolerance_px)
        self.band = mask & dilate(~mask, tolerance_px)
        if ignored is not None:  # so near to ignored pixels, the matching contour may lie within them
            away = ~dilate(ignored, tolerance_px)
            self.mask, self.contour, self.band = mask | ~away, self.contour & away, self.band & away


def boundary_pixels(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) bool that have one of their four neighbours outside it; the image's frame counts as inside."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    outer: np.ndarray = mask ^ inner
    return outer


def dilate(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """All pixels within ``radius_px`` of a pixel of the mask, centre to centre.

    A disc is a union of lines: 4 passes per pixel of radius, 3 ms on 1600x1200; a distance transform takes 200 ms.
    """
    reach = math.floor(radius_px)
    out, line, width = mask.copy(), mask.copy(), 0
    for up in range(reach, -1, -1):
        while width < math.floor(math.sqrt(radius_px**2 - up**2)):
            width += 1
            line[:, width:] |= mask[:, :-width]
            line[:, :-width] |= mask[:, width:]
        if up == 0:
            out |= line
        elif up < len(mask):
            out[up:] |= line[:-up]
            out[:-up] |= line[up:]
    return out


def boundary_scores(truth: MaskBoundary, found: MaskBoundary) -> tuple[float, float]:
    """``nsd`` and ``boundary_dice`` of two masks: NaN if both are empty. If neither has a contour, 1 if the masks are equal, else 0."""
    lengths = np.count_nonzero(truth.contour) + np.count_nonzero(found.contour)
    if not lengths:
        if truth.is_empty and found.is_empty:
            return math.nan, math.nan
        same = float((truth.mask == found.mask).all())
        return same, same
    close = np.count_nonzero(truth.contour & found.near) + np.count_nonzero(found.contour & truth.near)
    bands = np.count_nonzero(truth.band) + np.count_nonzero(found.band)
    return close / lengths, 2 * np.count_nonzero(truth.band & found.band) / bands
