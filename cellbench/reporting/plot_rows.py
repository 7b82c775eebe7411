"""The models of a test set as rows of a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cellbench.reporting.model_groups import TestSet
from cellbench.statistics.bootstrap import Interval


@dataclass(frozen=True, kw_only=True)
class PlotRow:
    """One model in a figure: ``metrics`` holds the mean over images with its interval, by label."""

    model: str
    baseline: bool
    metrics: Mapping[str, Interval]
    backbone: str = ""
    head: str = ""
    external: bool = False
    """Masks of another tool."""


def plot_rows(here: TestSet) -> list[PlotRow]:
    """The metrics that all models have, with intervals. Leaves out models without any score."""
    metrics = [metric for metric in here.compared_metrics() if metric.in_figures]
    metrics = [metric for metric in metrics if metric.key == "dice" or not any(math.isnan(one.mean) for one in here.intervals(metric.key))]
    return [
        PlotRow(
            model=model.name,
            baseline=model.baseline,
            external=model.external,
            backbone=model.backbone,
            head=model.head,
            metrics={metric.label: here.intervals(metric.key)[k] for metric in metrics},
        )
        for k, model in enumerate(here.models)
        if not math.isnan(here.intervals()[k].mean)
    ]
