"""How well counts agree with true counts: bias, limits of agreement, and concordance.

Bland and Altman, Lancet 1986; Lin, Biometrics 1989 (with the correction of 2000 to its variance).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from cellbench.statistics.bootstrap import Interval, mean_interval


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of N pairs of a predicted and a true count."""

    num: int
    bias: Interval
    """The mean of predicted minus true."""
    low: float | None
    """Lower limit of agreement: 95 % of the differences lie between the limits if they are normal. None for fewer than three pairs."""
    high: float | None
    error: float
    """The mean of the absolute differences."""
    ccc: float | None
    """Lin's concordance correlation coefficient, -1 to 1: 1 where every count is right. None where neither count varies."""
    ccc_low: float | None = None
    """End of its 95 % interval; None for fewer than four pairs."""
    ccc_high: float | None = None


def agreement(
    true: Sequence[float] | np.ndarray, predicted: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None = None
) -> Agreement:
    """The agreement of counts. ``groups``: what is resampled for the interval of the bias, such as the image of each region.

    Raises ValueError for no pairs, or lists of different lengths.
    """
    x, y = (np.asarray(values, float) for values in (true, predicted))
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"one predicted count for each true one is expected, got {x.shape} and {y.shape}")
    d = y - x
    num, spread = len(d), 1.96 * float(d.std(ddof=1)) if len(d) > 2 else None
    bias = mean_interval(d, groups=groups)
    ccc = concordance(x, y)
    ends = (None, None) if ccc is None else _concordance_interval(x, y, ccc)
    return Agreement(
        num=num,
        bias=bias,
        low=None if spread is None else bias.mean - spread,
        high=None if spread is None else bias.mean + spread,
        error=float(np.abs(d).mean()),
        ccc=ccc,
        ccc_low=ends[0],
        ccc_high=ends[1],
    )


def concordance(x: np.ndarray, y: np.ndarray) -> float | None:
    """Lin's concordance correlation coefficient of two lists of numbers; None where all numbers are the same.

    >>> concordance(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]))
    0.5714285714285714
    """
    apart = float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return 2 * float(((x - x.mean()) * (y - y.mean())).mean()) / apart if apart else None


def _concordance_interval(x: np.ndarray, y: np.ndarray, ccc: float) -> tuple[float | None, float | None]:
    """The 95 % interval by the inverse hyperbolic tangent. (None, None) where it is not defined."""
    num, scale = len(x), float(x.std() * y.std())
    if num < 4 or not scale or abs(ccc) >= 1 - 1e-12 or not ccc:
        return (ccc, ccc) if num >= 4 and abs(ccc) >= 1 - 1e-12 else (None, None)
    r = float(np.corrcoef(x, y)[0, 1])
    u2 = (float(x.mean() - y.mean()) ** 2) / scale
    c2, r2 = ccc**2, r**2
    variance = (
        (1 - r2) * c2 / ((1 - c2) * r2) + 2 * ccc**3 * (1 - ccc) * u2 / (r * (1 - c2) ** 2) - ccc**4 * u2**2 / (2 * r2 * (1 - c2) ** 2)
    ) / (num - 2)
    half = 1.96 * math.sqrt(max(variance, 0.0))
    return math.tanh(math.atanh(ccc) - half), math.tanh(math.atanh(ccc) + half)
