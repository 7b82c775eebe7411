"""The confidence of a predicted cell: the mean probability of its pixels that they are not background. Improbable cells are often none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellbench.metrics.instance import CellPairs
from cellbench.metrics.instances import Instances

MIN_CONFIDENCES = (0.0, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
"""Values to try; among equally good ones the smallest is chosen."""


def cell_confidences(cells: Instances, probability: np.ndarray) -> np.ndarray:
    """The confidence of each cell (num + 1,), 0 for the background; ``probability`` (H, W) uint8, 0..255."""
    total = np.bincount(cells.ids.ravel(), probability.ravel(), cells.num + 1)
    confidences: np.ndarray = total / np.maximum(255 * cells.areas_px, 1)
    confidences[0] = 0
    return confidences


def drop_improbable(cells: Instances, probability: np.ndarray, min_confidence: float) -> Instances:
    """Only the cells of at least this confidence, numbered again."""
    kept = cell_confidences(cells, probability) >= min_confidence
    kept[0] = False
    new, first = np.where(kept, np.cumsum(kept), 0).astype(np.int32), np.concatenate([[True], kept[1:]])
    return Instances(
        ids=new[cells.ids],
        areas_px=cells.areas_px[first],
        classes=cells.classes[first],
        num_left_out=cells.num_left_out,
        ignored=cells.ignored,
    )


def ap50_by_confidence(
    truth: Instances, found: Instances, probability: np.ndarray, least: Sequence[float] = MIN_CONFIDENCES
) -> list[float]:
    """AP50 if only cells of at least each of these confidences are kept; NaN where there is no cell at all."""
    pairs = CellPairs.of(truth, found).of_one_class
    found = pairs.found
    confidences = cell_confidences(found, probability)[1:]
    matched = np.zeros(found.num, bool)
    matched[pairs.p[pairs.matching()] - 1] = True
    out = []
    for value in least:
        kept = confidences >= value
        hits, num = np.count_nonzero(matched & kept), truth.num + np.count_nonzero(kept)
        out.append(float(hits / (num - hits)) if num else float("nan"))
    return out
