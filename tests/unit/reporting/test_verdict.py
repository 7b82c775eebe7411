"""The sentences about comparisons: they name the winner, and say only what is significant."""

from __future__ import annotations

import numpy as np
import pytest
from finished_runs import IMAGES, finished_run, per_image_scores
from made_up_scores import degenerate_scores, scores

from cellbench.reporting.model_groups import group_models
from cellbench.reporting.verdict import describe_best, describe_difference, describe_verdict, format_p
from cellbench.statistics.comparison import compare, compare_all


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def dice(rng):
    """(2, 159): models that share easy and hard images."""
    return rng.beta(20, 2, 159) - 0.001 * np.arange(2)[:, None] + rng.normal(0, 0.01, (2, 159))


def test_a_significant_difference_names_the_winner_first(rng):
    x = rng.random(159)
    y = x - 0.006
    y[:18] = x[:18] + 0.002
    d = compare(scores("bilinear", y), scores("fpn", x))
    assert (
        describe_difference(d) == "fpn is better than bilinear by 0.005 Dice (95 % 0.005 to 0.005, p < 0.001, better on 141 of 159 images)"
    )


def test_a_difference_that_is_not_significant_is_called_so(dice):
    d = compare(scores("fpn", dice[0]), scores("detail", dice[0] + np.resize([0.01, -0.01], 159)))
    assert describe_difference(d).startswith("fpn and detail: the difference is not significant (0.000, 95 %")


def test_equal_scores(dice):
    assert describe_difference(compare(scores("a", dice[0]), scores("b", dice[0]))) == "a and b score the same on each of the 159 images"


def test_one_image_gives_no_interval():
    d = compare(scores("a", [0.9]), scores("b", [0.8]))
    assert describe_difference(d) == "a and b: the difference is not significant (0.100, 1 image: no interval, p = 1.00)"


def test_a_significant_difference_never_reads_as_zero(rng):
    x = rng.random(100)
    sentence = describe_difference(compare(scores("a", x + 2e-5 + rng.normal(0, 1e-5, 100)), scores("b", x)))
    assert sentence.startswith("a is better than b by 0.00002 Dice (95 % 0.00002 to 0.00002")


@pytest.mark.parametrize("p", [0.0499, 0.04999, 0.049999])
def test_p_is_never_rounded_across_the_threshold(p):
    assert float(format_p(p).removeprefix("p = ")) < 0.05


def test_the_verdict_names_the_best_and_separates_significant_differences_from_others(dice):
    detail, bilinear = dice[0] + np.resize([0.01, -0.01], 159), dice[1] - 0.02
    models = [scores("fpn", dice[0]), scores("bilinear", bilinear), scores("detail", detail)]
    first, second, *rest = describe_verdict(compare_all(models, against="detail", picked=True))
    assert first.startswith("Best on average is detail: Dice 0.")
    assert second == "It is significantly better than 1 of 2 other models."
    assert any(sentence.startswith("detail is better than bilinear by 0.0") for sentence in rest)
    assert any(sentence.startswith("fpn and detail: the difference is not significant") for sentence in rest)


@pytest.mark.parametrize(("num", "sentence"), [(2, "The difference to the other model is not"), (3, "No difference to another model is")])
def test_three_images_give_no_significant_difference_and_the_verdict_says_why(num, sentence):
    (here,), _ = group_models([finished_run(f"h{k}", per_image_scores(0.9 - k / 10, k, IMAGES[:3])) for k in range(num)])
    said = describe_best(here)
    assert said[1].startswith(f"{sentence} significant (p = ")
    assert any(one.startswith("Note: with 3 test images no difference can be significant") for one in said)


def test_of_models_with_equal_scores_the_verdict_names_the_first_of_the_leaderboard():
    (here,), _ = group_models([finished_run(head, per_image_scores(0.9, 0)) for head in "abc"])
    assert describe_best(here)[0].startswith(f"Best on average is {here.models[0].name}:")


@pytest.mark.parametrize("num", [1, 2, 3, 8])
@pytest.mark.parametrize("make", ["constant", "equal", "binary", "random"])
def test_no_sentence_holds_nan_or_minus_zero(rng, num, make):
    text = " ".join(
        describe_verdict(compare_all([scores(f"m{n}", degenerate_scores(rng, make, n, num)) for n in range(4)], against="m0", picked=True))
    )
    assert "nan" not in text.lower()
    assert "-0.000" not in text
