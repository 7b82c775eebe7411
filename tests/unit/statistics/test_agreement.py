"""Agreement of counts, compared with published values and with computations by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr

from cellbench.statistics.agreement import agreement, concordance

WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI_WRIGHT = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]
"""Peak expiratory flow by two meters (Bland and Altman, Lancet 1986, table 1, first readings)."""


def test_the_limits_are_those_of_bland_and_altman() -> None:
    found = agreement(MINI_WRIGHT, WRIGHT)
    assert found.bias.mean == pytest.approx(-2.1, abs=0.05)  # published: -2.1 l/min, standard deviation 38.8
    assert found.low == pytest.approx(-2.12 - 1.96 * 38.8, abs=0.2)
    assert found.high == pytest.approx(-2.12 + 1.96 * 38.8, abs=0.2)
    assert found.error == pytest.approx(np.abs(np.subtract(WRIGHT, MINI_WRIGHT)).mean())


def test_the_concordance_is_the_product_of_correlation_and_accuracy() -> None:
    x, y = np.array(MINI_WRIGHT, float), np.array(WRIGHT, float)
    ratio, shift = y.std() / x.std(), (y.mean() - x.mean()) / np.sqrt(x.std() * y.std())
    accuracy = 2 / (ratio + 1 / ratio + shift**2)  # Lin 1989
    assert concordance(x, y) == pytest.approx(pearsonr(x, y).statistic * accuracy)
    assert agreement(x, y).ccc == pytest.approx(0.943, abs=5e-4)  # as other packages give it for these readings


def test_the_interval_of_the_concordance_has_the_spread_of_resamples() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(50, 10, 200)
    y = x + rng.normal(2, 5, 200)
    found = agreement(x, y)
    drawn = rng.integers(0, 200, (2000, 200))
    low, high = np.quantile([concordance(x[k], y[k]) or 0 for k in drawn], (0.025, 0.975))
    assert found.ccc_low == pytest.approx(low, abs=0.015)
    assert found.ccc_high == pytest.approx(high, abs=0.015)


def test_counts_that_are_all_right_agree_completely() -> None:
    found = agreement([3, 5, 9, 2], [3, 5, 9, 2])
    assert (found.ccc, found.low, found.high, found.error) == (1, 0, 0, 0)


def test_what_cannot_be_computed_is_none() -> None:
    assert agreement([0, 0, 0], [0, 0, 0]).ccc is None
    few = agreement([3, 4], [3, 5])
    assert (few.low, few.high, few.ccc_low) == (None, None, None)
    assert few.bias.mean == 0.5
    assert agreement([5, 5, 5, 5], [4, 5, 6, 5]).ccc == 0  # one of the two does not vary
    with pytest.raises(ValueError, match="one predicted count"):
        agreement([1, 2], [1])


def test_regions_of_one_image_are_one_unit() -> None:
    true, predicted = [1, 2, 3, 4, 5, 6, 7, 8], [1, 3, 3, 6, 6, 6, 9, 8]
    assert agreement(true, predicted).bias.num == 8
    assert agreement(true, predicted, groups=[0, 0, 1, 1, 2, 2, 3, 3]).bias.num == 4
