"""Bootstrap confidence intervals of mean scores over images, or over groups of images.

Intervals are BCa (Efron 1987) by scipy's definitions: with one score a unit and the same seed the ends equal those of
``scipy.stats.bootstrap``, but all rows share one matrix of resamples, so that 630 pairs of models cost one draw and one matrix product.
Results are never NaN: a note says why an interval is missing, a point, or rough.

Shapes: M rows (models), P rows or pairs of rows, I images, U units (images or groups of images), B resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri

RESAMPLES = 9999
FEWEST = 4  # units; fewer give no interval: with two or three it would miss the mean in half or a third of all cases
ROUGH_BELOW = 10  # units; see the coverage in ``mean_interval``
CHUNK = 256  # pairs at a time: 256 x 9999 resampled differences are 20 MiB


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval, in the scores' own unit. Where there is none, both ends are None and ``note`` says why."""

    mean: float
    low: float | None
    high: float | None
    num: int
    """Units resampled: images, or groups of images."""
    note: str = ""
    level: float = 0.95
    unit: str = "image"
    """What was resampled: 'image' or 'group'."""

    @property
    def rough(self) -> bool:
        """Whether the interval is based on so few units that it is likely too narrow."""
        return self.low is not None and self.num < ROUGH_BELOW

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def negate(one: Interval) -> Interval:
    """The interval of minus the mean."""
    ends = (None, None) if one.low is None or one.high is None else (-one.high + 0.0, -one.low + 0.0)
    return replace(one, mean=-one.mean + 0.0, low=ends[0], high=ends[1])


def mean_interval(
    scores: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of one score per image, with its BCa bootstrap interval. Raises ValueError for no scores, NaN, or a level outside (0, 1).

    With ``groups`` (one label per image) whole groups are resampled: images of one patient are correlated, and treating them as independent
    would make intervals too narrow. The mean is over images either way.

    Simulated coverage of 95 % intervals over normal and Dice-like scores: 2 images 49 %, 3 71 %, 4 78 %, 5 80 to 87 %, 10 90 %, 20 92 %, 159
    94 to 95 %. So fewer than 4 units give no interval, and fewer than 10 a rough one, which is noted.
    """
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"scores must be one finite number an image; got shape {x.shape}, {np.sum(~np.isfinite(x))} not finite")
    if groups is not None and len(groups) != len(x):
        raise ValueError(f"{len(groups)} groups for {len(x)} scores")
    unit_I = unit_numbers(range(len(x)) if groups is None else groups)
    unit = "image" if groups is None else "group"
    return bootstrap_intervals(unit_sums(x[None], unit_I), np.bincount(unit_I), unit=unit, level=level, resamples=resamples, seed=seed)[0]


def unit_labels(images: Sequence[Hashable], groups: Sequence[Hashable]) -> tuple[Hashable, ...] | None:
    """The unit of observation of each image: its group, or the image itself if it has none. None if no image has a group.

    >>> unit_labels(["a", "b", "c"], ["p", "p", ""])
    ('p', 'p', ('image', 'c'))
    """
    # A pair, since an image and a group may have the same name.
    return tuple(group or ("image", image) for image, group in zip(images, groups, strict=True)) if any(groups) else None


def unit_numbers(labels: Sequence[Hashable]) -> np.ndarray:
    """(num_images,): the number of each image's unit, 0, 1, ... in the order of their first image."""
    number = {label: u for u, label in enumerate(dict.fromkeys(labels))}
    return np.array([number[label] for label in labels])


def unit_sums(x_PI: np.ndarray, unit_I: np.ndarray) -> np.ndarray:
    """(P, U): each row summed over the images of each unit."""
    if unit_I.max() + 1 == len(unit_I):  # every image is its own unit, in order
        return x_PI
    order = np.argsort(unit_I, kind="stable")
    return np.add.reduceat(x_PI[:, order], np.flatnonzero(np.diff(unit_I[order], prepend=-1)), axis=1)


def bootstrap_intervals(
    sums_MU: np.ndarray,
    counts_U: np.ndarray,
    *,
    pairs_P2: np.ndarray | None = None,
    unit: str = "image",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """One interval per row, or per pair (first minus second).

    ``sums_MU``: the sum of scores over each unit's images; ``counts_U``: how many images that is. Means are sum of sums over sum of counts,
    so a unit's weight is its number of images.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    num = len(counts_U)
    same = 1e-12 * float(np.abs(sums_MU).max())
    few = num < FEWEST
    means_MB = np.empty((len(sums_MU), 0)) if few else _resampled_means(sums_MU, counts_U, resamples, seed)
    out = []
    for start in range(0, len(sums_MU) if pairs_P2 is None else len(pairs_P2), CHUNK):
        chunk = slice(start, start + CHUNK)
        if pairs_P2 is None:
            sums_PU, boot_PB = sums_MU[chunk], means_MB[chunk].copy()
        else:
            first, second = pairs_P2[chunk].T
            sums_PU, boot_PB = sums_MU[first] - sums_MU[second], means_MB[first] - means_MB[second]
        mean_P = sums_PU.sum(axis=1) / counts_U.sum()
        constant_P = (np.abs(sums_PU - mean_P[:, None] * counts_U) <= same).all(axis=1)
        low_P, high_P = (mean_P, mean_P) if few else _bca(mean_P, boot_PB, _acceleration(sums_PU, counts_U), level, same)
        low_P, high_P = np.where(constant_P, mean_P, low_P), np.where(constant_P, mean_P, high_P)
        # An end at 1e-17 is rounding, and would "exclude" 0.
        mean_P, low_P, high_P = (np.where(np.abs(x) <= same, 0.0, x) for x in (mean_P, low_P, high_P))
        for mean, low, high, constant in zip(mean_P.tolist(), low_P.tolist(), high_P.tolist(), constant_P.tolist(), strict=True):
            if few:
                note = f"{num} {unit}{'s: too few for an' if num > 1 else ': no'} interval"
                out.append(Interval(mean=mean, low=None, high=None, num=num, note=note, level=level, unit=unit))
                continue
            rough = f"{num} {unit}s: a rough interval, likely too narrow" if num < ROUGH_BELOW else ""
            note = f"constant over all {num} {unit}s: the interval is a point" if constant else rough
            out.append(Interval(mean=mean, low=low, high=high, num=num, note=note, level=level, unit=unit))
    return out


def _resampled_means(sums_MU: np.ndarray, counts_U: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(M, B): each row's mean in each resample of the units."""
    num = len(counts_U)
    step = max(1, 4_000_000 // num)  # 32 MB of weights at a time
    draws = (draw_units(num, resamples, seed),) if resamples <= step else _draws(num, resamples, seed, step)
    both = np.vstack([sums_MU, counts_U])  # one pass over the weights, which are expensive to read
    drawn = np.concatenate([both @ weights_BU.T.astype(np.float64) for weights_BU in draws], axis=1)
    means_MB: np.ndarray = drawn[:-1] / drawn[-1]
    return means_MB


def _draws(num: int, resamples: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """Count of each unit in each resample, in arrays of at most ``step`` resamples: (step, num). The mean is 1, so counts never exceed 255."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num).astype(np.uint8)


@lru_cache(maxsize=4)  # pairs with different image sets are resampled one by one, mostly with the same few sizes
def draw_units(num: int, resamples: int, seed: int) -> np.ndarray:
    """How often each unit is drawn in each resample: (resamples, num) uint8, to be read only."""
    return next(_draws(num, resamples, seed, resamples))


def _acceleration(sums_PU: np.ndarray, counts_U: np.ndarray) -> np.ndarray:
    """(P,): skewness of the leave-one-unit-out means over six; within -1/6..1/6."""
    without_PU = (sums_PU.sum(axis=1, keepdims=True) - sums_PU) / (counts_U.sum() - counts_U)
    d_PU = without_PU.mean(axis=1, keepdims=True) - without_PU
    square_PU = d_PU * d_PU  # ** 3 goes through pow, ten times slower
    squares = square_PU.sum(axis=1)
    acceleration_P: np.ndarray = (square_PU * d_PU).sum(axis=1) / (6 * np.where(squares > 0, squares, 1) ** 1.5)
    return acceleration_P


def _bca(mean_P: np.ndarray, boot_PB: np.ndarray, acceleration_P: np.ndarray, level: float, same: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals. Resampled means within ``same`` of the mean count half below; ``boot_PB`` is sorted in place."""
    boot_PB.sort(axis=1)
    num = boot_PB.shape[1]
    below = np.count_nonzero(boot_PB < mean_P[:, None] - same, axis=1)
    upto = np.count_nonzero(boot_PB <= mean_P[:, None] + same, axis=1)
    bias_P = ndtri(np.clip((below + upto) / (2 * num), 0.5 / num, 1 - 0.5 / num))
    ends = []
    for z in (ndtri((1 - level) / 2), ndtri((1 + level) / 2)):
        # |acceleration| <= 1/6, so only levels near 1 with a very skewed sample could reach the clip.
        z_P = bias_P + (bias_P + z) / np.maximum(1 - acceleration_P * (bias_P + z), 0.05)
        at = ndtr(z_P) * (num - 1)
        under = np.floor(at).astype(int)
        row = np.arange(len(boot_PB))
        lower, upper = boot_PB[row, under], boot_PB[row, np.minimum(under + 1, num - 1)]
        ends.append(lower + (upper - lower) * (at - under))
    return ends[0], ends[1]
