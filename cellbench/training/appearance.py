"""Describes whole images by the pooled features of the frozen backbone, and the training images of a run for later comparison.

Letters: B tiles, D features, h x w places of a map, N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cellbench.data.transforms.tiling import TileGrid
from cellbench.features.extractor import Features
from cellbench.metrics.appearance import TrainingAppearance
from cellbench.parallel import WorkerPool

MOST_IMAGES = 100
"""Number of training images that are described, spread evenly over all."""


def pooled(maps: dict[int, Tensor]) -> np.ndarray:
    """For each tile the mean and the mean square of each feature of the deepest map over its places: (B, 2D) float64. (B, 0) without maps."""
    if not maps:
        return np.zeros((0, 0))
    deepest = maps[max(maps)].flatten(2).double()
    return torch.cat([deepest.mean(2), deepest.square().mean(2)], 1).cpu().numpy()


def tile_weights(grid: TileGrid) -> np.ndarray:
    """The share of the image's area whose nearest tile is each tile, in the grid's order: overlapping tiles count no part twice."""
    areas = np.array([(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in grid.owned()], float)
    return areas / areas.sum()


def describe(moments_D: np.ndarray) -> np.ndarray:
    """An image's descriptor (2D,) float32, from the weighted mean of :func:`pooled` of its tiles: means, then logarithms of standard deviations."""
    mean, square = np.split(moments_D, 2)
    return np.concatenate([mean, np.log(np.sqrt(np.maximum(square - mean**2, 0)) + 1e-6)]).astype(np.float32)


def training_appearance(features: Features) -> TrainingAppearance | None:
    """The appearance of a cohort's training images, with its validation images as examples of others; None without a backbone."""
    if features.backbone.module is None:
        return None
    used = np.asarray(features.plan.used_images)
    chosen = used[np.unique(np.linspace(0, len(used) - 1, min(len(used), MOST_IMAGES)).round().astype(int))]
    return TrainingAppearance.of(_described(features, "train", chosen.tolist()), _described(features, "val"))


def _described(features: Features, split: str, images: Sequence[int] | None = None) -> np.ndarray:
    """The descriptors (N, 2D) of some images, or of all."""
    found: dict[int, list[np.ndarray]] = {image: [] for image in images or range(len(features.pixels[split]))}
    with WorkerPool(features.backbone.machine.lanes) as pool:
        for batch, numbers in features.tiles(split, pool, images):
            for image, moments in zip(numbers, pooled(batch.maps), strict=True):
                found[image].append(moments)
    return np.stack([describe(tile_weights(features.grid(split, image)) @ np.stack(rows)) for image, rows in found.items()])
