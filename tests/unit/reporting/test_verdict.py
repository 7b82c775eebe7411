"""The sentences about comparisons: they name the winner, and say only what is significant."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from finished_runs import IMAGES, finished_run, per_image_scores
from made_up_scores import degenerate_scores, scores

from cellbench.reporting.collect import ExperimentResults
from cellbench.reporting.difference_sentences import describe_difference
from cellbench.reporting.grouping import group_models
from cellbench.reporting.leaderboard import format_p, leaderboard_rows
from cellbench.reporting.model_groups import FinishedRun
from cellbench.reporting.shift import shift_of
from cellbench.reporting.verdict import conclude, describe_best, describe_missing, describe_pairs, list_notes
from cellbench.statistics.comparison import compare, compare_all
from cellbench.tracking.schema import RunRecord


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


def test_pairs_are_told_apart_by_whether_they_are_significant(dice):
    detail, bilinear = dice[0] + np.resize([0.01, -0.01], 159), dice[1] - 0.02
    models = [scores("fpn", dice[0]), scores("bilinear", bilinear), scores("detail", detail)]
    first, second, *_ = describe_pairs(compare_all(models, against="detail", picked=True))
    assert first.startswith("detail is better than bilinear by 0.0")
    assert second.startswith("fpn and detail: the difference is not significant")


def compared(*means, baseline=None, images=IMAGES):
    """Models h0, h1, … and a baseline. Equal means differ by turns in either direction, so that nothing is significant."""
    hard = np.random.default_rng(0).normal(0, 0.02, len(images))

    def dice(mean, k):
        return {"dice": (mean + hard + k * np.resize([0.004, -0.004], len(images)) - 1e-5 * k).tolist()}

    runs = [finished_run(f"h{k}", per_image_scores(mean, k, images) | dice(mean, k)) for k, mean in enumerate(means)]
    if baseline is not None:
        record = RunRecord(run_id="otsu", name="otsu", status="finished", metrics={"test/dice": 0.5}, params={"baseline": "otsu"})
        runs.append(FinishedRun(record=record, per_image=per_image_scores(baseline, 9, images) | dice(baseline, 0)))
    (here,), _ = group_models(runs)
    return here


def test_the_first_line_is_the_answer_with_its_interval():
    first, _ = describe_best(compared(0.93, 0.9))
    assert re.fullmatch(
        r"Best on average is uni · h0: Dice 0\.9\d\d \(95 % 0\.9\d\d to 0\.9\d\d\) over 16 images; corrected for the choice among 2 models: 0\.9\d\d\.",
        first,
    )


@pytest.mark.parametrize(
    ("means", "baseline", "expected"),
    [
        ((0.93, 0.9), None, "It is significantly better than uni · h1, which is 0.030 lower (95 % 0.028 to 0.032, p < 0.001)."),
        (
            (0.93, 0.9, 0.8),
            None,
            "It is significantly better than each of the 2 other models: the next, uni · h1, is 0.030 lower (95 % 0.0",
        ),
        ((0.93, 0.93), None, "The difference to the other model is not significant: uni · h1 is 0.000 lower (95 % -0.002 to 0.002, p = "),
        ((0.93, 0.93, 0.93), None, "No difference to another model is significant: the next, uni · h1, is 0.000 lower (95 % "),
        (
            (0.93, 0.93),
            0.8,
            "It is significantly better than 1 of 2 other models, the baseline otsu among them, but not significantly different from uni · h1, "
            "which is 0.000 lower (95 % ",
        ),
        ((0.9,), 0.93, "It is significantly better than uni · h0, which is 0.030 lower (95 % "),
    ],
)
def test_the_second_line_says_which_differences_are_significant(means, baseline, expected):
    assert describe_best(compared(*means, baseline=baseline))[1].startswith(expected)


def test_a_small_p_whose_interval_holds_zero_is_called_a_disagreement():
    # The first is a little better on 15 images of 16, and much worse on one: ranks decide, the mean does not.
    a = np.linspace(0.80, 0.90, len(IMAGES))
    b = a - np.linspace(0.002, 0.004, len(IMAGES))
    b[0] = a[0] + 0.04
    runs = [finished_run(name, per_image_scores(0.85, 0, IMAGES) | {"dice": x.tolist()}) for name, x in (("h0", a), ("h1", b))]
    (here,), _ = group_models(runs)
    line = describe_best(here)[1]
    assert line.startswith("The difference to the other model is not significant: ")
    assert float(re.search(r"p = (0\.\d+)", line)[1]) < 0.05
    assert "; the test and the mean disagree)." in line


@pytest.mark.parametrize(
    ("num_empty", "expected"),
    [
        (30, r"But uni · h1, which is 0\.575 higher on the same images \(.*p < 0\.001\), is significantly better\."),
        (9, r"The difference to the other model is not significant: uni · h1 is 0\.237 higher on the same images \("),
    ],
)
def test_a_model_that_is_silent_where_there_is_no_cell_may_be_better_in_pairs_than_the_best_by_mean(num_empty, expected):
    # In images without a cell, h0 always finds one (0), h1 never does (no score alone, 1 beside h0).
    images = [f"{k}.png" for k in range(10 + num_empty)]
    alone = 0.2 if num_empty == 30 else 0.45
    ramp = np.linspace(-0.05, 0.05, 10)
    dice = {"h0": [*(0.9 + ramp).tolist(), *[0.0] * num_empty], "h1": [*(alone + ramp).tolist(), *[None] * num_empty]}
    (here,), _ = group_models([finished_run(name, per_image_scores(0.5, 0, images) | {"dice": values}) for name, values in dice.items()])
    first, second = describe_best(here)
    assert first.startswith("Best on average is uni · h0: Dice ")
    assert re.match(expected, second), second
    assert describe_pairs(here.differences_to_best())[0].startswith(
        "uni · h1 is better than" if num_empty == 30 else "uni · h1 and uni · h0: the"
    )


def test_a_baseline_that_wins_is_called_one():
    assert describe_best(compared(0.9, baseline=0.93))[0].startswith("Best on average is otsu (a baseline): Dice 0.9")


@pytest.mark.parametrize(("num", "least"), [(2, "cannot"), (3, "over 3 pairs cannot")])
def test_three_images_give_no_significant_difference_and_the_verdict_says_why(num, least):
    first, second = describe_best(compared(*(0.9 - k / 10 for k in range(num)), images=IMAGES[:3]))
    assert first.endswith("over 3 images.")
    assert second.startswith(f"With 3 test images no difference can be significant (p {least} fall below 0.")
    assert "): the next, uni · h1, is 0.0" in second or "): the next, uni · h1, is 0.1" in second


def test_the_verdict_has_at_most_five_lines_and_nothing_is_lost():
    here = compared(0.93, 0.9, baseline=0.8)
    skipped = dict.fromkeys(("uni · fpn · seed 0", "uni · fpn · seed 1"), "uni is gated. Log in")
    results = ExperimentResults(experiment="e", sets=(here, here), skipped=skipped)
    rows = [replace(row, other_load_pct=60.0) for row in leaderboard_rows(here)]
    verdict = conclude(results, rows, shift_of(results.sets[0]))
    assert verdict.lines[:2] == tuple(describe_best(here))
    assert verdict.lines[2] == "Not compared: uni · fpn (uni is gated)."
    assert len(verdict.lines) == 5
    assert {*list_notes(results, rows), *describe_pairs(here.differences_to_best())} <= {*verdict.lines, *verdict.more}


def test_kinds_of_backbones_without_any_result_are_named_with_the_reason():
    reason = "its weights are not on this machine. Log in"
    skipped = {
        f"{name} · {head} · seed 0": f"{name}: {reason}" for name in ("dinobloom-s", "uni", "dinov2-small") for head in ("fpn", "detail")
    }
    results = ExperimentResults(experiment="e", sets=(compared(0.9, 0.8),), skipped=skipped)
    assert describe_missing(results) == [
        "No blood or natural-image model was compared; without a result: dinobloom-s, uni, dinov2-small (its weights are not on this machine)."
    ]  # the models compared are of UNI, a pathology model


def test_of_models_with_equal_scores_the_verdict_names_the_first_of_the_leaderboard():
    (here,), _ = group_models([finished_run(head, per_image_scores(0.9, 0)) for head in "abc"])
    assert describe_best(here)[0].startswith(f"Best on average is {here.models[0].name}:")


@pytest.mark.parametrize("num", [1, 2, 3, 8])
@pytest.mark.parametrize("make", ["constant", "equal", "binary", "random"])
def test_no_sentence_holds_nan_or_minus_zero(rng, num, make):
    images = IMAGES[:num]
    each = [degenerate_scores(rng, make, n, num).mean(axis=0).tolist() for n in range(4)]
    (here,), _ = group_models([finished_run(f"m{n}", per_image_scores(0.9, n, images) | {"dice": dice}) for n, dice in enumerate(each)])
    verdict = conclude(ExperimentResults(experiment="e", sets=(here,)), leaderboard_rows(here), shift_of(here))
    text = " ".join((*verdict.lines, *verdict.more))
    assert "nan" not in text.lower()
    assert "-0.000" not in text
