"""Describes whole images by the mean features of the frozen backbone, and the training images of a run for later comparison.

Letters: B tiles, D features, h x w places of a map, N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from cellbench.data.transforms.tiling import TileGrid
from cellbench.features.extractor import Features
from cellbench.metrics.training_features import TrainingFeatures
from cellbench.parallel import WorkerPool

MOST_IMAGES = 100
"""Number of training images that are described, spread evenly over all."""


def pooled(maps: dict[int, Tensor]) -> dict[int, np.ndarray]:
    """The mean features of each tile over the places of its maps: (B, D) float64 by depth."""
    return {depth: x.flatten(2).double().mean(2).cpu().numpy() for depth, x in maps.items()}


def tile_weights(grid: TileGrid) -> np.ndarray:
    """The share of the image's area whose nearest tile is each tile, in the grid's order: overlapping tiles count no part twice."""
    areas = np.array([(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in grid.owned()], float)
    return areas / areas.sum()


def describe_training_images(features: Features) -> TrainingFeatures | None:
    """What a cohort's training images look like to its backbone, with its validation images as examples of others; None without a backbone."""
    if features.backbone.module is None:
        return None
    used = np.asarray(features.plan.used_images)
    chosen = used[np.unique(np.linspace(0, len(used) - 1, min(len(used), MOST_IMAGES)).round().astype(int))]
    return TrainingFeatures.of(_described(features, "train", chosen.tolist()), _described(features, "val"))


def _described(features: Features, split: str, images: Sequence[int] | None = None) -> dict[int, np.ndarray]:
    """The descriptors (N, D) of some images, or of all, by depth."""
    numbers = range(len(features.pixels[split])) if images is None else images
    found: dict[int, dict[int, list[np.ndarray]]] = {depth: {image: [] for image in numbers} for depth in features.backbone.keys}
    with WorkerPool(features.backbone.machine.lanes) as pool:
        for batch, of_image in features.tiles(split, pool, images):
            for depth, means in pooled(batch.maps).items():
                for image, row in zip(of_image, means, strict=True):
                    found[depth][image].append(row)
    return {
        depth: np.stack([tile_weights(features.grid(split, image)) @ np.stack(rows) for image, rows in by_image.items()])
        for depth, by_image in found.items()
    }
