"""Infers the meaning of mask values from all masks of a set, and the minimum area of a cell.

Mask values are one of three things: cell numbers (each cell has its own), class values (the same few in many places), or cell and background.
One mask is often ambiguous: with a single cell it looks binary, with values 0, 1 and 2 it could be any. So each mask is summarised
(:class:`MaskFacts`), and the decision is made for the whole set (:func:`decide_meaning`). If it is ambiguous, the user is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from cellbench.data.class_content import ClassContent, class_content
from cellbench.errors import first_names
from cellbench.metrics.pixel import IGNORE

MOST_VALUES = 64
"""Maximum number of values of one mask that are examined one by one; there are fewer classes."""
FEW = 3
"""Up to this number of values, equal in every mask and each in one piece, may be classes as well as cells, as nucleus and cytoplasm."""
MARKS = (255, 65535)
"""The greatest values of 8 and 16 bits, which many tools use for ignored pixels."""
MANY_ALIKE = 5
"""In this many masks or more, the same values that do not count up from 1 are classes: tools that number cells begin with 1 in each image."""
MOST_NUMBERED = 33
"""The greatest class number of the usual label maps (Pascal VOC has 20, Cityscapes 33)."""
MOST_CLASSES = 10
"""Up to this number of values of a set, each is examined separately."""
SHARE = 1 / 75
"""Regions below this share of the median area are specks: a ninth of a cell's diameter. 100 px on BCCD, whose cells have 7,700 px."""
SPECK_PX = 10
"""Smaller regions are specks even if cells have less than 750 px, unless they exceed a tenth of the median."""


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """Facts about one mask (H, W). Values are counted without 0 and the ignored one."""

    size_px: Sequence[int]
    """Height, width."""
    digest: str = ""
    """Hash of the file's content."""
    values: Sequence[int] = ()
    """Distinct values, rising; the first ``MOST_VALUES``, and the greatest."""
    num_values: int = 0
    torn: Sequence[int] = ()
    """Those of ``values`` of which less than nine tenths are one connected region."""
    rest_px: int = 0
    """Pixels with another value than 0 and the greatest."""
    solid_px: int = 0
    """Of these, pixels in blocks of 2 x 2 of one value: nearly all in drawn masks, 1 % in a JPEG's noise or on smoothed edges."""
    num_solid: int = 0
    """Values that have such a block: nearly all in drawn masks."""
    middle_px: int = 0
    """Pixels inside fields of a quarter to three quarters of the greatest value: smoothed edges between two values have none inside."""
    top_px: int = 0
    """Pixels with the greatest value."""
    ignored_px: int = 0
    strays: Sequence[int] = ()
    """Values farther from their class's than the card allows, in fields of 3 x 3 or more."""
    regions: Sequence[Sequence[int]] = ()
    """(area in px, count) of the connected regions of each class."""
    numbered: Sequence[Sequence[int]] = ()
    """The same of each value's pixels."""
    content: dict[str, Any] = field(default_factory=dict)
    """``ClassContent`` as lists."""

    @property
    def class_content(self) -> ClassContent:
        return ClassContent.of(self.content)


def mask_facts(
    labels: np.ndarray, classes: np.ndarray, strays: Sequence[int] = (), num_classes: int = IGNORE, digest: str = ""
) -> MaskFacts:
    """Facts from a mask's values (H, W), ignored ones included, and its class map (H, W) uint8."""
    ignored = classes == IGNORE
    num_ignored = int(np.count_nonzero(ignored))
    if num_ignored:
        labels = np.where(ignored, 0, labels)
    values, areas = _counts(labels)
    top = int(values[-1]) if len(values) else 0
    rest = (labels > 0) & (labels != top) if len(values) > 1 else np.zeros(0, bool)
    listed = values if len(values) <= MOST_VALUES else np.append(values[:MOST_VALUES], top)
    num_rest = int(np.count_nonzero(rest))
    blocks = _solid(labels) if num_rest else rest
    solid = int(np.count_nonzero(blocks & rest))
    num_solid = len(_counts(labels[blocks])[0]) if num_rest else len(values)
    noisy = _is_noise(num_rest, solid, len(values), num_solid)
    middle = ndimage.binary_erosion(rest & (labels >= top / 4) & (labels <= top * 3 / 4), np.ones((3, 3), bool)) if noisy else rest[:0]
    content, regions = class_content(classes, num_classes)
    torn: list[int] = []
    if len(values) > 1 and not noisy:
        torn = _torn(labels, listed)
    elif len(values) == 1 and _in_parts(regions):  # the most common mask: its regions are those of its value
        torn = values.tolist()
    return MaskFacts(
        size_px=list(labels.shape),
        digest=digest,
        values=listed.tolist(),
        num_values=len(values),
        torn=torn,
        rest_px=num_rest,
        solid_px=solid,
        num_solid=num_solid,
        middle_px=int(np.count_nonzero(middle)),
        top_px=int(areas[-1]) if len(areas) else 0,
        ignored_px=num_ignored,
        strays=list(strays),
        regions=_histogram(regions),
        numbered=_histogram(areas),
        content=content.to_lists(),
    )


def mask_facts_of_cells(classes: np.ndarray, ids: np.ndarray, num_classes: int, digest: str = "") -> MaskFacts:
    """The same of an annotation: its class map (H, W) uint8 and its cell numbers (H, W)."""
    values, areas = _counts(np.where(classes == IGNORE, 0, ids))
    return MaskFacts(
        size_px=list(ids.shape),
        digest=digest,
        num_values=len(values),
        ignored_px=int(np.count_nonzero(classes == IGNORE)),
        numbered=_histogram(areas),
        content=class_content(classes, num_classes)[0].to_lists(),
    )


def off_values(labels: np.ndarray, classes: np.ndarray, values: Sequence[int], tolerance: int) -> np.ndarray:
    """The pixels (H, W) bool whose value is farther than ``tolerance`` from ``values[class]``; ignored ones are not.

    Class numbers 0, 1, 2 have no tolerance: it is below half of the least distance between two values.
    """
    tolerance = min(tolerance, (int(np.diff(np.sort(values)).min(initial=2**16)) - 1) // 2)
    known = np.array([*values, *[0] * (256 - len(values))], np.int32)
    return (np.abs(labels.astype(np.int32) - known[classes]) > tolerance) & (classes != IGNORE)


def _is_noise(rest_px: int, solid_px: int, num_values: int, num_solid: int) -> bool:
    return solid_px < 0.5 * rest_px or num_solid < 0.5 * num_values


def _counts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values above 0, rising, and their pixel counts."""
    if labels.size and int(labels.max()) <= 1 << 20:
        counts = np.bincount(labels.ravel(), minlength=1)
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(labels, return_counts=True)
    return values[values > 0], counts[values > 0]


def _histogram(areas: np.ndarray) -> list[list[int]]:
    found, counts = np.unique(areas, return_counts=True)
    return np.stack([found, counts], axis=1).tolist()


def _solid(labels: np.ndarray) -> np.ndarray:
    """The pixels (H, W) bool that are part of a 2 x 2 block of one value."""
    corner = labels[:-1, :-1]
    block = (corner == labels[1:, :-1]) & (corner == labels[:-1, 1:]) & (corner == labels[1:, 1:])
    out = np.zeros(labels.shape, bool)
    for rows in (np.s_[:-1], np.s_[1:]):
        for columns in (np.s_[:-1], np.s_[1:]):
            out[rows, columns] |= block
    return out


def _torn(labels: np.ndarray, values: np.ndarray) -> list[int]:
    """The values that are in several pieces: a cell is in one, unless another lies across it."""
    if len(values) and int(values[-1]) <= 1 << 20:
        table = np.zeros(int(values[-1]) + 1, np.int32)
        table[values] = np.arange(1, len(values) + 1)
        place = table[labels]
    else:
        at = np.searchsorted(values, labels).clip(0, max(len(values) - 1, 0)) if len(values) else np.zeros(labels.shape, int)
        place = np.where(values[at] == labels, at + 1, 0) if len(values) else at
    torn = []
    for value, box in zip(values.tolist(), ndimage.find_objects(place, len(values)), strict=True):
        if _in_parts(np.bincount(ndimage.label(labels[box] == value)[0].ravel())[1:]):
            torn.append(value)
    return torn


def _in_parts(areas: np.ndarray) -> bool:
    return bool(areas.max(initial=0) < 0.9 * areas.sum())


# --- the decision -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MaskMeaning:
    """Meaning of the mask values of a set."""

    kind: str
    """``cells``, ``classes`` or ``binary``; empty: an ignored value was found, and the rest must be examined without it."""
    description: str = ""
    values: tuple[int, ...] = ()
    """Of background and cell, where masks hold noise around two values."""
    ignore: int | None = None
    """The value of ignored pixels."""
    doubt: str = ""
    """Assumption that the user should confirm."""
    ask: str = ""
    """Question that the user must answer; the other fields are then the best guess."""


def decide_meaning(facts: Sequence[MaskFacts], kind: str = "", ignore: int | None = None) -> MaskMeaning:
    """The meaning of the masks of one set whose card gives no values; ``kind`` and ``ignore``: as given by the card."""
    marked = [f for f in facts if f.num_values]
    union = sorted({value for f in marked for value in f.values})
    most, least = max((f.num_values for f in facts), default=0), min((f.num_values for f in facts), default=0)
    noise = _is_noise(*(sum(getattr(f, name) for f in facts) for name in ("rest_px", "solid_px", "num_values", "num_solid")))
    two = "a cell is a connected region"
    rising = all(list(f.values) == list(range(1, f.num_values + 1)) for f in marked)
    if kind != "cells" and noise and not (rising and FEW < most < 255):  # cells of one or two pixels are numbers too
        top = max(union)
        if top < 65536 and (kind == "binary" or sum(f.middle_px for f in facts) < 0.2 * sum(f.top_px for f in facts)):
            text = f"cell or background, near {top} and 0 with noise or smooth edges; {two}"
            return MaskMeaning(kind="binary", values=(0, top), ignore=ignore, description=text)
        ask = "the values vary from pixel to pixel (a JPEG, or smoothed), around more than two. Write values = [...], one for each class"
        return MaskMeaning(kind="binary", ignore=ignore, description=f"cell or background, any value but 0 is a cell; {two}", ask=ask)
    doubt, odd = "", next((mark for mark in MARKS if ignore is None and _looks_ignored(marked, mark)), None)
    if odd is not None:
        others = [value for value in union if value != odd]
        beside = f"{odd} occurs beside the values {min(others)}{f' to {max(others)}' if len(others) > 1 else ''} and"
        if not kind:
            doubt = f"{beside} is taken for 'ignore'. Write ignore = {odd} to confirm, or masks = ... where it is a value like others"
            return MaskMeaning(kind="", ignore=odd, doubt=doubt)
        doubt = f"{beside} counts as one of them. Write ignore = {odd} where it must not count"
    cells = f"cell numbers, {f'{least} to ' if least < most else ''}{most} an image"
    if kind == "cells":
        return MaskMeaning(kind="cells", ignore=ignore, description=cells, doubt=doubt)
    shown = first_names([str(value) for value in union], 8)
    both = f"cell or background, {f'values 0 and {shown}' if union else 'no cell in any'}; {two}"
    if kind == "binary":
        return MaskMeaning(kind="binary", ignore=ignore, description=both, doubt=doubt)
    merged = f"class values 0, {shown}, of which all but 0 are taken for one class; {two}"
    if kind == "classes":
        return MaskMeaning(kind="classes", ignore=ignore, description=merged, doubt=doubt)
    if len(union) < 2 or (most == 1 and set(union) <= {1, 255, 65535}):
        return MaskMeaning(kind="binary", ignore=ignore, description=both)
    same = all(f.values == marked[0].values for f in marked)
    in_pieces = _in_pieces(marked, union)
    if in_pieces or (same and not rising and len(marked) >= MANY_ALIKE):
        where = "in many places each" if in_pieces else f"in each of {len(marked)} masks"
        doubt = (
            f"the values {shown} occur {where}, so they are classes and no cell numbers, and are taken for one class. "
            "To separate them, write classes = [...] and values = [...] into dataset.toml beside the data"
        )
        return MaskMeaning(kind="classes", ignore=ignore, description=merged, doubt=doubt)
    disjoint = sum(f.num_values for f in marked) == len(union)
    if most > 2 * FEW or (most > FEW and rising) or (disjoint and len(union) > 2 * FEW) or (not same and (rising or max(union) > 255)):
        return MaskMeaning(kind="cells", ignore=ignore, description=cells)
    ask = (
        f"the masks hold {'the' if same else 'some of the'} values {shown}{' in every image' if same else ''}: cell numbers, or classes? "
        'Write masks = "cells", "classes" or "binary" (all are one kind of cell) into dataset.toml beside the data'
    )
    return MaskMeaning(kind="cells", ignore=ignore, description=f"{cells} (in doubt)", ask=ask)


def _looks_ignored(marked: Sequence[MaskFacts], mark: int) -> bool:
    """Whether ``mark`` occurs and all other values are small: cell numbers from 1 in each image, or class numbers."""
    small = [[value for value in f.values if value != mark] for f in marked]
    others = {value for values in small for value in values}
    if not any(mark in f.values for f in marked) or not others or max(others) >= 128 or max(f.num_values for f in marked) == 1:
        return False
    return max(others) <= MOST_NUMBERED or all(list(values) == list(range(1, len(values) + 1)) for values in small)


def _in_pieces(marked: Sequence[MaskFacts], union: Sequence[int]) -> bool:
    """Whether most values occur in several places of an image, as classes do and cell numbers do not."""
    seen, torn = sum(len(f.values) for f in marked), sum(len(f.torn) for f in marked)
    if torn > 0.3 * seen:
        return True
    if len(union) > MOST_CLASSES:
        return False
    for value in union:
        there = [f for f in marked if value in f.values]
        if len(there) > 1 and sum(value in f.torn for f in there) > 0.5 * len(there):
            return True
    return False


# --- the smallest cell ------------------------------------------------------------------------------------------------------------------


def min_cell_area(areas: Sequence[Sequence[int]]) -> int:
    """The area below which a region is a speck, from (area in px, count) of a set's cells; one significant digit, at least 1.

    A share of the median weighted by diameter, so that neither many specks nor a few clumps of cells dominate.

    >>> min_cell_area([(7720, 100), (20, 60)]), min_cell_area([(50, 300)]), min_cell_area([])
    (100, 5, 1)
    """
    if not len(areas):
        return 1
    px, num = np.array(sorted((px, num) for px, num in areas), float).T
    weights = np.cumsum(np.sqrt(px) * num)
    median = px[np.searchsorted(weights, weights[-1] / 2)]
    limit = max(median * SHARE, min(SPECK_PX, median / 10))
    figure = 10 ** np.floor(np.log10(max(limit, 1)))
    return max(1, int(np.floor(limit / figure + 0.5) * figure))


def count_below(areas: Sequence[Sequence[int]], limit_px: int) -> tuple[int, int]:
    """How many of the areas (px, count) are below a limit, and how many there are."""
    return sum(num for px, num in areas if px < limit_px), sum(num for _, num in areas)
