"""Classes of single cells: which class each cell is taken for, and from that the counts and the AP50 of each class.

Cells are matched as in ``cellbench.metrics.instance`` but whatever their class, so that a cell found as another class is distinguished from a missed
one. Everything follows from one matrix of counts (K, K): rows are the classes of true cells, columns those of predicted ones. Column 0 holds
true cells that match no predicted one, row 0 predicted cells that match no true one. The diagonal sums to the cells found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellbench.metrics.instance import CellPairs
from cellbench.metrics.instances import connected_instances
from cellbench.metrics.pixel import IGNORE


@dataclass(frozen=True, kw_only=True)
class CellClass:
    """The cells of one class in a matrix of :func:`cell_confusion`."""

    index: int
    num_true: int
    num_predicted: int
    num_found: int
    """Matched, and of the right class."""

    @property
    def ap50(self) -> float:
        """TP / (TP + FP + FN); NaN where there is no cell of this class and none was predicted."""
        union = self.num_true + self.num_predicted - self.num_found
        return self.num_found / union if union else math.nan


def cell_confusion(pairs: CellPairs, num_classes: int) -> np.ndarray:
    """The matrix (K, K) of an image's cells."""
    truth, found, matched = pairs.truth, pairs.found, pairs.matching()  # at most one match a cell, as cells do not overlap
    t, p = pairs.t[matched], pairs.p[matched]
    out = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(out, (truth.classes[t], found.classes[p]), 1)
    for cells, mine, at in ((truth, t, np.s_[:, 0]), (found, p, np.s_[0])):
        alone = np.delete(cells.classes, [0, *mine])
        out[at] += np.bincount(alone, minlength=num_classes)
    return out


def part_confusion(truth: np.ndarray, classes: np.ndarray, owners: Sequence[int], num_classes: int, min_area_px: int) -> np.ndarray:
    """The same for parts of cells, such as nuclei: the connected regions of each part's class in two class maps (H, W)."""
    out = np.zeros((num_classes, num_classes), np.int64)
    for part, owner in enumerate(owners):
        if part != owner:
            true, found = (connected_instances(np.where((x == part) | (x == IGNORE), x, 0), min_area_px) for x in (truth, classes))
            out += cell_confusion(CellPairs.of(true, found), num_classes)
    return out


def cells_of_classes(confusion: np.ndarray) -> list[CellClass]:
    """The cells of each class but the background, from a matrix (K, K) or the sum of several."""
    return [
        CellClass(index=k, num_true=int(confusion[k].sum()), num_predicted=int(confusion[:, k].sum()), num_found=int(confusion[k, k]))
        for k in range(1, len(confusion))
    ]
