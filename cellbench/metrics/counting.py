"""Cells counted by image, region and class, predicted beside true ones. A cell is in a region if its centre is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cellbench.escaping import to_csv
from cellbench.metrics.instances import Instances

ALL = "all"
"""Instead of a class: the cells of all of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedCells:
    """The cells of one image: their centres (N, 2), x and y in px from the upper left corner, NaN where unknown, and class numbers (N,)."""

    xy: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(cls, cells: Instances) -> PlacedCells:
        """Of numbered cells; the centre is the mean of a cell's pixels."""
        y, x = np.nonzero(cells.ids)
        number = cells.ids[y, x]
        sums = [np.bincount(number, values + 0.5, minlength=cells.num + 1)[1:] for values in (x, y)]
        return cls(xy=np.stack(sums, 1) / np.maximum(cells.areas_px[1:, None], 1), classes=cells.classes[1:])


class CountingRegion(Protocol):
    """A part of an image in which cells are counted."""

    @property
    def name(self) -> str: ...

    def holds(self, xy: np.ndarray) -> np.ndarray:
        """Whether each point (N, 2) is inside, bool (N,)."""


@dataclass(frozen=True, kw_only=True)
class CountRow:
    """The cells of one class in one image, or in one region of it."""

    image: str
    region: str
    """Empty: the whole image."""
    label: str
    """The name of the class."""
    true: int
    predicted: int


def count_rows(
    image: str, true: PlacedCells, predicted: PlacedCells, names: Mapping[int, str], regions: Sequence[CountingRegion] = ()
) -> list[CountRow]:
    """The counts of an image, or of each of its ``regions``, by class; with several classes also of all.

    ``names``: by class number; cells of other classes do not count.
    """
    rows = []
    for region in regions or (None,):
        kept = [one.classes if region is None else one.classes[region.holds(one.xy)] for one in (true, predicted)]
        where = "" if region is None else region.name
        each = [(name, [int((classes == k).sum()) for classes in kept]) for k, name in names.items()]
        if len(each) > 1:
            each.append((ALL, [sum(num) for num in zip(*(num for _, num in each), strict=True)]))
        rows += [CountRow(image=image, region=where, label=name, true=num[0], predicted=num[1]) for name, num in each]
    return rows


def counts_by_label(rows: Sequence[CountRow]) -> dict[str, tuple[list[int], list[int]]]:
    """The true and the predicted counts of each class, in the order of ``rows``."""
    out: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows:
        true, predicted = out.setdefault(row.label, ([], []))
        true.append(row.true)
        predicted.append(row.predicted)
    return out


def counts_csv(rows: Sequence[CountRow]) -> str:
    """``counts.csv`` of an evaluation: a line an image or region, two columns a class."""
    labels = list(dict.fromkeys(row.label for row in rows))
    with_regions = any(row.region for row in rows)
    columns = ["image", *(["region"] if with_regions else [])]
    columns += [f"{label} {kind}" if len(labels) > 1 else kind for label in labels for kind in ("true", "predicted", "difference")]
    lines: dict[tuple[str, str], list[object]] = {}
    for row in rows:
        start: list[object] = [row.image, *([row.region] if with_regions else [])]
        lines.setdefault((row.image, row.region), start).extend([row.true, row.predicted, row.predicted - row.true])
    return to_csv(columns, list(lines.values()))
