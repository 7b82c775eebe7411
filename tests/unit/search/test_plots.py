"""Plots of a search: every trial in view, pruned and failed ones told apart, whole epochs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from cellbench.config.registry import Registry
from cellbench.config.search_space import Space
from cellbench.metrics.catalog import objectives
from cellbench.search import plots
from cellbench.search.study import Study


def study_of(folder: Path, **settings) -> tuple[Study, Space]:
    tree = {
        "experiment": "s", "dataset": "folder", "search": {"trials": 9, "batch": 3, "startup": 3, "sampler": "random", **settings},
        "space": {"backbone": ["vit-tiny-random"], "head": ["bilinear", "fpn"], "lr": {"low": 1e-4, "high": 1e-1, "log": True},
                  "batch_size": {"low": 2, "high": 9}},
    }  # fmt: skip
    space = Space.of(tree, "s.toml", Registry(), objectives())
    study = Study(f"sqlite:///{folder / 'optuna.db'}", space, space.facts, 4)
    with study:
        number = 0
        while batch := study.ask():
            for pending in batch:
                value = 0.05 if number == 1 else 0.9 - (math.log10(pending.point["lr"]) + 2) ** 2 / 50
                metrics = {"val/dice": value, "cost/latency_ms": float(pending.point["batch_size"])}
                if number == 2:
                    study.tell_failed(pending, "out of memory")
                elif number == 3 and len(space.settings.objectives) == 1:
                    study.should_continue(pending, 0, 0.5)
                    study.tell_pruned(pending, metrics, "median")
                else:
                    for epoch in range(3 * (len(space.settings.objectives) == 1)):
                        study.should_continue(pending, epoch, value - 0.2 / (epoch + 1))
                    study.tell(pending, metrics)
                number += 1
    return study, space


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "to_png", lambda figure: kept.append(figure) or b"")
    return kept


def test_every_trial_of_one_objective_has_a_mark_within_the_axes(tmp_path: Path, figures: list[Figure]) -> None:
    study, space = study_of(tmp_path, pruner="median")
    names = [name for name, _ in plots.plot_study(study, space)]
    assert names == ["history", "slice", "parallel", "importance", "curves"]
    history = figures[0].axes[0]
    low, high = history.get_ylim()
    marks = [mark for mark in history.collections if len(mark.get_offsets()) == 1 and mark.get_facecolor().size]
    assert {round(float(mark.get_offsets()[0][0])) for mark in marks} == set(range(9))
    assert all(low <= float(mark.get_offsets()[0][1]) <= high for mark in marks)
    assert low > 0.5  # trial 1, far below, does not squeeze the others: it is an arrow
    labels = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert labels == {"complete", "pruned", "failed", "best", "beyond the axis"}
    epochs = figures[-1].axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in epochs)


def test_two_objectives_give_a_front_and_each_its_plots(tmp_path: Path, figures: list[Figure]) -> None:
    study, space = study_of(tmp_path, objective=["val/dice", "cost/latency_ms"], pruner="none")
    names = [name for name, _ in plots.plot_study(study, space)]
    assert {"history-val-dice", "slice-cost-latency_ms", "pareto"} <= set(names)
    front = figures[-1].axes[0]
    assert {text.get_text() for text in front.texts} == {str(t.number) for t in study.best()}
    assert (front.get_xlabel(), front.get_ylabel()) == ("cost/latency_ms (lower is better)", "val/dice (higher is better)")


def test_a_study_without_two_results_has_no_plot(tmp_path: Path) -> None:
    study, space = study_of(tmp_path, trials=1, batch=1)
    assert list(plots.plot_study(study, space)) == []


def test_values_far_on_the_worse_side_alone_leave_the_axis() -> None:
    assert plots.view_span([0.9, 0.91, 0.92, 0.93, 0.1], True)[0] > 0.8
    assert plots.view_span([0.5, 0.51, 0.52, 0.9], True)[1] > 0.9
    assert plots.view_span([5, 6, 7, 8, 900], False)[1] < 100
