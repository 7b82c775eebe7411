"""How many test images decide between two models, and what a number of images can decide: the power of the signed-rank test.

Power is the share of repetitions in which the difference would be found. It is forecast by resampling the paired differences that were measured, or
for a normal distribution of a given spread where nothing was measured yet. Checked in ``tests/unit/statistics/test_power.py``: with the forecast
number of images 1,000 simulated comparisons are decided as often as forecast, within 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri

from cellbench.statistics.bootstrap import FEWEST
from cellbench.statistics.hypothesis_tests import EXACT_UP_TO, is_decidable, untied_distribution

POWER = 0.8
"""The usual power to plan for: four of five such comparisons find the difference."""
MOST_IMAGES = 2000
"""More are never labelled to decide between two models; the difference is then too small to matter."""
REPEATS = 1000


def images_to_decide(differences_U: np.ndarray, *, num_tests: int = 1, power: float = POWER, alpha: float = 0.05) -> int | None:
    """The number of units (images, or groups of them) with which two models differ significantly with the given power, if the spread stays.

    ``differences_U``: one model minus the other on each unit. ``num_tests``: comparisons that p is adjusted for. None: fewer than ``FEWEST`` units, no
    difference at all, or more than ``MOST_IMAGES`` are needed.
    """
    d = np.asarray(differences_U, float)
    if len(d) < FEWEST or not d.any():
        return None
    low = fewest_units(num_tests, alpha) - 1  # with so many nothing can be significant
    guess = min(MOST_IMAGES, max(low + 1, _noether(d, num_tests, power, alpha)))
    high = guess
    while power_of(d, high, num_tests=num_tests, alpha=alpha) < power:
        if high >= MOST_IMAGES:
            return None
        low, high = high, min(MOST_IMAGES, max(high + 1, math.ceil(1.3 * high)))
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        if power_of(d, middle, num_tests=num_tests, alpha=alpha) < power:
            low = middle
        else:
            high = middle
    return high


def power_of(differences_U: np.ndarray, num_units: int, *, num_tests: int = 1, alpha: float = 0.05) -> float:
    """The power with ``num_units`` units whose differences are like those given."""
    drawn = np.random.default_rng(0).choice(differences_U, (REPEATS, num_units))
    return _share_decided(drawn, differences_U.mean(), num_tests, alpha)


def _share_decided(drawn_RU: np.ndarray, mean: float, num_tests: int, alpha: float) -> float:
    """The share of rows that a report would call significant, in the direction of ``mean``: ranks and interval of the mean agree."""
    p_R, up_R = signed_rank_p(drawn_RU, np.random.default_rng(1))
    z_R = drawn_RU.mean(axis=1) / np.maximum(drawn_RU.std(axis=1, ddof=1) / math.sqrt(drawn_RU.shape[1]), 1e-12)
    beyond = z_R * np.sign(mean) > ndtri(1 - alpha / 2)
    return float(((p_R * num_tests < alpha) & (up_R == (mean > 0)) & beyond).mean())


def signed_rank_p(differences_RU: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p of each row by the signed-rank test, and whether its ranks are higher above 0. Ties are broken at random, so that one table serves all."""
    repeats, num = differences_RU.shape
    scale = np.abs(differences_RU).max() or 1.0
    noisy = differences_RU + rng.uniform(-1e-9, 1e-9, differences_RU.shape) * scale
    ranks = np.empty((repeats, num), np.int64)
    np.put_along_axis(ranks, np.abs(noisy).argsort(axis=1), np.arange(1, num + 1)[None], axis=1)
    up = np.where(noisy > 0, ranks, 0).sum(axis=1)
    total = num * (num + 1) // 2
    less, higher = np.minimum(up, total - up), 2 * up > total
    if num <= EXACT_UP_TO:
        return np.minimum(1, 2 * untied_distribution(num)[less]), higher
    sd = math.sqrt(num * (num + 1) * (2 * num + 1) / 24)
    return 2 * ndtr((less - total / 2) / sd), higher


def _noether(d: np.ndarray, num_tests: int, power: float, alpha: float) -> int:
    """A first guess of the number of units (Noether 1987), from how often the sum of two differences is positive."""
    sums = d[:, None] + d[None, :]
    share = (sums > 0).mean() + (sums == 0).mean() / 2
    z = ndtri(1 - alpha / num_tests / 2) + ndtri(power)
    return math.ceil(min(float(MOST_IMAGES), float(z**2 / max(3 * (share - 0.5) ** 2, 1e-9))))


def fewest_units(num_tests: int = 1, alpha: float = 0.05) -> int:
    """The number of units from which on any difference can be significant.

    >>> fewest_units(1), fewest_units(36)
    (6, 11)
    """
    return next(num for num in range(1, 200) if is_decidable(num, num_tests, alpha))


@lru_cache(maxsize=64)
def power_of_normal(difference: float, sd: float, num_units: int, num_tests: int = 1, alpha: float = 0.05) -> float:
    """The power to find a mean ``difference`` if the differences of images are normal with standard deviation ``sd``."""
    drawn = np.random.default_rng(0).normal(difference, sd, (REPEATS, num_units))
    return _share_decided(drawn, difference, num_tests, alpha)


TYPICAL_SD = 0.01
"""Standard deviation over images of the difference in Dice between two good models: the median of the 15 pairs of the six best models of README's
leaderboard (``grid --data BCCD``, 14 images), where it is 0.0097, and from 0.0065 to 0.0156 for each pair."""
PLANNED = (0.01, 0.005, 0.002)
"""Differences in Dice for which the power is stated."""


def describe_detectable(sizes: Mapping[str, int]) -> str:
    """What test sets can decide, in a sentence, before anything is trained. ``sizes``: the number of images by a name such as ``test images``."""
    parts = []
    for what, num in sizes.items():
        if num < fewest_units():
            parts.append(f"{num} {what}: none, {fewest_units()} are the least")
            continue
        enough = min(num, MOST_IMAGES)  # from here on all of PLANNED are found in every repetition, whose number times this is in memory
        found = ", ".join(f"{one:g} with {100 * power_of_normal(one, TYPICAL_SD, enough):.0f} %" for one in PLANNED)
        parts.append(f"{num} {what}: {found}")
    return (
        f"power to find a difference in Dice between two models (if it varies by {TYPICAL_SD:g} from image to image, as between good models on "
        f"BCCD): {'; '.join(parts)}"
    )


def doubling_gain(
    sizes: Sequence[int], scores_FU: np.ndarray, *, resamples: int = REPEATS, seed: int = 0
) -> tuple[float, float, float] | None:
    """What twice the largest number of training images would add to the mean score, with its 95 % interval over the test images.

    ``scores_FU``: scores, at most 1, of one model by number of training images (rising) and test image. The distance to 1 is taken to shrink by a power
    of the number of images (Hestness et al. 2017), fitted to all points. None for fewer than two sizes or ``FEWEST`` images, or a perfect score.
    """
    num = scores_FU.shape[1]
    if len(set(sizes)) < 2 or num < FEWEST:
        return None
    x = np.log(np.asarray(sizes, float))
    x = x - x.mean()

    def gains(means_FB: np.ndarray) -> np.ndarray:
        errors = np.maximum(1 - means_FB, 1e-6)
        slopes = x @ (np.log(errors) - np.log(errors).mean(axis=0)) / (x @ x)
        found: np.ndarray = errors[-1] * (1 - 2.0**slopes)
        return found

    drawn = np.random.default_rng(seed).integers(0, num, (resamples, num))
    low, high = np.quantile(gains(scores_FU[:, drawn].mean(axis=2)), (0.025, 0.975))
    return float(gains(scores_FU.mean(axis=1)[:, None])[0]), float(low), float(high)
