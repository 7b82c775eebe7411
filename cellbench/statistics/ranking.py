"""Ranks of many models: Friedman's test and critical differences, and averages over backbones or heads.

The Holm-adjusted pairs of ``cellbench.statistics.comparison`` decide what is significant; the critical difference gives the overview. They can
differ, because mean ranks of two models also depend on the other models (Benavoli, Corani & Mangili 2016).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from cellbench.errors import CellbenchError, quantity
from cellbench.metrics.pixel import impute_missing
from cellbench.statistics.comparison import align_images, compare_all
from cellbench.statistics.hypothesis_tests import DECIMALS, describe_undecidable, is_decidable, midranks
from cellbench.statistics.scores import ModelScores

FEW = 10  # units; below, the chi-squared of Friedman's test is rough (Demsar 2006 asks for more than 10)


@dataclass(frozen=True, kw_only=True)
class CriticalDifference:
    """Models from best to worst, by mean rank over images (1 is best, ties share)."""

    models: tuple[str, ...]
    ranks: tuple[float, ...]
    num_images: int
    num_units: int
    """Number of ranked units: images, or groups of images."""
    test: str
    """'Friedman', or 'Wilcoxon' where only two models are compared."""
    statistic: float | None
    """Friedman's chi-squared, corrected for ties, with len(models) - 1 degrees of freedom; None where not tested so."""
    p: float | None
    critical_difference: float | None
    """Nemenyi: mean ranks less than this apart do not differ significantly. None for two models, and where the images are too few."""
    cliques: tuple[tuple[str, ...], ...]
    """Largest groups of neighbours without a significant difference, two or more models each: the bars of the diagram."""
    notes: tuple[str, ...]


def critical_difference(models: Sequence[ModelScores], *, num_tests: int | None = None, alpha: float = 0.05) -> CriticalDifference:
    """Friedman's test over all models and Nemenyi's critical difference between them (Demsar 2006), on the images that all share.

    Where Friedman's test does not reject, all models are one clique, whatever their ranks. Two models are compared as a pair instead.
    ``num_tests``: how many pairs are compared in all, where these models are some of them. Where the images are too few for any significant
    difference (``cellbench.statistics.hypothesis_tests.is_decidable``), nothing is tested and all models are one clique: chi-squared and the studentized
    range are limits for many images, and would separate models on three.
    Raises CellbenchError for fewer than two models, two of one name, or no common image.
    """
    names = [m.model for m in models]
    if len(names) < 2 or len(set(names)) < len(names):
        raise CellbenchError(f"a ranking needs two or more models of different names; got {', '.join(names) or 'none'}.")
    here = align_images(models)
    # Rounded, so that the last bit of a mean over seeds does not break a tie.
    scores_MU = np.round(here.units_MU, DECIMALS)
    ranks_MU = midranks((scores_MU if models[0].lower_is_better else -scores_MU).T).T
    rank_M = ranks_MU.mean(axis=1)
    order = np.argsort(rank_M, kind="stable").tolist()
    num_models, num_units = ranks_MU.shape
    plural = "s" * (num_units > 1)
    notes = list(dict.fromkeys(note for m in models for note in m.notes))
    if num_dropped := len(set().union(*(m.images for m in models))) - len(set.intersection(*(set(m.images) for m in models))):
        notes.append(f"{quantity(num_dropped, 'image')} that not every model has: left out")
    test, statistic, p, critical = "Wilcoxon" if num_models == 2 else "Friedman", None, None, None
    num_tests = num_models * (num_models - 1) // 2 if num_tests is None else num_tests
    if num_units == 1:
        notes.append(f"1 {here.unit}: nothing to test")
        cliques = [tuple(range(num_models))]
    elif not is_decidable(num_units, num_tests, alpha):
        notes.append(describe_undecidable(num_units, num_tests, here.unit))
        cliques = [tuple(range(num_models))]
    elif num_models == 2:
        pair = compare_all(models, level=1 - alpha)[0]
        p, together = pair.p, not pair.significant
        notes.append("two models: the paired test instead of Friedman's")
        cliques = [(0, 1)] if together else []
    else:
        from scipy.stats import friedmanchisquare, studentized_range  # takes 0.4 s, which no other case needs

        if (ranks_MU == ranks_MU[:, :1]).all() and len(set(rank_M.tolist())) == 1:
            statistic, p = 0.0, 1.0
            notes.append("the same scores for every model")
        else:
            found = friedmanchisquare(*scores_MU)
            statistic, p = float(found.statistic), float(found.pvalue)
        if num_units < FEW:
            notes.append(f"{num_units} {here.unit}{plural}: Friedman's p is rough")
        quantile = studentized_range.ppf(1 - alpha, num_models, np.inf) / np.sqrt(2)
        critical = float(quantile * np.sqrt(num_models * (num_models + 1) / (6 * num_units)))
        if p < alpha:
            cliques = _runs([rank_M[i] for i in order], critical)
        else:
            cliques = [tuple(range(num_models))]
            notes.append(f"Friedman's test finds no significant difference (p = {p:.2g})")
    return CriticalDifference(
        models=tuple(names[i] for i in order),
        ranks=tuple(rank_M[order].tolist()),
        num_images=len(here.images),
        num_units=num_units,
        test=test,
        statistic=statistic,
        p=p,
        critical_difference=critical,
        cliques=tuple(tuple(names[order[n]] for n in clique) for clique in cliques),
        notes=tuple(notes),
    )


def _runs(sorted_ranks: Sequence[float], limit: float) -> list[tuple[int, ...]]:
    """Maximal runs of two or more positions whose first and last rank differ by less than ``limit``."""
    out: list[tuple[int, ...]] = []
    end = 0
    for start in range(len(sorted_ranks)):
        stop = max(n for n in range(start, len(sorted_ranks)) if sorted_ranks[n] - sorted_ranks[start] < limit) + 1
        if stop > max(end, start + 1):
            out.append(tuple(range(start, stop)))
        end = max(end, stop)
    return out


def marginal_scores(models: Sequence[ModelScores], factor: Sequence[Hashable], *, over: Sequence[Hashable]) -> list[ModelScores]:
    """The scores of each label of ``factor`` (a backbone), averaged per image over the labels of ``over`` (the heads).

    Only complete labels of ``over`` are used: those that every label of ``factor`` has been run with. If there is none, ``factor`` labels
    with the fewest runs are left out until there is one. ``notes`` lists what was left out. Seeds are averaged row by row where all
    have equally many, else first, and then ``seed_sd`` is None. ``factor`` and ``over``: one label a model.
    """
    cells: dict[tuple[Hashable, Hashable], ModelScores] = {}
    for row, column, m in zip(factor, over, models, strict=True):
        if (row, column) in cells:
            raise CellbenchError(f"{row} x {column} occurs twice ({cells[row, column].model}, {m.model}). Give seeds as rows of one model.")
        cells[row, column] = m
    kept, all_columns = list(dict.fromkeys(factor)), list(dict.fromkeys(over))

    def complete() -> list[Hashable]:
        return [column for column in all_columns if all((row, column) in cells for row in kept)]

    while not complete():
        kept.remove(min(reversed(kept), key=lambda row: sum((row, column) in cells for column in all_columns)))
    shared = complete()
    images = set.intersection(*(set(cells[row, column].images) for row in kept for column in shared)) if cells else set()
    if not images:
        raise CellbenchError(f"no image is scored by all {len(cells)} models to average. Compare models of the same test images.")
    lost = [f"{gone}" for gone in (*dict.fromkeys(factor), *all_columns) if gone not in kept and gone not in shared]
    notes = (f"averaged over {', '.join(map(str, shared))}",) + ((f"left out as incomplete: {', '.join(lost)}",) if lost else ())
    out = []
    for row in kept:
        first, parts = cells[row, shared[0]], []
        take = [image for image in first.images if image in images]
        for m in (cells[row, column] for column in shared):
            where = {image: n for n, image in enumerate(m.images)}
            parts.append(m.values[:, [where[image] for image in take]])
        # For an image that is empty for some of them only, finding nothing was right.
        rows_of = np.cumsum([len(part) for part in parts])[:-1]
        parts = np.split(impute_missing(np.concatenate(parts), first.best), rows_of)
        if len({len(part) for part in parts}) > 1:
            parts = [part.mean(axis=0, keepdims=True) for part in parts]
        where = {image: n for n, image in enumerate(first.images)}
        groups, folds = (None if x is None else tuple(x[where[image]] for image in take) for x in (first.groups, first.folds))
        few = (f"{len(first.images) - len(take)} images of {row} that not all models have: left out",) * (len(take) < len(first.images))
        out.append(
            ModelScores(
                model=str(row),
                images=tuple(take),
                values=np.mean(parts, axis=0),
                groups=groups,
                folds=folds,
                lower_is_better=first.lower_is_better,
                notes=(*notes, *few),
            )
        )
    return out
