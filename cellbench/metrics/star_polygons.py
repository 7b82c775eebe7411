"""Cells from stars: each pixel votes for the polygon that its rays span, and overlapping polygons are suppressed, the most probable first.

Two polygons are the same cell if their intersection is above ``max_overlap`` of the smaller one, as in StarDist. A pixel of the mask outside of
all polygons belongs to the cell that it touches, and a polygon ends where the mask ends: so outlines are those of the mask.

Letters: H x W image, R rays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage

from cellbench.metrics.instances import Instances, count_values, numbered_instances

RAYS = 32
LOG2_LONGEST = 10
"""Of the longest ray that can be stored, 1,023 px."""


def ray_directions(num: int = RAYS) -> np.ndarray:
    """Unit vectors (R, 2), down and right; the first points to the right."""
    angles = 2 * np.pi * np.arange(num) / num
    return np.stack([np.sin(angles), np.cos(angles)], axis=1)


def distance_to_share(distance_px: np.ndarray) -> np.ndarray:
    """Lengths of rays as numbers from 0 to 1, on a logarithmic scale."""
    out: np.ndarray = np.clip(np.log2(1 + distance_px) / LOG2_LONGEST, 0, 1)
    return out


def share_to_distance(share: np.ndarray) -> np.ndarray:
    """The inverse of :func:`distance_to_share`."""
    out: np.ndarray = np.exp2(share * LOG2_LONGEST) - 1
    return out


@dataclass(frozen=True, kw_only=True)
class _Polygon:
    """The pixels of a polygon in its bounding box."""

    top: int
    left: int
    mask: np.ndarray

    @functools.cached_property
    def area_px(self) -> int:
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.mask.shape[0]), slice(self.left, self.left + self.mask.shape[1])


class StarPolygons:
    """The polygons of a class map (H, W) and its stars (1 + R, H, W) uint8; ``instances`` suppresses overlapping ones."""

    SETTINGS: ClassVar[tuple[dict[str, float], ...]] = tuple(
        {"min_probability": probability, "max_overlap": overlap}
        for overlap in (0.3, 0.5)
        for probability in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    )

    def __init__(self, classes: np.ndarray, fields: np.ndarray) -> None:
        self._classes, self._mask = classes, classes > 0
        lowest = min(setting["min_probability"] for setting in self.SETTINGS)
        # Smoothed: on a plateau of rounded numbers every pixel would be a peak.
        probability = ndimage.gaussian_filter(np.where(self._mask, fields[0], 0).astype(np.float32) / 255, 1)
        peaks = self._mask & (probability >= ndimage.maximum_filter(probability, 3)) & (fields[0] >= lowest * 255)
        at = np.flatnonzero(peaks)
        at = at[np.argsort(-probability.ravel()[at], kind="stable")]
        at = at[_distinct(peaks, at, share_to_distance(np.median(fields[1:].reshape(RAYS, -1)[:, at], axis=0) / 255))]
        self._probability = fields[0].ravel()[at] / 255
        self._probability_map = probability
        distances = share_to_distance(fields[1:].reshape(RAYS, -1)[:, at].T / 255)
        corners = np.stack(np.divmod(at, classes.shape[1]), axis=1)[:, None] + distances[..., None] * ray_directions()
        self._polygons = [_rasterised(one, classes.shape) for one in corners]

    def instances(self, min_area_px: int, *, min_probability: float, max_overlap: float) -> Instances:
        """The cells, each of at least ``min_area_px`` pixels."""
        ids = np.zeros(self._classes.shape, np.int32)
        kept: list[_Polygon] = []
        for probability, one in zip(self._probability, self._polygons, strict=True):
            part = ids[one.box]
            if probability >= min_probability and not any(
                _overlap(one, kept[number - 1]) > max_overlap for number in count_values(part, len(kept) + 1)[0] if number
            ):
                kept.append(one)
                part[one.mask & (part == 0)] = len(kept)
        ids[~self._mask] = 0
        from skimage.segmentation import watershed

        ids = watershed(-self._probability_map, ids, mask=self._mask).astype(np.int32)
        return numbered_instances(ids, self._classes, min_area_px)


def _distinct(peaks: np.ndarray, at: np.ndarray, median_px: np.ndarray) -> np.ndarray:
    """Which of the peaks ``at`` these positions are needed, (num,) bool.

    Peaks that touch have the same probability, as in a cell that fills the image. Those within half the median ray of an earlier one of them
    span the same cell, and are left out: each would be drawn and compared.
    """
    plateaus, num = ndimage.label(peaks, np.ones((3, 3)))
    needed = np.ones(len(at), bool)
    if num == len(at):
        return needed
    seen = np.zeros(peaks.shape, bool)
    for k, (y, x, reach) in enumerate(zip(*np.divmod(at, peaks.shape[1]), (median_px / 2 / np.sqrt(2)).astype(int), strict=True)):
        if seen[y, x]:
            needed[k] = False
            continue
        box = slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1)
        seen[box] |= plateaus[box] == plateaus[y, x]
    return needed


def _rasterised(corners: np.ndarray, shape: tuple[int, ...]) -> _Polygon:
    """The pixels of a polygon with the given corners (R, 2) within an image."""
    low = np.clip(np.floor(corners.min(0)).astype(int), 0, np.array(shape) - 1)
    high = np.clip(np.ceil(corners.max(0)).astype(int), low, np.array(shape) - 1)
    mask = np.zeros(high - low + 1, bool)
    from skimage.draw import polygon

    mask[polygon(corners[:, 0] - low[0], corners[:, 1] - low[1], mask.shape)] = True
    return _Polygon(top=int(low[0]), left=int(low[1]), mask=mask)


def _overlap(a: _Polygon, b: _Polygon) -> float:
    """The intersection of two polygons as a share of the smaller one."""
    rows = slice(max(one.box[0].start for one in (a, b)), min(one.box[0].stop for one in (a, b)))
    columns = slice(max(one.box[1].start for one in (a, b)), min(one.box[1].stop for one in (a, b)))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return 0.0
    parts = [one.mask[rows.start - one.top : rows.stop - one.top, columns.start - one.left : columns.stop - one.left] for one in (a, b)]
    return float(np.count_nonzero(parts[0] & parts[1]) / max(1, min(a.area_px, b.area_px)))
