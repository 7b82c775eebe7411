"""Learning curves: models that differ only in their share of training images are one curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finished_runs import IMAGES, log_finished_run, per_image_scores

from cellbench.config.run import RunSpec
from cellbench.reporting import learning_curves
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.decisions import describe_doubling
from cellbench.reporting.plots import comparison as comparison_plots
from cellbench.reporting.plots import style
from cellbench.reporting.verdict import describe_learning_curves
from cellbench.run import main
from cellbench.tracking.tracker import Tracker


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker = Tracker("labels")
    for head, full in (("fpn", 0.93), ("bilinear", 0.90)):
        for fraction, lost in ((0.1, 0.05), (0.25, 0.02), (0.5, 0.0), (1.0, 0.0)):
            for seed in (0, 1):
                scores = per_image_scores(full - lost, seed) | {"num_train": int(40 * fraction)}
                log_finished_run(
                    tracker, RunSpec(backbone="uni", head=head, seed=seed, fraction=fraction), scores, name=f"{head} {fraction} {seed}"
                )
    log_finished_run(tracker, RunSpec(baseline="otsu"), per_image_scores(0.8, 0))
    return collect_runs([tracker]).sets[0]


def test_shares_of_one_model_make_one_curve_and_baselines_none(here) -> None:
    found = learning_curves.learning_curves(here)
    assert [curve.model for curve in found] == ["uni · fpn", "uni · bilinear"]
    for curve in found:
        assert [point.num_train for point in curve.points] == [4, 10, 20, 40]
        means = [point.dice.mean for point in curve.points]
        assert means[0] < means[1] < means[3]


def test_the_smallest_share_without_a_significant_difference_is_named(here) -> None:
    found = learning_curves.learning_curves(here)
    better = [[point.to_largest.better for point in curve.points[:-1]] for curve in found]
    assert better == [["1", "1", None]] * 2
    for sentence in describe_learning_curves(found):
        assert "20 of 40 images" in sentence
        assert "fewer are significantly worse" in sentence


def test_differences_are_those_of_paired_images(here) -> None:
    curve = learning_curves.learning_curves(here)[0]
    by_share = {model.runs[0].record.params["fraction"]: model.scores().per_image for model in here.models if "fpn" in model.name}
    assert len(by_share["1.0"]) == len(IMAGES)
    for point in curve.points[:-1]:
        assert point.to_largest is not None
        assert point.to_largest.interval.mean == pytest.approx(float(np.mean(by_share[str(point.fraction)] - by_share["1.0"])))


def test_what_twice_the_images_would_give_is_said_for_each_curve(here) -> None:
    curves = learning_curves.learning_curves(here)
    for curve, sentence in zip(curves, describe_doubling(curves), strict=True):
        errors = 1 - np.array([point.dice.mean for point in curve.points])
        slope = np.polyfit(np.log([4, 10, 20, 40]), np.log(errors), 1)[0]
        assert sentence.startswith(
            f"{curve.model}: 80 training images instead of 40 would change Dice by {errors[-1] * (1 - 2**slope):+.3f} (95 % "
        )
        assert sentence.endswith("if the curve goes on as before.")


@pytest.mark.slow
def test_the_report_has_the_section_only_where_there_is_a_curve(here, pictures) -> None:
    assert main(["report", "labels", "--out", "r"]) == 0
    assert "How few training images are enough?" in Path("r/report.html").read_text(encoding="utf-8")
    rows = Path("r/labels.csv").read_text(encoding="utf-8").splitlines()
    assert [row.rpartition(",")[2] for row in rows] == ["verdict", *["worse", "worse", "not significant", ""] * 2]
    assert Path("r/figures/labels.png").stat().st_size > 5000
    log_finished_run(Tracker("plain"), RunSpec(backbone="uni", head="fpn"), per_image_scores(0.9, 0))
    assert main(["report", "plain", "--out", "p"]) == 0
    assert "How few training" not in Path("p/report.html").read_text(encoding="utf-8")


def test_the_picture_can_be_drawn_without_intervals(here) -> None:
    curves = learning_curves.learning_curves(here)
    points = [[(point.fraction, point.dice) for point in curve.points] for curve in curves]
    assert len(style.to_png(comparison_plots.plot_learning_curves([curve.model for curve in curves], points, "share"))) > 5000
