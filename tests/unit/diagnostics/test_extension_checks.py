"""A metric of the user may not take the name of one of the package."""

from __future__ import annotations

import pytest

from cellbench.config.base import checked
from cellbench.config.cards import MetricCard
from cellbench.diagnostics.extension_checks import metric_name_is_free


@pytest.mark.parametrize(("name", "free"), [("area-error", True), ("dice", False), ("ap50", False)])
def test_the_name_of_a_shipped_metric_breaks_a_contract(name: str, free: bool) -> None:
    card = checked(MetricCard, {"id": name, "title": "", "path": "", "builder": "a.py:a"}, "card")
    assert (metric_name_is_free(card) == "") is free
