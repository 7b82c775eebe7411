"""The records of a comparison: the scores of one model, and the difference between two."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from cellbench.errors import CellbenchError
from cellbench.metrics.pixel import impute_missing, nan_mean
from cellbench.statistics.bootstrap import Interval, negate
from cellbench.statistics.hypothesis_tests import DECIMALS


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelScores:
    """One model's score on each image, once per seed. Raises CellbenchError for infinite scores, repeated images and mismatching lengths.

    ``values``: (num_seeds, num_images), or (num_images,) for one seed. Pool scores of k folds into one row: each image is tested once.
    Ids pair images, so they must mean the same image in every model: compare within one test set.

    NaN: no score, because the image has no cell and none was found. Means leave it out. If only some seeds found something, the others
    have the best score (:func:`cellbench.metrics.pixel.impute_missing`), so an image is NaN for all seeds or for none.
    """

    model: str
    images: tuple[str, ...]
    values: np.ndarray
    groups: tuple[Hashable, ...] | None = None
    """The patient, slide or smear of each image, where known."""
    folds: tuple[Hashable, ...] | None = None
    """The fold that tested each image, where the scores come from cross-validation."""
    lower_is_better: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64, ndmin=2)
        if values.ndim == 2:
            values = impute_missing(values, self.best)
        values.flags.writeable = False
        object.__setattr__(self, "values", values)
        for name in ("images", "groups", "folds"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(given))
                if values.ndim != 2 or len(given) != values.shape[1]:
                    raise CellbenchError(f"scores of {self.model}: {len(given)} {name} do not fit values of shape {values.shape}.")
        if values.size == 0:
            raise CellbenchError(f"scores of {self.model}: no images. Score at least one.")
        if len(set(self.images)) < len(self.images):
            twice = next(image for image in self.images if self.images.count(image) > 1)
            raise CellbenchError(f"scores of {self.model}: image '{twice}' occurs twice. Give seeds as rows, images once.")
        if len(bad := np.flatnonzero(np.isinf(values).any(axis=0))):
            raise CellbenchError(
                f"scores of {self.model}: not a finite number on {len(bad)} of {len(self.images)} images, first '{self.images[bad[0]]}'. "
                "Leave such images out, or define their score."
            )

    @property
    def best(self) -> float:
        """The score, in a comparison, of predicting nothing in an image without a cell."""
        return 0.0 if self.lower_is_better else 1.0

    @property
    def per_image(self) -> np.ndarray:
        """(num_images,): the mean over seeds; NaN where no seed has a score."""
        mean_I: np.ndarray = self.values.mean(axis=0)
        return mean_I

    @property
    def empty(self) -> np.ndarray:
        """(num_images,) bool: the images without a score."""
        empty_I: np.ndarray = np.isnan(self.values).any(axis=0)
        return empty_I

    @property
    def mean(self) -> float:
        """Over the images that have a score; NaN where none has."""
        return nan_mean(self.values)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Model ``a`` minus model ``b``, on the images that both have."""

    a: str
    b: str
    mean_a: float
    mean_b: float
    """Mean of each model over the images for which it has a score."""
    interval: Interval
    """Interval of the mean difference a - b by the paired bootstrap. For this pair alone, not adjusted for the number of pairs."""
    p: float
    """Wilcoxon signed-rank, two-sided."""
    p_adjusted: float
    """After Holm over ``num_tests`` pairs; ``p`` itself where one pair was tested alone."""
    num_tests: int
    effect: float
    """Matched-pairs rank-biserial correlation, -1 to 1, positive where ``a`` is higher."""
    wins: int
    """Images where ``a`` is better: higher, or lower if ``lower_is_better``."""
    ties: int
    losses: int
    p_folds: float | None
    """Corrected resampled t-test over folds (Nadeau & Bengio 2003), where both models share folds. Not adjusted."""
    lower_is_better: bool
    notes: tuple[str, ...]
    num_a: int = 0
    num_b: int = 0
    """Numbers of images of ``mean_a`` and ``mean_b``."""

    @property
    def num_images(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def alpha(self) -> float:
        """1 - level, without the last bit that makes 1 - 0.95 more than 0.05."""
        return round(1 - self.interval.level, DECIMALS)

    @property
    def significant(self) -> bool:
        """Whether it is significant: adjusted p below alpha, the interval excludes 0, and mean and ranks have the same sign."""
        same_way = self.effect * self.interval.mean > 0
        return self.p_adjusted < self.alpha and self.interval.excludes_zero and same_way

    @property
    def better(self) -> str | None:
        """The significantly better model, or None."""
        return (self.a if (self.interval.mean > 0) != self.lower_is_better else self.b) if self.significant else None


def swap_sides(d: Difference) -> Difference:
    """The same comparison with ``a`` and ``b`` exchanged."""
    return replace(
        d,
        a=d.b,
        b=d.a,
        mean_a=d.mean_b,
        mean_b=d.mean_a,
        num_a=d.num_b,
        num_b=d.num_a,
        interval=negate(d.interval),
        effect=-d.effect + 0.0,
        wins=d.losses,
        losses=d.wins,
    )


def seed_sd(values: np.ndarray) -> float | None:
    """The standard deviation (n - 1) of the seeds' means, of scores (num_seeds, num_images).

    Over images with a score; None for one seed, or where no image has a score.
    """
    known = values[:, ~np.isnan(values).any(axis=0)]
    return float(known.mean(axis=1).std(ddof=1)) if len(values) > 1 and known.size else None
