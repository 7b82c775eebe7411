"""Boundary scores and single-cell scores of one image, from class maps.

On BCCD, methods whose Dice differs by 0.02 differ by 0.3 in AP50: merging two cells that touch by a few pixels hardly changes Dice, but loses both cells.

Conventions:

- A contour is the mask's own pixels with a neighbour (of four) outside it. The image's frame is not a contour.
- ``nsd`` (normalised surface distance, surface Dice; Nikolov et al. 2021): the share of both contours' pixels that lie within the tolerance
  of the other contour, Euclidean between pixel centres. Contour pixels are counted; lengths are not weighted.
- ``boundary_dice``: Dice of the bands that each mask has within the tolerance of its outside (boundary IoU's; Cheng et al. 2021).
- A cell is a connected region of one class, unless the caller separates touching ones (``cellbench.metrics.separation``). Neighbours are the four
  beside a pixel, not the diagonal ones: masks often separate touching cells by a line one pixel wide. Regions below a minimum area are dropped
  on both sides. Where a mask numbers its cells, the numbers are used.
- Two cells match where their intersection is *more* than the threshold of their union and their class is the same. From 0.5 on, each
  cell has at most one match, so no assignment problem has to be solved. Integers are compared, without rounding.
- ``ap50``, ``ap50_95``: TP / (TP + FP + FN) at 0.5, and its mean over 0.50, 0.55 … 0.95 (Data Science Bowl 2018, StarDist, Cellpose).
  This is not COCO's average precision: there are no confidences to rank by.
- ``aji``: aggregated Jaccard index (Kumar et al. 2017) as published: one predicted cell may serve several true ones.
- ``pq``: panoptic quality (Kirillov et al. 2019), the product of ``dq`` (F1 at 0.5) and ``sq`` (mean IoU of the matched).
- Counts alone hide errors that cancel out (50 cells for 50 cells, a third of them wrong), so every cell has an outcome (:func:`cell_outcomes`).
- A class may be a *part* of another class's objects, as a nucleus is of a cell: ``owners`` has for each class the class whose object it
  belongs to. Cells are then found after each part has taken its owner's class (``merge_parts_into_objects``); outlines stay those of each class.

Pixels that the truth ignores (``cellbench.metrics.pixel.IGNORE``) are in no cell, outline or band: cells are cut there, and the rest of a
predicted cell counts if more than half of the cell lies outside, as panoptic quality treats void pixels. Next to them, as at the image's frame,
there is no outline; outlines within the tolerance of them are not scored.

A class in neither map has no score (NaN); a class in only one scores 0, as in ``cellbench.metrics.pixel``. Over several cell classes ``nsd`` and
``boundary_dice`` are means of the classes that have a score, while cells are counted together.

Letters: K classes, H x W image, T true cells, P predicted cells.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cellbench.metrics.boundary import TOLERANCE_PX, MaskBoundary, boundary_scores
from cellbench.metrics.instances import (
    Instances,
    connected_instances,
    count_values,
    drop_ignored,
    merge_parts_into_objects,
    reference_instances,
)
from cellbench.metrics.pixel import nan_mean

THRESHOLDS = tuple(range(10, 20))
"""Thresholds of the intersection over union, in twentieths: 0.50, 0.55 … 0.95."""
SCORES = ("nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq")
OUTCOMES = ("found", "missed", "split", "merged")
"""Of true cells."""
COUNTS = ("num_true", "num_predicted", "num_found", "num_missed", "num_split", "num_merged", "num_extra")
"""Counts of an image's cells, as :func:`cell_outcomes` defines them."""


@dataclass(frozen=True, kw_only=True)
class InstanceScores:
    """One prediction against one truth. All but the counts in 0..1, higher is better; NaN where there is nothing to score."""

    nsd: float
    boundary_dice: float
    ap50: float
    ap50_95: float
    aji: float
    pq: float
    dq: float
    sq: float
    num_true: int
    num_predicted: int
    num_found: int
    num_missed: int
    num_split: int
    num_merged: int
    num_extra: int
    numbered: bool
    """Whether the truth numbers its cells; else they are connected regions."""


class ReferenceMask:
    """The reference mask of one image (H, W), prepared once and compared with the predictions of many runs. Thread-safe."""

    def __init__(
        self,
        classes: np.ndarray,
        num_classes: int,
        ids: np.ndarray | None = None,
        *,
        owners: Sequence[int] = (),
        unused: Collection[int] = (),
        tolerance_px: float = TOLERANCE_PX,
        min_area_px: int | None = None,
    ) -> None:
        """Prepares a truth.

        Args:
            classes: (H, W) uint8, below ``num_classes``, 0 the background, or ``IGNORE``.
            ids: the mask's own cell numbers, if it has them.
            owners: as in :func:`merge_parts_into_objects`.
            unused: classes whose boundaries are not scored, as in :func:`cellbench.metrics.pixel.per_image_scores`.
            min_area_px: as for :func:`reference_instances`.

        """
        self._classes, self._tolerance, self._numbered, self._owners = classes, tolerance_px, ids is not None, tuple(owners)
        self.cells, self.min_area_px = reference_instances(classes, ids, min_area_px, owners=owners)
        ignored = self.cells.ignored
        self._outlines = {
            label: MaskBoundary(classes == label, tolerance_px, ignored) for label in range(1, num_classes) if label not in unused
        }

    def found(self, cells: Instances) -> dict[str, float | int]:
        """The scores of predicted cells, each of ``min_area_px`` or more, under the names of :class:`InstanceScores`."""
        return instance_scores(self.cells, cells)

    def agreement(self, classes: np.ndarray, pairs: CellPairs | None = None) -> InstanceScores:
        """How well a predicted class map (H, W) agrees; ``pairs``: of its single cells with ``cells``; by default of the connected regions of its objects."""
        if classes.shape != self._classes.shape:
            raise ValueError(f"truth is {self._classes.shape}, prediction {classes.shape}")
        ignored = self.cells.ignored
        outlines = [
            boundary_scores(truth, MaskBoundary(classes == label, self._tolerance, ignored)) for label, truth in self._outlines.items()
        ]
        nsd, band = (nan_mean(np.array(values)) for values in zip(*outlines, strict=True))
        pairs = pairs or CellPairs.of(self.cells, connected_instances(merge_parts_into_objects(classes, self._owners), self.min_area_px))
        return InstanceScores(nsd=nsd, boundary_dice=band, numbered=self._numbered, **scores_of_pairs(pairs))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, eq=False)
class CellPairs:
    """The pairs of a true and a predicted cell of an image that overlap: what all scores of single cells follow from."""

    truth: Instances
    found: Instances
    """As from :func:`drop_ignored`."""
    t: np.ndarray
    """The number of each pair's true cell."""
    p: np.ndarray
    """The number of its predicted cell."""
    shared: np.ndarray
    """Their intersection in px."""
    union: np.ndarray

    @classmethod
    def of(cls, truth: Instances, found: Instances) -> CellPairs:
        """All pairs, whatever the classes of the two cells."""
        if truth.ids.shape != found.ids.shape:
            raise ValueError(f"truth is {truth.ids.shape}, prediction {found.ids.shape}")
        found = drop_ignored(found, truth.ignored)
        most = (truth.num + 1) * (found.num + 1)
        codes = truth.ids.astype(np.int32 if most < 1 << 31 else np.int64, copy=False) * (found.num + 1) + found.ids
        pairs, shared = count_values(codes, most)
        t, p = pairs // (found.num + 1), pairs % (found.num + 1)
        cells = (t > 0) & (p > 0)
        t, p, shared = t[cells], p[cells], shared[cells]
        return cls(truth=truth, found=found, t=t, p=p, shared=shared, union=truth.areas_px[t] + found.areas_px[p] - shared)

    @cached_property
    def of_one_class(self) -> CellPairs:
        """The pairs of cells of the same class."""
        same = self.truth.classes[self.t] == self.found.classes[self.p]
        return replace(self, t=self.t[same], p=self.p[same], shared=self.shared[same], union=self.union[same])

    def matching(self, threshold: int = 10) -> np.ndarray:
        """Which pairs have an intersection of more than ``threshold`` twentieths of their union, (pairs,) bool."""
        return 20 * self.shared > threshold * self.union


def instance_scores(truth: Instances, found: Instances) -> dict[str, float | int]:
    """The scores of single cells, under the names of :class:`InstanceScores`. NaN if there is no cell and none was predicted."""
    return scores_of_pairs(CellPairs.of(truth, found))


def scores_of_pairs(pairs: CellPairs) -> dict[str, float | int]:
    """The same from their pairs."""
    pairs = pairs.of_one_class
    truth, found, shared, union = pairs.truth, pairs.found, pairs.shared, pairs.union
    both = truth.num + found.num

    def precision(num_hits: int) -> float:
        return num_hits / (both - num_hits) if both else math.nan

    matched = pairs.matching()
    num = int(matched.sum())
    dq = 2 * num / both if both else math.nan
    sq = float((shared[matched] / union[matched]).mean()) if num else 0.0 if both else math.nan
    return {
        "ap50": precision(num),
        "ap50_95": nan_mean(np.array([precision(int(pairs.matching(threshold).sum())) for threshold in THRESHOLDS])),
        "aji": _aji(pairs),
        "pq": dq * sq,
        "dq": dq,
        "sq": sq,
        **cell_outcomes(pairs),
    }


def cell_outcomes(pairs: CellPairs) -> dict[str, int]:
    """Counts the outcomes of all cells. A cell lies *mostly* in another if more than half of its pixels do.

    - ``num_found``: true cells matched by a predicted cell of their class with an IoU above 0.5.
    - ``num_merged``: true cells not found that lie mostly in a predicted cell in which another true cell lies mostly, too.
    - ``num_split``: true cells neither found nor merged in which two or more predicted cells lie mostly.
    - ``num_missed``: all other true cells.
    - ``num_extra``: predicted cells that match no true cell: false alarms, and the predicted cells of the split and merged ones above.

    So found + merged + split + missed = ``num_true``, and found + extra = ``num_predicted``.
    """
    truth, found = pairs.truth, pairs.found
    each = np.bincount(_outcomes(pairs)[1:], minlength=len(OUTCOMES)).tolist()
    num = dict(zip(OUTCOMES, each, strict=True))
    return {
        "num_true": truth.num,
        "num_predicted": found.num,
        **{f"num_{name}": num[name] for name in OUTCOMES},
        "num_extra": found.num - num["found"],
    }


def _outcomes(pairs: CellPairs) -> np.ndarray:
    """The outcome of each true cell (T + 1,), a place in ``OUTCOMES``; that of number 0, the background, means nothing."""
    truth, found, t, p, shared = pairs.truth, pairs.found, pairs.t, pairs.p, pairs.shared
    out = np.full(truth.num + 1, OUTCOMES.index("missed"), np.uint8)
    pieces = np.bincount(t[2 * shared > found.areas_px[p]], minlength=truth.num + 1)
    out[pieces > 1] = OUTCOMES.index("split")
    inside = 2 * shared > truth.areas_px[t]  # the true cell, in the predicted one
    swallowed = np.bincount(p[inside], minlength=found.num + 1)
    out[t[inside][swallowed[p[inside]] > 1]] = OUTCOMES.index("merged")
    out[t[pairs.matching()]] = OUTCOMES.index("found")
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class CellOutcomes:
    """The true and the predicted cells of an image (H, W), for pictures: their numbers from 1, and what became of each."""

    true_ids: np.ndarray
    outcomes: np.ndarray
    """(T + 1,) places in ``OUTCOMES``."""
    found_ids: np.ndarray
    matched: np.ndarray
    """(P + 1,) bool: whether the predicted cell matches a true one."""

    @classmethod
    def of(cls, pairs: CellPairs) -> CellOutcomes:
        pairs = pairs.of_one_class
        matched = np.zeros(pairs.found.num + 1, bool)
        matched[pairs.p[pairs.matching()]] = True
        return cls(true_ids=pairs.truth.ids, outcomes=_outcomes(pairs), found_ids=pairs.found.ids, matched=matched)


def describe_outcomes(counts: Mapping[str, float]) -> str:
    """The counts of :func:`cell_outcomes` as a phrase.

    >>> describe_outcomes({"num_true": 50, "num_found": 44, "num_missed": 1, "num_split": 2, "num_merged": 3, "num_extra": 6})
    '44 of 50 cells found, 1 missed, 2 split, 3 merged; 6 extra'
    """
    n = {name: f"{counts[name]:g}" for name in COUNTS if name in counts}
    return (
        f"{n['num_found']} of {n['num_true']} cells found, {n['num_missed']} missed, {n['num_split']} split, {n['num_merged']} merged; "
        f"{n['num_extra']} extra"
    )


def _aji(pairs: CellPairs) -> float:
    truth, found, t, p, shared, union = pairs.truth, pairs.found, pairs.t, pairs.p, pairs.shared, pairs.union
    # Each true cell's best match: sorted by true cell, descending IoU, then number; the first of each.
    order = np.lexsort((p, -shared / union, t)) if len(t) else np.empty(0, int)
    first = order[np.flatnonzero(np.diff(t[order], prepend=0))]
    lonely_px = truth.areas_px.sum() - truth.areas_px[t[first]].sum()
    unused_px = found.areas_px.sum() - found.areas_px[np.unique(p[first])].sum()
    whole = union[first].sum() + lonely_px + unused_px
    return float(shared[first].sum() / whole) if whole else math.nan
