"""Counts in a report: which models its figure and its table show."""

from __future__ import annotations

from finished_runs import finished_run, per_image_scores

from cellbench.reporting.collect import ExperimentResults
from cellbench.reporting.counts import agreement_row
from cellbench.reporting.grouping import group_models
from cellbench.reporting.model_groups import FinishedRun
from cellbench.reporting.sections import build_report
from cellbench.statistics.agreement import agreement


def run(head: str, mean: float, *, with_counts: bool) -> FinishedRun:
    record = per_image_scores(mean, 0)
    if not with_counts:  # as runs of older versions
        del record["num_true"], record["num_predicted"]
    return finished_run(head, record)


def test_the_figure_shows_the_best_models_that_have_counts(pictures) -> None:
    runs = [run(head, 0.95 - k / 100, with_counts=k > 2) for k, head in enumerate(("fpn", "detail", "bilinear", "unetr"))]
    (here,), _ = group_models(runs)
    report = build_report(ExperimentResults(experiment="e", sets=(here,)))
    (table,) = [one for one in report.tables() if one.name == "counts"]
    assert [row[0] for row in table.rows] == ["uni · unetr"]
    (figure,) = [one for one in report.figures() if one.name == "counts"]
    assert len(figure.drawn.png) > 1000
    assert len([axes for axes in figure.draw().axes if axes.get_title("left") == "uni · unetr"]) == 1


def test_limits_that_are_unknown_are_left_out_of_the_table() -> None:
    some = agreement([3, 5, 9, 2], [4, 5, 8, 2])
    assert agreement_row("m", some)["limits of agreement"] == "-1.60 to +1.60"
    few = agreement_row("m", agreement([3, 4], [3, 5]))
    assert few["limits of agreement"] == ""
    assert few["concordance"] == "0.667"
