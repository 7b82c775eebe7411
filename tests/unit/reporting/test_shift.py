"""Shift in a report: the safest model, the further test sets with the tests of the main one, and models that lack a test."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from finished_runs import finished_run, per_image_scores
from PIL import Image

from cellbench.reporting.collect import ExperimentResults
from cellbench.reporting.grouping import group_models
from cellbench.reporting.leaderboard import LeaderboardRow, format_row, leaderboard_rows, terminal_table, to_json
from cellbench.reporting.model_groups import FinishedRun, TestSet
from cellbench.reporting.report_data import Heading
from cellbench.reporting.sections import build_report
from cellbench.reporting.shift import read_further, shift_of
from cellbench.reporting.shift_section import shift_blocks
from cellbench.reporting.verdict import conclude, describe_shift
from cellbench.statistics.comparison import compare_all

ELSEWHERE = tuple(f"other-{k}.png" for k in range(12))


def run(
    head: str,
    own: float,
    noise: float,
    other: float | None,
    *,
    seed: int = 0,
    fold: int | None = None,
    looks: int = 0,
    digest: str = "e" * 16,
) -> FinishedRun:
    """A run with Dice ``own``; ``noise``: under the strongest noise; ``other``: on another laboratory's images."""
    record = per_image_scores(own, seed)
    if looks:
        record["appearance"] = [f"appearance {k % looks + 1}" for k in range(len(record["images"]))]
    if fold is not None:
        record |= {"fold": fold, "num_folds": 2, "pool": "p" * 16, "images": record["images"][8 * fold : 8 * fold + 8]}
        record |= {key: value[8 * fold : 8 * fold + 8] for key, value in record.items() if isinstance(value, list) and len(value) == 16}
    perturbed = {"none": record["dice"]} | {f"noise-{k}": [dice - k / 3 * (own - noise) for dice in record["dice"]] for k in (1, 2, 3)}
    sets = (
        {"lab2": per_image_scores(other, seed, ELSEWHERE, digest) | {"confusion": [[[90, 5], [5, 90]]] * 12}} if other is not None else {}
    )
    return dataclasses.replace(finished_run(head, record, seed, fold), further={"sets": sets, "perturbed": perturbed})


def test_set(*runs: FinishedRun) -> TestSet:
    (here,), _ = group_models(runs)
    return here


test_set.__test__ = False


def lines(here: TestSet) -> list[str]:
    shift = shift_of(here)
    assert shift is not None
    return describe_shift(shift)


def test_the_safest_model_may_be_another_than_the_best() -> None:
    here = test_set(run("fpn", 0.95, 0.6, 0.9), run("detail", 0.93, 0.8, 0.85))
    first, second = lines(here)
    safe, best = (shift_of(here).lowest(f"uni · {head}").mean(f"uni · {head}") for head in ("detail", "fpn"))
    assert first == (
        f"The safest is another one, uni · detail: its worst case among 3 perturbations and 1 further test set is {safe:.3f} (noise-3), "
        f"the best of all models'; that of uni · fpn is {best:.3f} (noise-3)."
    )
    assert second.startswith("On lab2 (12 images) the best is uni · fpn with 0.9")
    verdict = conclude(ExperimentResults(experiment="e", sets=(here,)), leaderboard_rows(here), shift_of(here))
    assert verdict.lines[2] == first
    assert len(verdict.lines) <= 5
    assert second in verdict.more


def test_the_best_model_may_also_be_the_safest_and_a_constant_bad_one_is_not() -> None:
    here = test_set(run("fpn", 0.95, 0.8, 0.9), run("detail", 0.5, 0.5, 0.5))
    assert lines(here)[0].startswith("It is also the safest: its worst case among 3 perturbations and 1 further test set is 0.")


def test_a_further_test_set_has_the_paired_statistics_of_the_main_one() -> None:
    here = test_set(run("fpn", 0.95, 0.6, 0.8), run("detail", 0.93, 0.8, 0.9))
    (other,) = shift_of(here).sets
    assert [model.name for model in other.models] == ["uni · detail", "uni · fpn"]  # in its own order
    assert other.images == ELSEWHERE
    (d,) = other.differences_to_best()
    (expected,) = compare_all([model.scores() for model in reversed(other.models)])
    assert (d.a, d.b, d.p, d.interval) == (expected.a, expected.b, expected.p, expected.interval)
    rows = {row.model: row for row in leaderboard_rows(here, shift_of(here))}
    assert rows["uni · fpn"].further["lab2"]["p_to_best"] == d.p_adjusted
    assert rows["uni · detail"].further["lab2"]["dice"] == pytest.approx(np.mean(here.models[1].runs[0].further["sets"]["lab2"]["dice"]))
    cells = format_row(rows["uni · fpn"])
    assert {"lab2: Dice/image", "lab2: 95 %", "lab2: AP50", "lab2: p vs best", "lowest Dice", "lowest at"} <= set(cells)
    assert other.models[0].pooled("dice") == pytest.approx([0.947368], abs=1e-6)


def test_on_a_further_test_set_folds_and_seeds_are_repeats() -> None:
    here = test_set(*(run("fpn", 0.95, 0.6, 0.8, seed=seed, fold=fold) for seed in (0, 1) for fold in (0, 1)))
    shift = shift_of(here)
    (other,) = shift.sets
    assert len(other.models[0].by_seed) == 4
    assert len(other.images) == 12
    assert len(shift.of_kind("noise")[0].dice["uni · fpn"]) == 16  # of both folds, each image once


def test_each_appearance_is_a_condition() -> None:
    here = test_set(run("fpn", 0.95, 0.9, None, looks=3), run("detail", 0.93, 0.9, None, looks=3))
    shift = shift_of(here)
    looks = shift.of_kind("appearance")
    assert [one.name for one in looks] == ["appearance 1", "appearance 2", "appearance 3"]
    dice = np.array(here.models[0].runs[0].per_image["dice"])
    assert [one.mean(here.models[0].name) for one in looks] == pytest.approx([dice[k::3].mean() for k in range(3)])
    assert looks[0].fall(here.models[0].name) is None


def test_the_fall_is_from_the_same_images_without_the_perturbation() -> None:
    shift = shift_of(test_set(run("fpn", 0.9, 0.6, None)))
    assert [one.fall("uni · fpn") for one in shift.of_kind("noise")] == pytest.approx([0.1, 0.2, 0.3])
    assert describe_shift(shift)[0].startswith("Its worst case among 3 perturbations is 0.")


def test_a_model_without_a_test_is_named_and_does_not_hide_the_others() -> None:
    old = dataclasses.replace(run("bilinear", 0.97, 0.9, None), further={})
    here = test_set(old, run("fpn", 0.95, 0.6, 0.8), run("detail", 0.93, 0.8, 0.9))
    shift = shift_of(here)
    assert shift.models == ("uni · fpn", "uni · detail")
    assert "uni · bilinear" in lines(here)[-1]
    rows = leaderboard_rows(here, shift)
    assert len({tuple(format_row(row)) for row in rows}) == 1  # the same columns
    restored = [LeaderboardRow(**row) for row in json.loads(json.dumps(to_json(rows), allow_nan=False))]
    assert "lab2" in terminal_table(restored)
    assert "lowest Dice" in terminal_table(restored, wide=True)


def test_runs_of_older_versions_have_no_shift() -> None:
    here = test_set(finished_run("fpn", per_image_scores(0.9, 0)), finished_run("detail", per_image_scores(0.8, 0)))
    assert shift_of(here) is None
    assert "lowest Dice" not in format_row(leaderboard_rows(here, None)[0])


@pytest.mark.parametrize("data", [None, b"", b"[1]", b"{}", b'{"sets": 3}', b"not json"])
def test_a_damaged_file_of_tests_is_no_test(data: bytes | None) -> None:
    assert read_further(data, 3) in ({}, {"sets": {}, "perturbed": {}})


def test_the_report_has_a_figure_that_fits_a_phone_and_a_table_of_all_conditions(pictures) -> None:
    here = test_set(run("fpn", 0.95, 0.6, 0.8), run("detail", 0.93, 0.8, 0.9))
    report = build_report(ExperimentResults(experiment="e", sets=(here,)))
    figure = next(one for one in report.figures() if one.name == "falls")
    assert "lab2" not in figure.drawn.caption
    assert Image.open(io.BytesIO(figure.drawn.png)).width > 1000
    assert b"noise-3 (safest)" in figure.drawn.picture
    assert figure.drawn.narrow
    table = next(one for one in report.tables() if one.name == "shift")
    assert len(table.rows) == 2 * 5
    (section,) = [one for one in report.sections if one.title == "How far does each model fall?"]
    rows: Any = next(block for block in section.blocks if block.kind == "table")
    assert rows.headings == ["model", "own", "noise", "lab2", "lowest", "at"]
    assert rows.rows[0][2].count(" / ") == 2


def test_one_appearance_alone_is_no_condition() -> None:
    assert shift_of(test_set(run_without_tests(looks=1))) is None
    assert [one.name for one in shift_of(test_set(run_without_tests(looks=2))).conditions] == ["own", "appearance 1", "appearance 2"]


def run_without_tests(looks: int) -> FinishedRun:
    return dataclasses.replace(run("fpn", 0.9, 0.8, None, looks=looks), further={})


def test_conditions_that_some_models_lack_do_not_count() -> None:
    less = run("detail", 0.93, 0.8, 0.85)
    less = dataclasses.replace(less, further={**less.further, "perturbed": {}})
    shift = shift_of(test_set(run("fpn", 0.95, 0.6, 0.9), less))
    assert shift.models == ("uni · fpn", "uni · detail")
    assert [one.name for one in shift.conditions] == ["own", "lab2"]
    assert describe_shift(shift)[-1].startswith("Not tested on noise-1, noise-2, noise-3: uni · detail.")


def test_the_report_has_the_calibration_of_each_model_on_each_test_set() -> None:
    own = {"pixels": [60, 0, 40], "probability": [0.1, 0.0, 0.9], "share_cell": [0.1, 0.0, 0.8]}  # error 0.4 * 0.1
    other = {"pixels": [50, 0, 50], "probability": [0.2, 0.0, 0.8], "share_cell": [0.1, 0.0, 0.6]}  # 0.5 * 0.1 + 0.5 * 0.2
    cooler = {"pixels": [0, 100, 0], "probability": [0.0, 0.5, 0.0], "share_cell": [0.0, 0.35, 0.0]}  # 0.15
    runs = []
    for seed in (0, 1):
        one = run("fpn", 0.95, 0.6, 0.9, seed=seed)
        one.per_image.update(calibration=own, calibration_corrected=own)
        one.further["sets"]["lab2"] |= {"calibration": [other, cooler][seed], "calibration_corrected": other}
        runs.append(one)
    shift = shift_of(test_set(*runs))
    heading, figure, table, text = shift_blocks(shift, "")[-4:]
    assert heading == Heading("Calibration on each test set")
    assert table.headings == ("model", "own", "lab2")
    # Without correction, the bins of both runs are pooled: (50 * 0.1 + 50 * 0.2 + 100 * 0.15) / 200.
    assert table.rows == [["uni · fpn", "0.040 / 0.040", "0.150 / 0.150"]]
    assert "temperature" in text.sentences[0]
    assert [line.get_label() for line in figure.draw().axes[0].lines] == ["perfect", "own", "lab2"]


def test_without_probabilities_a_report_has_no_calibration() -> None:
    blocks = shift_blocks(shift_of(test_set(run("fpn", 0.95, 0.6, 0.9))), "")
    assert Heading("Calibration on each test set") not in blocks
