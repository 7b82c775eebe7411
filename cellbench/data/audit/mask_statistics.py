"""What an audit wants to know of one image and its truth, measured in one reading; what it means for the set is `audit`'s matter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from cellbench.data.audit.keypoint_matching import NO_KEYPOINTS, Keypoints, keypoints
from cellbench.data.audit.mask_placement import PlacementFeatures, describe
from cellbench.data.audit.perceptual_hash import mean_pool, to_grey
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io import images
from cellbench.errors import CellbenchError, one_line
from cellbench.files import compute_sha256
from cellbench.metrics.instances import MIN_AREA_PX, connected_instances, merge_part_ids, merge_parts_into_objects, numbered_instances
from cellbench.metrics.pixel import IGNORE

LOOK_PX = 600
"""The longer side at which polarity and missed cells are looked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleFacts:
    """Of one sample. Where ``error`` is not empty the rest is as it is by default."""

    name: str
    split: str
    group: str = ""
    error: str = ""
    size_px: tuple[int, int] = (0, 0)
    mask_px: tuple[int, int] = (0, 0)
    image_hash: str = ""
    mask_hash: str = ""
    small: np.ndarray = field(default_factory=lambda: np.zeros((64, 64), np.float32))
    """Grey, 64 x 64."""
    marks: Keypoints = NO_KEYPOINTS
    """What parts of the image are known again by."""
    stain: tuple[float, float, float] = (0, 0, 0)
    """Mean red, green and blue, 0..255."""
    shares: tuple[float, ...] = ()
    """Of the pixels, by class."""
    areas_px: tuple[int, ...] = ()
    """Of the cells."""
    num_specks: int = 0
    min_cell_px: int = MIN_AREA_PX
    """Regions below are specks."""
    is_numbered: bool = False
    off_share: float = 0.0
    """Pixels whose mask value is further from its class's than the card allows."""
    off_solid: bool = False
    """Whether some of these form a field of 3 x 3 or more, so that they are no rim between two classes."""
    off_example: int = 0
    lost_share: float = 0.0
    """Pixels that hold a number other than the background's and are background all the same."""
    noisy: bool = False
    """Any number but 0 is a cell here, and the numbers vary from pixel to pixel as a compressed mask's do."""
    frame_share: float = 0.0
    """Of the image's outermost pixels, those marked as cell."""
    holes: int = 0
    """Separate fields of background that do not touch the frame."""
    islands: int = 0
    """Separate fields of cell that do not touch the frame."""
    mode_in_cell: float = 0.0
    """Share of the pixels of the image's commonest brightness that are marked as cell."""
    seen_share: float = 0.0
    """What Otsu's threshold sets apart from the commoner side, as a share of the pixels."""
    seen_contrast: float = 0.0
    """How well it does: variance between both sides as a share of all, 0..1."""
    agreement: float = 0.0
    """Correlation of what the threshold sets apart and what is marked, -1..1."""
    maps: PlacementFeatures | None = None
    """By which it is told whether the mask lies on what the image shows."""
    exif_turn: int = 1
    """The orientation that the image file asks for, 1 (upright) to 8."""
    missed_border: tuple[int, ...] = ()
    """Areas, in px, of fields at the frame that stand out like cells and are not marked."""


def measure_sample(dataset: Dataset, sample: Sample, split: str, tolerance: int, with_marks: bool = True) -> SampleFacts:
    """Reads and measures one sample; what is wrong with its files is in ``error``, never raised. ``with_marks``: also what its parts are known by."""
    known = {"name": sample.name, "split": split, "group": sample.group}
    try:
        image = images.read_image(sample.image, dataset.reading)
        labels = images.read_labels(sample.mask) if sample.truth is None and not dataset.colors else None
        classes, ids = _truth(dataset, sample, labels)
        hashes = {
            "image_hash": compute_sha256(sample.image),
            "mask_hash": compute_sha256(sample.mask) if sample.truth is None else sample.truth.digest(),
        }
    except (CellbenchError, OSError) as error:
        return SampleFacts(**known, error=one_line(error))
    sizes = {"size_px": image.shape[:2], "mask_px": classes.shape}
    known |= {**hashes, **sizes, "stain": _mean_colour(image)}
    plain = to_grey(image)
    known |= {
        "small": mean_pool(plain),
        "marks": keypoints(plain) if with_marks else NO_KEYPOINTS,
        "exif_turn": images.exif_turn(sample.image),
    }
    if image.shape[:2] != classes.shape:
        return SampleFacts(**known)
    objects = merge_parts_into_objects(classes, dataset.owners)
    cells = connected_instances(objects, 1) if ids is None else numbered_instances(merge_part_ids(ids, classes, dataset.owners), objects)
    areas = cells.areas_px[1:]
    limit = dataset.min_cell_px or MIN_AREA_PX
    specks = areas < limit
    judged = classes != IGNORE
    pixels = np.bincount(classes[judged], minlength=len(dataset.classes))
    return SampleFacts(
        **known,
        shares=tuple(float(n) / pixels.sum() for n in pixels) if pixels.any() else (1.0, *[0.0] * (len(dataset.classes) - 1)),
        min_cell_px=limit,
        areas_px=tuple(int(area) for area in areas[~specks]),
        num_specks=int(specks.sum()),
        is_numbered=ids is not None,
        **(_values(labels, classes, dataset, tolerance) if labels is not None else {}),
        **_look(image, (classes > 0) & judged, judged),
    )


def _mean_colour(image: np.ndarray) -> tuple[float, float, float]:
    rows = image.reshape(len(image), -1).sum(0, dtype=np.int64)  # row by row: numpy's mean over pixels takes eight times as long
    red, green, blue = rows.reshape(-1, 3).sum(0) / (image.size // 3)
    return float(red), float(green), float(blue)


def _truth(dataset: Dataset, sample: Sample, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    if sample.truth is not None:
        return sample.truth.read()
    if labels is None:
        return dataset.read_mask(sample), None
    return dataset.meaning(labels), dataset.ids_of(labels)


def _values(labels: np.ndarray, classes: np.ndarray, dataset: Dataset, tolerance: int) -> dict[str, object]:
    lost = (classes == 0) & (labels != (dataset.values[0] if dataset.values else 0)) if not dataset.thresholds else np.zeros(1, bool)
    if not dataset.values:
        inside = labels[:, 1:][(labels[:, 1:] > 0) & (labels[:, :-1] > 0)]
        alike = (labels[:, 1:] == labels[:, :-1])[(labels[:, 1:] > 0) & (labels[:, :-1] > 0)].mean() if inside.size else 1.0
        # Rims of smoothed masks are a few per cent; a JPEG's noise around 0 is everywhere.
        return {"noisy": not dataset.thresholds and bool(alike < 0.7)}
    known = np.array([*dataset.values, *[0] * (256 - len(dataset.values))], np.int32)
    off = (np.abs(labels.astype(np.int32) - known[classes]) > tolerance) & (classes != IGNORE)
    share = float(off.mean())
    solid = bool(share) and bool(ndimage.binary_erosion(off, np.ones((3, 3), bool)).any())
    # A mask of 0 and 1 read as 0 and 255: all within tolerance, and not a cell in it.
    return {
        "off_share": share,
        "off_solid": solid,
        "off_example": int(labels[off][0]) if share else 0,
        "lost_share": float(lost.mean()) if not classes.any() and len(np.unique(labels[::3, ::3])) == 2 else 0.0,
    }


def _look(image: np.ndarray, cell: np.ndarray, judged: np.ndarray) -> dict[str, object]:
    step = -(-max(cell.shape) // LOOK_PX)
    small, cell, judged = image[::step, ::step].astype(np.float32), cell[::step, ::step], judged[::step, ::step]
    frame = np.ones(cell.shape, bool)
    frame[1:-1, 1:-1] = False
    found: dict[str, object] = {
        "frame_share": float(cell[frame].mean()),
        "holes": _islands(~cell, frame),
        "islands": _islands(cell, frame),
    }
    channel = int(small.reshape(-1, 3).std(0).argmax())
    levels = ndimage.uniform_filter(small[..., channel], 3).astype(np.uint8)
    counts = np.bincount(levels.ravel(), minlength=256)
    wide = np.convolve(counts, np.ones(9), "same")
    mode = int(wide.argmax())
    found["mode_in_cell"] = float(cell[np.abs(levels.astype(int) - mode) <= 4].mean())
    threshold, found["seen_contrast"] = _otsu(counts)
    seen = (levels > threshold) if mode <= threshold else (levels <= threshold)
    found["seen_share"] = float(seen.mean())
    found["maps"] = describe(small, cell, seen)
    if judged.any() and 0 < seen[judged].mean() < 1 and 0 < cell[judged].mean() < 1:
        found["agreement"] = float(np.corrcoef(seen[judged], cell[judged])[0, 1])
    parts, num = ndimage.label(ndimage.binary_fill_holes(seen))
    missed = []
    if num and cell.any():
        area = np.bincount(parts.ravel())
        marked = np.bincount(parts.ravel(), cell.ravel().astype(float))
        near = ndimage.binary_dilation(cell | ~judged, iterations=2)
        touching = np.bincount(parts.ravel(), near.ravel().astype(float)) > 0
        for part in np.setdiff1d(np.unique(parts[frame]), [0]):
            if marked[part] < 0.05 * area[part] and not touching[part]:
                missed.append(int(area[part]) * step * step)
    found["missed_border"] = tuple(missed)
    return found


def _islands(mask: np.ndarray, frame: np.ndarray) -> int:
    parts, num = ndimage.label(mask)
    area = np.bincount(parts.ravel(), minlength=num + 1)
    at_frame = np.zeros(num + 1, bool)
    at_frame[parts[frame]] = True
    return int(((area >= 20) & ~at_frame)[1:].sum())


def _otsu(counts: np.ndarray) -> tuple[int, float]:
    """The threshold (values up to it are one side) and the share of variance between both sides."""
    values, total = np.arange(256), counts.sum()
    below = np.cumsum(counts)
    above = total - below
    sums = np.cumsum(counts * values)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2 / total**2
    between = np.nan_to_num(between)
    best = int(between.argmax())
    variance = (counts * (values - sums[-1] / total) ** 2).sum() / total
    return best, float(between[best] / variance) if variance > 0 else 0.0
