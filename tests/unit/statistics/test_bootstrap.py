"""Intervals of means, against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats as st
from made_up_scores import scores

from cellbench.statistics.bootstrap import bootstrap_intervals, mean_interval
from cellbench.statistics.comparison import compare

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("num", [12, 159])
def test_interval_of_a_mean_is_scipys_bca(rng, num):
    """Not for 4 to 6 images: there many resamples equal the mean but for their last bit, which scipy counts as above or below it."""
    x = rng.beta(20, 2, num)
    scipys = st.bootstrap((x,), np.mean, n_resamples=1999, rng=np.random.default_rng(5)).confidence_interval
    ours = mean_interval(x, resamples=1999, seed=5)
    assert (ours.low, ours.high) == pytest.approx(tuple(scipys), abs=1e-12)


def test_interval_of_a_difference_is_scipys_bca_of_the_differences(dice):
    d = compare(scores("a", dice[0]), scores("b", dice[1]), resamples=1999, seed=5)
    scipys = st.bootstrap((dice[0] - dice[1],), np.mean, n_resamples=1999, rng=np.random.default_rng(5)).confidence_interval
    assert (d.interval.low, d.interval.high) == pytest.approx(tuple(scipys), abs=1e-12)


def test_interval_over_groups_is_scipys_bca_over_groups(rng):
    """scipy resamples rows of (sum, count); the statistic is their ratio."""
    groups = np.repeat(np.arange(15), rng.integers(1, 9, 15))
    x = rng.normal(size=15)[groups] + 0.1 * rng.normal(size=len(groups))
    sums, counts = np.bincount(groups, x), np.bincount(groups)

    def ratio(s, c, axis=-1):
        return s.sum(axis=axis) / c.sum(axis=axis)

    scipys = st.bootstrap((sums, counts), ratio, paired=True, n_resamples=1999, rng=np.random.default_rng(5)).confidence_interval
    ours = mean_interval(x, groups=groups.tolist(), resamples=1999, seed=5)
    assert (ours.low, ours.high) == pytest.approx(tuple(scipys), abs=1e-12)


def test_grouped_images_widen_the_interval(rng):
    groups = np.repeat(np.arange(20), 8)
    x = rng.normal(size=20)[groups] + 0.1 * rng.normal(size=160)
    alone, grouped = mean_interval(x), mean_interval(x, groups=groups.tolist())
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_groups_of_one_image_change_nothing(rng):
    x = rng.normal(size=30)
    alone, grouped = mean_interval(x), mean_interval(x, groups=[f"p{n}" for n in range(30)])
    assert (alone.low, alone.high) == (grouped.low, grouped.high)


@pytest.mark.parametrize(("num", "least"), [(10, 0.86), (40, 0.91), (159, 0.92)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(rng, num, least):
    found = bootstrap_intervals(rng.beta(20, 2, (1000, num)), np.ones(num), resamples=999)
    covered = np.mean([i.low <= 20 / 22 <= i.high for i in found])
    assert least < covered < 0.97


def test_constant_scores_give_a_point_and_say_so():
    i = mean_interval([0.9] * 20)
    assert (i.low, i.high, i.mean) == pytest.approx((0.9, 0.9, 0.9))
    assert "constant" in i.note


def test_one_image_gives_no_interval():
    i = mean_interval([0.9])
    assert (i.mean, i.low, i.high, i.note) == (0.9, None, None, "1 image: no interval")


def test_one_group_gives_no_interval():
    assert mean_interval([0.9, 0.8], groups=["p", "p"]).note == "1 group: no interval"


@pytest.mark.parametrize(("num", "rough"), [(4, True), (5, True), (9, True), (10, False)])
def test_few_images_give_a_rough_interval(rng, num, rough):
    found = mean_interval(rng.normal(size=num))
    assert ("rough" in found.note) == found.rough == rough


@pytest.mark.parametrize("num", [2, 3])
def test_two_or_three_images_give_no_interval(rng, num):
    found = mean_interval(rng.normal(size=num))
    assert (found.low, found.high, found.note) == (None, None, f"{num} images: too few for an interval")
    assert mean_interval([0.9] * num).low is None
    d = compare(scores("a", rng.random(num) + 1), scores("b", np.zeros(num)))
    assert (d.interval.low, d.interval.excludes_zero) == (None, False)
    assert mean_interval(rng.normal(size=9), groups=[k % num for k in range(9)]).low is None


@pytest.mark.parametrize("bad", [[], [0.9, math.nan], [math.inf, 0.1], [[0.1, 0.2]]])
def test_an_interval_of_nothing_or_nan_is_refused(bad):
    with pytest.raises(ValueError, match="one finite number an image"):
        mean_interval(bad)
