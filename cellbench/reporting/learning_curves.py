"""How few labels are enough: models that differ in the share of training images alone, as learning curves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cellbench.reporting.leaderboard import format_interval
from cellbench.reporting.model_groups import REPEATS, ModelGroup, TestSet
from cellbench.reporting.verdict import format_p
from cellbench.statistics.bootstrap import Interval
from cellbench.statistics.comparison import compare_all
from cellbench.statistics.hypothesis_tests import describe_undecidable, is_decidable
from cellbench.statistics.scores import Difference


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One model on its curve."""

    fraction: float
    num_train: int
    """Images that it learned from, in the first of its runs; 0: not recorded."""
    dice: Interval
    """Mean over the test images."""
    against_most: Difference | None
    """This point minus the curve's last; None for the last itself."""


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """One model at several shares of the training images, the smallest first."""

    model: str
    points: tuple[CurvePoint, ...]


HEADINGS = ("model", "share", "training images", "Dice/image", "95 %", "minus the largest share", "p (adjusted)", "verdict")


def learning_curves(here: TestSet) -> list[LearningCurve]:
    """The models that were run at two shares or more, best first."""
    together: dict[tuple[tuple[str, str], ...], list[tuple[float, ModelGroup, Interval]]] = {}
    for model, interval in zip(here.models, here.intervals("dice"), strict=True):
        params = dict(model.runs[0].stored.params)
        fraction = float(params.pop("fraction", 1.0))
        for name in (*REPEATS, "dataset"):
            params.pop(name, None)
        if not model.baseline:
            together.setdefault(tuple(sorted(params.items())), []).append((fraction, model, interval))
    return [_curve(sorted(members, key=lambda one: one[0])) for members in together.values() if len(members) > 1]


def _curve(members: list[tuple[float, ModelGroup, Interval]]) -> LearningCurve:
    named = [replace(model.scores(), model=f"{fraction:g}") for fraction, model, _ in members]
    # The largest share was chosen before any score was seen, so the questions are only those against it.
    found = compare_all(named, against=named[-1].model)
    points = [
        CurvePoint(fraction=fraction, num_train=int(model.runs[0].told.get("num_train", 0)), dice=interval, against_most=difference)
        for (fraction, model, interval), difference in zip(members, [*found, None], strict=True)
    ]
    parts = members[-1][1].name.split(" \u00b7 ")
    return LearningCurve(model=" \u00b7 ".join(part for part in parts if not part.startswith("fraction ")), points=tuple(points))


def table_rows(found: list[LearningCurve]) -> list[list[str]]:
    """The table under ``HEADINGS``."""
    out = []
    for curve in found:
        for point in curve.points:
            d = point.against_most
            out.append(
                [
                    curve.model,
                    f"{point.fraction:.0%}" if point.fraction >= 0.01 else f"{point.fraction:.2%}",
                    str(point.num_train or ""),
                    "" if math.isnan(point.dice.mean) else f"{point.dice.mean:.4f}",
                    format_interval(point.dice.low, point.dice.high, point.dice.rough),
                    f"{d.interval.mean:+.4f}" if d else "",
                    format_p(d.p_adjusted).removeprefix("p = ").removeprefix("p ") if d else "",
                    "" if d is None else "cannot tell" if d.better is None else "worse" if d.better == d.b else "better",
                ]
            )
    return out


def describe_curves(found: list[LearningCurve]) -> list[str]:
    """For each curve, from which share on this data cannot tell it from the largest. That is no proof that they are equal."""
    out = []
    for curve in found:
        last = curve.points[-1]
        if not is_decidable(last.dice.num, len(curve.points) - 1):
            out.append(f"{curve.model}: {describe_undecidable(last.dice.num, len(curve.points) - 1, last.dice.unit)}.")
            continue
        worse = [
            point for point in curve.points[:-1] if point.against_most is not None and point.against_most.better == point.against_most.b
        ]
        above = [point for point in curve.points[:-1] if not worse or point.fraction > worse[-1].fraction]
        images = f"{last.num_train} images" if last.num_train else f"{last.fraction:.0%}"
        if not above:
            out.append(f"{curve.model}: each smaller share is worse than {images} for certain; more labels may still help.")
            continue
        first = above[0]
        d = first.against_most
        few = f"{first.num_train} of {images}" if first.num_train and last.num_train else f"a share of {first.fraction:g}"
        lost = f" (difference {d.interval.mean:+.4f})" if d is not None else ""
        fewer = "worse for certain" if worse else "not tried"
        out.append(f"{curve.model}: with {few} the test cannot tell it from the largest share{lost}; fewer are {fewer}.")
    return out
