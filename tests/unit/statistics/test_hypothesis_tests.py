"""Tests of paired differences, against scipy, statsmodels and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats as st
from made_up_scores import scores

from cellbench.statistics.comparison import compare
from cellbench.statistics.hypothesis_tests import fold_test, holm_adjust, is_decidable, midranks, smallest_p, wilcoxon_test

pytestmark = pytest.mark.filterwarnings("error")


def test_midranks_are_scipys(rng):
    values = rng.integers(0, 6, (5, 40)) / 3
    assert np.array_equal(midranks(values), st.rankdata(values, axis=1))


# Wilcoxon on R's ?wilcox.test: depression scores of nine patients (Hollander & Wolfe 1973, p. 29): V = 40.
BEFORE = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
AFTER = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]


def test_wilcoxon_of_a_textbook():
    d = compare(scores("before", BEFORE), scores("after", AFTER))
    assert (d.p, d.effect) == pytest.approx((2 * 0.01953125, (40 - 5) / 45))


def test_wilcoxon_of_cramers_maize():
    """Heights of 15 pairs of Zea mays, as in scipy's own documentation."""
    p, _ = wilcoxon_test(np.array([[6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]]))
    assert p[0] == pytest.approx(0.041259765625)


@pytest.mark.parametrize("num", [1, 2, 7, 30, 50])
def test_wilcoxon_is_scipys_exact_one_without_ties(rng, num):
    d = rng.normal(0.3, 1, num)
    assert wilcoxon_test(d[None])[0][0] == pytest.approx(st.wilcoxon(d, method="exact").pvalue)


@pytest.mark.parametrize("_", range(3))
def test_wilcoxon_is_exact_with_ties_and_zeros(rng, _):
    """Against scipy's full enumeration of signs."""
    d = np.array([0.0, *rng.integers(-2, 5, 8)])
    enumerated = st.wilcoxon(d, zero_method="pratt", method=st.PermutationMethod(n_resamples=2**9))
    assert wilcoxon_test(d[None])[0][0] == pytest.approx(enumerated.pvalue)


def test_wilcoxon_is_scipys_pratt_for_many_images(rng):
    d = np.round(rng.normal(0.1, 1, (6, 300)), 1)  # ties and zeros
    scipys = st.wilcoxon(d, zero_method="pratt", method="asymptotic", correction=False, axis=1)
    assert (d == 0).any()
    assert wilcoxon_test(d)[0] == pytest.approx(scipys.pvalue)


def test_exact_and_normal_wilcoxon_agree_at_the_switch(rng):
    d = rng.normal(0.3, 1, 50)
    normal = st.wilcoxon(d, method="asymptotic").pvalue
    assert wilcoxon_test(d[None])[0][0] == pytest.approx(normal, rel=0.1)


def test_wilcoxon_finds_nothing_in_noise_as_often_as_it_says(rng):
    p, _ = wilcoxon_test(rng.normal(size=(4000, 25)))
    assert 0.035 < np.mean(p < 0.05) < 0.065


def test_the_same_scores_give_p_one_and_say_so():
    d = compare(scores("a", [0.9, 0.8, 0.7, 0.6]), scores("b", [0.9, 0.8, 0.7, 0.6]))
    assert (d.p, d.effect, d.interval.low, d.interval.high, d.ties) == (1, 0, 0, 0, 4)
    assert "the same score on every image" in d.notes


def test_fold_test_is_a_t_test_with_a_wider_variance(rng):
    """t over sqrt(1 + J * test/train), J = 5 folds, a quarter as many test as training images."""
    folds = np.repeat(np.arange(5), 10)
    d = rng.normal(0.3, 1, 50)
    plain = st.ttest_1samp([d[folds == n].mean() for n in range(5)], 0).statistic
    assert fold_test(d[None], folds.tolist())[0] == pytest.approx(2 * st.t.sf(abs(plain) / math.sqrt(1 + 5 / 4), 4))


def test_holm_of_a_worked_example():
    assert holm_adjust([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_is_statsmodels(rng):
    from statsmodels.stats.multitest import multipletests

    p = np.round(rng.random(200) ** 4, 3)  # with ties
    assert holm_adjust(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_of_nothing_is_nothing():
    assert holm_adjust([]) == []


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_holm_refuses_values_outside_0_to_1(bad):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        holm_adjust([0.1, bad])


@pytest.mark.parametrize(("num_units", "num_tests"), [(3, 1), (5, 1), (6, 1), (6, 3), (9, 15), (10, 36), (11, 36)])
def test_what_can_be_decided_follows_from_the_least_p_of_the_signed_rank_test(num_units, num_tests):
    """The least p is scipy's, of differences that all point one way; Holm's first step multiplies it by the number of pairs."""
    least = st.wilcoxon(np.arange(num_units) + 1.0, mode="exact").pvalue
    assert smallest_p(num_units, num_tests) == min(1, least * num_tests)
    assert is_decidable(num_units, num_tests) == (least * num_tests < 0.05)
