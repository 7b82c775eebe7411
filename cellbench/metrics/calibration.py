"""Calibration: do predicted probabilities agree with observed shares? And what Dice do they promise for an image without truth?

All of it needs histograms only: the pixels of an image by truth (0 background, 1 cell) and predicted probability of a cell (0..255), (2, 256).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from cellbench.metrics.pixel import IGNORE

LOGITS: np.ndarray = np.log((np.arange(256) + 0.5) / (255.5 - np.arange(256)))
"""The logit of each probability 0..255, at the middle of the values that are rounded to it; finite at both ends."""
LEAST_IMAGES = 3
"""Validation images from which a temperature is used, and validation images with cells from which the error of an estimated Dice is stated."""


def expected_calibration_error(calibration: dict[str, list[float]]) -> float:
    """Expected calibration error, 0..1: mean difference of probability and observed share over bins, weighted by pixels (Naeini et al. 2015)."""
    pixels, predicted, observed = (np.array(calibration[key]) for key in ("pixels", "probability", "share_cell"))
    return float((pixels * np.abs(predicted - observed)).sum() / pixels.sum())


def pooled_calibration(each: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The calibration over the pixels of several, each of the same bins: mean probability and observed share by bin."""
    pixels = np.array([one["pixels"] for one in each], float)
    known = np.maximum(pixels.sum(0), 1)
    means = {key: (pixels * np.array([one[key] for one in each])).sum(0) / known for key in ("probability", "share_cell")}
    return {"pixels": pixels.sum(0).tolist(), **{key: values.tolist() for key, values in means.items()}}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is fitted on a run's validation images to correct its probabilities, and its batch norms."""

    temperature: float = 1.0
    """The logit of the probability of a cell is divided by it (Guo et al. 2017). Masks stay the same: a half stays a half.

    1 where it does not help images that it was not fitted to: a few images may share an error that others do not have.
    """
    dice_shift: float = 0.0
    """Mean difference of the true Dice of a validation image and the one that its probabilities promise."""
    dice_error: float | None = None
    """Root mean squared error of the estimated Dice, each validation image by the shift of the others; None with fewer than ``LEAST_IMAGES``."""
    own_share: float = 0.0
    """The share of a tile's own statistics in the head's batch norms (``adapt = "batchnorm"``). Predictions contain it; nothing here uses it."""

    edge_share: float = 0.0
    """The share of a cell below which regions at an image's frame are dropped (``edge_cells = "tuned"``). Likewise."""

    @property
    def is_fitted(self) -> bool:
        """Whether probabilities were compared with the truth."""
        return replace(self, own_share=0.0, edge_share=0.0) != Calibration()

    @classmethod
    def of(cls, images: Sequence[np.ndarray]) -> Calibration:
        """From the histograms (2, 256) of validation images."""
        total = np.sum(images, axis=0) if len(images) else np.zeros((2, 256))
        if not total.any(1).all():  # without both cells and background there is nothing to fit
            return cls()
        made = cls(temperature=fit_temperature(total) if temperature_helps(images) else 1.0)
        known = [one for one in images if one[1].any()]
        missing = np.array([true_dice(one) - made.promised_dice(one.sum(0)) for one in known])
        if len(missing) < LEAST_IMAGES:
            return made
        others = (missing.sum() - missing) / (len(missing) - 1)
        return cls(
            temperature=made.temperature, dice_shift=float(missing.mean()), dice_error=float(np.sqrt(np.mean((missing - others) ** 2)))
        )

    @property
    def table(self) -> np.ndarray:
        """(256,) uint8: the corrected probability of each probability."""
        share = np.asarray(expit(LOGITS / self.temperature))
        return np.clip(np.rint(256 * share - 0.5), 0, 255).astype(np.uint8)

    def corrected(self, levels: np.ndarray) -> np.ndarray:
        """A histogram (2, 256) of corrected probabilities."""
        return np.stack([np.bincount(self.table, one, 256) for one in levels]).astype(np.int64)

    def promised_dice(self, pixels_256: np.ndarray) -> float:
        """The Dice of the mask if each pixel is a cell with its corrected probability, from an image's pixels by probability."""
        share = expit(LOGITS / self.temperature)
        found, expected, both = pixels_256[128:].sum(), (pixels_256 * share).sum(), (pixels_256 * share)[128:].sum()
        return float(2 * both / max(found + expected, 1e-9))

    def estimated_dice(self, pixels_256: np.ndarray) -> float | None:
        """The Dice to expect of an image without truth, 0..1; None where no error can be stated, and where nothing was found."""
        if self.dice_error is None or not pixels_256[128:].any():
            return None
        return min(max(self.promised_dice(pixels_256) + self.dice_shift, 0.0), 1.0)


def temperature_helps(images: Sequence[np.ndarray]) -> bool:
    """Whether temperatures fitted to all images but one lower the mean cross-entropy of the images left out. Histograms (2, 256)."""
    images = [one for one in images if one.any()]
    if len(images) < LEAST_IMAGES:
        return False
    total = np.sum(images, axis=0)
    return sum(cross_entropy(one, fit_temperature(total - one)) - cross_entropy(one, 1.0) for one in images) < 0


def fit_temperature(levels: np.ndarray) -> float:
    """The temperature with the smallest cross-entropy on a histogram (2, 256), 0.1 to 10."""
    from scipy.optimize import minimize_scalar  # takes a tenth of a second

    logs = minimize_scalar(lambda log: cross_entropy(levels, math.exp(log)), bounds=(math.log(0.1), math.log(10)), method="bounded")
    return math.exp(logs.x)


def cross_entropy(levels: np.ndarray, temperature: float) -> float:
    """The mean cross-entropy of a pixel, in nats, from a histogram (2, 256)."""
    scaled = LOGITS / temperature
    return float((levels[1] * np.logaddexp(0, -scaled) + levels[0] * np.logaddexp(0, scaled)).sum() / levels.sum())


def true_dice(levels: np.ndarray) -> float:
    """The Dice of everything but background, from an image's histogram (2, 256)."""
    found, true, both = levels[:, 128:].sum(), levels[1].sum(), levels[1, 128:].sum()
    return float(2 * both / max(found + true, 1))


def histogram(truth: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """The histogram (2, 256) of pixels by truth (0 background, else a cell) and probability of a cell, uint8 of the same shape.

    Without pixels whose truth is ``IGNORE``.
    """
    if truth.max(initial=0) == IGNORE:
        truth, cell = truth[truth != IGNORE], cell[truth != IGNORE]
    return np.bincount((cell + np.uint16(256) * (truth > 0)).ravel(), minlength=512).reshape(2, 256)
