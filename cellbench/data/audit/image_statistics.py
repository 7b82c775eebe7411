"""Measure one image and its mask: the statistics that ``explore`` shows, and the facts that the data checks judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from cellbench.data.audit.keypoint_matching import NO_KEYPOINTS, Keypoints, keypoints
from cellbench.data.audit.mask_placement import PlacementFeatures, describe
from cellbench.data.audit.perceptual_hash import mean_pool, to_grey
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io import images
from cellbench.data.masks import off_values
from cellbench.data.regions import within_regions
from cellbench.errors import CellbenchError, one_line
from cellbench.files import compute_sha256
from cellbench.metrics.instances import MIN_AREA_PX, reference_instances
from cellbench.metrics.pixel import IGNORE

LOOK_PX = 600
"""Longer side of the downsampled image used to detect inverted masks and missed cells."""

_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)

Colour = tuple[float, float, float]
Box = tuple[int, int, int, int]
"""x, y, width, height."""


# --- statistics -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """Statistics of one image."""

    name: str
    size_px: tuple[int, int]
    """Height, width."""
    cell_share: float
    """Share of the pixels, 0..1."""
    num_cells: int
    diameters_px: tuple[float, ...]
    """Diameters of circles with the cells' areas; without cells cut by the border."""
    cell_rgb: Colour
    """Mean colour of the cells, 0..255; nan without cells."""
    ground_rgb: Colour
    """Mean colour of the background; nan where there is none."""


def measure_image(dataset: Dataset, sample: Sample) -> ImageStatistics:
    """Cells are the mask's own numbers if it has them, else connected regions of at least ``min_cell_px``."""
    image, (classes, ids) = images.read_image(sample.image, dataset.reading), dataset.read_truth(sample)
    cells, _ = reference_instances(classes, ids, dataset.min_cell_px, owners=dataset.owners)
    is_cell = (classes > 0) & (classes != IGNORE)
    whole = np.ones(cells.num + 1, bool)
    whole[np.unique(np.concatenate([[0], cells.ids[0], cells.ids[-1], cells.ids[:, 0], cells.ids[:, -1]]))] = False
    return ImageStatistics(
        name=sample.name,
        size_px=classes.shape,
        cell_share=float(is_cell.sum() / max(np.count_nonzero(classes != IGNORE), 1)),
        num_cells=cells.num,
        diameters_px=tuple(np.sqrt(cells.areas_px[whole] * 4 / np.pi).tolist()),
        cell_rgb=_mean_colour(image[is_cell]),
        ground_rgb=_mean_colour(image[classes == 0]),
    )


def measure_images(dataset: Dataset, samples: Sequence[Sample], progress: Callable[[], object] = lambda: None) -> list[ImageStatistics]:
    """Statistics of each sample; ``progress`` is called after each."""
    out = []
    for sample in samples:
        out.append(measure_image(dataset, sample))
        progress()
    return out


def summarize(images: Sequence[ImageStatistics]) -> dict[str, float]:
    """The figures of the published exploration, and some more, over these images."""
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


# --- facts for the checks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleFacts:
    """Measurements of one sample. Where ``error`` is not empty the rest has its default."""

    name: str
    split: str
    group: str = ""
    error: str = ""
    size_px: tuple[int, int] = (0, 0)
    mask_px: tuple[int, int] = (0, 0)
    image_hash: str = ""
    mask_hash: str = ""
    small: np.ndarray = field(default_factory=lambda: np.zeros((64, 64), np.float32))
    """Grey thumbnail, 64 x 64."""
    keypoints: Keypoints = NO_KEYPOINTS
    stain: Colour = (0, 0, 0)
    """Mean colour, 0..255."""
    shares: tuple[float, ...] = ()
    """Share of the pixels of each class."""
    areas_px: tuple[int, ...] = ()
    """Area of each cell."""
    num_specks: int = 0
    min_cell_px: int = MIN_AREA_PX
    """Smaller regions are specks."""
    off_share: float = 0.0
    """Pixels whose mask value is farther from its class's than the card allows."""
    off_solid: bool = False
    """Whether these form a field of 3 x 3 or more, which smoothed edges do not."""
    off_example: int = 0
    lost_share: float = 0.0
    """Number of pixels that are read as background although their value differs from the background's."""
    noisy: bool = False
    """Any value but 0 is a cell, and the values vary from pixel to pixel as those of a compressed mask do."""
    frame_share: float = 0.0
    """Share of the outermost pixels that are marked as cell."""
    holes: int = 0
    """Fields of background that do not touch the frame."""
    islands: int = 0
    """Fields of cell that do not touch the frame."""
    mode_in_cell: float = 0.0
    """Share of the pixels of the most frequent brightness that are marked as cell."""
    seen_share: float = 0.0
    """Share of the pixels on the rarer side of Otsu's threshold."""
    seen_contrast: float = 0.0
    """Between-class variance of Otsu's threshold as a share of all variance, 0..1."""
    agreement: float = 0.0
    """Correlation of Otsu's threshold with the mask, -1..1."""
    placement: PlacementFeatures | None = None
    exif_turn: int = 1
    """EXIF orientation of the image file, 1 (upright) to 8."""
    missed_border: tuple[int, ...] = ()
    """Areas in px of unmarked fields at the frame that stand out like cells."""
    missed_boxes_px: tuple[Box, ...] = ()
    """Where they lie."""


def measure_sample(dataset: Dataset, sample: Sample, split: str, with_keypoints: bool = True) -> SampleFacts:
    """Measures one sample; an unreadable file gives ``error`` and raises nothing."""
    known: dict[str, Any] = {"name": sample.name, "split": split, "group": sample.group}
    labels = None
    try:
        image = images.read_image(sample.image, dataset.reading)
        if sample.truth is not None or dataset.colors:
            classes, ids = dataset.read_truth(sample)
        else:
            labels = images.read_labels(sample.mask)
            classes, ids = within_regions(dataset.meaning(labels), sample.regions), dataset.ids_of(labels)
        known["image_hash"] = compute_sha256(sample.image)
        known["mask_hash"] = compute_sha256(sample.mask) if sample.truth is None else sample.truth.digest()
    except (CellbenchError, OSError) as error:
        return SampleFacts(**known, error=one_line(error))
    grey = to_grey(image)
    known |= {
        "size_px": image.shape[:2],
        "mask_px": classes.shape,
        "stain": _mean_colour(image),
        "small": mean_pool(grey),
        "keypoints": keypoints(grey) if with_keypoints else NO_KEYPOINTS,
        "exif_turn": images.exif_turn(sample.image),
    }
    if image.shape[:2] != classes.shape:
        return SampleFacts(**known)
    areas = reference_instances(classes, ids, 1, owners=dataset.owners)[0].areas_px[1:]
    limit = dataset.min_cell_px or MIN_AREA_PX
    judged = classes != IGNORE
    pixels = np.bincount(classes[judged], minlength=len(dataset.classes))
    return SampleFacts(
        **known,
        shares=tuple(float(n) / pixels.sum() for n in pixels) if pixels.any() else (1.0, *[0.0] * (len(dataset.classes) - 1)),
        min_cell_px=limit,
        areas_px=tuple(areas[areas >= limit].tolist()),
        num_specks=int((areas < limit).sum()),
        **(_value_facts(labels, classes, dataset) if labels is not None else {}),
        **_contrast_facts(image, (classes > 0) & judged, judged),
    )


def _mean_colour(pixels: np.ndarray) -> Colour:
    """Mean over (..., 3) uint8; nan without pixels."""
    if not pixels.size:
        return (float("nan"),) * 3
    rows = pixels.reshape(len(pixels), -1).sum(0, dtype=np.int64)  # row by row: numpy's mean over pixels takes eight times longer
    red, green, blue = (rows.reshape(-1, 3).sum(0) / (pixels.size // 3)).tolist()
    return red, green, blue


def _value_facts(labels: np.ndarray, classes: np.ndarray, dataset: Dataset) -> dict[str, Any]:
    if not dataset.values:
        inside = (labels[:, 1:] > 0) & (labels[:, :-1] > 0)
        equal = (labels[:, 1:] == labels[:, :-1])[inside].mean() if inside.any() else 1.0
        # Rims of smoothed masks are a few per cent; a JPEG's noise around 0 is everywhere.
        return {"noisy": not dataset.thresholds and bool(equal < 0.7)}
    off = off_values(labels, classes, dataset.values, dataset.tolerance)
    # A mask of 0 and 1 read as 0 and 255: all within tolerance, and without a cell.
    lost = not dataset.thresholds and not classes.any() and len(np.unique(labels[::3, ::3])) == 2
    return {
        "off_share": float(off.mean()),
        "off_solid": bool(off.any() and ndimage.binary_erosion(off, np.ones((3, 3), bool)).any()),
        "off_example": int(labels[off][0]) if off.any() else 0,
        "lost_share": float((labels != dataset.values[0]).mean()) if lost else 0.0,
    }


class Foreground(NamedTuple):
    """The two sides of Otsu's threshold."""

    levels: np.ndarray
    """(H, W) uint8: the channel that varies most, smoothed."""
    mode: int
    """Its most frequent level, that of the background."""
    mask: np.ndarray
    """(H, W) bool: the side of the threshold on which the mode is not."""
    contrast: float
    """Between-class share of the variance, 0..1."""


def find_foreground(small: np.ndarray) -> Foreground:
    """What stands out from the background of an image (H, W, 3) float32 RGB, on a bright or a dark one."""
    channel = int(cv2.meanStdDev(small)[1].argmax())
    levels = ndimage.uniform_filter(small[..., channel], 3).astype(np.uint8)
    counts = np.bincount(levels.ravel(), minlength=256)
    mode = int(np.convolve(counts, np.ones(9), "same").argmax())
    threshold, contrast = _otsu(counts)
    return Foreground(levels, mode, (levels > threshold) if mode <= threshold else (levels <= threshold), contrast)


def _contrast_facts(image: np.ndarray, cell: np.ndarray, judged: np.ndarray) -> dict[str, Any]:
    step = -(-max(cell.shape) // LOOK_PX)
    small, cell, judged = image[::step, ::step].astype(np.float32), cell[::step, ::step], judged[::step, ::step]
    frame = np.ones(cell.shape, bool)
    frame[1:-1, 1:-1] = False
    levels, mode, seen, contrast = find_foreground(small)
    telling = judged.any() and 0 < seen[judged].mean() < 1 and 0 < cell[judged].mean() < 1
    parts, num = ndimage.label(_holes_filled(seen))
    missed, boxes = [], []
    if num and cell.any():
        area = np.bincount(parts.ravel())
        marked = np.bincount(parts.ravel(), cell.ravel().astype(float))
        near = cv2.dilate((cell | ~judged).view(np.uint8), _CROSS, iterations=2)
        touching = np.bincount(parts.ravel(), near.ravel().astype(float)) > 0
        places = ndimage.find_objects(parts)
        for part in np.setdiff1d(np.unique(parts[frame]), [0]):
            if marked[part] < 0.05 * area[part] and not touching[part]:
                missed.append(int(area[part]) * step * step)
                y, x = places[part - 1]
                boxes.append((x.start * step, y.start * step, (x.stop - x.start) * step, (y.stop - y.start) * step))
    return {
        "frame_share": float(cell[frame].mean()),
        "holes": _num_islands(~cell, frame),
        "islands": _num_islands(cell, frame),
        "mode_in_cell": float(cell[np.abs(levels.astype(int) - mode) <= 4].mean()),
        "seen_share": float(seen.mean()),
        "seen_contrast": contrast,
        "placement": describe(small, cell, seen),
        "agreement": float(np.corrcoef(seen[judged], cell[judged])[0, 1]) if telling else 0.0,
        "missed_border": tuple(missed),
        "missed_boxes_px": tuple(boxes),
    }


def _holes_filled(mask: np.ndarray) -> np.ndarray:
    """``ndimage.binary_fill_holes`` in a tenth of its time."""
    outside = np.pad(mask.view(np.uint8), 1)
    cv2.floodFill(outside, None, (0, 0), 2)
    filled: np.ndarray = outside[1:-1, 1:-1] != 2
    return filled


def _num_islands(mask: np.ndarray, frame: np.ndarray) -> int:
    num, parts, facts, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    at_frame = np.zeros(num, bool)
    at_frame[parts[frame]] = True
    return int(((facts[:, cv2.CC_STAT_AREA] >= 20) & ~at_frame)[1:].sum())


def _otsu(counts: np.ndarray) -> tuple[int, float]:
    """Otsu's threshold (values up to it are one side) and the between-class share of the variance."""
    values, total = np.arange(256), counts.sum()
    below = np.cumsum(counts)
    above = total - below
    sums = np.cumsum(counts * values)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num(below * above * (sums / below - (sums[-1] - sums) / above) ** 2 / total**2)
    best = int(between.argmax())
    variance = (counts * (values - sums[-1] / total) ** 2).sum() / total
    return best, float(between[best] / variance) if variance > 0 else 0.0
