"""Intervals, paired tests and rankings, against scipy, statsmodels and published numbers."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import scipy.stats as st

from cellbench.errors import CellbenchError
from cellbench.statistics.bootstrap import bootstrap_intervals, mean_interval
from cellbench.statistics.comparison import compare, compare_all
from cellbench.statistics.hypothesis_tests import fold_test, holm_adjust, is_decidable, smallest_p, wilcoxon_test
from cellbench.statistics.ranking import critical_difference, marginal_scores
from cellbench.statistics.scores import ModelScores

pytestmark = pytest.mark.filterwarnings("error")

# Wilcoxon on R's ?wilcox.test: depression scores of nine patients (Hollander & Wolfe 1973, p. 29): V = 40.
BEFORE = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
AFTER = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]

# Ranks of Demsar 2006, table 6: C4.5, C4.5+m, C4.5+cf, C4.5+m+cf on 14 data sets.
DEMSAR = np.array(
    [
        [4, 1, 4, 4, 4, 1, 3, 2.5, 4, 2.5, 4, 3, 4, 3],
        [3, 2, 1, 1, 2, 2.5, 2, 2.5, 3, 2.5, 2.5, 2, 1, 1],
        [2, 3, 2, 3, 3, 4, 4, 4, 2, 2.5, 1, 4, 2, 4],
        [1, 4, 3, 2, 1, 2.5, 1, 1, 1, 2.5, 2.5, 1, 3, 2],
    ]
)


def scores(name, values, **more):
    values = np.atleast_2d(values)
    return ModelScores(**{"model": name, "images": [f"{n}.png" for n in range(values.shape[1])], "values": values} | more)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def dice(rng):
    """(36, 159): models that share easy and hard images, as on BCCD."""
    return rng.beta(20, 2, 159) - 0.001 * np.arange(36)[:, None] + rng.normal(0, 0.01, (36, 159))


def numbers(record):
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from numbers(value)
        elif isinstance(value, float):
            yield value


# Intervals


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


@pytest.mark.parametrize(("num_units", "num_tests"), [(3, 1), (5, 1), (6, 1), (6, 3), (9, 15), (10, 36), (11, 36)])
def test_what_can_be_decided_follows_from_the_least_p_of_the_signed_rank_test(num_units, num_tests):
    """The least p is scipy's, of differences that all point one way; Holm's first step multiplies it by the number of pairs."""
    least = st.wilcoxon(np.arange(num_units) + 1.0, mode="exact").pvalue
    assert smallest_p(num_units, num_tests) == min(1, least * num_tests)
    assert is_decidable(num_units, num_tests) == (least * num_tests < 0.05)


@pytest.mark.parametrize("bad", [[], [0.9, math.nan], [math.inf, 0.1], [[0.1, 0.2]]])
def test_an_interval_of_nothing_or_nan_is_refused(bad):
    with pytest.raises(ValueError, match="one finite number an image"):
        mean_interval(bad)


# One pair


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


def test_exact_and_normal_wilcoxon_meet_where_one_hands_over(rng):
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


def test_a_tie_survives_the_last_bit_of_a_mean_over_seeds():
    a = scores("a", [[0.1, 0.5], [0.2, 0.6], [0.3, 0.7]])  # sums in another order differ in the last bit
    b = scores("b", [[0.3, 0.7], [0.2, 0.6], [0.1, 0.5]])
    assert (a.per_image != b.per_image).any()
    d = compare(a, b)
    assert (d.ties, d.interval.excludes_zero) == (2, False)


def test_seeds_are_repeats_not_images(rng):
    """Ten copies of a seed are no more evidence than one."""
    a, b = rng.normal(0.1, 1, 20), rng.normal(0, 1, 20)
    once = compare(scores("a", a), scores("b", b))
    ten = compare(scores("a", [a] * 10), scores("b", [b] * 10))
    assert (ten.p, ten.interval.num) == (once.p, 20)


def test_spread_between_seeds_is_that_of_their_means():
    assert scores("a", [[0.1, 0.3], [0.2, 0.4], [0.3, 0.5]]).seed_sd == pytest.approx(0.1)


def test_a_difference_within_the_spread_of_seeds_is_said(rng):
    values = rng.normal(0, 0.001, 50)
    a = scores("a", [values + 0.9, values + 0.7])
    b = scores("b", [values + 0.86, values + 0.70])
    assert any("spread between seeds" in note for note in compare(a, b).notes)


def test_images_are_paired_by_id_not_by_place(rng):
    x = rng.normal(size=20)
    a, order = scores("a", x), rng.permutation(20)
    b = ModelScores(model="b", images=[a.images[n] for n in order], values=x[order])
    assert compare(a, b).ties == 20


def test_only_common_images_are_compared_and_the_rest_counted(rng):
    x = rng.normal(size=20)
    a = scores("a", x)
    b = ModelScores(model="b", images=[*a.images[:15], "other.png"], values=[*(x[:15] - 1), 50])
    d = compare(a, b)
    assert (d.num_images, d.num_dropped, d.interval.mean) == (15, 6, pytest.approx(1))


def test_no_common_image_is_refused():
    with pytest.raises(CellbenchError, match="no image is scored by all of a, b"):
        compare(scores("a", [0.1]), scores("b", [0.2], images=["other.png"]))


def test_an_infinite_score_is_refused_with_its_image():
    with pytest.raises(CellbenchError, match=r"scores of fpn: not a finite number on 1 of 2 images, first '1\.png'"):
        scores("fpn", [0.9, math.inf])


def test_an_image_without_a_score_is_left_out_of_means_and_intervals():
    whole = scores("fpn", [0.9, 0.8, 0.7])
    gaps = scores("fpn", [0.9, math.nan, 0.8, math.nan, 0.7])
    assert gaps.mean == whole.mean == pytest.approx(0.8)
    assert (gaps.interval().mean, gaps.interval().low, gaps.interval().num) == (whole.interval().mean, whole.interval().low, 3)
    assert gaps.empty.tolist() == [False, True, False, True, False]
    nothing = scores("fpn", [math.nan, math.nan])
    assert math.isnan(nothing.mean)
    assert (nothing.interval().low, nothing.interval().note) == (None, "no image has a score")


def test_seeds_that_find_nothing_in_an_empty_image_are_right_where_another_seed_found_something():
    both = scores("fpn", [[0.9, math.nan, math.nan], [0.9, 0.0, math.nan]])
    assert both.per_image[:2].tolist() == [0.9, 0.5]
    assert both.empty.tolist() == [False, False, True]
    assert both.seed_sd == pytest.approx(np.std([0.95, 0.45], ddof=1))


def test_a_false_alarm_on_an_empty_image_counts_in_a_paired_comparison_and_an_image_empty_for_both_does_not():
    alarmed = scores("a", [0.9, 0.8, 0.0, math.nan])  # found something in the third image, where there is no cell
    silent = scores("b", [0.9, 0.8, math.nan, math.nan])
    d = compare(alarmed, silent)
    assert d.interval.mean == pytest.approx(-1 / 3)
    assert (d.wins, d.ties, d.losses, d.num_dropped) == (0, 2, 1, 0)
    assert (d.mean_a, d.num_a) == (pytest.approx(1.7 / 3), 3)  # the means of the table
    assert (d.mean_b, d.num_b) == (pytest.approx(0.85), 2)
    assert any("without a cell" in note for note in d.notes)
    # A third model does not change what is said of these two.
    third = scores("c", [0.5, 0.5, 0.0, 0.0])
    again = compare_all([alarmed, silent, third])[0]
    assert (again.interval, again.p, again.effect) == (d.interval, d.p, d.effect)


def test_models_that_find_nothing_where_nothing_is_are_equal():
    a, b = scores("a", [math.nan] * 12), scores("b", [math.nan] * 12)
    d = compare(a, b)
    assert (d.interval.mean, d.ties, d.better) == (0, 12, None)
    assert critical_difference([a, b, scores("c", [0.0] * 12)]).models[-1] == "c"


def test_averaging_over_heads_keeps_a_false_alarm_on_an_empty_image():
    models = [scores("x1", [0.8, math.nan]), scores("x2", [0.6, 0.0]), scores("y1", [0.8, math.nan]), scores("y2", [0.6, math.nan])]
    x, y = marginal_scores(models, ["x", "x", "y", "y"], over=["1", "2", "1", "2"])
    assert x.per_image.tolist() == pytest.approx([0.7, 0.5])
    assert y.empty.tolist() == [False, True]


def test_an_image_twice_is_refused():
    with pytest.raises(CellbenchError, match=r"'x\.png' occurs twice"):
        scores("fpn", [0.9, 0.8], images=["x.png", "x.png"])


@pytest.mark.parametrize("more", [{"images": ["x"]}, {"groups": ["p"]}, {"folds": [0]}])
def test_lengths_that_do_not_fit_are_refused(more):
    with pytest.raises(CellbenchError, match="do not fit values"):
        scores("fpn", [0.9, 0.8], **more)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_fewer_than_six_images_decide_nothing_and_say_so(num):
    d = compare(scores("a", np.arange(num) + 1.0), scores("b", np.zeros(num)))
    assert not d.significant
    assert any(f"cannot fall below {2.0 ** (1 - num):.2g}" in note for note in d.notes)


def test_six_images_can_decide(rng):
    assert compare(scores("a", 1 + rng.random(6)), scores("b", np.zeros(6))).significant


def test_groups_are_the_unit_of_the_test(rng):
    """Eight images of each of four patients are four observations."""
    groups = [f"p{n // 8}" for n in range(32)]
    d = compare(scores("a", rng.random(32) + 1, groups=groups), scores("b", np.zeros(32), groups=groups))
    assert (d.p, d.interval.num, d.wins) == (0.125, 4, 32)


def test_groups_that_disagree_are_refused():
    with pytest.raises(CellbenchError, match="One group an image"):
        compare(scores("a", [1, 2], groups="pq"), scores("b", [1, 2], groups="pp"))


def test_a_mean_dominated_by_a_few_images_is_not_significant(rng):
    """Ranks say b, the mean says a."""
    x = -rng.uniform(0.5, 1, 60)
    x[:8] = 20
    d = compare(scores("a", x), scores("b", np.zeros(60)))
    assert d.interval.excludes_zero
    assert d.p < 0.05
    assert not d.significant
    assert any("opposite signs" in note for note in d.notes)


def test_swapping_the_models_swaps_the_answer(dice):
    a, b = scores("a", dice[0]), scores("b", dice[5])
    ab, ba = compare(a, b), compare(b, a)
    assert (ab.p, ab.effect, ab.wins, ab.better) == (ba.p, -ba.effect, ba.losses, ba.better)


def test_lower_is_better_turns_wins_not_differences():
    a, b = (scores(name, np.arange(10) + shift, lower_is_better=True) for name, shift in (("a", 0.0), ("b", 1.0)))
    d = compare(a, b)
    assert (d.wins, d.interval.mean, d.better) == (10, -1, "a")


def test_two_directions_are_refused():
    with pytest.raises(CellbenchError, match="one metric at a time"):
        compare(scores("a", [1.0]), scores("b", [2.0], lower_is_better=True))


def test_fold_test_is_a_t_test_with_a_wider_variance(rng):
    """t over sqrt(1 + J * test/train), J = 5 folds, a quarter as many test as training images."""
    folds = np.repeat(np.arange(5), 10)
    d = rng.normal(0.3, 1, 50)
    plain = st.ttest_1samp([d[folds == n].mean() for n in range(5)], 0).statistic
    assert fold_test(d[None], folds.tolist())[0] == pytest.approx(2 * st.t.sf(abs(plain) / math.sqrt(1 + 5 / 4), 4))


def test_folds_are_said_to_make_p_optimistic(rng):
    folds = np.repeat(np.arange(5), 4).tolist()
    d = compare(scores("a", rng.random(20), folds=folds), scores("b", rng.random(20), folds=folds))
    assert d.p_folds is not None
    assert any("5 folds" in note and "optimistic" in note for note in d.notes)


def test_models_of_other_folds_have_no_fold_test(rng):
    a = scores("a", rng.random(20), folds=np.repeat(np.arange(5), 4).tolist())
    assert compare(a, scores("b", rng.random(20))).p_folds is None


# Many pairs


def test_holm_of_a_worked_example():
    assert holm_adjust([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_is_statsmodels(rng):
    from statsmodels.stats.multitest import multipletests

    p = np.round(rng.random(200) ** 4, 3)  # with ties
    assert holm_adjust(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_of_nothing_is_nothing():
    assert holm_adjust([]) == []


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_holm_refuses_what_is_no_p(bad):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        holm_adjust([0.1, bad])


def test_all_pairs_equal_each_pair_alone(dice):
    models = [scores(f"m{n}", x) for n, x in enumerate(dice[:4])]
    models[2] = scores("m2", dice[2][:100])  # another set of images: another batch
    together = {(d.a, d.b): d for d in compare_all(models)}
    alone = {(a.model, b.model): compare(a, b) for n, a in enumerate(models) for b in models[n + 1 :]}
    assert list(together) == list(alone)
    for pair, d in alone.items():
        assert together[pair].p == d.p
        assert (together[pair].interval.low, together[pair].interval.high) == pytest.approx((d.interval.low, d.interval.high), abs=1e-12)


def test_pairs_are_adjusted_over_the_family(dice):
    found = compare_all([scores(f"m{n}", x) for n, x in enumerate(dice[:5])])
    assert [d.p_adjusted for d in found] == holm_adjust(d.p for d in found)


def test_against_one_model_asks_fewer_questions(dice):
    models = [scores(f"m{n}", x) for n, x in enumerate(dice[:5])]
    found = compare_all(models, against="m2")
    assert [(d.a, d.b, d.num_tests) for d in found] == [(f"m{n}", "m2", 4) for n in (0, 1, 3, 4)]


def test_decided_needs_the_adjusted_p(rng):
    base = np.zeros(40)
    models = [scores(f"m{n}", base + rng.normal(0, 0.1, 40)) for n in range(12)]
    found = compare_all(models)
    assert any(d.p < 0.05 for d in found)
    assert not any(d.significant for d in found)


def test_two_models_of_one_name_are_refused():
    with pytest.raises(CellbenchError, match="two models are called 'fpn'"):
        compare_all([scores("fpn", [1.0]), scores("fpn", [2.0])])


def test_thirty_six_models_are_quick(dice):
    assert len(compare_all([scores(f"m{n}", x) for n, x in enumerate(dice)])) == 630


def test_models_that_each_lack_an_image_are_quick_too(dice):
    """Every pair has its own images, so that no product is shared, only the draw. 66 pairs take 1 s on two busy cores."""
    models = [scores(f"m{n}", np.delete(x, n), images=[f"{i}" for i in range(159) if i != n]) for n, x in enumerate(dice[:12])]
    assert len(compare_all(models)) == 66


def test_many_images_are_drawn_in_pieces_of_one_stream(rng):
    """6,000 images make pieces of 666 resamples; scipy's pieces of 666 are the same draws."""
    x = rng.normal(size=6000)
    scipys = st.bootstrap((x,), np.mean, n_resamples=999, batch=666, rng=np.random.default_rng(5)).confidence_interval
    ours = mean_interval(x, resamples=999, seed=5)
    assert (ours.low, ours.high) == pytest.approx(tuple(scipys), abs=1e-12)


# Rankings


def test_average_ranks_and_friedman_of_demsar():
    """chi2 = 9.28 there, without the tie correction that scipy makes: undone here."""
    r = critical_difference([scores(name, -ranks) for name, ranks in zip(("C4.5", "+m", "+cf", "+m+cf"), DEMSAR, strict=True)])
    assert dict(zip(r.models, r.ranks, strict=True)) == pytest.approx({"C4.5": 3.143, "+m": 2.0, "+cf": 2.893, "+m+cf": 1.964}, abs=5e-4)
    num_tied = sum(t**3 - t for column in DEMSAR.T for t in np.unique(column, return_counts=True)[1])
    assert r.statistic * (1 - num_tied / (14 * (4**3 - 4))) == pytest.approx(9.28, abs=0.01)


@pytest.mark.parametrize(("alpha", "apart"), [(0.05, 1.25), (0.10, 1.12)])
def test_critical_difference_of_demsar(alpha, apart):
    r = critical_difference([scores(f"m{n}", -ranks) for n, ranks in enumerate(DEMSAR)], alpha=alpha)
    assert r.critical_difference == pytest.approx(apart, abs=0.005)


def test_cliques_of_demsar():
    """At 0.10 C4.5 is worse than +m and +m+cf; of C4.5+cf the data say nothing."""
    r = critical_difference([scores(name, -ranks) for name, ranks in zip(("0", "m", "cf", "mcf"), DEMSAR, strict=True)], alpha=0.1)
    assert r.cliques == (("mcf", "m", "cf"), ("cf", "0"))


@pytest.mark.parametrize(("num", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (7, 2.949), (10, 3.164)])
def test_nemenyi_critical_values_of_demsar_table_5(rng, num, q):
    r = critical_difference([scores(f"m{n}", x) for n, x in enumerate(rng.normal(size=(num, 30)))])
    # 0.002: the table is cut to three places from a studentized range that was rounded before
    assert r.critical_difference / math.sqrt(num * (num + 1) / 180) == pytest.approx(q, abs=0.002)


def test_friedman_is_scipys(dice):
    r = critical_difference([scores(f"m{n}", x) for n, x in enumerate(dice[:6])])
    assert (r.statistic, r.p) == pytest.approx(tuple(st.friedmanchisquare(*dice[:6])))


def test_cliques_are_maximal_and_hold_what_is_close():
    from cellbench.statistics.ranking import _runs

    assert _runs([1.0, 1.4, 1.9, 2.2, 5.0], 1.0) == [(0, 1, 2), (1, 2, 3)]


def test_no_clique_where_all_are_apart(rng):
    x = rng.normal(size=100)
    r = critical_difference([scores(f"m{n}", x - n) for n in range(3)])
    assert (r.models, r.cliques) == (("m0", "m1", "m2"), ())


def test_models_without_a_difference_are_one_clique(rng):
    r = critical_difference([scores(f"m{n}", x) for n, x in enumerate(rng.normal(size=(4, 30)))])
    assert r.p > 0.05
    assert [set(clique) for clique in r.cliques] == [{"m0", "m1", "m2", "m3"}]


def test_two_models_rank_by_the_paired_test(dice):
    a, b = scores("a", dice[0]), scores("b", dice[20])
    r = critical_difference([a, b])
    assert (r.test, r.p, r.cliques, r.models) == ("Wilcoxon", compare(a, b).p, (), ("a", "b"))


def test_same_scores_everywhere_rank_the_same():
    r = critical_difference([scores(name, [0.9] * 12) for name in "abc"])
    assert (r.p, r.ranks, r.cliques) == (1.0, (2, 2, 2), (("a", "b", "c"),))


def test_one_image_ranks_nothing_and_says_so():
    r = critical_difference([scores(name, [x]) for name, x in zip("abc", (0.1, 0.2, 0.3), strict=True)])
    assert (r.p, r.notes) == (None, ("1 image: nothing to test",))


def test_few_images_are_said_to_be_rough(rng):
    r = critical_difference([scores(name, rng.random(8)) for name in "abc"])
    assert "8 images: Friedman's p is rough" in r.notes


@pytest.mark.parametrize("num", [2, 3, 6])
@pytest.mark.parametrize("num_models", [2, 3, 9])
def test_a_ranking_separates_models_only_where_pairs_can_be_significant(num, num_models):
    """On three images Friedman's and Nemenyi's tests would tell nine models apart, of which no pair can reach p below 0.05."""
    models = [scores(f"m{k}", np.linspace(0.9, 0.95, num) - 0.1 * k) for k in range(num_models)]
    r = critical_difference(models)
    pairs = compare_all(models)
    if not any(d.significant for d in pairs):
        assert r.cliques == (tuple(m.model for m in models),)
        assert (r.p, r.critical_difference) == (None, None)
        assert any("no difference can be significant" in note for note in (*r.notes, *pairs[0].notes))
    else:
        assert (num, num_models) == (6, 2)
        assert r.cliques == ()


def test_a_ranking_of_some_models_heeds_all_pairs_that_are_compared():
    models = [scores(f"m{k}", np.linspace(0.9, 0.95, 8) - 0.1 * k) for k in range(3)]
    assert critical_difference(models).critical_difference is not None
    assert critical_difference(models, num_tests=36).critical_difference is None


# Margins


def grid(rng, missing=()):
    runs = [(b, h) for b in ("dino", "uni", "floor") for h in ("fpn", "linear", "detail") if (b, h) not in missing]
    return [scores(f"{b}/{h}", rng.random((2, 12))) for b, h in runs]


def backbone(m):
    return m.model.split("/")[0]


def head(m):
    return m.model.split("/")[1]


def test_a_margin_is_the_mean_over_the_other_factor(rng):
    models = grid(rng)
    found = marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])
    assert [m.model for m in found] == ["dino", "uni", "floor"]
    assert found[1].per_image == pytest.approx(np.mean([m.per_image for m in models[3:6]], axis=0))


def test_a_margin_keeps_the_spread_between_seeds(rng):
    models = grid(rng)
    found = marginal_scores(models, [head(m) for m in models], over=[backbone(m) for m in models])
    assert found[0].seed_sd == pytest.approx(np.std([np.mean([models[n].values[s] for n in (0, 3, 6)]) for s in (0, 1)], ddof=1))


def test_a_margin_is_over_complete_combinations_and_says_what_is_not(rng):
    models = grid(rng, missing={("uni", "fpn")})
    found = marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])
    assert found[0].notes == ("averaged over linear, detail", "left out as incomplete: fpn")


def test_a_margin_without_a_complete_column_leaves_out_a_row(rng):
    missing = {("floor", "fpn"), ("floor", "linear"), ("uni", "detail")}
    models = grid(rng, missing)
    found = marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])
    assert [m.model for m in found] == ["dino", "uni"]
    assert "left out as incomplete: floor, detail" in found[0].notes


def test_a_combination_twice_is_refused(rng):
    models = grid(rng)
    models.append(models[0])
    with pytest.raises(CellbenchError, match="dino x fpn occurs twice"):
        marginal_scores(models, [backbone(m) for m in models], over=[head(m) for m in models])


@pytest.mark.parametrize("num", [1, 2, 3, 8])
@pytest.mark.parametrize("make", ["constant", "equal", "binary", "random"])
def test_nothing_is_ever_nan_and_nothing_warns(rng, num, make):
    kinds = {
        "constant": lambda n: np.full((1, num), n / 10),
        "equal": lambda n: np.full((2, num), 0.5),
        "binary": lambda n: rng.integers(0, 2, (1, num)),
        "random": lambda n: rng.random((2, num)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = [scores(f"m{n}", kinds[make](n), folds=np.resize([0, 1], num).tolist()) for n in range(4)]
        found, ranking = compare_all(models), critical_difference(models)
    assert all(math.isfinite(x) for record in (*found, ranking, models[0].interval()) for x in numbers(record))
