"""More than overlap: how well outlines agree, and how well single cells are found. Class maps in, scores of one image out.

On BCCD Dice differs by 0.02 between methods where AP50 differs by 0.3: two cells that touch by a few pixels cost no Dice and both cells.

Decisions, each with its reason:

- A contour is the mask's own pixels with a neighbour (of four) outside it. The image's frame is no contour: nobody drew it.
- ``nsd`` (normalised surface distance, surface Dice; Nikolov et al. 2021): the share of both contours' pixels that lie within the tolerance
  of the other contour, Euclidean between pixel centres. Contour pixels are counted, lengths are not weighed.
- ``boundary_dice``: Dice of the bands that each mask has within the tolerance of its outside (boundary IoU's; Cheng et al. 2021).
- A cell is a connected region of one class, unless the caller parts those that touch (``cellbench.metrics.separation``). Neighbours are the four
  beside a pixel, not the diagonal ones: masks often part touching cells by a line one pixel wide. Regions below a minimum area are specks,
  dropped on both sides. Masks that number their cells are used as such.
- Two cells match where their intersection is *more* than the threshold of their union and their class is the same. From 0.5 on that is
  at most one partner each, so no assignment has to be solved; it is decided in whole numbers, without rounding.
- ``ap50``, ``ap50_95``: TP / (TP + FP + FN) at 0.5, and its mean over 0.50, 0.55 … 0.95 (Data Science Bowl 2018, StarDist, Cellpose).
  This is not COCO's average precision: there are no confidences to rank by.
- ``aji``: aggregated Jaccard index (Kumar et al. 2017) as published: one predicted cell may serve several true ones.
- ``pq``: panoptic quality (Kirillov et al. 2019), the product of ``dq`` (F1 at 0.5) and ``sq`` (mean IoU of the matched).
- Counts alone hide errors that cancel out (50 cells for 50 cells, a third of them wrong), so every cell is accounted for (``outcomes``).
- A class may be a *part* of another class's objects, as a nucleus is of a cell: ``owners`` has for each class the class whose object it
  belongs to. Cells are then found after each part has taken its owner's class (``as_objects``); outlines stay those of each class.

Pixels that the truth ignores (``cellbench.metrics.pixel.IGNORE``) are in no cell, outline or band: cells are cut there, and what is left of a
predicted one counts where more than half of it lies outside, as panoptic quality treats void pixels. Beside them, as at the image's frame,
there is no outline, and within the tolerance of them none is judged.

What is in neither map has no score (NaN); what is in only one scores 0, as in ``cellbench.metrics.pixel``. Over several cell classes ``nsd`` and
``boundary_dice`` are means of the classes that have a score, while cells are counted together.

Letters: K classes, H x W image, T true cells, P predicted cells.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cellbench.metrics.pixel import IGNORE, nan_mean

TOLERANCE_PX = 2.0
"""For contours: what two careful people differ by on a cell of 100 px."""
MIN_AREA_PX = 100
"""For cells found as connected regions: 23 % of the components of BCCD's masks are specks below it; the median cell has 7,720 px."""
MIN_AREA_NUMBERED_PX = 10
"""For predicted cells where the truth numbers its own, of which none is then dropped: a nucleus at low magnification may have 30 px."""
THRESHOLDS = tuple(range(10, 20))
"""Of the intersection over union, in twentieths: 0.50, 0.55 … 0.95."""
SCORES = ("nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq")
COUNTS = ("num_true", "num_predicted", "num_found", "num_missed", "num_split", "num_merged", "num_extra")
"""Of an image's cells, as :func:`cell_outcomes` defines them."""


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

    @property
    def count_error(self) -> int:
        """Cells predicted minus cells there."""
        return self.num_predicted - self.num_true

    @property
    def relative_count_error(self) -> float | None:
        """``count_error`` as a share of the cells there; None where there are none."""
        return self.count_error / self.num_true if self.num_true else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Instances:
    """Single cells of an image. ``ids`` (H, W) int32: 0 is background, 1..num the cells; ``areas_px`` and ``classes``: (num + 1,)."""

    ids: np.ndarray
    areas_px: np.ndarray
    classes: np.ndarray
    num_left_out: int = 0
    """Regions below the least area, which are no cells."""
    ignored: np.ndarray | None = None
    """Of a truth: the pixels (H, W) bool that count nowhere; None where all count."""

    @property
    def num(self) -> int:
        return len(self.areas_px) - 1


def connected_instances(classes: np.ndarray, min_area_px: int = MIN_AREA_PX) -> Instances:
    """The connected regions of each class of a class map (H, W), of at least ``min_area_px`` pixels."""
    ids, num = np.zeros(classes.shape, np.int32), 0
    for label in range(1, _highest(classes) + 1):
        part, found = ndimage.label(classes == label)
        if num:
            part[part > 0] += num
        ids, num = (np.maximum(ids, part) if num else part), num + found
    return numbered_instances(ids, classes, min_area_px)


def numbered_instances(ids: np.ndarray, classes: np.ndarray, min_area_px: int = 0) -> Instances:
    """Cells by their given numbers (H, W), whole and not negative, 0 being background; a cell's class is that of most of its pixels.

    A number may have several parts: they are one cell, cut by something above it, or by pixels that the class map ignores.
    """
    if ids.shape != classes.shape or ids.dtype.kind not in "iub" or (ids.size and ids.min() < 0):
        raise ValueError(f"cell numbers are whole, from 0, one a pixel: {ids.dtype} {ids.shape} for classes {classes.shape}")
    ignored = classes == IGNORE if classes.size and int(classes.max()) == IGNORE else None
    flat = ids.ravel() if ignored is None else np.where(ignored, 0, ids).ravel()
    if flat.size and int(flat.max()) > 16 * flat.size:  # a count of each number would not fit memory
        flat = np.unique(flat, return_inverse=True)[1] + (0 if (flat == 0).any() else 1)
    areas = np.bincount(flat, minlength=1)
    kept = areas >= max(min_area_px, 1)
    kept[0] = False
    left_out = int(np.count_nonzero(areas[1:])) - int(kept.sum())
    new = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    out = new[flat].reshape(ids.shape)
    num = int(kept.sum())
    votes = np.zeros((num + 1, 1), np.int64)
    if num:
        inside = np.flatnonzero(out)
        width = int(classes.max()) + 1
        votes = np.bincount(out.ravel()[inside] * width + classes.ravel()[inside], minlength=(num + 1) * width).reshape(num + 1, width)
    areas = np.concatenate([[0], areas[kept]])
    return Instances(ids=out, areas_px=areas, classes=votes.argmax(1).astype(np.uint8), num_left_out=left_out, ignored=ignored)


def _highest(classes: np.ndarray) -> int:
    """The greatest class number of a map (H, W), ``IGNORE`` not being one."""
    highest = int(classes.max()) if classes.size else 0
    return highest if highest != IGNORE else int(classes[classes != IGNORE].max(initial=0))


def drop_ignored(found: Instances, ignored: np.ndarray | None) -> Instances:
    """Predicted cells without what lies in ``ignored`` pixels (H, W) bool: those that lie there by more than half are gone, the others cut."""
    if ignored is None or not found.num:
        return found
    inside = np.bincount(found.ids[ignored], minlength=found.num + 1)
    kept = 2 * inside <= found.areas_px
    kept[0] = False
    new = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    areas, none = (found.areas_px - inside)[kept], np.zeros(1, int)
    ids = np.where(ignored, 0, new[found.ids])
    return Instances(ids=ids, areas_px=np.concatenate([none, areas]), classes=np.concatenate([found.classes[:1], found.classes[kept]]))


def merge_parts_into_objects(classes: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """A class map (H, W) uint8 in which each part has the class of the object that it belongs to. ``owners``: for each class the class of its
    object, its own for an object; empty: every class is an object.

    >>> as_objects(np.array([[0, 1, 2, 3]], np.uint8), (0, 1, 1, 3)).tolist()
    [[0, 1, 1, 3]]
    """
    if not has_parts(owners) or not classes.size:
        return classes
    table = np.arange(256, dtype=np.uint8)  # other values, such as pixels to ignore, stay as they are
    table[: len(owners)] = owners
    return table[classes]


def has_parts(owners: Sequence[int]) -> bool:
    """Whether any class is a part of another's objects."""
    return any(owner != label for label, owner in enumerate(owners))


def merge_part_ids(ids: np.ndarray, classes: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """The cells' numbers (H, W) after each numbered part has taken the number of the object that it touches along most of its outline.

    For truths that number a nucleus and its cell separately. ``classes`` (H, W) as they are in the truth, parts not yet :func:`merge_parts_into_objects`.
    A part that touches no object of its own keeps its number.
    """
    if not has_parts(owners):
        return ids
    cells = numbered_instances(ids, classes)
    owner = np.asarray(owners)[cells.classes]
    is_part = owner != cells.classes
    pairs = []
    for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        a, b = cells.ids[first].ravel(), cells.ids[second].ravel()
        for part, other in ((a, b), (b, a)):
            at = is_part[part] & (other > 0) & (cells.classes[other] == owner[part])
            pairs.append(part[at].astype(np.int64) * (cells.num + 1) + other[at])
    code, length = np.unique(np.concatenate(pairs), return_counts=True)
    new = np.arange(cells.num + 1, dtype=np.int32)
    order = np.argsort(length, kind="stable")  # the longest contact is written last
    new[code[order] // (cells.num + 1)] = code[order] % (cells.num + 1)
    return new[cells.ids]


def reference_instances(
    classes: np.ndarray, ids: np.ndarray | None, min_area_px: int | None = None, *, owners: Sequence[int] = ()
) -> tuple[Instances, int]:
    """The cells of a truth (H, W), by its own numbers where it has them, and the least area in px that a predicted cell must then have.

    ``min_area_px``: the data set's, for both; None: ``MIN_AREA_PX``, or where cells are numbered none for them and ``MIN_AREA_NUMBERED_PX``
    for predicted ones. ``owners``: as in :func:`merge_parts_into_objects`.
    """
    objects = merge_parts_into_objects(classes, owners)
    if ids is None:
        least = MIN_AREA_PX if min_area_px is None else min_area_px
        return connected_instances(objects, least), least
    ids = merge_part_ids(ids, classes, owners)
    if min_area_px is None:
        return numbered_instances(ids, objects), MIN_AREA_NUMBERED_PX
    return numbered_instances(ids, objects, min_area_px), min_area_px


class ReferenceMask:
    """The truth of one image (H, W), prepared once and compared with the answers of many runs. May be asked from several threads."""

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
        """``classes`` below ``num_classes``, 0 the background, or ``IGNORE``; ``ids``: the mask's own numbers of cells, where it has them;
        ``owners``: as in :func:`merge_parts_into_objects`; ``unused``: classes whose outlines are not scored, as in :func:`cellbench.metrics.pixel.per_image_scores`;
        ``min_area_px`` as for :func:`reference_instances`."""
        self._classes, self._tolerance, self._numbered, self._owners = classes, tolerance_px, ids is not None, tuple(owners)
        self._cells, self.min_area_px = reference_instances(classes, ids, min_area_px, owners=owners)
        ignored = self._cells.ignored
        self._outlines = {
            label: MaskBoundary(classes == label, tolerance_px, ignored) for label in range(1, num_classes) if label not in unused
        }

    def found(self, cells: Instances) -> dict[str, float | int]:
        """The scores of predicted cells, each of ``min_area_px`` or more, under the names of :class:`InstanceScores`."""
        return instance_scores(self._cells, cells)

    def agreement(self, classes: np.ndarray, cells: Instances | None = None) -> InstanceScores:
        """How well a predicted class map (H, W) agrees; ``cells``: the single cells of it, if not the connected regions of its objects."""
        if classes.shape != self._classes.shape:
            raise ValueError(f"truth is {self._classes.shape}, prediction {classes.shape}")
        ignored = self._cells.ignored
        outlines = [
            boundary_scores(truth, MaskBoundary(classes == label, self._tolerance, ignored)) for label, truth in self._outlines.items()
        ]
        nsd, band = (nan_mean(np.array(values)) for values in zip(*outlines, strict=True))
        cells = connected_instances(merge_parts_into_objects(classes, self._owners), self.min_area_px) if cells is None else cells
        return InstanceScores(nsd=nsd, boundary_dice=band, numbered=self._numbered, **self.found(cells))


# --- outlines ---------------------------------------------------------------------------------------------------------------------------


class MaskBoundary:
    """A mask (H, W) bool with its contour, the neighbourhood of that, and its band; without what lies in ``ignored`` pixels (H, W) bool."""

    def __init__(self, mask: np.ndarray, tolerance_px: float, ignored: np.ndarray | None = None) -> None:
        self.is_empty = not (mask.any() if ignored is None else mask[~ignored].any())
        if ignored is not None:
            mask = mask | ignored  # a neighbour that nobody knows is no outside
        self.mask = mask
        self.contour = boundary_pixels(mask)
        if ignored is not None:
            self.contour &= ~ignored
        self.near = dilate(self.contour, tolerance_px)
        self.band = mask & dilate(~mask, tolerance_px)
        if ignored is not None:  # so near to them, what answers to a pixel may lie among them
            away = ~dilate(ignored, tolerance_px)
            self.mask, self.contour, self.band = mask | ~away, self.contour & away, self.band & away


def boundary_pixels(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) bool that have one of their four neighbours outside it; the image's frame counts as inside."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask ^ inner


def dilate(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """Every pixel within ``radius_px`` of a pixel of the mask, centre to centre.

    A disc is a stack of lines: 4 passes a pixel of radius, 3 ms on 1600x1200 where a distance transform takes 200.
    """
    reach = math.floor(radius_px)
    out, line, width = mask.copy(), mask.copy(), 0
    for up in range(reach, -1, -1):
        while width < math.floor(math.sqrt(radius_px**2 - up**2)):
            width += 1
            line[:, width:] |= mask[:, :-width]
            line[:, :-width] |= mask[:, width:]
        if up == 0:
            out |= line
        elif up < len(mask):
            out[up:] |= line[:-up]
            out[:-up] |= line[up:]
    return out


def boundary_scores(truth: MaskBoundary, found: MaskBoundary) -> tuple[float, float]:
    """``nsd`` and ``boundary_dice`` of two masks: NaN where both are empty. Where neither has a contour, it is whether they are the same."""
    lengths = np.count_nonzero(truth.contour) + np.count_nonzero(found.contour)
    if not lengths:
        if truth.is_empty and found.is_empty:
            return math.nan, math.nan
        same = float((truth.mask == found.mask).all())
        return same, same
    close = np.count_nonzero(truth.contour & found.near) + np.count_nonzero(found.contour & truth.near)
    bands = np.count_nonzero(truth.band) + np.count_nonzero(found.band)
    return close / lengths, 2 * np.count_nonzero(truth.band & found.band) / bands


# --- cells ------------------------------------------------------------------------------------------------------------------------------


def pairwise_overlaps(truth: Instances, found: Instances) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every pair of cells of one class that share a pixel: number of the true and of the found cell, intersection and union in px."""
    both = np.flatnonzero((truth.ids > 0) & (found.ids > 0))
    codes = truth.ids.ravel()[both].astype(np.int64) * (found.num + 1) + found.ids.ravel()[both]
    if (truth.num + 1) * (found.num + 1) <= 1 << 22:
        table = np.bincount(codes, minlength=1)
        pairs = np.flatnonzero(table)
        shared = table[pairs]
    else:
        pairs, shared = np.unique(codes, return_counts=True)
    t, p = pairs // (found.num + 1), pairs % (found.num + 1)
    same = truth.classes[t] == found.classes[p]
    t, p, shared = t[same], p[same], shared[same]
    return t, p, shared, truth.areas_px[t] + found.areas_px[p] - shared


def instance_scores(truth: Instances, found: Instances) -> dict[str, float | int]:
    """The scores of single cells, under the names of :class:`InstanceScores`, of predicted ones as :func:`drop_ignored`; NaN where there is no cell and none
    was predicted."""
    found = drop_ignored(found, truth.ignored)
    t, p, shared, union = pairwise_overlaps(truth, found)
    both = truth.num + found.num

    def hits(threshold: int) -> np.ndarray:
        return 20 * shared > threshold * union

    def precision(num_hits: int) -> float:
        return num_hits / (both - num_hits) if both else math.nan

    matched = hits(10)
    num = int(matched.sum())
    dq = 2 * num / both if both else math.nan
    sq = float((shared[matched] / union[matched]).mean()) if num else 0.0 if both else math.nan
    return {
        "ap50": precision(num),
        "ap50_95": nan_mean(np.array([precision(int(hits(threshold).sum())) for threshold in THRESHOLDS])),
        "aji": _aji(truth, found, t, p, shared, union),
        "pq": dq * sq,
        "dq": dq,
        "sq": sq,
        **cell_outcomes(truth, found, t, p, shared, matched),
    }


def cell_outcomes(
    truth: Instances, found: Instances, t: np.ndarray, p: np.ndarray, shared: np.ndarray, matched: np.ndarray
) -> dict[str, int]:
    """What became of every cell; a cell lies *mostly* in another where more than half of its own pixels do.

    - ``num_found``: true cells matched by a predicted cell of their class with an IoU above 0.5.
    - ``num_merged``: true cells not found that lie mostly in a predicted cell in which another true cell lies mostly, too.
    - ``num_split``: true cells neither found nor merged in which two or more predicted cells lie mostly.
    - ``num_missed``: all other true cells.
    - ``num_extra``: predicted cells that match no true cell: false alarms, and the pieces and mergers of the cells above.

    So found + merged + split + missed = ``num_true``, and found + extra = ``num_predicted``. Pairs ``t``, ``p``, ``shared`` as
    :func:`pairwise_overlaps` gives them, of one class; ``matched`` (pairs,) bool: which of them match.
    """
    is_found = np.zeros(truth.num + 1, bool)
    is_found[t[matched]] = True
    inside = 2 * shared > truth.areas_px[t]  # the true cell, in the predicted one
    swallowed = np.bincount(p[inside], minlength=found.num + 1)
    is_merged = np.zeros(truth.num + 1, bool)
    is_merged[t[inside][swallowed[p[inside]] > 1]] = True
    pieces = np.bincount(t[2 * shared > found.areas_px[p]], minlength=truth.num + 1)
    is_merged &= ~is_found
    is_split = (pieces > 1) & ~is_found & ~is_merged
    num, merged, split = (int(one.sum()) for one in (is_found, is_merged, is_split))
    return {
        "num_true": truth.num,
        "num_predicted": found.num,
        "num_found": num,
        "num_missed": truth.num - num - merged - split,
        "num_split": split,
        "num_merged": merged,
        "num_extra": found.num - num,
    }


def describe_outcomes(counts: Mapping[str, float]) -> str:
    """The counts of :func:`cell_outcomes` as a phrase.

    >>> outcome_words({"num_true": 50, "num_found": 44, "num_missed": 1, "num_split": 2, "num_merged": 3, "num_extra": 6})
    '44 of 50 cells found, 1 missed, 2 split, 3 merged; 6 extra'
    """
    n = {name: f"{counts[name]:g}" for name in COUNTS if name in counts}
    return (
        f"{n['num_found']} of {n['num_true']} cells found, {n['num_missed']} missed, {n['num_split']} split, {n['num_merged']} merged; "
        f"{n['num_extra']} extra"
    )


def _aji(truth: Instances, found: Instances, t: np.ndarray, p: np.ndarray, shared: np.ndarray, union: np.ndarray) -> float:
    # Each true cell's best partner: sorted by true cell, then IoU downwards, then number; the first of each.
    order = np.lexsort((p, -shared / union, t)) if len(t) else np.empty(0, int)
    first = order[np.flatnonzero(np.diff(t[order], prepend=0))]
    lonely_px = truth.areas_px.sum() - truth.areas_px[t[first]].sum()
    unused_px = found.areas_px.sum() - found.areas_px[np.unique(p[first])].sum()
    whole = union[first].sum() + lonely_px + unused_px
    return float(shared[first].sum() / whole) if whole else math.nan
