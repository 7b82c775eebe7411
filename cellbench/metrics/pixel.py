"""Overlap scores from pixel counts: counts are summed first, ratios are taken last.

A confusion matrix counts pixels, ``counts[truth, prediction]``. Pooled scores add the matrices of all images first; per-image scores
average afterwards. The two differ and have different names.

An image, or a whole set, may lack a class. A class in neither truth nor prediction has no score: it is NaN and left out of means, since
counting it as 1 would reward finding nothing (with nine empty images of ten that gives 0.9). A class in only one of the two scores 0, except in
accuracy, which counts the pixels of the others too. An image without a score is *empty*: it has no cell and none was found.

Pooled means go over the classes that are in the truth, and per-image means over those that are in any mask of the data set: a class that no
mask holds cannot be scored, and a single predicted pixel of it must not change a mean by 1/K.

The other convention, by which a class in neither scores 1, is available for comparison with published numbers: ``absent=1`` here, and names that end in
``_empty1`` in MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

MEASURES = ("dice", "iou", "precision", "recall", "accuracy")
IGNORE = 255
"""Marks pixels of a truth's class map that are left out of losses, scores and cells. Class numbers are below it."""
FEW_CLASSES = 3
"""Up to this number, pairs of classes are counted one by one."""


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
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
    if num_classes <= FEW_CLASSES and truth.dtype == prediction.dtype == np.uint8:  # a third of the time of counting all at once
        codes = truth * np.uint8(num_classes) + prediction
        counts = np.array([np.count_nonzero(codes == code) for code in range(num_classes**2 - 1)])
        return np.append(counts, codes.size - counts.sum()).reshape(num_classes, num_classes)
    pairs = truth.ravel().astype(np.int64) * num_classes + prediction.ravel()
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True)
class PixelScores:
    """The five measures, each an array over classes in 0..1. ``accuracy`` is one class against the rest: (tp + tn) / all."""

    dice: np.ndarray
    iou: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    accuracy: np.ndarray

    def of(self, classes: slice | int | list[int]) -> dict[str, float]:
        """The measures of one class, or their means over those of several that have a score; NaN where none has."""
        return {name: nan_mean(getattr(self, name)[..., classes]) for name in MEASURES}


def nan_mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN, without a warning, where there is none."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else math.nan


def impute_missing(scores_MI: np.ndarray, best: float = 1.0) -> np.ndarray:
    """Scores of M models on the same I images, made comparable: (M, I) float64.

    Where an image is empty for one model (NaN: no cell, none found) and not for another (something was found), finding nothing was right and
    scores ``best``. So a false alarm counts the same in a paired comparison as in the means. Images empty for all stay NaN.

    >>> impute_missing(np.array([[0.9, np.nan, np.nan], [0.8, 0.0, np.nan]])).tolist()
    [[0.9, 1.0, nan], [0.8, 0.0, nan]]
    """
    values = np.asarray(scores_MI, dtype=np.float64)
    missing = np.isnan(values)
    return np.where(missing & ~missing.all(axis=0), best, values)


def pixel_scores(counts: np.ndarray, absent: float = math.nan) -> PixelScores:
    """The measures of confusion matrices (..., C, C); arrays (..., C). ``absent``: what a class in neither truth nor prediction scores."""
    counts = np.asarray(counts, dtype=np.float64)
    hit = np.diagonal(counts, axis1=-2, axis2=-1)
    predicted, present = counts.sum(-2), counts.sum(-1)
    total = counts.sum((-2, -1))[..., None]
    nowhere = (predicted + present) == 0

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.where(nowhere, absent, np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))

    return PixelScores(
        dice=ratio(2 * hit, predicted + present),
        iou=ratio(hit, predicted + present - hit),
        precision=ratio(hit, predicted),
        recall=ratio(hit, present),
        accuracy=ratio(total - predicted - present + 2 * hit, np.broadcast_to(total, hit.shape)),
    )


def cell_classes(num_classes: int) -> slice:
    """The classes that ``test/dice`` averages over: all except the background."""
    return slice(1, num_classes)


def pooled_classes(counts: np.ndarray, first: int = 1) -> list[int]:
    """The classes from ``first`` on that a pooled mean goes over, of pixel counts (C, C): those in the truth; where none is, those predicted."""
    truth, predicted = (np.flatnonzero(np.asarray(counts).sum(axis)[first:]) + first for axis in (1, 0))
    return (truth if len(truth) else predicted).tolist()


def named_scores(prefix: str, counts: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
    """Pooled scores of images' confusion matrices (N, C, C) under their names in MLflow; NaN where there is nothing to score.

    ``test/dice`` is the cell class (mean over classes that are not background), ``test_background/dice`` and so on each class, and
    ``test_mean/dice`` the mean over all classes. Means go over :func:`pooled_classes`. ``test/dice_empty1`` and ``test/iou_empty1`` follow the
    other convention.
    """
    total = np.asarray(counts).sum(0)
    pooled = pixel_scores(total)
    out = {f"{prefix}/{name}": value for name, value in pooled.of(pooled_classes(total)).items()}
    old = pixel_scores(total, absent=1.0).of(cell_classes(len(classes)))
    out |= {f"{prefix}/{name}_empty1": old[name] for name in ("dice", "iou")}
    others = enumerate(classes) if len(classes) > 2 else [(0, classes[0])]
    for index, name in others:
        out |= {f"{prefix}_{name}/{measure}": value for measure, value in pooled.of(index).items()}
    return out | {f"{prefix}_mean/{measure}": value for measure, value in pooled.of(pooled_classes(total, 0)).items()}


def per_image_scores(counts: np.ndarray, absent: float = math.nan, unused: Collection[int] = ()) -> dict[str, np.ndarray]:
    """Per-image scores (N,) of the cell class from confusion matrices (N, C, C).

    Means over the cell classes in truth or prediction; NaN for an image that has none in either. ``absent``: as in :func:`pixel_scores`;
    ``unused``: classes that no mask of the dataset holds. They are left out even where they are predicted, since no model could learn them.
    """
    each = pixel_scores(counts, absent)
    here = [k for k in range(1, np.shape(counts)[-1]) if k not in unused]
    return {name: np.array([nan_mean(row) for row in getattr(each, name)[:, here]]) for name in MEASURES}


def count_empty_images(counts: np.ndarray) -> tuple[int, int]:
    """Of images' confusion matrices (N, C, C): how many have no cell pixel in their truth, and in how many of those one was predicted."""
    counts = np.asarray(counts)
    empty = counts[:, 1:].sum((1, 2)) == 0
    return int(empty.sum()), int((empty & (counts[:, :, 1:].sum((1, 2)) > 0)).sum())
