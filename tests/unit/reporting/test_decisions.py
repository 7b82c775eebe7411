"""What follows from a comparison: images to decide, equivalence with the cheaper model, the price of choosing, external masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from finished_runs import finished_run, per_image_scores

from cellbench.reporting.decisions import (
    describe_correction,
    describe_equivalence,
    describe_power,
    describe_validation_choice,
    images_needed,
)
from cellbench.reporting.grouping import group_models
from cellbench.reporting.model_groups import FinishedRun, TestSet
from cellbench.reporting.verdict import describe_best, describe_evidence, describe_external
from cellbench.statistics.power import power_of
from cellbench.tracking.schema import RunRecord


def run(name: str, dice: np.ndarray, **metrics: float) -> FinishedRun:
    images = tuple(f"i{k}" for k in range(len(dice)))
    one = finished_run(name, per_image_scores(0.9, 0, images) | {"dice": dice.tolist()})
    return replace(one, record=replace(one.record, metrics={**one.record.metrics, **metrics}))


def external(name: str, dice: np.ndarray) -> FinishedRun:
    images = tuple(f"i{k}" for k in range(len(dice)))
    params = {"external": name, "backbone": "none", "head": "none", "baseline": "none", "seed": "0"}
    record = RunRecord(
        run_id=name, name=name, status="finished", metrics={"test/dice": 0.9}, params=params, tags={"cellbench.kind": "external"}
    )
    return FinishedRun(record=record, per_image=per_image_scores(0.9, 0, images) | {"dice": dice.tolist()})


def grouped(*runs: FinishedRun) -> TestSet:
    (here,), _ = group_models(runs)
    return here


def hard(num: int = 16) -> np.ndarray:
    return 0.9 + np.random.default_rng(0).normal(0, 0.02, num)


def noise(seed: int, sd: float, num: int = 16) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 1, num)
    scaled: np.ndarray = sd * (values - values.mean()) / values.std()
    return scaled


def test_the_number_of_images_that_would_decide_is_a_sentence() -> None:
    here = grouped(run("a", hard() + 0.004 + noise(1, 0.01)), run("b", hard()))
    (d,) = here.differences_to_best()
    num = images_needed(here, d)
    assert d.better is None
    assert num is not None
    assert describe_power(here) == f"With this spread about {num} test images would decide between the two."
    assert power_of(0.004 + noise(1, 0.01), num) >= 0.8
    assert power_of(0.004 + noise(1, 0.01), num - 3) < 0.82
    assert num > 16


def test_equal_models_need_too_many_and_decided_ones_none() -> None:
    assert "more than 2,000 test images" in describe_power(grouped(run("a", hard() + 1e-6 + noise(3, 0.01)), run("b", hard())))
    assert describe_power(grouped(run("a", hard() + 0.05 + noise(1, 0.001)), run("b", hard()))) == ""
    three = grouped(*(run(name, 0.9 + noise(k, 0.01, 3)) for k, name in enumerate("abc")))
    assert describe_power(three) == "At least 7 test images are needed for 3 pairs of models."


def test_of_two_equal_models_the_cheaper_one_is_recommended() -> None:
    dear, cheap = {"cost/image_cpu_s": 4.0}, {"cost/image_cpu_s": 0.5}
    here = grouped(run("a", hard() + 0.001 + noise(1, 0.001), **dear), run("b", hard(), **cheap))
    said = describe_equivalence(here)
    assert said.startswith("For practical purposes uni · b equals uni · a (within 0.005 Dice, p < 0.001")
    assert said.endswith("take uni · b, which needs 0.5 instead of 4 CPU seconds an image.")
    same = grouped(run("a", hard() + 0.001 + noise(1, 0.001), **dear), run("b", hard(), **dear))
    assert describe_equivalence(same).endswith("none of them needs clearly less time.")
    assert describe_equivalence(replace(here, margin=0.0005)) == ""


def test_a_wide_interval_is_no_equality() -> None:
    assert describe_equivalence(grouped(run("a", hard() + noise(1, 0.03)), run("b", hard()))) == ""


def test_the_score_of_the_best_of_many_equals_is_corrected_downwards() -> None:
    here = grouped(*(run(f"h{k}", hard() + noise(k, 0.02) + np.random.default_rng(k).normal(0, 0.01)) for k in range(12)))
    corrected = float(describe_correction(here).rpartition(" ")[2])
    assert corrected < here.best.scores().mean
    assert f"corrected for the choice among 12 models: {corrected:.3f}." in describe_best(here)[0]


def test_the_best_by_validation_is_named_where_it_is_another() -> None:
    here = grouped(run("a", hard() + 0.01, **{"best/val_dice": 0.90}), run("b", hard(), **{"best/val_dice": 0.95}))
    (said,) = describe_validation_choice(here)
    assert said.startswith("By validation the best is uni · b (validation Dice 0.950), which is number 2 by test (Dice 0.")
    assert describe_validation_choice(grouped(run("a", hard() + 0.01, **{"best/val_dice": 0.96}), run("b", hard()))) == []


def test_masks_of_another_tool_are_tested_and_are_not_the_best_model() -> None:
    here = grouped(run("a", hard()), run("b", hard() - 0.03), external("cellpose", hard() + 0.02 + noise(2, 0.002)))
    assert (here.best.name, here.best.kind, here.best_own.name) == ("cellpose", "external", "uni · a")
    assert describe_best(here)[0].startswith("Best on average is cellpose (masks of another tool): Dice 0.9")
    assert "better than each of the 2 other models" in describe_evidence(here)
    assert describe_external(here) == [], "the first lines say it"
    worse = grouped(run("a", hard()), external("cellpose", hard() - 0.02 + noise(2, 0.002)))
    (said,) = describe_external(worse)
    assert said.startswith("Masks of cellpose: Dice 0.8")
    assert "uni · a is better than cellpose by 0.020 Dice" in said


def test_external_masks_change_no_names_of_models() -> None:
    alone = grouped(run("a", hard()), run("b", hard() - 0.01))
    beside = grouped(run("a", hard()), run("b", hard() - 0.01), external("x", hard()))
    assert [model.name for model in beside.models if not model.external] == [model.name for model in alone.models]
