"""What a dataset holds, image by image: sizes, how much of it is cells, how many and how large, and in which colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cellbench.data.dataset import Dataset, Sample
from cellbench.metrics.instances import reference_instances
from cellbench.metrics.pixel import IGNORE


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """One image."""

    name: str
    size_px: tuple[int, int]
    """Height, width."""
    cell_share: float
    """Of its pixels, 0 to 1."""
    num_cells: int
    diameters_px: tuple[float, ...]
    """Of circles of the cells' areas; cells cut by the border are left out."""
    cell_rgb: tuple[float, float, float]
    """Mean colour of its cells, 0 to 255; nan without cells."""
    ground_rgb: tuple[float, float, float]
    """Mean colour of what is no cell; nan where there is nothing else."""


def measure_image(dataset: Dataset, sample: Sample) -> ImageStatistics:
    """Single cells are the mask's own numbers where it has them, else connected regions, of at least ``min_cell_px``."""
    image, classes = dataset.read(sample)
    ids = dataset.read_instances(sample)
    cells, _ = reference_instances(classes, ids, dataset.min_cell_px, owners=dataset.owners)
    is_cell = (classes > 0) & (classes != IGNORE)
    whole = np.ones(cells.num + 1, bool)
    whole[np.unique(np.concatenate([cells.ids[0], cells.ids[-1], cells.ids[:, 0], cells.ids[:, -1]]))] = False
    whole[0] = False
    return ImageStatistics(
        name=sample.name,
        size_px=classes.shape,
        cell_share=float(is_cell.sum() / max(np.count_nonzero(classes != IGNORE), 1)),
        num_cells=cells.num,
        diameters_px=tuple(np.sqrt(cells.areas_px[whole] * 4 / np.pi).tolist()),
        cell_rgb=_mean(image[is_cell]),
        ground_rgb=_mean(image[classes == 0]),
    )


def measure_images(dataset: Dataset, samples: Sequence[Sample], progress: Callable[[], object] = lambda: None) -> list[ImageStatistics]:
    """Each of the samples; ``progress`` is called after each."""
    out = []
    for sample in samples:
        out.append(measure_image(dataset, sample))
        progress()
    return out


def summarize(images: Sequence[ImageStatistics]) -> dict[str, float]:
    """The figures that the published exploration tells, and some more, over these images."""
    sizes = sorted({one.size_px for one in images}, key=lambda size: -sum(one.size_px == size for one in images))
    diameters = np.concatenate([one.diameters_px for one in images]) if images else np.zeros(0)
    counts = np.array([one.num_cells for one in images])
    return {
        "images": len(images),
        "height_px": sizes[0][0],
        "width_px": sizes[0][1],
        "sizes": len(sizes),
        "cell_share": float(np.mean([one.cell_share for one in images])),
        "cells_per_image": float(counts.mean()),
        "cells_per_image_sd": float(counts.std()),
        "cell_diameter_px": float(np.median(diameters)) if len(diameters) else 0.0,
    }


def _mean(pixels_N3: np.ndarray) -> tuple[float, float, float]:
    if not len(pixels_N3):
        return (float("nan"),) * 3
    red, green, blue = pixels_N3.mean(axis=0).tolist()
    return red, green, blue
