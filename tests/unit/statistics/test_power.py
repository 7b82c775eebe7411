"""Power and equivalence: the forecast number of images decides as often as forecast, by simulation with the test that reports use."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, wilcoxon

from cellbench.statistics.comparison import compare
from cellbench.statistics.hypothesis_tests import equivalence_test, wilcoxon_test
from cellbench.statistics.power import (
    MOST_IMAGES,
    PLANNED,
    POWER,
    TYPICAL_SD,
    describe_detectable,
    doubling_gain,
    fewest_units,
    images_to_decide,
    power_of,
    power_of_normal,
    signed_rank_p,
)
from cellbench.statistics.scores import ModelScores

QUANTILES = norm.ppf((np.arange(400) + 0.5) / 400)
"""A population without sampling error."""


@pytest.mark.parametrize(("mean", "num_tests"), [(0.5, 1), (0.5, 10), (0.8, 3), (0.3, 1)])
def test_with_the_forecast_number_a_thousand_comparisons_are_decided_as_often_as_forecast(mean: float, num_tests: int) -> None:
    num = images_to_decide(mean + QUANTILES, num_tests=num_tests)
    assert num is not None
    forecast = power_of(mean + QUANTILES, num, num_tests=num_tests)
    drawn = np.random.default_rng(7).normal(mean, 1, (1000, num))
    decided = (wilcoxon_test(drawn)[0] * num_tests < 0.05).mean()
    assert abs(decided - forecast) < 0.05
    assert POWER - 0.01 <= forecast < POWER + 0.1


def test_the_forecast_is_about_what_a_report_calls_significant() -> None:
    """The whole comparison of two models: ranks, interval and direction; 300 of them."""
    images = tuple(f"i{k}" for k in range(30))
    rng = np.random.default_rng(9)
    decided = []
    for _ in range(300):
        a, b = (
            ModelScores(model="a", images=images, values=0.9 + rng.normal(0.006, 0.01, 30)),
            ModelScores(model="b", images=images, values=np.full(30, 0.9)),
        )
        decided.append(compare(a, b, resamples=299).significant)
    assert abs(np.mean(decided) - power_of(0.006 + 0.01 * QUANTILES, 30)) < 0.05


def test_skewed_differences_are_forecast_too() -> None:
    population = np.quantile(np.random.default_rng(0).gamma(2, 1, 100_000), np.linspace(0.0005, 0.9995, 1000)) - 1.2
    num = images_to_decide(population)
    assert num is not None
    drawn = np.random.default_rng(8).gamma(2, 1, (1000, num)) - 1.2
    assert abs((wilcoxon_test(drawn)[0] < 0.05).mean() - power_of(population, num)) < 0.05


def test_the_fast_p_is_that_of_scipy() -> None:
    drawn = np.random.default_rng(1).normal(0.3, 1, (20, 12))
    expected = [wilcoxon(row, method="exact").pvalue for row in drawn]
    np.testing.assert_allclose(signed_rank_p(drawn, np.random.default_rng(0))[0], expected)


def test_no_difference_and_few_images_give_no_number() -> None:
    assert images_to_decide(np.zeros(20)) is None
    assert images_to_decide(np.array([0.1, 0.2, 0.1])) is None
    assert images_to_decide(np.concatenate([QUANTILES, -QUANTILES])) is None, f"more than {MOST_IMAGES}"
    assert images_to_decide(np.full(6, 0.1)) == fewest_units() == 6


def test_a_larger_spread_or_more_comparisons_need_more_images() -> None:
    few, many = images_to_decide(1 + QUANTILES), images_to_decide(1 + 2 * QUANTILES)
    adjusted = images_to_decide(1 + QUANTILES, num_tests=20)
    assert few is not None
    assert many is not None
    assert adjusted is not None
    assert few < adjusted < many
    assert power_of_normal(0.01, 0.01, 14) > power_of_normal(0.005, 0.01, 14) > power_of_normal(0.002, 0.01, 14)


def test_equivalence_is_claimed_wrongly_in_at_most_one_case_of_twenty() -> None:
    rng = np.random.default_rng(2)
    at_the_margin, equal = rng.normal(0.005, 0.004, (1000, 14)), rng.normal(0, 0.003, (1000, 14))
    assert (equivalence_test(at_the_margin, 0.005) < 0.05).mean() < 0.065
    assert (equivalence_test(-at_the_margin, 0.005) < 0.05).mean() < 0.065
    assert (equivalence_test(equal, 0.005) < 0.05).mean() > 0.95


def test_equivalence_is_two_one_sided_tests_of_scipy() -> None:
    d = np.random.default_rng(3).normal(0.001, 0.004, 15)
    sides = [wilcoxon(d + 0.005, alternative="greater").pvalue, wilcoxon(d - 0.005, alternative="less").pvalue]
    assert equivalence_test(d[None], 0.005)[0] == pytest.approx(max(sides))


def test_what_doubling_gives_is_read_off_a_power_law() -> None:
    sizes = [5, 10, 20, 40]
    rng = np.random.default_rng(4)
    hard = rng.uniform(0.5, 1.5, 30)
    scores = np.array([1 - 0.4 * size**-0.5 * hard for size in sizes])
    gain = doubling_gain(sizes, scores)
    assert gain is not None
    true = float((0.4 * 40**-0.5 * (1 - 2**-0.5) * hard).mean())
    assert gain[0] == pytest.approx(true, rel=1e-6)
    assert gain[1] < true < gain[2]
    assert doubling_gain([20], scores[2:3]) is None
    flat = doubling_gain(sizes, np.tile(scores[-1], (4, 1)))
    assert flat is not None
    assert flat == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_interval_of_what_doubling_gives_covers_a_planted_gain() -> None:
    rng, sizes, covered, estimates = np.random.default_rng(6), [5, 10, 20, 40], 0, []
    true = 0.3 * 40**-0.4 * (1 - 2**-0.4)
    for _ in range(100):
        hard = rng.gamma(4, 1 / 4, 20)  # images differ, and each varies from size to size
        scores = np.array([1 - 0.3 * size**-0.4 * hard * np.exp(rng.normal(-0.01, 0.15, 20)) for size in sizes])
        mean, low, high = doubling_gain(sizes, scores, resamples=200) or (0.0, 0.0, 0.0)
        covered += low <= true <= high
        estimates.append(mean)
    assert np.mean(estimates) == pytest.approx(true, rel=0.05)
    assert 85 <= covered <= 99


def test_what_a_test_set_can_decide_is_said_before_training() -> None:
    assert describe_detectable({"test images": 3}).endswith(": 3 test images: none, 6 are the least")
    said = describe_detectable({"test images": 14})
    shares = [int(part.split()[0]) for part in said.split(" with ")[1:]]
    assert "14 test images: 0.01 with " in said
    rng = np.random.default_rng(0)
    decided = [100 * np.mean([wilcoxon(rng.normal(one, TYPICAL_SD, 14)).pvalue <= 0.05 for _ in range(400)]) for one in PLANNED]
    assert shares == pytest.approx(decided, abs=7)
