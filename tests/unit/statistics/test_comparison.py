"""Comparisons of models by their scores of the same images."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import scipy.stats as st
from made_up_scores import degenerate_scores, scores

from cellbench.errors import CellbenchError
from cellbench.statistics.bootstrap import mean_interval
from cellbench.statistics.comparison import compare, compare_all
from cellbench.statistics.hypothesis_tests import holm_adjust
from cellbench.statistics.ranking import critical_difference, marginal_scores
from cellbench.statistics.scores import ModelScores, seed_sd

pytestmark = pytest.mark.filterwarnings("error")


def numbers(record):
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from numbers(value)
        elif isinstance(value, float):
            yield value


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
    assert seed_sd(np.array([[0.1, 0.3], [0.2, 0.4], [0.3, 0.5]])) == pytest.approx(0.1)


def test_a_difference_within_the_spread_of_seeds_is_noted(rng):
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
    assert (d.num_images, d.interval.mean) == (15, pytest.approx(1))
    assert "6 images that only one of the two has: left out" in d.notes


def test_no_common_image_is_refused():
    with pytest.raises(CellbenchError, match="no image is scored by all of a, b"):
        compare(scores("a", [0.1]), scores("b", [0.2], images=["other.png"]))


def test_an_infinite_score_is_refused_with_its_image():
    with pytest.raises(CellbenchError, match=r"scores of fpn: not a finite number on 1 of 2 images, first '1\.png'"):
        scores("fpn", [0.9, math.inf])


def test_an_image_without_a_score_is_left_out_of_means():
    whole = scores("fpn", [0.9, 0.8, 0.7])
    gaps = scores("fpn", [0.9, math.nan, 0.8, math.nan, 0.7])
    assert gaps.mean == whole.mean == pytest.approx(0.8)
    assert gaps.empty.tolist() == [False, True, False, True, False]
    nothing = scores("fpn", [math.nan, math.nan])
    assert math.isnan(nothing.mean)


def test_seeds_that_find_nothing_in_an_empty_image_are_right_where_another_seed_found_something():
    both = scores("fpn", [[0.9, math.nan, math.nan], [0.9, 0.0, math.nan]])
    assert both.per_image[:2].tolist() == [0.9, 0.5]
    assert both.empty.tolist() == [False, False, True]
    assert seed_sd(both.values) == pytest.approx(np.std([0.95, 0.45], ddof=1))


def test_a_false_alarm_on_an_empty_image_counts_in_a_paired_comparison_and_an_image_empty_for_both_does_not():
    alarmed = scores("a", [0.9, 0.8, 0.0, math.nan])  # found something in the third image, where there is no cell
    silent = scores("b", [0.9, 0.8, math.nan, math.nan])
    d = compare(alarmed, silent)
    assert d.interval.mean == pytest.approx(-1 / 3)
    assert (d.wins, d.ties, d.losses) == (0, 2, 1)
    assert (d.mean_a, d.num_a) == (pytest.approx(1.7 / 3), 3)  # the means of the table
    assert (d.mean_b, d.num_b) == (pytest.approx(0.85), 2)
    assert any("without a cell" in note for note in d.notes)
    # A third model does not change the result for these two.
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
def test_fewer_than_six_images_decide_nothing_and_a_note_says_so(num):
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
    """Scores whose ranks favour b and whose mean favours a."""
    x = -rng.uniform(0.5, 1, 60)
    x[:8] = 20
    d = compare(scores("a", x), scores("b", np.zeros(60)))
    assert d.interval.excludes_zero
    assert d.p < 0.05
    assert not d.significant
    assert any("opposite signs" in note for note in d.notes)


def test_swapping_the_models_negates_the_result(dice):
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


def test_a_note_says_that_folds_make_p_optimistic(rng):
    folds = np.repeat(np.arange(5), 4).tolist()
    d = compare(scores("a", rng.random(20), folds=folds), scores("b", rng.random(20), folds=folds))
    assert d.p_folds is not None
    assert any("5 folds" in note and "optimistic" in note for note in d.notes)


def test_models_of_other_folds_have_no_fold_test(rng):
    a = scores("a", rng.random(20), folds=np.repeat(np.arange(5), 4).tolist())
    assert compare(a, scores("b", rng.random(20))).p_folds is None


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


def test_comparing_with_one_model_makes_fewer_tests(dice):
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


@pytest.mark.parametrize("num", [1, 2, 3, 8])
@pytest.mark.parametrize("make", ["constant", "equal", "binary", "random"])
def test_nothing_is_ever_nan_and_nothing_warns(rng, num, make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = [scores(f"m{n}", degenerate_scores(rng, make, n, num), folds=np.resize([0, 1], num).tolist()) for n in range(4)]
        found, ranking = compare_all(models), critical_difference(models)
    assert all(math.isfinite(x) for record in (*found, ranking, mean_interval(models[0].per_image)) for x in numbers(record))
