"""In which order are unlabelled images worth labelling? By the spread between models, and by the distance from what is labelled.

Models that disagree on an image have something to learn there (query by committee; Seung et al. 1992). An image like one that is labelled, or that
ranks higher already, teaches little more (core sets; Sener and Savarese 2018). Either is enough: on an image of a new kind models may agree that there
is nothing. Letters: N images, L depths of the backbone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellbench.metrics.training_features import Descriptor, TrainingFeatures


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """An image and what labelling it would teach."""

    number: int
    """Its place in what was ranked."""
    score: float
    """0 to 1: 1 - (1 - s)(1 - d), where s is the spread and d the distance, each x / (x + its usual value): the median of the images, and 1."""
    spread: float | None
    """1 minus the mean Dice of each pair of models' masks; None for a single model."""
    distance: float | None
    """To the nearest image that is labelled or ranks higher; up to 1 is usual for the training images. None without a backbone."""


def mask_spread(masks: Sequence[np.ndarray]) -> float | None:
    """1 minus the mean Dice of each pair of masks (H, W) bool; two empty ones agree. None for a single mask."""
    areas = [int(one.sum()) for one in masks]
    each = [
        2 * int((masks[i] & masks[j]).sum()) / (areas[i] + areas[j]) if areas[i] + areas[j] else 1.0
        for i, j in itertools.combinations(range(len(masks)), 2)
    ]
    return 1 - float(np.mean(each)) if each else None


def rank_images(
    spreads: Sequence[float | None], descriptors: Sequence[Descriptor | None], training_features: Sequence[TrainingFeatures]
) -> list[Ranked]:
    """All images, the one that would teach most first; distances count those that rank higher as labelled.

    ``training_features``: of the training images, in one or several folds, which together are what is labelled.
    """
    num = len(spreads)
    usual = float(np.median([one for one in spreads if one is not None] or [0.0]))
    known = [one for one in descriptors if one is not None]
    near_LN = between_LNN = None
    if training_features and len(known) == num and num:
        found = [one.distances(known) for one in training_features]
        near_LN, between_LNN = np.min([to_train for to_train, _ in found], axis=0), found[0][1]
    out: list[Ranked] = []
    rest = list(range(num))
    while rest:
        nearest_N = None if near_LN is None else near_LN.max(0)
        distances = [None if nearest_N is None else float(nearest_N[k]) for k in rest]
        scores = [_score(spreads[k], usual, distance) for k, distance in zip(rest, distances, strict=True)]
        place = int(np.argmax(scores))
        k = rest.pop(place)
        out.append(Ranked(number=k, score=scores[place], spread=spreads[k], distance=distances[place]))
        if near_LN is not None and between_LNN is not None:
            near_LN = np.minimum(near_LN, between_LNN[:, k])
    return out


def _score(spread: float | None, usual: float, distance: float | None) -> float:
    return 1 - (1 - _share(spread, usual)) * (1 - _share(distance, 1.0))


def _share(value: float | None, usual: float) -> float:
    return value / (value + usual) if value else 0.0
