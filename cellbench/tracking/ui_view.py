"""The view of an experiment that MLflow's UI opens: its columns, best first, and charts that lay the runs over one another.

A saved view is a tag of the experiment, in the form that the UI itself writes (read in the bundle of 3.17.2, seen in a browser): people find
it under "Views". Without one the UI shows no metric at all, and its charts begin with whatever comes first in the alphabet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from cellbench.escaping import escape_markdown
from cellbench.tracking.schema import EVALUATED, LIMIT, VIEW

TAG = f"mlflow.sharedViewState.{VIEW}"
QUERY = f"viewStateShareKey={VIEW}&workflowType=machine_learning"
"""Opens the view by an address. Without the second part the UI may show the menus for language models around it."""
COLUMNS = (
    *(f"metrics.`{name}`" for name in ("test_image/dice", "test/dice", "test_image/nsd", "test_image/ap50", "cost/train_s")),
    *(f"params.`{name}`" for name in ("backbone", "head", "seed")),
)
"""The first sorts; five metrics leave room for the params on a laptop's screen."""
FILTER = f"tags.`{EVALUATED}` IS NULL"
"""Evaluations have other test images, so their scores do not stand in one column with those of the runs."""
BARS = ("test_image/dice", "test_image/nsd", "test_image/ap50")
LINES = ("val/dice", "val/loss", "train/loss")


WHOLE = f"tags.`{LIMIT}` IS NULL"
"""Shows no quick tries, which would stand on top with the score of a few images."""


def leaderboard_view_url(search: str = "") -> str:
    """The tag's value. ``search``: what the filter that the UI begins with asks beside ``FILTER``."""
    asked = " AND ".join(part for part in (FILTER, search) if part)
    state: dict[str, Any] = {
        "searchFilter": asked,
        "orderByKey": COLUMNS[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
    }
    state |= {
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS),
        "runsExpanded": {},
        "runsPinned": [],
    }
    state |= {"runsHidden": [], "runsHiddenMode": "FIRST_10_RUNS", "groupBy": None, "groupsExpanded": {}, "hideEmptyCharts": True}
    # "Reordered" keeps our sections on top of those that the UI makes of all other metrics.
    state |= {
        "compareRunCharts": _charts(),
        "compareRunSections": [_section("Side by side"), _section("While learning")],
        "isAccordionReordered": True,
    }
    now_ms = int(time.time() * 1000)
    return json.dumps({"name": VIEW, "createdAt": now_ms, "updatedAt": now_ms, "state": json.dumps(state)})


def _charts() -> list[dict[str, Any]]:
    dice, time_s = BARS[0], "cost/train_s"
    charts = [_chart("Side by side", "BAR", name, metricKey=name) for name in BARS]
    axes = {"xaxis": {"key": time_s, "type": "METRIC"}, "yaxis": {"key": dice, "type": "METRIC"}}
    charts.append(_chart("Side by side", "SCATTER", "cost", **axes))
    charts.append(_chart("Side by side", "PARALLEL", "both", selectedParams=["backbone", "head"], selectedMetrics=[dice], showAllRuns=True))
    charts.append(_chart("Side by side", "BAR", "speed", metricKey="cost/images_per_s"))
    settings = {"xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear", "lineSmoothness": 0, "yAxisKey": "metric"}
    settings |= {"yAxisExpressions": [], "selectedXAxisMetricKey": "", "useGlobalLineSmoothing": True, "useGlobalXaxisKey": True}
    return charts + [_chart("While learning", "LINE", name, metricKey=name, selectedMetricKeys=[name], **settings) for name in LINES]


def _chart(section: str, kind: str, key: str, **settings: Any) -> dict[str, Any]:
    chart = {"uuid": f"cellbench-{key}", "type": kind, "metricSectionId": _id(section), "runsCountToCompare": 10}
    return {**chart, "deleted": False, "isGenerated": False, **settings}


def _section(name: str) -> dict[str, Any]:
    return {"uuid": _id(name), "name": name, "display": True, "isReordered": False, "isGenerated": False}


def _id(section: str) -> str:
    return f"cellbench-{section.replace(' ', '-').lower()}"


def padded_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table for MLflow's notes, where cells have no room around them: a wide space that its parser does not strip gives them some."""
    out = ["| " + " | ".join(f"{escape_markdown(heading)}&emsp;" for heading in headings) + " |", "|:---" * len(headings) + "|"]
    return "\n".join(out + ["| " + " | ".join(f"{escape_markdown(cell)}&emsp;" for cell in line) + " |" for line in lines])
