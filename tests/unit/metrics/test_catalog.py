"""Claims about the declarations of metrics: unique names, selections, and the way of a user's metric into a record and back."""

from __future__ import annotations

import pytest

from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError
from cellbench.metrics import catalog


def with_metric(folder, name="share", facts=""):
    (folder / "metrics").mkdir()
    (folder / "metrics" / f"{name}.toml").write_text(f'# Share of right pixels\nbuilder = "mine.py:share"\n{facts}')
    (folder / "metrics" / "mine.py").write_text("def share(image):\n    return float((image.truth == image.prediction).mean())\n")
    return Registry(folder)


def test_no_two_metrics_share_a_name():
    names = [name for one in catalog.METRICS for name in one.names]
    assert len(names) == len(set(names))
    keys = [one.key for one in catalog.METRICS]
    assert len(keys) == len(set(keys))
    assert all(one.meaning and one.label for one in catalog.METRICS)


def test_selections_keep_the_order_in_which_they_are_shown():
    assert [one.key for one in catalog.compared()] == ["dice", "nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq"]
    scores_then_costs = ["dice", "iou", "precision", "recall", "nsd", "ap50", "head_params", "train_s", "images_per_s"]
    assert [one.key for one in catalog.leaderboard()] == scores_then_costs
    assert catalog.counts()[0].key == "num_true"
    assert catalog.view_columns() == ("test_image/dice", "test/dice", "test_image/nsd", "test_image/ap50", "cost/train_s")


def test_a_search_may_seek_validation_and_cost_and_never_the_test():
    assert catalog.objectives() == {
        "val/dice": "maximize", "val/iou": "maximize", "val/loss": "minimize", "cost/head_params": "minimize", "cost/backbone_params": "minimize",
        "cost/train_s": "minimize", "cost/train_cpu_s": "minimize", "cost/latency_ms": "minimize", "cost/features_mib": "minimize",
    }  # fmt: skip


def test_a_users_metric_is_listed_after_the_shipped_ones(tmp_path):
    registry = with_metric(tmp_path, facts='label = "right"\ndirection = "minimize"\nsearchable = true\n')
    own = catalog.own_metrics(registry)
    assert catalog.compared(own)[-1] == catalog.metric("share", own) == own[0]
    assert catalog.leaderboard(own)[-4].label == "right"  # before the costs
    assert catalog.objectives(own)["val/share"] == "minimize"
    assert catalog.view_columns(own)[-2:] == ("test_image/share", "cost/train_s")


def test_a_record_holds_all_of_a_metric_but_its_code(tmp_path):
    (own,) = catalog.own_metrics(with_metric(tmp_path))
    (read,) = catalog.from_record(catalog.to_record([own]))
    assert read.compute is None
    assert catalog.to_record([read]) == catalog.to_record([own])
    assert (read.meaning, read.names) == ("Share of right pixels", ("test_image/share",))


def test_a_users_metric_may_not_take_a_shipped_name(tmp_path):
    with pytest.raises(CellbenchError, match="'dice' is a metric of cellbench already"):
        catalog.own_metrics(with_metric(tmp_path, "dice"))
