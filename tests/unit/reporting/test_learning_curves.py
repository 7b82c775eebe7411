"""Learning curves: models that differ in their share of labels alone lie on one curve, and what is worse for certain is said so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finished_runs import IMAGES, finished, told_of

from cellbench.config.run import RunSpec
from cellbench.reporting import learning_curves
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.plots import comparison as comparison_plots
from cellbench.reporting.plots import style
from cellbench.run import main
from cellbench.tracking.tracker import Tracker


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker = Tracker("labels")
    for head, full in (("fpn", 0.93), ("bilinear", 0.90)):
        for fraction, lost in ((0.1, 0.05), (0.25, 0.02), (0.5, 0.0), (1.0, 0.0)):
            for seed in (0, 1):
                told = told_of(full - lost, seed) | {"num_train": int(40 * fraction)}
                finished(tracker, RunSpec(backbone="uni", head=head, seed=seed, fraction=fraction), told, name=f"{head} {fraction} {seed}")
    finished(tracker, RunSpec(baseline="otsu"), told_of(0.8, 0))
    return collect_runs([tracker]).sets[0]


def test_shares_of_one_model_make_one_curve_and_baselines_none(here) -> None:
    found = learning_curves.learning_curves(here)
    assert [curve.model for curve in found] == ["uni · fpn", "uni · bilinear"]
    for curve in found:
        assert [point.num_train for point in curve.points] == [4, 10, 20, 40]
        means = [point.dice.mean for point in curve.points]
        assert means[0] < means[1] < means[3]


def test_the_smallest_share_that_is_not_worse_is_named(here) -> None:
    found = learning_curves.learning_curves(here)
    assert [line[-1] for line in learning_curves.table_rows(found)] == ["worse", "worse", "cannot tell", ""] * 2
    for sentence in learning_curves.describe_curves(found):
        assert "20 of 40 images" in sentence
        assert "fewer are worse for certain" in sentence


def test_differences_are_those_of_paired_images(here) -> None:
    curve = learning_curves.learning_curves(here)[0]
    by_share = {model.runs[0].stored.params["fraction"]: model.scores().per_image for model in here.models if "fpn" in model.name}
    assert len(by_share["1.0"]) == len(IMAGES)
    for point in curve.points[:-1]:
        assert point.against_most is not None
        assert point.against_most.interval.mean == pytest.approx(float(np.mean(by_share[str(point.fraction)] - by_share["1.0"])))


def test_the_report_has_the_chapter_only_where_there_is_a_curve(here) -> None:
    assert main(["report", "labels", "--out", "r"]) == 0
    assert "How few labels are enough?" in Path("r/report.html").read_text(encoding="utf-8")
    assert len(Path("r/labels.csv").read_text(encoding="utf-8").splitlines()) == 9
    assert Path("r/figures/labels.png").stat().st_size > 5000
    finished(Tracker("plain"), RunSpec(backbone="uni", head="fpn"), told_of(0.9, 0))
    assert main(["report", "plain", "--out", "p"]) == 0
    assert "How few labels" not in Path("p/report.html").read_text(encoding="utf-8")


def test_the_picture_can_be_drawn_without_intervals(here) -> None:
    curves = learning_curves.learning_curves(here)
    points = [[(point.fraction, point.dice) for point in curve.points] for curve in curves]
    assert len(style.to_png(comparison_plots.plot_learning_curves([curve.model for curve in curves], points, "share"))) > 5000
