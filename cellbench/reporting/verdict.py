"""The comparison of models in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cellbench.statistics.bootstrap import Interval, negate
from cellbench.statistics.hypothesis_tests import DECIMALS
from cellbench.statistics.ranking import CriticalDifference
from cellbench.statistics.scores import Difference


def describe_difference(d: Difference, what: str = "Dice") -> str:
    """The comparison in plain words, winner first. The p told is the adjusted one."""
    num = d.num_images
    if d.ties == num:
        return f"{d.a} and {d.b} score the same on {'the one image' if num == 1 else f'each of the {num} images'}"
    if d.better is None:
        why = ""
        if d.p_adjusted < d.alpha:
            why = ", but the test and the mean disagree"
        elif d.interval.excludes_zero and d.num_tests > 1:
            why = f" after {d.num_tests} pairs"
        return f"between {d.a} and {d.b} this data cannot tell (difference {_evidence(d.interval, d.p_adjusted)}{why})"
    i, wins, other = d.interval, d.wins, d.b
    if d.better == d.b:
        wins, other = d.losses, d.a
    if i.mean < 0:
        i = negate(i)
    size, rest = _evidence(i, d.p_adjusted, sure=True).split(", ", 1)
    lower = "lower is better, " if d.lower_is_better else ""
    groups = f" in {i.num} groups" if i.num != num else ""
    return f"{d.better} beats {other} by {size} {what} ({lower}{rest}, {wins} of {num} images{groups})"


def _evidence(i: Interval, p: float, sure: bool = False) -> str:
    numbers = [i.mean] if i.low is None or i.high is None else [i.mean, i.low, i.high]
    digits = 3 if max(map(abs, numbers)) < 10 else 1
    # A sure difference never reads "by 0.000" or "0.000 to ...".
    while sure and digits < DECIMALS and min(abs(round(x, digits)) for x in numbers) == 0:
        digits += 1
    told = [f"{round(x, digits) + 0.0:.{digits}f}" for x in numbers]
    span = i.note if len(told) == 1 else f"{100 * i.level:g} % {'roughly ' if i.rough else ''}{told[1]} to {told[2]}"
    return f"{told[0]}, {span}, {format_p(p)}"


def format_p(p: float) -> str:
    """Three decimals below 0.1, two above, and as many as it takes not to round up to 0.05.

    >>> p_words(0.00004), p_words(0.0016), p_words(0.049996), p_words(0.213), p_words(1.0)
    ('p < 0.001', 'p = 0.002', 'p = 0.049996', 'p = 0.21', 'p = 1.00')
    """
    digits = 3 if p < 0.1 else 2
    while p < 0.05 and digits < DECIMALS and float(f"{p:.{digits}f}") >= 0.05:
        digits += 1
    return "p < 0.001" if p < 0.001 else f"p = {p:.{digits}f}"


def describe_verdict(
    differences: Iterable[Difference], ranking: CriticalDifference | None = None, *, what: str = "Dice", most: int = 4
) -> list[str]:
    """A short paragraph, one sentence an item: the best model, whom it beats for certain, with whom it ties, and what to mind.

    ``differences``: what ``compare_all`` gave, over all pairs. ``most``: how many models a sentence spells out before it counts the rest.
    """
    pairs = list(differences)
    if not pairs:
        return ["One model alone: there is nothing to compare."]
    gains: dict[str, list[float]] = {}
    means: dict[str, float] = {}
    for d in pairs:
        up = -d.interval.mean if d.lower_is_better else d.interval.mean
        gains.setdefault(d.a, []).append(up)
        gains.setdefault(d.b, []).append(-up)
        means[d.a], means[d.b] = d.mean_a, d.mean_b
    # Mean gain over the others, not the mean itself: on unequal image sets only pairs are fair.
    best = max(gains, key=lambda name: sum(gains[name]) / len(gains[name]))
    own = [d for d in pairs if best in (d.a, d.b)]
    beaten = sorted((d for d in own if d.better == best), key=lambda d: abs(d.interval.mean))
    tied = sorted((d for d in own if d.better is None), key=lambda d: abs(d.interval.mean))
    num_images = min(d.num_a if best == d.a else d.num_b for d in own)
    out = [f"Best on average is {best}: {what} {means[best]:.3f} over {num_images} image{'s' * (num_images > 1)}."]
    if not tied:
        out.append(f"It beats {'the other model' if len(own) == 1 else f'each of the {len(own)} others'} for certain.")
    elif not beaten:
        out.append("It beats no other model for certain.")
    else:
        out.append(f"It beats {len(beaten)} of {len(own)} others for certain.")
    for some, rest in ((beaten, "further behind"), (tied, "that this data cannot tell from it")):
        out += [f"{_capital(describe_difference(d, what))}." for d in some[:most]]
        if len(some) > most:
            out.append(f"{len(some) - most} more {rest}: {_listed([d.b if d.a == best else d.a for d in some[most:]], 3 * most)}.")
    if ranking is not None and ranking.critical_difference is not None and ranking.p is not None:
        top = next((c for c in ranking.cliques if ranking.models[0] in c), (ranking.models[0],))
        with_top = _listed(top, 3 * most) if len(top) > 1 else "none of the others"
        out.append(
            f"By mean rank, {ranking.models[0]} leads with {ranking.ranks[0]:.2f} (Friedman {format_p(ranking.p)}; ranks less than "
            f"{ranking.critical_difference:.2f} apart are not told apart: {with_top})."
        )
    minded: dict[str, list[str]] = {}
    for d in own:
        for note in dict.fromkeys((d.interval.note, *d.notes)):
            minded.setdefault(note, []).append(d.b if d.a == best else d.a)
    for note, others in minded.items():
        if note:
            out.append(f"Mind{'' if len(others) == len(own) else ', against ' + _listed(others, most)}: {note}.")
    return out + [f"Mind: {note}." for note in (ranking.notes if ranking else ()) if note not in minded]


def _listed(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _capital(text: str) -> str:
    """Model names are ids and keep their case."""
    return "B" + text[1:] if text.startswith("between ") else text
