"""Temperature scaling finds the temperature, keeps masks, and calibrated probabilities promise the Dice that images have."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from cellbench.metrics.calibration import LOGITS, Calibration, expected_calibration_error, fit_temperature, histogram, true_dice
from cellbench.metrics.pixel import IGNORE


def drawn(temperature: float, seed: int, spread: float = 3.0, num: int = 40_000) -> np.ndarray:
    """An image's histogram: logits are ``temperature`` times too large."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, spread, num)
    truth = (rng.random(num) < expit(logit)).astype(np.uint8)
    return histogram(truth, np.rint(255 * expit(logit * temperature)).astype(np.uint8))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_of_the_logits_is_found(temperature: float) -> None:
    assert fit_temperature(drawn(temperature, 0, spread=1.5)) == pytest.approx(temperature, rel=0.08)  # few at the ends, where 8 bits clip


def test_correction_keeps_masks_and_lowers_the_calibration_error() -> None:
    images = [drawn(2.5, seed) for seed in range(4)]
    made = Calibration.of(images)
    assert np.array_equal(made.table >= 128, np.arange(256) >= 128)
    assert (np.diff(made.table.astype(int)) >= 0).all()

    def error(levels: np.ndarray) -> float:
        share = levels[1] / np.maximum(levels.sum(0), 1)
        return expected_calibration_error(
            {"pixels": levels.sum(0).tolist(), "probability": (np.arange(256) / 255).tolist(), "share_cell": share.tolist()}
        )

    total = drawn(2.5, 9)
    assert error(made.corrected(total)) < error(total) / 2
    assert made.corrected(total).sum() == total.sum()


def test_without_a_correction_probabilities_stay_as_they_are() -> None:
    assert np.array_equal(Calibration().table, np.arange(256))
    assert np.isfinite(LOGITS).all()


def test_the_estimated_dice_is_near_the_true_one_with_the_error_that_is_stated() -> None:
    images = [drawn(2.0, seed, spread) for seed, spread in enumerate(np.linspace(1, 6, 8))]
    made = Calibration.of(images)
    others = [drawn(2.0, 100 + seed, spread) for seed, spread in enumerate(np.linspace(1.2, 5.5, 8))]
    pairs = np.array([(made.estimated_dice(one.sum(0)), true_dice(one)) for one in others])
    assert made.dice_error is not None
    assert np.ptp(pairs[:, 1]) > 0.15
    assert np.sqrt(np.mean((pairs[:, 0] - pairs[:, 1]) ** 2)) < 2 * made.dice_error < 0.05


def test_the_true_dice_is_that_of_the_masks() -> None:
    rng = np.random.default_rng(0)
    truth, cell = rng.integers(0, 2, 999, dtype=np.uint8), rng.integers(0, 256, 999, dtype=np.uint8)
    found = cell >= 128
    assert true_dice(histogram(truth, cell)) == pytest.approx(2 * (found & (truth == 1)).sum() / (found.sum() + truth.sum()))


def test_pixels_of_unknown_truth_are_in_no_histogram() -> None:
    truth, cell = np.array([[0, 1], [IGNORE, IGNORE]], np.uint8), np.array([[3, 200], [7, 250]], np.uint8)
    assert np.argwhere(histogram(truth, cell)).tolist() == [[0, 3], [1, 200]]


@pytest.mark.parametrize("num", [0, 1, 2])
def test_too_few_validation_images_give_no_estimate(num: int) -> None:
    made = Calibration.of([drawn(2.0, seed) for seed in range(num)])
    assert made.dice_error is None
    assert made.estimated_dice(drawn(2.0, 9).sum(0)) is None


def test_validation_images_without_cells_change_nothing() -> None:
    assert Calibration.of([histogram(np.zeros(9, np.uint8), np.arange(9, dtype=np.uint8))] * 4) == Calibration()


def test_a_temperature_that_does_not_help_other_images_is_not_used() -> None:
    one_differs = [drawn(0.5, 0, 1.5, num=2_000_000), *(drawn(2.0, seed, 1.5) for seed in (1, 2, 3))]
    assert fit_temperature(np.sum(one_differs, axis=0)) < 0.8
    assert Calibration.of(one_differs).temperature == 1
    assert Calibration.of([drawn(2.0, seed, 1.5) for seed in range(4)]).temperature == pytest.approx(2, rel=0.1)


def test_two_validation_images_give_no_temperature() -> None:
    assert Calibration.of([drawn(2.0, seed) for seed in range(2)]).temperature == 1
