"""Single cells of a mask: by its own numbers, or as connected regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cellbench.metrics.pixel import IGNORE

MIN_AREA_PX = 100
"""For cells found as connected regions: 23 % of the components of BCCD's masks are specks below it; the median cell has 7,720 px."""


MIN_AREA_NUMBERED_PX = 10
"""Minimum area of predicted cells if the reference numbers its cells, none of which is dropped: a nucleus at low magnification may have 30 px."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Instances:
    """Single cells of an image. ``ids`` (H, W) int32: 0 is background, 1..num the cells; ``areas_px`` and ``classes``: (num + 1,)."""

    ids: np.ndarray
    areas_px: np.ndarray
    classes: np.ndarray
    num_left_out: int = 0
    """Number of regions below the minimum area, which are not cells."""
    ignored: np.ndarray | None = None
    """For a reference mask: the ignored pixels (H, W) bool; None if there are none."""

    @property
    def num(self) -> int:
        return len(self.areas_px) - 1


def connected_instances(classes: np.ndarray, min_area_px: int = MIN_AREA_PX) -> Instances:
    """The connected regions of each class of a class map (H, W), of at least ``min_area_px`` pixels."""
    ids, class_of = np.zeros(classes.shape, np.int32), [np.zeros(1, np.uint8)]
    for label in range(1, highest_class(classes) + 1):
        part, found = ndimage.label(classes == label)
        if len(class_of) > 1:
            part[part > 0] += sum(map(len, class_of)) - 1
        ids = np.maximum(ids, part) if len(class_of) > 1 else part
        class_of.append(np.full(found, label, np.uint8))
    ignored = classes == IGNORE if classes.size and int(classes.max()) == IGNORE else None
    areas = np.bincount(ids.ravel(), minlength=1)
    return kept_instances(ids, np.arange(len(areas)), areas, np.concatenate(class_of), min_area_px, ignored)


def kept_instances(
    pieces: np.ndarray, numbers: np.ndarray, areas_px: np.ndarray, classes: np.ndarray, min_area_px: int, ignored: np.ndarray | None = None
) -> Instances:
    """The cells of at least ``min_area_px`` pixels, where every cell is a union of pieces.

    ``pieces`` (H, W): the piece of each pixel; ``numbers`` (Q,): the cell of each piece, 0 is background; ``areas_px`` and ``classes``: by cell.
    """
    kept = areas_px >= max(min_area_px, 1)
    kept[0] = False
    new = np.where(kept, np.cumsum(kept), 0).astype(np.int32)[numbers]
    ids = pieces if pieces.dtype == np.int32 and (new == np.arange(len(new))).all() else new.take(pieces)
    return Instances(
        ids=ids,
        areas_px=np.concatenate([[0], areas_px[kept]]),
        classes=np.concatenate([np.zeros(1, np.uint8), classes[kept]]),
        num_left_out=int(np.count_nonzero(areas_px[1:])) - int(kept.sum()),
        ignored=ignored,
    )


def numbered_instances(ids: np.ndarray, classes: np.ndarray, min_area_px: int = 0) -> Instances:
    """Cells by their given numbers (H, W), whole and not negative, 0 being background; a cell's class is that of most of its pixels.

    A number may have several parts. They are one cell, divided by an overlapping one or by ignored pixels. A cell with more than half of its pixels
    in ignored ones, as at the border of a region of interest, is none; so it is with predicted ones (:func:`drop_ignored`).
    """
    if ids.shape != classes.shape or ids.dtype.kind not in "iub" or (ids.size and ids.min() < 0):
        raise ValueError(f"cell numbers are whole, from 0, one a pixel: {ids.dtype} {ids.shape} for classes {classes.shape}")
    ignored = classes == IGNORE if classes.size and int(classes.max()) == IGNORE else None
    flat = ids.ravel() if ignored is None else np.where(ignored, 0, ids).ravel()
    if flat.size and int(flat.max()) > 16 * flat.size:  # an array of counts would not fit into memory
        flat = np.unique(flat, return_inverse=True)[1] + (0 if (flat == 0).any() else 1)
    areas = np.bincount(flat, minlength=1)
    kept = areas >= max(min_area_px, 1)
    kept[0] = False
    if ignored is not None and ids[ignored].any():
        whole = np.bincount(ids.ravel(), minlength=len(areas))[: len(areas)] if int(ids.max()) <= 16 * ids.size else areas
        kept &= 2 * areas >= whole
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


def highest_class(classes: np.ndarray) -> int:
    """The greatest class number of a map (H, W), ``IGNORE`` not being one."""
    highest = int(classes.max()) if classes.size else 0
    return highest if highest != IGNORE else int(classes[classes != IGNORE].max(initial=0))


def drop_ignored(found: Instances, ignored: np.ndarray | None) -> Instances:
    """Predicted cells without what lies in ``ignored`` pixels (H, W) bool: cells with more than half of their pixels there are removed, the others are cut."""
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
    """A class map (H, W) uint8 in which each part has the class of the object that it belongs to.

    ``owners``: for each class the class of its object, its own for an object; empty: every class is an object.

    >>> merge_parts_into_objects(np.array([[0, 1, 2, 3]], np.uint8), (0, 1, 1, 3)).tolist()
    [[0, 1, 1, 3]]
    """
    if not has_parts(owners) or not classes.size:
        return classes
    table = np.arange(256, dtype=np.uint8)  # other values, such as pixels to ignore, stay as they are
    table[: len(owners)] = owners
    merged: np.ndarray = table[classes]
    return merged


def has_parts(owners: Sequence[int]) -> bool:
    """Whether any class is a part of another's objects."""
    return any(owner != label for label, owner in enumerate(owners))


def merge_part_ids(ids: np.ndarray, classes: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """The cells' numbers (H, W) after each numbered part has taken the number of the object that it touches along most of its outline.

    For truths that number a nucleus and its cell separately. ``classes`` (H, W) as they are in the truth, parts not yet :func:`merge_parts_into_objects`.
    A part that touches no object of its class keeps its number.
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
    order = np.argsort(length, kind="stable")  # written last, so that the longest contact wins
    new[code[order] // (cells.num + 1)] = code[order] % (cells.num + 1)
    merged: np.ndarray = new[cells.ids]
    return merged


def reference_instances(
    classes: np.ndarray, ids: np.ndarray | None, min_area_px: int | None = None, *, owners: Sequence[int] = ()
) -> tuple[Instances, int]:
    """The cells of a reference mask (H, W), by its own numbers if it has them, and the minimum area in px of predicted cells.

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


def count_values(codes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The values that occur in ``codes``, integers from 0 to below ``most``, rising, and how often each does."""
    if most <= 1 << 24:
        counts = np.bincount(codes.ravel(), minlength=1)
        found = np.flatnonzero(counts)
        return found, counts[found]
    found, counts = np.unique(codes, return_counts=True)
    return found, counts


def near_two_cells(ids: np.ndarray, reach_px: int) -> np.ndarray:
    """The pixels (H, W) bool within ``reach_px``, along rows and columns, of two cells of ``ids`` (H, W) int."""
    side = 2 * reach_px + 1
    most = ndimage.maximum_filter(ids, side, mode="nearest")
    least = ndimage.minimum_filter(np.where(ids == 0, np.iinfo(ids.dtype).max, ids), side, mode="nearest")
    near: np.ndarray = (most > 0) & (most != least)
    return near


def root(parent: list[int], k: int) -> int:
    """The member that stands for the set of ``k``, of sets as trees: ``parent`` of each member, its own for a root."""
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = parent[k]
    return k
