"""Scores from counts: a metric is a sum until the end.

A confusion matrix counts pixels, ``counts[truth, prediction]``. Pooled scores add the matrices of all images first; per-image scores
average afterwards. The two are different numbers and never share a name.

An image, or a whole set, may lack a class. The policy: a class in neither truth nor prediction was got right and scores 1 everywhere;
a class in only one of the two scores 0, save in accuracy, which counts the pixels of the others too. (smp counts the first case as 0 by
default, which punishes a clean empty image.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MEASURES = ("dice", "iou", "precision", "recall", "accuracy")
IGNORE = 255
"""In a truth's class map: this pixel counts nowhere, neither in losses nor in scores nor as part of a cell. Class numbers are below it."""


def confusion(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixel counts (C, C) int64, rows truth, columns prediction, of two equal-shaped maps of class numbers 0..C-1.

    Pixels whose truth is ``IGNORE`` are left out, whatever was predicted there.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}")
    if truth.size and int(truth.max()) == IGNORE:
        judged = truth != IGNORE
        truth, prediction = truth[judged], prediction[judged]
    if truth.size and max(int(truth.max()), int(prediction.max())) >= num_classes:
        raise ValueError(f"a class number is not below {num_classes}")
    pairs = truth.ravel().astype(np.int64) * num_classes + prediction.ravel()
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The five measures, each an array over classes in 0..1. ``accuracy`` is one class against the rest: (tp + tn) / all."""

    dice: np.ndarray
    iou: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    accuracy: np.ndarray

    def of(self, classes: slice | int | list[int]) -> dict[str, float]:
        """The measures of one class, or their means over several."""
        return {name: float(np.mean(getattr(self, name)[..., classes])) for name in MEASURES}


def scores(counts: np.ndarray) -> Scores:
    """The measures of confusion matrices (..., C, C); arrays (..., C)."""
    counts = np.asarray(counts, dtype=np.float64)
    hit = np.diagonal(counts, axis1=-2, axis2=-1)
    predicted, present = counts.sum(-2), counts.sum(-1)
    total = counts.sum((-2, -1))[..., None]
    absent = (predicted + present) == 0

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.where(absent, 1.0, np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))

    return Scores(
        dice=ratio(2 * hit, predicted + present),
        iou=ratio(hit, predicted + present - hit),
        precision=ratio(hit, predicted),
        recall=ratio(hit, present),
        accuracy=np.divide(total - predicted - present + 2 * hit, total, out=np.ones_like(hit), where=total > 0),
    )


def cell_classes(num_classes: int) -> slice:
    """The classes that ``test/dice`` speaks of: all but the background; their mean where there are several."""
    return slice(1, num_classes)


def named(prefix: str, counts: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
    """Pooled scores of images' confusion matrices (N, C, C) under the contract's names.

    ``test/dice`` is the cell class (mean over classes that are not background), ``test_background/dice`` and so on each class, and
    ``test_mean/dice`` the mean over all classes.
    """
    pooled = scores(np.asarray(counts).sum(0))
    out = {f"{prefix}/{name}": value for name, value in pooled.of(cell_classes(len(classes))).items()}
    others = enumerate(classes) if len(classes) > 2 else [(0, classes[0])]
    for index, name in others:
        out |= {f"{prefix}_{name}/{measure}": value for measure, value in pooled.of(index).items()}
    return out | {f"{prefix}_mean/{measure}": value for measure, value in pooled.of(slice(None)).items()}


def image_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Per-image scores (N,) of the cell class from confusion matrices (N, C, C)."""
    each = scores(counts)
    return {name: getattr(each, name)[:, cell_classes(counts.shape[-1])].mean(-1) for name in MEASURES}
