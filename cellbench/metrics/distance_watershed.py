"""Finds touching cells by a watershed on the distance to the background, merging basins that are joined by a wide neck.

The distance has a peak in each bulge of a region, and a saddle between neighbouring peaks: the half-width of the neck. Two bulges are two cells
if the saddle is below ``saddle_ratio`` times the lower peak. As a ratio, the parameter does not depend on magnification. At 0 cells are connected
regions; towards 1 every bulge is a cell. One watershed serves all values (basins are merged afterwards, the highest saddle first), so tuning on
validation images takes one watershed per image.

If a model predicts the depth of a pixel in its cell (``cellbench.data.cell_targets``), that depth replaces the distances.

Distances are taken on blocks of ``1/BLOCKS`` of the region's half-width: on 1600x1200 with cells of 100 px that is 0.1 s instead of 0.65.
Gaps in the mask are kept to the pixel; only new cuts are as coarse as the blocks.

Letters: H x W image, h x w blocks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage

from cellbench.metrics.boundary import boundary_pixels
from cellbench.metrics.instances import (
    Instances,
    count_values,
    highest_class,
    kept_instances,
    numbered_instances,
    root,
)

SADDLE_RATIOS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Values to try; among equally good ones the smallest is chosen, which cuts least."""
BLOCKS = 12
"""Blocks per half-width of a region: pixel noise of outlines and steps of cuts are then below a tenth of a cell's radius."""
SMOOTH_BLOCKS = 1.0
"""Sigma of the Gaussian over distances, so that a rough outline does not create a basin at every corner."""


class DistanceWatershed:
    """The basins of a class map (H, W), computed once on demand; ``instances`` merges them for any saddle_ratio.

    ``fields`` (1, H, W) uint8: predicted depth of each pixel in its cell; None: the distance to the background, in blocks.
    """

    SETTINGS: ClassVar[tuple[dict[str, float], ...]] = tuple({"saddle_ratio": ratio} for ratio in SADDLE_RATIOS)

    def __init__(self, classes: np.ndarray, fields: np.ndarray | None = None) -> None:
        self._shape, boundary_depth = classes.shape, None if fields is None else fields[0]
        masks = ((label, classes == label) for label in range(1, highest_class(classes) + 1))
        self._floods = [(label, _Flood(mask, boundary_depth)) for label, mask in masks if mask.any()]

    def instances(self, min_area_px: int, *, saddle_ratio: float) -> Instances:
        """The cells at this ``saddle_ratio``, each of at least ``min_area_px`` pixels."""
        if not 0 <= saddle_ratio <= 1:
            raise ValueError(f"a saddle_ratio is a ratio from 0 to 1: {saddle_ratio}")
        if not self._floods:
            return numbered_instances(np.zeros(self._shape, np.int32), np.zeros(self._shape, np.uint8))
        return functools.reduce(_joined, (flood.cells(saddle_ratio, label, min_area_px) for label, flood in self._floods))

    def ap50s(self, truth: Instances, min_area_px: int) -> list[float]:
        """The AP50 at each of ``SETTINGS``, from the areas that the pieces of cells share with true cells: no setting looks at pixels."""
        overlaps = [(label, flood, _Overlap.of(flood.pieces(max(SADDLE_RATIOS))[0], truth)) for label, flood in self._floods]
        out = []
        for setting in self.SETTINGS:
            each = [one.matches(flood.numbers(**setting), label, truth, min_area_px) for label, flood, one in overlaps]
            hits, both = sum(hit for hit, _ in each), truth.num + sum(num for _, num in each)
            out.append(hits / (both - hits) if both else math.nan)
        return out


def _joined(first: Instances, second: Instances) -> Instances:
    """Cells of two classes in one image."""
    ids = np.where(second.ids > 0, second.ids + np.int32(first.num), first.ids)
    return Instances(
        ids=ids,
        areas_px=np.concatenate([first.areas_px, second.areas_px[1:]]),
        classes=np.concatenate([first.classes, second.classes[1:]]),
        num_left_out=first.num_left_out + second.num_left_out,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Overlap:
    """What the Q pieces of one class's mask share with true cells."""

    areas_px: np.ndarray
    """(Q,): without ignored pixels."""
    ignored_px: np.ndarray
    """(Q,)"""
    piece: np.ndarray
    """Of each pair of a piece and a true cell."""
    true: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(cls, pieces: np.ndarray, truth: Instances) -> _Overlap:
        num = int(pieces.max()) + 1
        most = num * (truth.num + 1)
        codes = pieces.astype(np.int32 if most < 1 << 31 else np.int64, copy=False) * (truth.num + 1) + truth.ids
        found, shared = count_values(codes, most)
        piece, true = found // (truth.num + 1), found % (truth.num + 1)
        ignored_px = np.zeros(num, int) if truth.ignored is None else np.bincount(pieces[truth.ignored], minlength=num)
        areas_px = np.bincount(piece, shared, num).astype(np.int64) - ignored_px
        return cls(areas_px=areas_px, ignored_px=ignored_px, piece=piece[true > 0], true=true[true > 0], shared=shared[true > 0])

    def matches(self, numbers: np.ndarray, label: int, truth: Instances, min_area_px: int) -> tuple[int, int]:
        """How many cells match a true one, and how many there are; ``numbers`` (Q,): the cell of each piece, 0 is background."""
        areas, ignored = (np.bincount(numbers, px).astype(np.int64) for px in (self.areas_px, self.ignored_px))
        kept = (areas + ignored >= max(min_area_px, 1)) & (ignored <= areas)  # as in drop_ignored
        kept[0] = False
        codes = self.true * len(kept) + numbers[self.piece]
        pairs, place = np.unique(codes, return_inverse=True)
        shared = np.bincount(place, self.shared, len(pairs)).astype(np.int64)
        t, p = pairs // len(kept), pairs % len(kept)
        hit = kept[p] & (truth.classes[t] == label) & (20 * shared > 10 * (truth.areas_px[t] + areas[p] - shared))
        return int(hit.sum()), int(kept.sum())


class _Flood:
    """One mask's regions, basins, peaks and saddles."""

    def __init__(self, mask: np.ndarray, boundary_depth: np.ndarray | None) -> None:
        self._mask, self._boundary_depth = mask, boundary_depth
        self._regions, self._num_regions = ndimage.label(mask)
        self._flooded = False

    def _flood(self) -> None:
        mask, self._flooded = self._mask, True
        self._step, self._basins, self._peaks = max(mask.shape), np.ones((1, 1), np.int32), np.zeros(2)
        self._saddles: list[tuple[float, int, int]] = []
        edge_px = np.count_nonzero(boundary_pixels(mask))
        if edge_px or self._boundary_depth is not None:  # otherwise the mask is the whole image and has no distances
            # Twice the area over the outline's length is the radius of a disc, and the half-width of elongated shapes.
            self._step = min(8, max(1, int(2 * np.count_nonzero(mask) / edge_px / BLOCKS))) if edge_px else 1
            full_hw, any_hw = _blocks(mask, self._step)
            if self._boundary_depth is not None:
                distance = _means(np.where(mask, self._boundary_depth, 0), self._step)
            else:
                distance = ndimage.distance_transform_edt(full_hw) if not full_hw.all() else np.zeros(full_hw.shape)
            distance = ndimage.gaussian_filter(distance, SMOOTH_BLOCKS, mode="nearest") * any_hw
            from skimage.segmentation import watershed

            self._basins = watershed(-distance, mask=any_hw)
            self._peaks = np.zeros(int(self._basins.max()) + 1)
            np.maximum.at(self._peaks, self._basins.ravel(), distance.ravel())
            self._peaks[0] = 0
            self._saddles = _saddles(self._basins, distance)
        self._pieces()

    def _pieces(self) -> None:
        """Computes the intersections of regions and basins. For any saddle_ratio, cells are unions of these pieces."""
        height, width = self._regions.shape
        rows, columns = np.arange(height) // self._step, np.arange(width) // self._step
        num_basins = len(self._peaks)
        most = (self._num_regions + 1) * num_basins
        codes = self._regions.astype(np.int32 if most < 1 << 31 else np.int64, copy=False) * num_basins + self._basins[rows][:, columns]
        found, self._areas_px = count_values(codes, most)
        if most <= 1 << 24:
            number = np.zeros(most, np.int32)
            number[found] = np.arange(len(found))
            self._piece = number.take(codes)
        else:
            self._piece = np.searchsorted(found, codes).astype(np.int32)
        self._region, self._basin = found // num_basins, found % num_basins
        # Regions less than a block apart share blocks. A basin belongs to the region with most of it; pieces of other regions there are
        # fragments of blocks, not cells.
        inside = np.where(self._region > 0, self._areas_px, 0)
        most = np.zeros(num_basins, np.int64)
        np.maximum.at(most, self._basin, inside)
        self._is_fragment = inside < most[self._basin]

    def pieces(self, saddle_ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """The piece of each pixel (H, W) int32, and the area of each; regions where they are whole cells and there was no other use for basins."""
        if saddle_ratio and not self._flooded:
            self._flood()
        if self._flooded:
            return self._piece, self._areas_px
        return self._regions, np.bincount(self._regions.ravel())

    def cells(self, saddle_ratio: float, label: int, min_area_px: int) -> Instances:
        """The cells, which are of class ``label``."""
        (pieces, areas_px), numbers = self.pieces(saddle_ratio), self.numbers(saddle_ratio)
        cells_px = np.bincount(numbers, areas_px).astype(np.int64)
        return kept_instances(pieces, numbers, cells_px, np.full(len(cells_px), label, np.uint8), min_area_px)

    def numbers(self, saddle_ratio: float) -> np.ndarray:
        """The cell number of each of :meth:`pieces`, 0 is background; numbers may have gaps."""
        if not saddle_ratio:
            return self._region if self._flooded else np.arange(self._num_regions + 1)
        cells, cell = np.unique(self._region * len(self._peaks) + self._merged(saddle_ratio)[self._basin], return_inverse=True)
        region = cells // len(self._peaks)
        areas = np.bincount(cell, self._areas_px * ~self._is_fragment, len(cells))
        # The largest cell of each region: the last of its run when sorted by region, then area.
        order = np.lexsort((areas, region))
        largest = np.zeros(self._num_regions + 1, np.int64)
        largest[region[order]] = order
        numbers = np.where(self._is_fragment, largest[self._region], cell) + 1
        numbers[self._region == 0] = 0
        return np.asarray(numbers)

    def _merged(self, saddle_ratio: float) -> np.ndarray:
        """For each basin the one that it is merged into."""
        parent, peaks = list(range(len(self._peaks))), self._peaks.tolist()
        for height, a, b in self._saddles:
            a, b = root(parent, a), root(parent, b)
            if a != b and height >= saddle_ratio * min(peaks[a], peaks[b]):
                low, high = (a, b) if peaks[a] < peaks[b] else (b, a)
                parent[low] = high
        return np.array([root(parent, k) for k in range(len(parent))])


def _blocks(mask: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (h, w) of ``step`` x ``step`` pixels that lie entirely in the mask, and those that touch it. The image is padded by its edge."""
    if step == 1:
        return mask, mask
    down, right = (-length % step for length in mask.shape)
    padded = np.pad(mask, ((0, down), (0, right)), mode="edge")
    rows = padded.reshape(-1, step, padded.shape[1])
    whole, some = np.all(rows, axis=1), np.any(rows, axis=1)
    return np.all(whole.reshape(len(rows), -1, step), axis=2), np.any(some.reshape(len(rows), -1, step), axis=2)


def _means(values: np.ndarray, step: int) -> np.ndarray:
    """The mean of each block of ``step`` x ``step`` pixels, (h, w) float. The image is padded by its edge."""
    down, right = (-length % step for length in values.shape)
    padded = np.pad(values, ((0, down), (0, right)), mode="edge")
    means: np.ndarray = padded.reshape(len(padded) // step, step, -1, step).mean((1, 3))
    return means


def _saddles(basins: np.ndarray, distance: np.ndarray) -> list[tuple[float, int, int]]:
    """For each pair of touching basins: the height of the saddle between them, and their numbers; the highest first."""
    num = int(basins.max()) + 1
    codes, heights = [], []
    for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        a, b = basins[first], basins[second]
        at = np.flatnonzero((a != b) & (a > 0) & (b > 0))
        low, high = np.minimum(a.ravel()[at], b.ravel()[at]), np.maximum(a.ravel()[at], b.ravel()[at])
        codes.append(low.astype(np.int64) * num + high)
        heights.append(np.minimum(distance[first].ravel()[at], distance[second].ravel()[at]))
    code, height = np.concatenate(codes), np.concatenate(heights)
    order = np.lexsort((-height, code))
    best = order[np.flatnonzero(np.diff(code[order], prepend=-1))]
    best = best[np.lexsort((code[best], -height[best]))]
    return [(float(height[k]), int(code[k] // num), int(code[k] % num)) for k in best]
