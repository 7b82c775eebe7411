"""Which masks are likely wrong? Compares the cells of a mask with what several models, none of which was trained on the image, find there.

Every model votes for each pixel with its probability of a cell; their mean is the consensus. Five kinds of faults, each with a score from 0 to 1:

- ``missing``: a place where the models find a cell and the mask has none. Score: the mean consensus there.
- ``border``: the same at the image's border. Many sets leave such cells out on purpose, so they come last.
- ``false``: a cell of the mask that the models do not find. Score: 1 minus the mean consensus in it.
- ``outline``: a cell that is there, but not where the mask has it. Score: how well the models agree with each other minus how well they agree with the
  mask (both as intersection over union, for the part of the consensus that lies nearest to the cell: models need not separate touching cells), less
  what this is for the usual cell of the set, since weak models agree with no mask.
- ``class``: a cell that the models give another class. Score: the share of its pixels and models with that class minus the share with its own.

A mask whose faults were learned by the models is not found: this needs most masks to be right. Letters: M models, H x W pixels, T cells of the mask.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
from scipy import ndimage

from cellbench.console import Column, format_table, number_columns
from cellbench.data.audit.checks import Finding, Severity
from cellbench.data.audit.image_statistics import Box
from cellbench.data.dataset import Sample
from cellbench.escaping import to_csv
from cellbench.metrics.instances import Instances

MISSING, FALSE, OUTLINE, CLASS, BORDER = KINDS = ("missing", "false", "outline", "class", "border")
LEAST = {MISSING: 0.6, FALSE: 0.6, OUTLINE: 0.3, CLASS: 0.5, BORDER: 0.6}
"""The least score that is reported."""
TOO_MANY = 0.2
"""Of the cells: with more faults the models are doubted instead."""
THIN = 0.3
"""Of the radius of a usual cell: narrower strips beside the mask's cells are differences of outlines, not cells."""
SMALL = 0.25
"""Of the area of a usual cell: smaller places without a mark are no missing cells."""
BESIDE_PX = 3
"""What is not farther from a cell of the mask borders on it."""
PARTLY = (0.1, 0.75)
"""A cell of the mask of which the models find a share between these is shifted: what they find beside it is the rest of it, not another cell."""
ENCLOSED = 0.5
"""Likewise a cell of which more than this share of the outline borders on what the models find: it is drawn too small."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelFault:
    """A cell that is likely wrong in a mask."""

    image: str
    kind: str
    score: float
    x_px: float
    y_px: float
    """The centre of the cell."""
    area_px: int
    num_models: int
    """Models that contradict the mask."""
    classes: tuple[int, int] = (0, 0)
    """For ``class``: the mask's class and that of the models."""
    box: Box
    """Around the cell."""
    window: Box
    """The part of the image that a picture shows."""
    consensus: np.ndarray
    """(h, w) bool: what the models find in the window."""


def usual_area(areas_px: Sequence[float], fallback: float = 0.0) -> float:
    """The area of a usual cell; ``fallback`` where fewer than three are known."""
    return float(np.median(areas_px)) if len(areas_px) >= 3 else fallback


def find_label_faults(
    image: str, truth: Instances, marked: np.ndarray, votes: Sequence[np.ndarray], found_classes: Sequence[np.ndarray], usual_px: float
) -> tuple[list[LabelFault], np.ndarray]:
    """The likely faults of one mask, and for each of its cells that the models find the score of its outline; :func:`rank_faults` takes both.

    Args:
        image: its name.
        truth: the cells of the mask.
        marked: (H, W) bool: pixels of the mask that are not background, those of its smallest regions included.
        votes: for each model (H, W) uint8: the probability of a cell, 0..255.
        found_classes: for each model (H, W) uint8: the class of each pixel, parts merged into their objects.
        usual_px: the area of a usual cell.

    """
    consensus: np.ndarray = np.stack(votes).mean(0, dtype=np.float32) / np.float32(255)
    sure: np.ndarray = consensus > 0.5
    ignored = np.zeros_like(sure) if truth.ignored is None else truth.ignored
    radius = max(math.sqrt(max(usual_px, 1.0) / math.pi), 2.0)
    cells = _Cells(truth, consensus)
    free = _missing(sure & ~marked & ~ignored, radius, usual_px)
    free = _without_rests(free, cells, sure)
    drafts = [*_missing_drafts(free, consensus, votes), *_false_drafts(cells, votes), *_class_drafts(cells, found_classes)]
    named = {draft.cell for draft in drafts if draft.cell}
    outlines = [one for one in _outline_drafts(cells, sure, votes, free > 0, ignored, 2 * radius) if one.cell not in named]
    out = []
    for draft in (*drafts, *outlines):
        if draft.score >= LEAST[draft.kind]:
            window = _window(draft.box, sure.shape, radius)
            x, y, width, height = window
            out.append(
                LabelFault(
                    image=image,
                    kind=draft.kind,
                    score=round(draft.score, 4),
                    x_px=round(draft.x, 1),
                    y_px=round(draft.y, 1),
                    area_px=draft.area_px,
                    num_models=draft.num_models,
                    classes=draft.classes,
                    box=(draft.box[1].start, draft.box[0].start, *(draft.box[k].stop - draft.box[k].start for k in (1, 0))),
                    window=window,
                    consensus=sure[y : y + height, x : x + width].copy(),
                )
            )
    return out, np.array([one.score for one in outlines])


def rank_faults(faults: Sequence[tuple[Sample, LabelFault]], outlines: np.ndarray) -> list[tuple[Sample, LabelFault]]:
    """The faults of all masks, the highest score first, and those at the border last. ``outlines``: the score of the outline of each cell of the set."""
    usual = max(float(np.median(outlines)), 0.0) if len(outlines) else 0.0
    rated = [(sample, replace(fault, score=round(fault.score - usual, 4)) if fault.kind == OUTLINE else fault) for sample, fault in faults]
    return sorted([one for one in rated if one[1].score >= LEAST[one[1].kind]], key=lambda one: (one[1].kind == BORDER, -one[1].score))


@dataclass(frozen=True, kw_only=True)
class _Draft:
    kind: str
    score: float
    box: tuple[slice, slice]
    x: float
    y: float
    area_px: int
    num_models: int
    cell: int = 0
    """Number of the mask's cell; 0: none."""
    classes: tuple[int, int] = (0, 0)


class _Cells:
    """The cells of the mask with means of maps over each, (T + 1,); the nearest of them for each pixel, and how far away it is."""

    def __init__(self, truth: Instances, consensus: np.ndarray) -> None:
        self.truth = truth
        self.consensus_T = self.mean(consensus)
        self.away, (rows, columns) = ndimage.distance_transform_edt(truth.ids == 0, return_indices=True)
        self.nearest = truth.ids[rows, columns]
        self.boxes = ndimage.find_objects(truth.ids)
        self.centres = ndimage.center_of_mass(truth.ids > 0, truth.ids, np.arange(1, truth.num + 1)) if truth.num else []

    def mean(self, values: np.ndarray) -> np.ndarray:
        sums = np.bincount(self.truth.ids.ravel(), values.ravel(), self.truth.num + 1)
        out: np.ndarray = sums / np.maximum(self.truth.areas_px, 1)
        return out

    def draft(self, cell: int, kind: str, score: float, num_models: int, classes: tuple[int, int] = (0, 0)) -> _Draft:
        y, x = self.centres[cell - 1]
        area = int(self.truth.areas_px[cell])
        box = self.boxes[cell - 1]
        return _Draft(
            kind=kind, score=float(score), box=box, x=float(x), y=float(y), area_px=area, num_models=num_models, cell=cell, classes=classes
        )


# --- cells that the mask lacks ------------------------------------------------------------------------------------------------------------


def _missing(free: np.ndarray, radius: float, usual_px: float) -> np.ndarray:
    """Numbers (H, W) of the places as large as cells in what the models find and the mask lacks: opened, so that thin strips are left out."""
    reach = max(1.0, THIN * radius)
    core = cv2.distanceTransform(free.view(np.uint8), cv2.DIST_L2, 5) > reach
    if not core.any():
        return np.zeros(free.shape, np.int32)
    opened = free & (cv2.distanceTransform((~core).view(np.uint8), cv2.DIST_L2, 5) <= reach)
    places: np.ndarray = ndimage.label(opened)[0]
    areas = np.bincount(places.ravel())
    places[areas[places] < SMALL * usual_px] = 0
    return places


def _without_rests(places: np.ndarray, cells: _Cells, sure: np.ndarray) -> np.ndarray:
    """The places without those that are the rest of a cell of the mask, which is shifted or too small."""
    if not places.any() or not cells.truth.num:
        return places
    low, high = PARTLY
    covered_T = cells.mean(sure)
    ring = np.where((cells.away > 0) & (cells.away <= BESIDE_PX), cells.nearest, 0)
    borders_T = np.bincount(ring[places > 0], minlength=len(covered_T)) / np.maximum(np.bincount(ring.ravel(), minlength=len(covered_T)), 1)
    wrong_T = ((covered_T > low) & (covered_T < high)) | (borders_T > ENCLOSED)
    wrong_T[0] = False
    out: np.ndarray = np.where(np.isin(places, places[wrong_T[ring]]), 0, places)
    return out


def _missing_drafts(places: np.ndarray, consensus: np.ndarray, votes: Sequence[np.ndarray]) -> list[_Draft]:
    out = []
    for number, box in enumerate(ndimage.find_objects(places), 1):
        if box is None:
            continue
        here = places[box] == number
        y, x = (float(one.mean()) for one in np.nonzero(here))
        num = sum(bool(vote[box][here].mean() > 127) for vote in votes)
        score, area_px = float(consensus[box][here].mean()), int(here.sum())
        x, y = x + box[1].start, y + box[0].start
        at_border = any(side.start == 0 or side.stop == length for side, length in zip(box, places.shape, strict=True))
        out.append(_Draft(kind=BORDER if at_border else MISSING, score=score, box=box, x=x, y=y, area_px=area_px, num_models=num))
    return out


# --- cells of the mask --------------------------------------------------------------------------------------------------------------------


def _false_drafts(cells: _Cells, votes: Sequence[np.ndarray]) -> list[_Draft]:
    against_T = np.sum([cells.mean(vote) <= 127 for vote in votes], axis=0)
    score_T = 1 - cells.consensus_T
    return [cells.draft(k, FALSE, score_T[k], int(against_T[k])) for k in range(1, len(score_T)) if score_T[k] >= LEAST[FALSE]]


def _class_drafts(cells: _Cells, found_classes: Sequence[np.ndarray]) -> list[_Draft]:
    truth = cells.truth
    labels = [k for k in np.unique(truth.classes[1:]).tolist() if k]
    if len(labels) < 2:
        return []
    shares_KMT = np.array([[cells.mean(found == label) for found in found_classes] for label in labels])
    out = []
    for k in range(1, truth.num + 1):
        shares_K, own = shares_KMT[:, :, k].mean(1), labels.index(int(truth.classes[k]))
        other = int(shares_K.argmax())
        if other != own and (score := shares_K[other] - shares_K[own]) >= LEAST[CLASS]:
            num = int((shares_KMT[:, :, k].argmax(0) == other).sum())
            out.append(cells.draft(k, CLASS, score, num, (labels[own], labels[other])))
    return out


def _outline_drafts(
    cells: _Cells, sure: np.ndarray, votes: Sequence[np.ndarray], free: np.ndarray, ignored: np.ndarray, reach_px: float
) -> list[_Draft]:
    """Cells whose part of the consensus has another outline. ``free``: where cells are missing, which are nobody's part."""
    truth = cells.truth
    if not truth.num:
        return []
    part = np.where((cells.away <= reach_px) & ~free & ~ignored, cells.nearest, 0).ravel()

    def area(pixels: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.bincount(part[pixels.ravel()], minlength=truth.num + 1)
        return out

    def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = area(a & b)
        out: np.ndarray = both / np.maximum(area(a) + area(b) - both, 1)
        return out

    own = truth.ids > 0
    with_mask_T = overlap(sure, own)
    each_MT = np.array([[overlap(found, sure), overlap(found, own)] for found in (vote > 127 for vote in votes)])
    score_T = each_MT[:, 0].mean(0) - with_mask_T
    against_T = (each_MT[:, 0] > each_MT[:, 1]).sum(0)
    return [cells.draft(k, OUTLINE, score_T[k], int(against_T[k])) for k in range(1, truth.num + 1)]


def _window(box: tuple[slice, slice], shape: tuple[int, ...], radius: float) -> Box:
    """A square around a place, three times as wide, inside the image where it fits."""
    side = round(max(box[0].stop - box[0].start, box[1].stop - box[1].start, 2 * radius) * 3)
    height, width = min(side, shape[0]), min(side, shape[1])
    y = int(np.clip((box[0].start + box[0].stop - height) // 2, 0, shape[0] - height))
    x = int(np.clip((box[1].start + box[1].stop - width) // 2, 0, shape[1] - width))
    return x, y, width, height


# --- the faults of a whole set ------------------------------------------------------------------------------------------------------------

SHOWN = 10
"""Faults in the terminal."""
WORDS = {
    MISSING: "cell without a mark",
    FALSE: "mark without a cell",
    OUTLINE: "other outline",
    CLASS: "other class",
    BORDER: "cell without a mark at the border",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelFaults:
    """The likely faults of the masks of a set, as :func:`rank_faults` orders them."""

    found: Sequence[tuple[Sample, LabelFault]]
    classes: Sequence[str]
    experiment: str
    models: Sequence[str]
    """That were asked."""
    num_judged: int
    num_images: int
    num_cells: int
    """Of the masks that were compared."""

    @cached_property
    def finding(self) -> Finding:
        kinds = Counter(fault.kind for _, fault in self.found)
        num = ", ".join(f"{WORDS[kind]} {kinds[kind]}" for kind in KINDS if kinds[kind])
        images = tuple(dict.fromkeys(fault.image for _, fault in self.found))
        who = (
            "models that were not trained on these images agree with each other and not with the mask"
            if len(self.models) > 1
            else "a model that was not trained on these images does not agree with the mask (several models would be surer)"
        )
        message = (
            f"{len(self.found)} cells are likely wrong in the masks of {len(images)} of {self.num_judged} images ({num}): {who}. In pictures the mask "
            "is yellow, what models find is cyan."
        )
        if len(self.found) > TOO_MANY * self.num_cells:
            message += f" So many of {self.num_cells} cells say more about the models: compare with better ones, and look at the first faults only."
        return Finding(kind="labels", severity=Severity.LOOK, message=message, images=images)

    def first_of_each_kind(self, num: int) -> list[tuple[Sample, LabelFault]]:
        return [one for kind in KINDS for one in [one for one in self.found if one[1].kind == kind][:num]]

    def lines(self) -> list[str]:
        """The first faults as a table, and what was asked."""
        num = len(self.models)
        columns = [Column("image", cut=True), Column("likely fault"), *number_columns("x", "y", "score", "models")]
        rows = [
            (
                one.image,
                describe_fault(one, self.classes),
                f"{one.x_px:.0f}",
                f"{one.y_px:.0f}",
                f"{one.score:.2f}",
                f"{one.num_models} of {num}",
            )
            for _, one in self.found[:SHOWN]
        ]
        unseen = "; the models were trained or validated on the others" if self.num_judged < self.num_images else ""
        said = (
            f"labels: {self.num_judged} of {self.num_images} images compared with {', '.join(self.models)} of '{self.experiment}'{unseen}."
        )
        more = len(self.found) - len(rows)
        table = ["", *format_table(columns, rows), *([f"… {more} more"] if more else [])] if rows else ["No mask is likely wrong."]
        return ["", said, *table, ""]

    def csv(self) -> str:
        """A row a fault."""
        rows: list[list[object]] = []
        for sample, fault in self.found:
            classes = [self.classes[k] if fault.kind == CLASS else "" for k in fault.classes]
            place = [fault.x_px, fault.y_px, fault.area_px, fault.num_models, len(self.models)]
            rows.append([fault.image, str(sample.mask), fault.kind, fault.score, *place, *classes])
        return to_csv(
            ["image", "mask", "kind", "score", "x_px", "y_px", "area_px", "models", "models_asked", "class", "models_class"], rows
        )


def describe_fault(fault: LabelFault, classes: Sequence[str]) -> str:
    """The fault in words."""
    return f"{classes[fault.classes[1]]} instead of {classes[fault.classes[0]]}" if fault.kind == CLASS else WORDS[fault.kind]
