"""The saved view of an experiment in MLflow's UI: its columns, sorted with the best run first, and its charts.

A saved view is a tag of the experiment in the UI's own format (read from the bundle of 3.17.2, checked in a browser). It appears under "Views".
Without one, the UI shows no metric, and its charts are in alphabetical order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from cellbench.escaping import escape_markdown
from cellbench.tracking.schema import EVALUATED, LIMIT, VIEW

TAG = f"mlflow.sharedViewState.{VIEW}"
PARAMS = ("backbone", "head", "seed")
"""Columns after the metrics."""
FILTER = f"tags.`{EVALUATED}` IS NULL"
"""Hides evaluations: they have other test images, so their scores must not share a column with those of the runs."""
WHOLE = f"tags.`{LIMIT}` IS NULL"
"""Hides runs on part of the data, which might rank first with the score of a few images."""
COMPARED, TRAINING = "Side by side", "Training curves"
CURVES = ("val/dice", "val/loss", "train/loss")


def leaderboard_address(server: str, experiment_id: str) -> str:
    """The address of the view on a server. From MLflow's start page a click on an experiment shows traces of language models instead."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def leaderboard_view(metrics: Sequence[str], search: str = "") -> str:
    """The tag's value. ``metrics``: the first sorts and stands first; five leave room for the params on a laptop's screen. ``search``: added to ``FILTER``."""
    columns = [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in PARAMS)]
    state: dict[str, Any] = {
        "searchFilter": " AND ".join(part for part in (FILTER, search) if part),
        "orderByKey": columns[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": ["attributes.`Run Name`", *columns, "duration", "runDateAndNestInfo"],
        "columnWidths": {"attributes.`Run Name`": 215, "runDateAndNestInfo": 145, **dict.fromkeys(columns[: len(metrics)], 118)},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_10_RUNS",
        "groupBy": None,
        "groupsExpanded": {},
        "hideEmptyCharts": True,
        "compareRunCharts": _charts(metrics),
        "compareRunSections": [_section(COMPARED), _section(TRAINING)],
        "isAccordionReordered": True,  # keeps our sections above the UI's sections of other metrics
    }
    now_ms = int(time.time() * 1000)
    return json.dumps({"name": VIEW, "createdAt": now_ms, "updatedAt": now_ms, "state": json.dumps(state)})


def _charts(metrics: Sequence[str]) -> list[dict[str, Any]]:
    dice = metrics[0]
    bars = [*(name for name in metrics if name.startswith("test_image/")), "cost/images_per_s"]
    axes = {"xaxis": {"key": "cost/train_s", "type": "METRIC"}, "yaxis": {"key": dice, "type": "METRIC"}}
    line = {
        "xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear", "lineSmoothness": 0, "yAxisKey": "metric",
        "yAxisExpressions": [], "selectedXAxisMetricKey": "", "useGlobalLineSmoothing": True, "useGlobalXaxisKey": True,
    }  # fmt: skip
    return [
        *(_chart(COMPARED, "BAR", name, metricKey=name) for name in bars),
        _chart(COMPARED, "SCATTER", "cost", **axes),
        _chart(COMPARED, "PARALLEL", "both", selectedParams=["backbone", "head"], selectedMetrics=[dice], showAllRuns=True),
        *(_chart(TRAINING, "LINE", name, metricKey=name, selectedMetricKeys=[name], **line) for name in CURVES),
    ]


def _chart(section: str, kind: str, key: str, **settings: Any) -> dict[str, Any]:
    chart = {"uuid": f"cellbench-{key}", "type": kind, "metricSectionId": _id(section), "runsCountToCompare": 10}
    return {**chart, "deleted": False, "isGenerated": False, **settings}


def _section(name: str) -> dict[str, Any]:
    return {"uuid": _id(name), "name": name, "display": True, "isReordered": False, "isGenerated": False}


def _id(section: str) -> str:
    return f"cellbench-{section.replace(' ', '-').lower()}"


def padded_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table for MLflow's notes. MLflow renders cells without padding, so each cell ends in a wide space."""
    out = ["| " + " | ".join(f"{escape_markdown(heading)}&emsp;" for heading in headings) + " |", "|:---" * len(headings) + "|"]
    return "\n".join(out + ["| " + " | ".join(f"{escape_markdown(cell)}&emsp;" for cell in line) + " |" for line in lines])
