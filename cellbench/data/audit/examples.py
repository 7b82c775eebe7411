"""Pictures of what the checks found: the image with its mask outlined, the place marked. Only the files of the examples are opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage

from cellbench.data.audit.checks import Finding
from cellbench.data.audit.image_statistics import Box, SampleFacts
from cellbench.data.audit.label_faults import LabelFault, describe_fault
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io import images
from cellbench.data.io.overlay import CYAN, RED, YELLOW, class_colours, draw_boxes, draw_outlines
from cellbench.data.masks import off_values
from cellbench.errors import CellbenchError
from cellbench.metrics.instances import reference_instances
from cellbench.metrics.pixel import IGNORE

SIDE_PX = 480
"""Longer side of a picture."""
EXAMPLES, WIDE_EXAMPLES = 3, 4
"""Pictures of a finding: each of one image, or of two side by side."""
_GAP_PX = 8
_FIELD_PX = 300
"""Side of the part of a large image that is shown where the places are small."""

_MASK_BESIDE = {"mis-sized", "values", "lost", "noisy", "smoothed", "full", "empty", "no cell", "inverted", "meaning"}
"""Kinds of findings that show in the mask itself, which stands beside its image."""
_BAD_FIRST: Mapping[str, Callable[[SampleFacts], float]] = {
    "specks": lambda f: f.num_specks,
    "border": lambda f: sum(f.missed_border),
    "meaning": lambda f: f.off_share,
}


@dataclass(frozen=True, kw_only=True)
class Example:
    caption: str
    picture: np.ndarray
    """(h, w, 3) uint8."""

    @property
    def is_wide(self) -> bool:
        return self.picture.shape[1] > 1.7 * self.picture.shape[0]


def draw_examples(dataset: Dataset, sample_of: Mapping[SampleFacts, Sample], finding: Finding) -> list[Example]:
    """Some pictures of a finding, the worst first where that can be said; none of a finding about files that cannot be read."""
    order = _BAD_FIRST.get(finding.kind, lambda f: 0)
    cases = sorted(zip(finding.images, finding.facts, strict=False), key=lambda case: -order(case[1][0]))
    out = []
    most = WIDE_EXAMPLES if finding.kind in _MASK_BESIDE or any(len(facts) > 1 for facts in finding.facts) else EXAMPLES
    for name, facts in [case for case in cases if not any(f.error for f in case[1])][:most]:
        try:
            shown = [(f, sample_of[f]) for f in facts]
            if len(shown) > 1:
                out.append(Example(caption=name, picture=_side_by_side([_image(dataset, sample) for _, sample in shown])))
            else:
                out.append(_example(dataset, finding.kind, *shown[0]))
        except (CellbenchError, OSError):  # changed since it was read: the finding is reported without it
            continue
    return out


def draw_samples(dataset: Dataset, samples: Sequence[Sample]) -> list[Example]:
    """Some images of a dataset with their masks outlined: how the masks were understood."""
    some = [samples[k] for k in sorted({round(k) for k in np.linspace(0, len(samples) - 1, EXAMPLES)})]
    return [Example(caption=sample.name, picture=_outlined(dataset, _image(dataset, sample), _regions(dataset, sample))) for sample in some]


def draw_fault(dataset: Dataset, sample: Sample, fault: LabelFault, num_models: int) -> Example:
    """The place of a likely fault of a mask: the mask outlined in yellow, what most models find in cyan."""
    x, y, width, height = fault.window
    image, regions = (array[y : y + height, x : x + width] for array in (_image(dataset, sample), _regions(dataset, sample)))
    left, top, wide, high = fault.box
    picture = _outlined(dataset, image, regions, [(left - x, top - y, wide, high)])
    found = cv2.resize(fault.consensus.view(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    said = f"{describe_fault(fault, dataset.classes)}. Score {fault.score:.2f}, {fault.num_models} of {num_models} models"
    return Example(caption=f"{fault.image}: {said}", picture=draw_outlines(picture, found, CYAN, width_px=1))


def _example(dataset: Dataset, kind: str, facts: SampleFacts, sample: Sample) -> Example:
    if kind in _MASK_BESIDE:
        mask = _mask_picture(dataset, sample, mark_off=kind in ("values", "smoothed", "meaning"))
        sizes = f": image {_size(facts.size_px)}, mask {_size(facts.mask_px)}" if kind == "mis-sized" else ", and its mask"
        return Example(caption=f"{facts.name}{sizes}", picture=_side_by_side([_image(dataset, sample), mask]))
    image, regions = _image(dataset, sample), _regions(dataset, sample)
    boxes, said = [], ""
    if kind == "border":
        boxes, said = list(facts.missed_boxes_px), f": {len(facts.missed_border)} at the border without a mark"
    elif kind == "specks":
        boxes = _speck_boxes(dataset, sample, facts.min_cell_px)
        said = f": {facts.num_specks} below {facts.min_cell_px} px"
        if max(image.shape[:2]) > 1.5 * _FIELD_PX:
            x, y, width, height = _fullest_field(boxes, image.shape)
            image, regions = (array[y : y + height, x : x + width] for array in (image, regions))
            boxes, said = [(left - x, top - y, wide, high) for left, top, wide, high in boxes], f"{said}; where most of them lie"
    return Example(caption=f"{facts.name}{said}", picture=_outlined(dataset, image, regions, boxes))


def _fullest_field(boxes: Sequence[Box], shape: tuple[int, ...]) -> Box:
    """The field of ``_FIELD_PX``, centred on one of the boxes, that holds most of them."""
    centres = np.array([(x + width / 2, y + height / 2) for x, y, width, height in boxes])
    near = (np.abs(centres[:, None] - centres[None]) < _FIELD_PX / 2).all(2).sum(1)
    width, height = min(_FIELD_PX, shape[1]), min(_FIELD_PX, shape[0])
    x, y = centres[near.argmax()] - (width / 2, height / 2)
    return int(np.clip(x, 0, shape[1] - width)), int(np.clip(y, 0, shape[0] - height)), width, height


def _image(dataset: Dataset, sample: Sample) -> np.ndarray:
    return images.brightened(images.read_image(sample.image, dataset.reading))[0]


def _regions(dataset: Dataset, sample: Sample) -> np.ndarray:
    """The mask's cells where it numbers them, so that touching ones stay apart, else its classes."""
    classes, ids = dataset.read_truth(sample)
    return np.where(classes == IGNORE, 0, classes if ids is None else ids)


def _outlined(dataset: Dataset, image: np.ndarray, regions: np.ndarray, boxes: Sequence[Box] = ()) -> np.ndarray:
    picture = _scaled(image)
    scale = picture.shape[1] / image.shape[1]
    small = cv2.resize(regions.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(np.int32)
    numbered = dataset.masks == "cells" or dataset.cut_px
    picture = draw_outlines(picture, small, YELLOW if numbered else class_colours(len(dataset.classes)), width_px=2)
    return draw_boxes(picture, [(x * scale, y * scale, width * scale, height * scale) for x, y, width, height in boxes])


def _mask_picture(dataset: Dataset, sample: Sample, *, mark_off: bool) -> np.ndarray:
    """The mask's values from black to white, whatever they are. ``mark_off``: those that the card does not name are red."""
    if sample.truth is not None or dataset.colors:
        labels, off = dataset.read_mask(sample), None
    else:
        labels = images.read_labels(sample.mask)
        off = off_values(labels, dataset.meaning(labels), dataset.values, dataset.tolerance) if mark_off and dataset.values else None
    low, high = float(labels.min()), float(labels.max())
    grey = (labels - low) / (high - low) * 255 if high > low else np.full(labels.shape, 255.0 * (high > 0))
    picture = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if off is not None:
        picture[off] = RED
    return picture


def _speck_boxes(dataset: Dataset, sample: Sample, limit_px: int) -> list[Box]:
    cells = reference_instances(*dataset.read_truth(sample), 1, owners=dataset.owners)[0]
    found = []
    for area_px, box in zip(cells.areas_px[1:], ndimage.find_objects(cells.ids), strict=True):
        if area_px < limit_px and box is not None:
            y, x = box
            found.append((x.start, y.start, x.stop - x.start, y.stop - y.start))
    return found


def _scaled(image: np.ndarray) -> np.ndarray:
    """An image whose longer side is ``SIDE_PX``, or four times its own."""
    scale = min(SIDE_PX / max(image.shape[:2]), 4.0)
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one height in a grey frame."""
    shown = [_scaled(picture) for picture in pictures]
    height = min(picture.shape[0] for picture in shown)
    same = [cv2.resize(p, (max(1, round(p.shape[1] * height / p.shape[0])), height), interpolation=cv2.INTER_AREA) for p in shown]
    framed = [np.pad(picture, ((2, 2), (2, 2), (0, 0)), constant_values=150) for picture in same]
    gap = np.full((height + 4, _GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for picture in framed for part in (gap, picture)][1:], axis=1)


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[1]} x {size_px[0]}"
