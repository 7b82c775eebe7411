"""Claims about Results: its tables hold what was logged, and its comparisons are those of the report."""

from __future__ import annotations

import numpy as np
import pytest
from finished_runs import EXPERIMENT, IMAGES, log_finished_run, per_image_scores, small_grid

from cellbench.api.results import Results
from cellbench.config.run import RunSpec
from cellbench.errors import CellbenchError
from cellbench.reporting.collect import collect_runs
from cellbench.tracking.tracker import Tracker

__all__ = ["EXPERIMENT"]  # read by the fixture `tracker`


@pytest.fixture(scope="module")
def found(tracker: Tracker) -> Results:
    few = IMAGES[:5]
    log_finished_run(tracker, RunSpec(baseline="otsu"), per_image_scores(0.8, 0, few, "e" * 16))
    log_finished_run(tracker, RunSpec(backbone="uni", head="fpn"), per_image_scores(0.9, 0, few, "e" * 16))
    small_grid(tracker)
    return Results.collect([tracker])


def test_the_leaderboard_has_a_row_a_model_with_the_means_of_its_images(found: Results):
    table, scores = found.leaderboard(), found.per_image()
    assert table["model"].tolist() == list(found.models)
    assert found.models[0] == found.best == "dinobloom-s · fpn"
    means = scores.groupby("model")["dice"].mean()
    np.testing.assert_allclose(table["dice_per_image"], means[table["model"]])
    assert (table["low"] < table["dice_per_image"]).all()
    assert (table["dice_per_image"] < table["high"]).all()
    assert table["num_seeds"].tolist() == [2, 2, 2, 2, 1]
    assert table["baseline"].tolist() == [False, False, False, False, True]
    assert table[["backbone", "head"]].isna().all(axis=1).tolist() == table["baseline"].tolist()
    assert table["p_to_best"].isna().tolist() == [True, False, False, False, False]
    assert {"train_s", "peak_mib", "ap50"} <= set(table)


def test_there_is_a_row_an_image_and_run(found: Results):
    table = found.per_image()
    assert len(table) == 9 * len(IMAGES)
    one = table[(table["model"] == "uni · bilinear") & (table["seed"] == 1)]
    assert one["image"].tolist() == list(IMAGES)
    assert one["dice"].tolist() == per_image_scores(0.9, 1)["dice"]
    assert one["num_true"].tolist() == [90] * len(IMAGES)
    assert set(table["run_id"]) == set(found.runs()["run_id"])
    assert table["fold"].isna().all()
    assert table["dice"].dtype == np.float64


def test_runs_have_their_settings_and_metrics(found: Results):
    runs = found.runs()
    assert len(runs) == 9
    assert runs["model"].tolist() == [name for name, num in zip(found.models, (2, 2, 2, 2, 1), strict=True) for _ in range(num)]
    assert set(runs["seed"]) == {"0", "1"}
    assert (runs["test/iou"] == 0.9).all()


def test_a_comparison_is_that_of_the_report_and_reads_as_a_sentence(found: Results, tracker: Tracker):
    one = found.compare("dinobloom-s · fpn", "otsu")
    (reported,) = (d for d in collect_runs([tracker]).sets[0].differences() if {d.a, d.b} == {one.a, one.b})
    assert (one.difference, one.p_adjusted, one.num_pairs) == (reported.interval.mean, reported.p_adjusted, 10)
    scores = found.per_image().pivot_table(index="image", columns="model", values="dice")
    each = scores["dinobloom-s · fpn"] - scores["otsu"]
    assert one.difference == pytest.approx(each.mean())
    assert (one.wins, one.ties, one.losses) == (int((each > 0).sum()), 0, int((each < 0).sum()))
    assert one.significant
    assert one.better == "dinobloom-s · fpn"
    assert str(one) == repr(one)
    assert str(one).startswith(f"dinobloom-s · fpn is better than otsu by {one.difference:.3f} Dice (95 % ")


def test_sides_are_as_named_and_any_separator_will_do(found: Results):
    one, other = found.compare("uni fpn", "otsu", metric="nsd"), found.compare("otsu", "uni/fpn", metric="nsd")
    assert (one.a, one.b, one.metric) == ("uni · fpn", "otsu", "nsd")
    assert (other.a, other.b) == (one.b, one.a)
    assert (other.difference, other.wins, other.effect) == (-one.difference, one.losses, -one.effect)
    assert other.low == pytest.approx(-one.high)
    assert found.compare("otsu").b == found.best
    assert found.compare(found.best).b == found.models[1]


def test_all_pairs_are_a_table(found: Results):
    table = found.comparisons()
    assert len(table) == 10
    row = table[(table["a"] == found.best) & (table["b"] == "otsu")].iloc[0]
    assert row["p_adjusted"] == found.compare(found.best, "otsu").p_adjusted


@pytest.mark.parametrize(
    ("names", "metric", "message"),
    [
        (("otzu", "uni · fpn"), "dice", "no model called 'otzu'. Did you mean 'otsu'?"),
        (("otsu", "otsu"), "dice", "are the same model"),
        (("otsu", "uni · fpn"), "iuo", "no per-image metric called 'iuo'."),
    ],
)
def test_unknown_names_are_one_line(found: Results, names: tuple[str, str], metric: str, message: str):
    with pytest.raises(CellbenchError) as raised:
        found.compare(*names, metric=metric)
    assert message in str(raised.value)


def test_other_test_images_are_other_results(found: Results):
    (other,) = found.others
    assert other.models == ("uni · fpn", "otsu")
    assert len(other.per_image()) == 10
    assert other.others == ()
    assert set(other.runs()["run_id"]).isdisjoint(found.runs()["run_id"])
    assert "Best on average is uni · fpn" in other.verdict()


def test_it_prints_as_leaderboard_and_verdict_and_shows_as_html(found: Results):
    assert all(name in str(found) for name in found.models)
    assert found.verdict() in str(found)
    assert repr(found) == "<Results 'cells, a/b & ü 🔬' on drawn: 16 test images: 5 models, best dinobloom-s · fpn>"
    page = found._repr_html_()
    assert page.count("<tr") == 1 + len(found.models)
    assert "cells, a/b &amp; ü 🔬" in page


def test_the_report_is_written_where_it_is_asked_for(found: Results, tmp_path):
    place = found.report(tmp_path / "new" / "report")
    assert place == tmp_path / "new" / "report" / "report.html"
    assert found.best in place.read_text(encoding="utf-8")
    assert (place.parent / "leaderboard.csv").is_file()
