"""Separates touching cells by a watershed on the distance to the background, merging basins that are joined by a wide neck.

The distance has a peak in each bulge of a region, and a saddle between neighbouring peaks: the half-width of the neck. Two bulges are two cells
if the saddle is below ``saddle_ratio`` times the lower peak. As a ratio, the parameter does not depend on magnification. At 0 cells are connected
regions; towards 1 every bulge is a cell. One watershed serves all values (basins are merged afterwards, the highest saddle first), so tuning on
validation images takes one watershed per image.

If a model predicts the depth of a pixel in its cell (``cellbench.data.transforms.cell_targets``), that depth replaces the distances.

Distances are taken on blocks of ``1/BLOCKS`` of the region's half-width: on 1600x1200 with cells of 100 px that is 0.1 s instead of 0.65.
Gaps in the mask are kept to the pixel; only new cuts are as coarse as the blocks.

Letters: H x W image, h x w blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from cellbench.metrics.boundary import boundary_pixels
from cellbench.metrics.instance import instance_scores
from cellbench.metrics.instances import MIN_AREA_PX, Instances, merge_parts_into_objects, numbered_instances
from cellbench.metrics.pixel import impute_missing, nan_mean

SADDLE_RATIOS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Values to try; among equally good ones the smallest is chosen, which cuts least."""
BLOCKS = 12
"""Blocks per half-width of a region: pixel noise of outlines and steps of cuts are then below a tenth of a cell's radius."""
SMOOTH_BLOCKS = 1.0
"""Sigma of the Gaussian over distances, so that a rough outline does not create a basin at every corner."""


@dataclass(frozen=True, kw_only=True)
class SeparationParams:
    """How single cells are found in a class map: ``saddle_ratio`` in 0..1; 0: connected regions."""

    saddle_ratio: float = 0.0
    val_ap50: dict[str, float] = field(default_factory=dict, hash=False)
    """Result of tuning: mean AP50 over the validation images for each tried saddle_ratio. Empty: not tuned."""
    num_images: int = 0
    """Number of validation images used for tuning."""
    min_area_px: int = MIN_AREA_PX
    """Minimum area of a cell, that of the reference masks used for tuning."""
    learned: bool = False
    """Whether basins are those of the boundary depth that the model predicts, not of the mask's own distances."""
    owners: tuple[int, ...] = ()
    """For each class the class of the object that it is a part of, its own for an object; empty: every class is an object."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", tuple(self.owners))  # JSON has only lists

    def watershed(self, classes: np.ndarray, boundary_depth: np.ndarray | None = None) -> DistanceWatershed:
        """The basins of the objects of a class map (H, W) uint8."""
        return DistanceWatershed(merge_parts_into_objects(classes, self.owners), boundary_depth)

    def instances(self, classes: np.ndarray, boundary_depth: np.ndarray | None = None) -> Instances:
        """The cells of a class map (H, W) uint8; ``boundary_depth`` (H, W) uint8 if the model predicts it."""
        return self.watershed(classes, boundary_depth).instances(self.saddle_ratio, self.min_area_px)

    @property
    def description(self) -> str:
        """For messages and MLflow tags."""
        return (
            f"watershed{' on the learned boundary depth' * self.learned}, saddle_ratio {self.saddle_ratio:g}"
            if self.saddle_ratio
            else "connected regions"
        )


CONNECTED = SeparationParams()
"""No separation."""


class DistanceWatershed:
    """The basins of a class map (H, W), computed once on demand; ``instances`` merges them for any saddle_ratio.

    ``boundary_depth`` (H, W) uint8: predicted depth of each pixel in its cell; None: the distance to the background, in blocks.
    """

    def __init__(self, classes: np.ndarray, boundary_depth: np.ndarray | None = None) -> None:
        self._classes = classes
        masks = [classes == label for label in range(1, (int(classes.max()) if classes.size else 0) + 1)]
        self._floods = [_Flood(mask, boundary_depth) for mask in masks if mask.any()]

    def instances(self, saddle_ratio: float, min_area_px: int) -> Instances:
        """The cells at this ``saddle_ratio``, each of at least ``min_area_px`` pixels."""
        if not 0 <= saddle_ratio <= 1:
            raise ValueError(f"a saddle_ratio is a ratio from 0 to 1: {saddle_ratio}")
        ids, num = np.zeros(self._classes.shape, np.int32), 0
        for flood in self._floods:
            part = flood.ids(saddle_ratio)
            ids[part > 0] = part[part > 0] + num
            num = max(num, int(ids.max()))
        return numbered_instances(ids, self._classes, min_area_px)


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
        if edge_px := np.count_nonzero(boundary_pixels(mask)):  # otherwise the mask is the whole image and has no distances
            # Twice the area over the outline's length is the radius of a disc, and the half-width of elongated shapes.
            self._step = min(8, max(1, int(2 * np.count_nonzero(mask) / edge_px / BLOCKS)))
            full_hw, any_hw = _blocks(mask, self._step)
            if self._boundary_depth is not None:
                distance = _means(np.where(mask, self._boundary_depth, 0), self._step)
            else:
                distance = ndimage.distance_transform_edt(full_hw) if not full_hw.all() else np.zeros(full_hw.shape)
            distance = ndimage.gaussian_filter(distance, SMOOTH_BLOCKS, mode="nearest") * any_hw
            self._basins = watershed(-distance, mask=any_hw)
            self._peaks = np.concatenate([[0.0], ndimage.maximum(distance, self._basins, np.arange(1, int(self._basins.max()) + 1))])
            self._saddles = _saddles(self._basins, distance)
        self._pieces()

    def _pieces(self) -> None:
        """Computes the intersections of regions and basins. For any saddle_ratio, cells are unions of these pieces."""
        height, width = self._regions.shape
        rows, columns = np.arange(height) // self._step, np.arange(width) // self._step
        num_basins = len(self._peaks)
        codes = self._regions.astype(np.int64) * num_basins + self._basins[rows][:, columns]
        if (self._num_regions + 1) * num_basins <= 1 << 24:
            counts = np.bincount(codes.ravel(), minlength=1)
            found = np.flatnonzero(counts)
            self._areas_px = counts[found]
            number = np.zeros(len(counts), np.int32)
            number[found] = np.arange(len(found))
            self._piece = number[codes]
        else:
            found, flat, self._areas_px = np.unique(codes, return_inverse=True, return_counts=True)
            self._piece = flat.reshape(codes.shape).astype(np.int32)
        self._region, self._basin = found // num_basins, found % num_basins
        # Regions less than a block apart share blocks. A basin belongs to the region with most of it; pieces of other regions there are
        # fragments of blocks, not cells.
        inside = np.where(self._region > 0, self._areas_px, 0)
        most = np.zeros(num_basins, np.int64)
        np.maximum.at(most, self._basin, inside)
        self._is_fragment = inside < most[self._basin]

    def ids(self, saddle_ratio: float) -> np.ndarray:
        """Cell numbers (H, W), 0 is background; numbers may have gaps."""
        if not saddle_ratio:
            regions: np.ndarray = self._regions
            return regions
        if not self._flooded:
            self._flood()
        cells, cell = np.unique(self._region * len(self._peaks) + self._merged(saddle_ratio)[self._basin], return_inverse=True)
        region = cells // len(self._peaks)
        areas = np.bincount(cell, self._areas_px * ~self._is_fragment, len(cells))
        # The largest cell of each region: the last of its run when sorted by region, then area.
        order = np.lexsort((areas, region))
        largest = np.zeros(self._num_regions + 1, np.int64)
        largest[region[order]] = order
        numbers = np.where(self._is_fragment, largest[self._region], cell) + 1
        numbers[self._region == 0] = 0
        ids: np.ndarray = numbers.astype(np.int32)[self._piece]
        return ids

    def _merged(self, saddle_ratio: float) -> np.ndarray:
        """For each basin the one that it is merged into."""
        parent, peaks = list(range(len(self._peaks))), self._peaks.tolist()

        def root(k: int) -> int:
            while parent[k] != k:
                parent[k] = parent[parent[k]]
                k = parent[k]
            return k

        for height, a, b in self._saddles:
            a, b = root(a), root(b)
            if a != b and height >= saddle_ratio * min(peaks[a], peaks[b]):
                low, high = (a, b) if peaks[a] < peaks[b] else (b, a)
                parent[low] = high
        return np.array([root(k) for k in range(len(parent))])


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


class SeparationTuner:
    """Chooses from ``SADDLE_RATIOS`` the one with the best AP50 over predicted class maps and their true cells."""

    def __init__(self, min_area_px: int = MIN_AREA_PX, *, owners: Sequence[int] = ()) -> None:
        """``min_area_px``: used if no image is added; ``owners``: as in :class:`SeparationParams`."""
        self._found: list[list[float]] = []
        self._min_area_px, self._learned, self._owners = min_area_px, False, tuple(owners)

    def add(self, classes: np.ndarray, boundary_depth: np.ndarray | None, truth: Instances, min_area_px: int) -> None:
        """A predicted class map (H, W) uint8, the boundary depth (H, W) uint8 where the model predicts it, and the true cells."""
        parts, self._learned = (
            DistanceWatershed(merge_parts_into_objects(classes, self._owners), boundary_depth),
            boundary_depth is not None,
        )
        self._min_area_px = min_area_px
        self._found.append(
            [float(instance_scores(truth, parts.instances(saddle_ratio, min_area_px))["ap50"]) for saddle_ratio in SADDLE_RATIOS]
        )

    def best(self) -> SeparationParams:
        """The separation with the highest mean AP50; connected regions if no image has a true or predicted cell."""
        found = impute_missing(np.array(self._found, dtype=np.float64).reshape(-1, len(SADDLE_RATIOS)).T)
        means: Sequence[float] = [round(nan_mean(values), 6) for values in found]
        if np.isnan(means).any():
            return SeparationParams(min_area_px=self._min_area_px, learned=self._learned, owners=self._owners)
        val_ap50 = {f"{saddle_ratio:g}": value for saddle_ratio, value in zip(SADDLE_RATIOS, means, strict=True)}
        return SeparationParams(
            saddle_ratio=SADDLE_RATIOS[int(np.argmax(means))],
            val_ap50=val_ap50,
            num_images=len(self._found),
            min_area_px=self._min_area_px,
            learned=self._learned,
            owners=self._owners,
        )
