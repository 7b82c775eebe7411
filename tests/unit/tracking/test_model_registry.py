"""Winners are in MLflow's list of models, with the metrics of the epoch that was kept."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from cellbench.errors import CellbenchError
from cellbench.tracking import model_registry
from cellbench.tracking.schema import RunRecord
from cellbench.tracking.tracker import Tracker

EXPERIMENT = "entries, a/b 🔬"
DICES = (0.5, 0.9, 0.7)


def trained(tracker: Tracker, tmp_path: Path, name: str, files: tuple[str, ...]) -> RunRecord:
    """A run of three epochs, the second the best, as a grid leaves it."""
    with tracker.run(name, name) as run:
        run.log_input("smears", "d" * 16, "drawn", "training")
        for epoch, dice in enumerate(DICES):
            run.buffer(epoch, {"val/dice": dice, "train/loss": 1 - dice})
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        for file in files:
            (folder / file).write_bytes(b"experiment = 'x'\n")
        run.log_artifacts(folder)
        run.log({"best/epoch": 1, "test/dice": 0.8}, params={"head": "fpn"})
    return next(one for one in tracker.stored() if one.run_id == run.run_id)


def test_a_winner_has_the_metrics_of_the_epoch_that_was_kept(tracker, tmp_path):
    run = trained(tracker, tmp_path, "a / b · lr 0.1", ("config.toml", "head.safetensors"))
    model = tracker.client.get_logged_model(model_registry.register(tracker, run, "the best"))
    found = {one.key: (one.value, one.step, one.dataset_name) for one in model.metrics}
    assert found["val/dice"] == (0.9, 1, None)
    assert found["train/loss"] == (pytest.approx(0.1), 1, None)
    assert found["test/dice"] == (0.8, 0, "smears")
    assert (model.status, model.params, model.tags["cellbench.verdict"]) == ("READY", {"head": "fpn"}, "the best")
    again = tracker.client.get_run(run.run_id)
    assert [one.model_id for one in again.outputs.model_outputs] == [model.model_id]
    assert len(tracker.client.get_metric_history(run.run_id, "val/dice")) == len(DICES)
    assert len(tracker.client.get_metric_history(run.run_id, "test/dice")) == 1


def test_an_entry_holds_what_is_needed_to_use_it_and_says_what_goes_in_and_out(tracker, tmp_path):
    run = trained(tracker, tmp_path, "whole", ("config.toml", "head.safetensors"))
    folder = Path(
        mlflow.artifacts.download_artifacts("models:/" + model_registry.register(tracker, run, "the best"), dst_path=str(tmp_path / "out"))
    )
    assert {"MLmodel", "config.toml", "head.safetensors"} <= {path.name for path in folder.iterdir()}
    signature = mlflow.models.Model.load(str(folder)).signature
    assert [one.name for one in signature.inputs] == ["image"]
    assert [one.name for one in signature.outputs] == ["classes", "cell"]


def test_an_entry_is_made_once_and_anew_where_a_person_deleted_it(tracker, tmp_path):
    name = "once"
    run = trained(tracker, tmp_path, name, ("config.toml",))
    first = model_registry.register(tracker, run, "the best")
    (run,) = (one for one in tracker.stored() if one.run_id == run.run_id)
    assert model_registry.register(tracker, run, "the best") == first
    tracker.client.delete_logged_model(first)
    assert model_registry.register(tracker, run, "the best") != first


def test_an_entry_is_marked_when_superseded(tracker, tmp_path):
    run = trained(tracker, tmp_path, "was the best", ("config.toml",))
    first = model_registry.register(tracker, run, "the best", " Chosen by its test score among 3 models.")
    assert tracker.client.get_logged_model(first).tags["mlflow.note.content"] == (
        f"In '{EXPERIMENT}': the best. Chosen by its test score among 3 models."
    )
    second = model_registry.register(tracker, trained(tracker, tmp_path, "is the best", ("config.toml",)), "the best")
    model_registry.mark_superseded(tracker, [second])
    assert tracker.client.get_logged_model(first).tags["cellbench.verdict"] == "superseded"
    assert tracker.client.get_logged_model(second).tags["cellbench.verdict"] == "the best"


def test_a_run_that_lost_its_files_gets_no_entry_and_that_is_said(tracker, tmp_path):
    run = trained(tracker, tmp_path, "lost", ("head.safetensors",))
    with pytest.raises(CellbenchError, match=r"'lost' has no config\.toml"):
        model_registry.register(tracker, run, "the best")
    assert [one.status for one in tracker.client.search_logged_models([tracker.experiment_id]) if one.name == "lost"] == ["FAILED"]
