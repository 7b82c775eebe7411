"""The difference between two models in words: a sentence, a clause, or a table cell."""

from __future__ import annotations

from cellbench.reporting.leaderboard import format_p
from cellbench.statistics.bootstrap import Interval, negate
from cellbench.statistics.hypothesis_tests import DECIMALS
from cellbench.statistics.scores import Difference


def describe_difference(d: Difference, metric: str = "Dice") -> str:
    """One comparison as a sentence without a full stop, the better model first, with the adjusted p."""
    num = d.num_images
    if d.ties == num:
        return f"{d.a} and {d.b} score the same on {'the one image' if num == 1 else f'each of the {num} images'}"
    if d.better is None:
        why = _disagreement(d)
        if not why and d.interval.excludes_zero and d.num_tests > 1:
            why = f" after adjustment for {d.num_tests} pairs"
        evidence = _evidence(d.interval, d.p_adjusted)
        return f"{d.a} and {d.b}: the difference is not significant ({evidence}{why})"
    interval, wins, other = (d.interval, d.wins, d.b) if d.better == d.a else (d.interval, d.losses, d.a)
    if interval.mean < 0:
        interval = negate(interval)
    size, rest = _evidence(interval, d.p_adjusted, never_zero=True).split(", ", 1)
    lower = "lower is better, " if d.lower_is_better else ""
    groups = f" in {interval.num} groups" if interval.num != num else ""
    return f"{d.better} is better than {other} by {size} {metric} ({lower}{rest}, better on {wins} of {num} images{groups})"


def _evidence(interval: Interval, p: float, never_zero: bool = False) -> str:
    """Mean, interval and p. ``never_zero``: with so many digits that neither the mean nor an end of the interval reads as 0.000."""
    digits = _digits(interval, never_zero)
    return f"{_format(interval.mean, digits)}, {format_span(interval, digits)}, {format_p(p)}"


def _digits(interval: Interval, never_zero: bool = False) -> int:
    numbers = [interval.mean] if interval.low is None or interval.high is None else [interval.mean, interval.low, interval.high]
    digits = 3 if max(map(abs, numbers)) < 10 else 1
    while never_zero and digits < DECIMALS and min(abs(round(x, digits)) for x in numbers) == 0:
        digits += 1
    return digits


def _format(number: float, digits: int) -> str:
    return f"{round(number, digits) + 0.0:.{digits}f}"


def format_span(interval: Interval, digits: int) -> str:
    """The interval, or why there is none."""
    if interval.low is None or interval.high is None:
        return interval.note
    rough = "roughly " if interval.rough else ""
    return f"{100 * interval.level:g} % {rough}{_format(interval.low, digits)} to {_format(interval.high, digits)}"


def describe_outcome(d: Difference) -> str:
    """Outcome for the first model, for a table cell."""
    return "not significant" if d.better is None else "better" if d.better == d.a else "worse"


def describe_gap(d: Difference, alone: bool = False) -> str:
    """How far a model is below the best: ``is 0.002 lower (95 % -0.001 to 0.005, adjusted p = 0.40)``. ``alone``: without interval and p.

    A model that predicts nothing in images without a cell may be below the best by its mean, which leaves them out, and above it in pairs.
    """
    if d.ties == d.num_images:
        return "scores the same on every image"
    size, side = (d.interval, "higher on the same images") if round(d.interval.mean, DECIMALS) > 0 else (negate(d.interval), "lower")
    if alone:
        return f"is {_format(size.mean, _digits(size, never_zero=True))} {side}"
    digits = _digits(size, never_zero=d.better is not None)
    adjusted = "adjusted " if d.num_tests > 1 else ""
    span = f"{format_span(size, digits)}, " if size.low is not None else ""
    return f"is {_format(size.mean, digits)} {side} ({span}{adjusted}{format_p(d.p_adjusted)}{_disagreement(d)})"


def _disagreement(d: Difference) -> str:
    """Why a small p decides nothing; empty where it decides, or is large."""
    return "; the test and the mean disagree" if d.better is None and d.p_adjusted < d.alpha else ""
