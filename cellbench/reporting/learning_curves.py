"""Learning curves: models that differ only in their share of the training images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cellbench.reporting.model_groups import ModelGroup, TestSet
from cellbench.statistics.bootstrap import Interval
from cellbench.statistics.comparison import align_images, compare_all
from cellbench.statistics.scores import Difference


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    fraction: float
    """Share of the training images, 0..1."""
    num_train: int
    """Training images of its first run; 0: not recorded."""
    dice: Interval
    """Mean over the test images."""
    to_largest: Difference | None
    """Difference to the point of the largest share; None for that point."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LearningCurve:
    """One model at several shares of the training images, the smallest first."""

    model: str
    points: tuple[CurvePoint, ...]
    scores_FU: np.ndarray  # noqa: N815
    """Dice of each share, and each test image or group of images that has a score at every share."""


def learning_curves(here: TestSet) -> list[LearningCurve]:
    """The models that were trained on two shares or more, best first."""
    together: dict[tuple[tuple[str, str], ...], list[tuple[float, ModelGroup, Interval]]] = {}
    for model, interval in zip(here.models, here.intervals(), strict=True):
        settings = dict(model.runs[0].settings)
        fraction = float(settings.pop("fraction", 1.0))
        if not model.baseline:
            together.setdefault(tuple(settings.items()), []).append((fraction, model, interval))
    return [_curve(sorted(members, key=lambda one: one[0])) for members in together.values() if len(members) > 1]


def _curve(members: list[tuple[float, ModelGroup, Interval]]) -> LearningCurve:
    scores = [replace(model.scores(), model=f"{fraction:g}") for fraction, model, _ in members]
    # The largest share was chosen before any score was seen, so only the pairs with it are tested.
    differences = compare_all(scores, against=scores[-1].model)
    points = [
        CurvePoint(fraction=fraction, num_train=int(model.runs[0].per_image.get("num_train", 0)), dice=interval, to_largest=difference)
        for (fraction, model, interval), difference in zip(members, [*differences, None], strict=True)
    ]
    parts = members[-1][1].name.split(" · ")
    name = " · ".join(part for part in parts if not part.startswith("fraction "))
    return LearningCurve(model=name, points=tuple(points), scores_FU=align_images(scores).units_MU)
