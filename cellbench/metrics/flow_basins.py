"""Cells from vectors that lead each pixel to the centre of its cell: pixels that flow to the same place are a cell.

Each pixel follows the vectors in short steps to another pixel, and jumps from there on are doubled, so that a path of 500 px takes a few array
operations instead of 500. Noise may part a cell into several basins. Along the line between two of them the vectors tell whether it is a cell's
outline: there they part, each towards its own centre, and within a cell they run side by side. Basins are merged where the mean parting of the
directions is below ``min_parting``, -1 (none is merged) to 1, the lowest first. It does not depend on magnification, and all its values take one
pass.

Letters: H x W image.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from scipy import ndimage

from cellbench.metrics.instances import Instances, numbered_instances, root

STEPS, DOUBLINGS = 4, 8
"""Steps of one pixel for each jump, and how often jumps are doubled: paths of 1,024 px."""
JOINED_PX = 1
"""Ends of paths that are this near to each other are one place: paths circle around a centre."""


class FlowBasins:
    """The basins of a class map (H, W) and its vectors (2, H, W) uint8, down and right; ``instances`` merges them for any ``min_parting``."""

    SETTINGS: ClassVar[tuple[dict[str, float], ...]] = tuple(
        {"min_parting": value} for value in (-1.0, -0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
    )

    def __init__(self, classes: np.ndarray, fields: np.ndarray) -> None:
        self._classes = classes
        self._mask = classes > 0
        vectors = (fields.astype(np.float32) / 127.5 - 1) * self._mask
        # Of unit length: where cells touch the predicted vectors are short, but their direction still counts.
        vectors /= np.maximum(np.linalg.norm(vectors, axis=0), 1e-3)
        self._basins = _basins(self._mask, vectors)
        self._lines = _lines(self._basins, vectors)

    def instances(self, min_area_px: int, *, min_parting: float) -> Instances:
        """The cells, each of at least ``min_area_px`` pixels."""
        parent = np.arange(int(self._basins.max(initial=0)) + 1).tolist()
        for parting, a, b in self._lines:
            if parting >= min_parting:
                break
            parent[root(parent, b)] = root(parent, a)
        number = np.array([root(parent, k) for k in range(len(parent))], np.int32)
        return numbered_instances(number[self._basins], self._classes, min_area_px)


class OffsetBasins(FlowBasins):
    """The same of offsets from the centre, which point away from it."""

    def __init__(self, classes: np.ndarray, fields: np.ndarray) -> None:
        super().__init__(classes, 255 - fields)


def _basins(mask: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """For each pixel of a mask (H, W) the number of the place where its path ends, int32; 0 outside."""
    inside = np.flatnonzero(mask)
    out = np.zeros(mask.shape, np.int32)
    if not len(inside):
        return out
    height, width = mask.shape
    y, x = (place.astype(np.float32) for place in np.divmod(inside, width))
    for _ in range(STEPS):
        down, right = _bilinear(vectors, y, x)
        y, x = np.clip(y + down, 0, height - 1), np.clip(x + right, 0, width - 1)
    row = np.zeros(mask.size, np.int64)
    row[inside] = np.arange(len(inside))
    target = np.rint(y).astype(np.int64) * width + np.rint(x).astype(np.int64)
    jump = np.where(mask.ravel()[target], row[target], np.arange(len(inside)))  # a path stays in the mask
    for _ in range(DOUBLINGS):
        jump = jump[jump]
    ends = np.zeros(mask.size, bool)
    ends[inside[jump]] = True
    places, _ = ndimage.label(ndimage.binary_dilation(ends.reshape(mask.shape), np.ones((3, 3)), JOINED_PX), np.ones((3, 3)))
    out.ravel()[inside] = places.ravel()[inside[jump]]
    return out


def _bilinear(maps: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The values (C, num) of maps (C, H, W) at positions between pixels."""
    height, width = maps.shape[1:]
    top, left = np.minimum(y.astype(np.int64), max(height - 2, 0)), np.minimum(x.astype(np.int64), max(width - 2, 0))
    below, beside = min(1, height - 1) * width, min(1, width - 1)
    down, right = y - top, x - left
    flat, first = maps.reshape(len(maps), -1), top * width + left
    upper = flat[:, first] * (1 - right) + flat[:, first + beside] * right
    lower = flat[:, first + below] * (1 - right) + flat[:, first + below + beside] * right
    values: np.ndarray = upper * (1 - down) + lower * down
    return values


def _lines(basins: np.ndarray, vectors: np.ndarray) -> list[tuple[float, int, int]]:
    """For each pair of touching basins the mean parting of the vectors across the line between them, and their numbers; the lowest first."""
    num = int(basins.max(initial=0)) + 1
    codes, partings = [], []
    for axis in range(2):
        here, along = (np.moveaxis(array, axis, 0) for array in (basins, vectors[axis]))
        a, b = here[:-1], here[1:]
        at = (a != b) & (a > 0) & (b > 0)
        low, high = np.minimum(a[at], b[at]).astype(np.int64), np.maximum(a[at], b[at])
        codes.append(low * num + high)
        partings.append((np.diff(along, axis=0) / 2)[at])
    code, parting = np.concatenate(codes), np.concatenate(partings)
    pairs, which = np.unique(code, return_inverse=True)
    mean = np.bincount(which, parting, len(pairs)) / np.maximum(np.bincount(which, minlength=len(pairs)), 1)
    return [(float(mean[k]), int(pairs[k] // num), int(pairs[k] % num)) for k in np.argsort(mean, kind="stable")]
