"""The view that MLflow's UI opens is consistent."""

from __future__ import annotations

import json

from cellbench.metrics import catalog
from cellbench.tracking import ui_view


def test_the_view_sorts_by_a_shown_column_and_each_chart_has_its_section():
    view = json.loads(ui_view.leaderboard_view_url(catalog.view_columns()))
    state = json.loads(view["state"])
    assert view["name"]
    assert view["createdAt"] > 0
    assert state["orderByKey"] in state["selectedColumns"]
    sections = {one["uuid"] for one in state["compareRunSections"]}
    assert {one["metricSectionId"] for one in state["compareRunCharts"]} == sections
    assert len({one["uuid"] for one in state["compareRunCharts"]}) == len(state["compareRunCharts"])
