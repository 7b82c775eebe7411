"""p-values of paired differences: Wilcoxon's signed-rank test, the corrected t-test over folds, Holm's adjustment.

Shapes: P pairs of models, I images, U units (images or groups of images), F folds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, stdtr

from cellbench.errors import quantity
from cellbench.statistics.bootstrap import unit_numbers, unit_sums

DECIMALS = 12  # decimals to which scores are rounded, so that the last bit of a mean over seeds does not break a tie
EXACT_UP_TO = 50  # unequal units; above, the normal approximation, as in scipy


def smallest_p(num_units: int, num_tests: int = 1) -> float:
    """The smallest adjusted p of the signed-rank test, reached when every unit favours the same model.

    2 ** (1 - n), times the number of tests (Holm's first step, and Bonferroni).
    """
    return min(1.0, num_tests * 2.0 ** (1 - num_units))


def is_decidable(num_units: int, num_tests: int = 1, alpha: float = 0.05) -> bool:
    """Whether any difference can be significant with this number of images (or groups of images) and tests.

    >>> [is_decidable(num) for num in (3, 5, 6)], [is_decidable(num, 36) for num in (10, 11)]
    ([False, False, True], [False, True])
    """
    return smallest_p(num_units, num_tests) < alpha


def describe_undecidable(num_units: int, num_tests: int = 1, unit: str = "image") -> str:
    """A clause that says that no difference can be significant, and why."""
    units = quantity(num_units, "test image") if unit == "image" else f"{quantity(num_units, 'group')} of test images"
    over = f" over {num_tests} pairs" if num_tests > 1 else ""
    return f"with {units} no difference can be significant (p{over} cannot fall below {smallest_p(num_units, num_tests):.2g})"


def wilcoxon_test(differences_PU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilcoxon's two-sided p and the rank-biserial correlation of each row. Zeros by Pratt's method; all zeros give p = 1 and effect 0."""
    num = differences_PU.shape[1]
    ranks_PU = midranks(np.abs(differences_PU))
    up_P, down_P = ((ranks_PU * side).sum(axis=1) for side in (differences_PU > 0, differences_PU < 0))
    kept_PU = np.where(differences_PU != 0, ranks_PU, 0)
    # Midranks carry the tie correction: the sum's variance given the ranks is a quarter of their sum of squares.
    sd_P = np.sqrt((kept_PU**2).sum(axis=1)) / 2
    p_P = 2 * ndtr(-np.abs(up_P - down_P) / 2 / np.where(sd_P > 0, sd_P, 1))
    for row in np.flatnonzero(np.count_nonzero(kept_PU, axis=1) <= EXACT_UP_TO):
        doubled = np.sort(2 * kept_PU[row]).astype(int)  # midranks are halves
        p_P[row] = min(1, 2 * _cumulated(tuple(doubled[doubled > 0].tolist()))[int(2 * min(up_P[row], down_P[row]))])
    return p_P, (up_P - down_P) / (num * (num + 1) / 2)


def midranks(values_PU: np.ndarray) -> np.ndarray:
    """The rank of each value in its row, from 1; equal values share their mean rank. As ``scipy.stats.rankdata``, whose import takes 0.4 s.

    >>> midranks(np.array([[0.2, 0.1, 0.2]])).tolist()
    [[2.5, 1.0, 2.5]]
    """
    ranks_PU = np.empty(values_PU.shape)
    for row, values_U in enumerate(values_PU):
        _, place_U, num = np.unique(values_U, return_inverse=True, return_counts=True)
        ranks_PU[row] = (np.cumsum(num) - (num - 1) / 2)[place_U]
    return ranks_PU


@lru_cache(maxsize=4096)
def _cumulated(ranks: tuple[int, ...]) -> np.ndarray:
    """P(sum <= s) for s = 0, 1, ..., if each rank is in the sum with probability one half."""
    probability = np.zeros(sum(ranks) + 1)
    probability[0] = 1
    for rank in ranks:
        without = probability.copy()
        probability[rank:] += without[: len(without) - rank]
        probability /= 2
    return np.cumsum(probability)


def untied_distribution(num: int) -> np.ndarray:
    """P(W <= w) for w = 0, 1, ... of the signed-rank sum of ``num`` units without ties, if there is no difference."""
    return _cumulated(tuple(range(1, num + 1)))


def equivalence_test(differences_PU: np.ndarray, margin: float) -> np.ndarray:
    """The p of each row that its difference is not within -margin to margin: the greater of two one-sided signed-rank tests (Schuirmann 1987)."""
    sides = []
    for shifted_PU in (differences_PU + margin, margin - differences_PU):
        p_P, effect_P = wilcoxon_test(np.round(shifted_PU, DECIMALS))
        sides.append(np.where(effect_P > 0, p_P / 2, 1 - p_P / 2))
    return np.maximum(*sides)


def fold_test(differences_PI: np.ndarray, folds: Sequence[Hashable]) -> list[float | None]:
    """Two-sided p of each row by the corrected resampled t-test (Nadeau & Bengio 2003) over the folds' mean differences.

    The variance 1/J + 1/(J - 1) instead of 1/J allows for the training images that J folds share. None if the folds do not vary.
    """
    fold_I = unit_numbers(folds)
    num = fold_I.max() + 1
    fold_PF = unit_sums(differences_PI, fold_I) / np.bincount(fold_I)
    sd_P = fold_PF.std(axis=1, ddof=1)
    varies_P = sd_P > 10.0**-DECIMALS
    t_P = fold_PF.mean(axis=1) / (np.where(varies_P, sd_P, 1) * np.sqrt(1 / num + 1 / (num - 1)))
    return [p if varies else None for p, varies in zip((2 * stdtr(num - 1, -np.abs(t_P))).tolist(), varies_P.tolist(), strict=True)]


def holm_adjust(p_values: Iterable[float]) -> list[float]:
    """Holm's step-down adjustment (1979), in the order given: controls the family-wise error rate, whatever the dependence.

    >>> [round(p, 3) for p in holm_adjust([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    p = np.array(list(p_values), dtype=np.float64)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must lie in 0..1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(one) for one in adjusted]
