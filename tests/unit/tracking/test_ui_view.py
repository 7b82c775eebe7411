"""The view that MLflow's UI opens is consistent."""

from __future__ import annotations

import json

from cellbench.metrics import catalog
from cellbench.tracking import ui_view


def test_the_view_sorts_by_a_shown_column_and_each_chart_has_its_section():
    view = json.loads(ui_view.leaderboard_view(catalog.view_columns()))
    state = json.loads(view["state"])
    assert view["name"]
    assert view["createdAt"] > 0
    assert state["orderByKey"] in state["selectedColumns"]
    sections = {one["uuid"] for one in state["compareRunSections"]}
    assert {one["metricSectionId"] for one in state["compareRunCharts"]} == sections
    assert len({one["uuid"] for one in state["compareRunCharts"]}) == len(state["compareRunCharts"])


def test_the_score_that_sorts_is_the_first_column_after_the_run_name():
    state = json.loads(json.loads(ui_view.leaderboard_view(catalog.view_columns()))["state"])
    assert state["columnOrder"][:2] == ["attributes.`Run Name`", state["orderByKey"]]
    assert set(state["selectedColumns"]) <= set(state["columnOrder"])
    assert set(state["columnWidths"]) <= set(state["columnOrder"])
