"""What follows from a comparison: how many images would decide, which models are equal for practical purposes, and what choosing the best costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellbench.errors import first_names, quantity
from cellbench.reporting.leaderboard import format_p
from cellbench.reporting.learning_curves import LearningCurve
from cellbench.reporting.model_groups import ModelGroup, TestSet
from cellbench.statistics.bootstrap import FEWEST
from cellbench.statistics.comparison import align_images
from cellbench.statistics.hypothesis_tests import equivalence_test
from cellbench.statistics.power import MOST_IMAGES, doubling_gain, fewest_units, images_to_decide
from cellbench.statistics.scores import Difference
from cellbench.statistics.selection import corrected_best

CHEAPER = 0.8
"""A model is cheaper if it needs less than this share of another one's time; smaller differences are within what measuring varies."""


def _unit_differences(here: TestSet, d: Difference) -> np.ndarray:
    """The first model minus the second, for each image or group of images."""
    models = {model.name: model for model in here.models}
    a, b = align_images([models[name].scores() for name in (d.a, d.b)]).units_MU
    difference_U: np.ndarray = a - b
    return difference_U


def images_needed(here: TestSet, d: Difference) -> int | None:
    """How many test images (or groups) would decide a pair that is not decided, by its spread and the number of pairs that are not; None: too many."""
    undecided = sum(other.better is None for other in here.differences()) if here.decidable else here.num_pairs
    return images_to_decide(_unit_differences(here, d), num_tests=max(undecided, 1), alpha=d.alpha)


def describe_power(here: TestSet) -> str:
    """How many test images would decide between the best model and the next one that it does not differ from; empty where nothing is open."""
    differences = {d.a: d for d in here.differences_to_best()}
    tied = [d for model in here.models[1:] if (d := differences[model.name]).better is None and d.ties < d.num_images]
    if not tied:
        return ""
    what = "test images" if here.unit == "image" else "groups of test images"
    if here.num_units < FEWEST:
        return f"At least {fewest_units(here.num_pairs)} {what} are needed for {quantity(here.num_pairs, 'pair')} of models."
    needed = images_needed(here, tied[0])
    if needed is None:
        return f"With this spread more than {MOST_IMAGES:,} {what} would be needed to decide between the two."
    return f"With this spread about {needed} {what} would decide between the two."


# --- equivalence ------------------------------------------------------------------------------------------------------------------------


def equivalence_p(here: TestSet, d: Difference) -> float:
    """p, adjusted for every pair of models, that two models are not equal for practical purposes: two one-sided tests, ``here.margin``."""
    p = equivalence_test(_unit_differences(here, d)[None], here.margin)
    return min(1.0, float(p[0]) * here.num_pairs)


def is_equivalent(here: TestSet, d: Difference) -> bool:
    """Whether two models are equal for practical purposes: the tests say so, and the interval of the difference lies within the margin."""
    low, high = d.interval.low, d.interval.high
    within = low is not None and high is not None and -here.margin < low <= high < here.margin
    return within and equivalence_p(here, d) < d.alpha


def describe_equivalence(here: TestSet) -> str:
    """Which models equal the best one for practical purposes, and which of them is the cheapest; empty where none does."""
    found = {d.a: d for d in here.differences_to_best() if is_equivalent(here, d)}
    equal = [model for model in here.models if model.name in found]
    if not equal:
        return ""
    names = first_names([model.name for model in equal], 3)
    p = max(equivalence_p(here, d) for d in found.values())
    start = f"For practical purposes {names} equal{'s' * (len(equal) == 1)} {here.best.name} (within {here.margin:g} Dice, {format_p(p)})"
    cost = {model.name: _seconds(model) for model in (here.best, *equal)}
    known = {name: s for name, s in cost.items() if s is not None}
    best_s = known.get(here.best.name)
    if best_s is None or len(known) < 2:
        return f"{start}."
    cheapest = min(known, key=lambda name: known[name])
    if known[cheapest] < CHEAPER * best_s:
        return f"{start}; take {cheapest}, which needs {known[cheapest]:.2g} instead of {best_s:.2g} CPU seconds an image."
    return f"{start}, and none of them needs clearly less time."


def _seconds(model: ModelGroup) -> float | None:
    """Processor seconds of the prediction of one image."""
    return model.mean("cost/image_cpu_s")


# --- the price of choosing --------------------------------------------------------------------------------------------------------------


def corrected_score(here: TestSet) -> float | None:
    """The mean Dice to expect of the best model on new images: corrected for having been chosen by these. None where it cannot be computed."""
    scores = [model.scores() for model in here.models]
    return None if all(one.empty.all() for one in scores) else corrected_best(scores)


def describe_correction(here: TestSet) -> str:
    """The corrected score, to stand beside the score of the best; empty where there is none."""
    score = corrected_score(here)
    return "" if score is None else f"corrected for the choice among {len(here.models)} models: {score:.3f}"


def describe_validation_choice(here: TestSet) -> list[str]:
    """The model that is best by validation, where another one is best by test."""
    chosen = here.best_by_validation
    if chosen is None or chosen is here.best_own:
        return []
    place = next(k for k, model in enumerate(here.models, 1) if model is chosen)
    return [
        f"By validation the best is {chosen.name} (validation Dice {chosen.mean('best/val_dice'):.3f}), which is number {place} by test "
        f"(Dice {chosen.scores().mean:.3f}). `best-by-validation` means it, `best` the best by test."
    ]


# --- more labels ------------------------------------------------------------------------------------------------------------------------


def describe_doubling(curves: Sequence[LearningCurve]) -> list[str]:
    """What twice as many training images would give, for each learning curve, if it goes on as before."""
    out = []
    for curve in curves:
        sizes = [point.num_train for point in curve.points]
        if not all(sizes) or (gain := doubling_gain(sizes, curve.scores_FU)) is None:
            continue
        mean, low, high = gain
        out.append(
            f"{curve.model}: {2 * sizes[-1]} training images instead of {sizes[-1]} would change Dice by {mean:+.3f} "
            f"(95 % {low:+.3f} to {high:+.3f}), if the curve goes on as before."
        )
    return out
