"""Compares models pairwise by their per-image scores: intervals and paired tests.

Images are the sample: models are paired by image id; where images come in groups (a patient, a slide), the group is the unit. Seeds are
repeats of one measurement, averaged per image before any test. Results are never NaN: a note says why a number is missing.
``cellbench.statistics.ranking`` ranks more than two models.

Decisions, each with its reason:

- Intervals are BCa bootstrap intervals (Efron 1987), with the same resamples for every model and pair.
- Wilcoxon signed-rank, two-sided. Equal images are ranked, then dropped (Pratt 1959): they count as evidence of no difference, which
  would be lost if they were dropped first. Up to 50 unequal units p is exact, with ties too; above, normal with tie correction.
- Effect size is the matched-pairs rank-biserial correlation (Kerby 2014), -1 to 1, over the ranks of *all* units: ties pull it to 0.
- An image that is empty for both models of a pair (no cell, none found: NaN) is left out. Where only one of them found something, the other
  scores best there (``cellbench.metrics.pixel.impute_missing``): a false alarm on an empty image is never dropped from a comparison.
- Scores are compared at 12 decimals, so that a mean over seeds does not break a tie by its last bit.

Shapes: M models, P pairs, I images, U units (images or groups), B resamples, F folds.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cellbench.errors import CellbenchError, quantity
from cellbench.metrics.pixel import nan_mean
from cellbench.statistics.bootstrap import RESAMPLES, bootstrap_intervals, unit_numbers, unit_sums
from cellbench.statistics.hypothesis_tests import DECIMALS, describe_undecidable, fold_test, holm_adjust, is_decidable, wilcoxon_test
from cellbench.statistics.scores import Difference, ModelScores, seed_sd

MANY_PAIRS = 50_000


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignedScores:
    """Models on their common images."""

    images: tuple[str, ...]
    values_MI: np.ndarray  # noqa: N815
    means: tuple[float, ...]
    """Each model's mean over the images for which it has a score."""
    seed_sds: tuple[float | None, ...]
    unit_I: np.ndarray  # noqa: N815
    """The number of each image's unit: itself, or its group."""
    unit: str
    """What a unit is: 'image' or 'group'."""
    folds: tuple[Hashable, ...] | None
    """None unless every model has the same."""
    num_filled: tuple[int, ...]
    """For each model: number of images that are empty for it but not for all others; there it has the best score."""

    @property
    def units_MU(self) -> np.ndarray:  # noqa: N802
        """The mean of each unit."""
        return unit_sums(self.values_MI, self.unit_I) / np.bincount(self.unit_I)


def align_images(models: Sequence[ModelScores]) -> AlignedScores:
    """Reduces models to their common images in the order of the first model, without images that are empty for all.

    Raises CellbenchError where they share none or their scores have different directions.
    """
    first = models[0]
    if len({m.lower_is_better for m in models}) > 1:
        raise CellbenchError("some scores are better when lower, others when higher: compare one metric at a time.")
    common = set(first.images).intersection(*(m.images for m in models[1:]))
    if not common:
        names = ", ".join(sorted({m.model for m in models})[:4])
        raise CellbenchError(f"no image is scored by all of {names}: nothing to pair. Compare models of the same test images.")
    empty = set.intersection(*({image for image, missing in zip(m.images, m.empty, strict=True) if missing} for m in models))
    # If all images are empty for all models, all are right everywhere: they are equal and can be compared.
    common = common - empty or common
    images = tuple(image for image in first.images if image in common)
    units: dict[str, Hashable] = {}
    for m in models:
        for image, group in zip(m.images, m.groups or (), strict=False):
            if units.setdefault(image, group) != group:
                raise CellbenchError(f"image '{image}' is in group '{units[image]}' and, for {m.model}, in '{group}'. One group an image.")
    grouped = any(image in units for image in images)
    labels = [("group", units[image]) if image in units else ("image", image) for image in images]
    rows, means, sds, folds, num_filled = [], [], [], set(), []
    for m in models:
        where = None if m.images == images else {image: i for i, image in enumerate(m.images)}
        take = range(len(images)) if where is None else [where[image] for image in images]
        values = m.values if where is None else m.values[:, take]
        own = nan_mean(values)
        means.append(m.best if np.isnan(own) else own)
        num_filled.append(int(np.isnan(values).any(axis=0).sum()))
        values = np.where(np.isnan(values), m.best, values)
        rows.append(values.mean(axis=0))
        sds.append(seed_sd(values))
        folds.add(None if m.folds is None else m.folds if where is None else tuple(m.folds[i] for i in take))
    return AlignedScores(
        images=images,
        values_MI=np.array(rows),
        means=tuple(means),
        seed_sds=tuple(sds),
        unit_I=unit_numbers(labels),
        unit="group" if grouped else "image",
        folds=folds.pop() if len(folds) == 1 else None,
        num_filled=tuple(num_filled),
    )


def compare(a: ModelScores, b: ModelScores, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """``a`` minus ``b``, paired by image. Raises CellbenchError where they share no image."""
    return compare_all([a, b], level=level, resamples=resamples, seed=seed)[0]


def compare_all(
    models: Sequence[ModelScores],
    *,
    against: str | None = None,
    picked: bool = False,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Difference]:
    """Every pair of models, in the order given, Holm-adjusted over all of them.

    ``against``: only the pairs with this model, as second of each pair. Fewer tests have more power, but this is valid only if the model was
    chosen before the scores were known. ``picked``: it was chosen by the scores, as the best of all; then p is adjusted for all pairs
    (Bonferroni, since the other p-values are not known; Holm over all pairs is never stricter).
    Above 50,000 pairs (317 models) 999 resamples are used, and a note says so: 1,000 models would take two minutes otherwise.
    Raises CellbenchError for two models of one name, and for a pair without common images.
    """
    names = [m.model for m in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CellbenchError(f"two models are called '{twice}'. Give runs that differ only by seed as one model with several rows.")
    if against is not None and against not in names:
        raise CellbenchError(f"no model called '{against}' to compare against. Known: {', '.join(names)}.")
    if against is None:
        pairs = list(itertools.combinations(range(len(models)), 2))
    else:
        pairs = [(i, names.index(against)) for i in range(len(models)) if names[i] != against]
    resamples = min(resamples, 999) if len(pairs) > MANY_PAIRS else resamples
    num_tests = len(models) * (len(models) - 1) // 2 if picked else len(pairs)
    # Pairs of models with the same images and folds share one resampling: 630 pairs then cost one draw and one matrix product.
    layouts: dict[Hashable, int] = {}
    keys = [
        (frozenset(m.images), frozenset(zip(m.images, m.folds or (), strict=False)), frozenset(np.array(m.images, object)[m.empty]))
        for m in models
    ]
    layout = [layouts.setdefault(key, len(layouts)) for key in keys]
    batches: dict[tuple[int, int], list[int]] = {}
    for n, (i, j) in enumerate(pairs):
        batches.setdefault((min(layout[i], layout[j]), max(layout[i], layout[j])), []).append(n)
    found: dict[int, Difference] = {}
    for numbers in batches.values():
        batch = [pairs[n] for n in numbers]
        found.update(zip(numbers, _differences(models, batch, num_tests, len(batches) == 1, level, resamples, seed), strict=True))
    differences = [found[n] for n in range(len(pairs))]
    if num_tests > len(pairs):
        return [replace(d, p_adjusted=min(1.0, d.p * num_tests)) for d in differences]
    return [replace(d, p_adjusted=p) for d, p in zip(differences, holm_adjust(d.p for d in differences), strict=True)]


def _differences(
    models: Sequence[ModelScores], pairs: list[tuple[int, int]], num_tests: int, alone: bool, level: float, resamples: int, seed: int
) -> list[Difference]:
    """Pairs of models that all have the same images. ``alone``: these pairs are the whole family."""
    used = sorted({i for pair in pairs for i in pair})
    here = align_images([models[i] for i in used])
    local = {i: n for n, i in enumerate(used)}
    pairs_P2 = np.array([(local[i], local[j]) for i, j in pairs])
    counts_U = np.bincount(here.unit_I)
    num_units = len(counts_U)
    each = bootstrap_intervals(
        unit_sums(here.values_MI, here.unit_I), counts_U, pairs_P2=pairs_P2, unit=here.unit, level=level, resamples=resamples, seed=seed
    )
    p, effect, higher, lower = [], [], [], []
    p_folds: list[float | None] = []
    for start in range(0, len(pairs), 2048):
        first, second = pairs_P2[start : start + 2048].T
        d_PI = np.round(here.values_MI[first] - here.values_MI[second], DECIMALS)
        p_P, effect_P = wilcoxon_test(np.round(unit_sums(d_PI, here.unit_I) / counts_U, DECIMALS))
        p += p_P.tolist()
        effect += effect_P.tolist()
        higher += np.count_nonzero(d_PI > 0, axis=1).tolist()
        lower += np.count_nonzero(d_PI < 0, axis=1).tolist()
        p_folds += fold_test(d_PI, here.folds) if here.folds is not None and len(set(here.folds)) > 1 else [None] * len(d_PI)

    family = num_tests if alone else 1
    shared = []
    if not is_decidable(num_units, family, round(1 - level, DECIMALS)):
        shared.append(describe_undecidable(num_units, family, here.unit))
    if resamples < RESAMPLES and num_tests > MANY_PAIRS:
        shared.append(f"{num_tests} pairs: intervals from {resamples} resamples")
    num_folds = max(len(set(models[i].folds or ())) for i in used)
    if num_folds > 1:
        shared.append(f"scores from {num_folds} folds, whose training images overlap: p is optimistic")
    num_images = len(here.images)
    out = []
    for n, (i, j) in enumerate(pairs):
        a, b, interval = models[i], models[j], each[n]
        sd_a, sd_b = here.seed_sds[local[i]], here.seed_sds[local[j]]
        num_dropped = len(set(a.images) ^ set(b.images))
        ties = num_images - higher[n] - lower[n]
        notes = list(dict.fromkeys([*a.notes, *b.notes, *shared]))
        filled = here.num_filled[local[i]] + here.num_filled[local[j]]
        if filled and filled < 2 * num_images:
            notes.append(
                f"{quantity(filled, 'image')} without a cell where only one of the two predicts a cell: the other scores best there"
            )
        if num_dropped:
            notes.append(f"{quantity(num_dropped, 'image')} that only one of the two has: left out")
        if ties == num_images:
            notes.append("the same score on every image")
        if effect[n] * interval.mean < 0 and interval.excludes_zero:
            notes.append("mean and ranks have opposite signs: a few images dominate the mean")
        if sd_a is None and sd_b is None:
            notes.append("one seed each: another seed may give another result")
        elif abs(interval.mean) < 2 * np.sqrt((sd_a or 0) ** 2 / len(a.values) + (sd_b or 0) ** 2 / len(b.values)):
            notes.append("within two standard errors of the spread between seeds: other seeds may give another result")
        out.append(
            Difference(
                a=a.model,
                b=b.model,
                mean_a=here.means[local[i]],
                mean_b=here.means[local[j]],
                interval=interval,
                p=p[n],
                p_adjusted=p[n],
                num_tests=num_tests,
                effect=effect[n],
                wins=lower[n] if a.lower_is_better else higher[n],
                ties=ties,
                losses=higher[n] if a.lower_is_better else lower[n],
                p_folds=p_folds[n],
                lower_is_better=a.lower_is_better,
                notes=tuple(notes),
                num_a=num_images - here.num_filled[local[i]] or num_images,
                num_b=num_images - here.num_filled[local[j]] or num_images,
            )
        )
    return out
