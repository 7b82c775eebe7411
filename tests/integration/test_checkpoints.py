"""A checkpoint belongs to one run in one store; the same run elsewhere may start from it, and then has its whole curve."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from small_data import write_pair

from cellbench.run import main
from cellbench.training import checkpoints
from cellbench.training.trainer import HeadTrainer

EXPERIMENT = """experiment = "same"
dataset = "folder"
[grid]
backbone = ["filter-bank"]
head = ["bilinear"]
[run]
tile_px = 64
epochs = 5
patience = 0
"""


@pytest.fixture
def question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for split, num in (("train", 4), ("test", 1)):
        for seed in range(num):
            write_pair(tmp_path / "smears" / split, f"{split}{seed}.png", seed + 50 * (split == "test"))  # no image in both
    (tmp_path / "same.toml").write_text(EXPERIMENT)
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    return ["grid", str(tmp_path / "same.toml"), "--data", str(tmp_path / "smears"), "--device", "cpu"]


def ask(question: list[str], project: Path, monkeypatch: pytest.MonkeyPatch, until: int = 5) -> int:
    """Asks in a project of its own; ended as by Ctrl-C before epoch ``until``. Gives the exit code."""
    project.mkdir(exist_ok=True)
    begin = HeadTrainer.start_epoch

    def ends(self: HeadTrainer) -> None:
        if self.epoch == until:
            raise KeyboardInterrupt
        begin(self)

    with monkeypatch.context() as patch:
        patch.chdir(project)
        patch.setattr(HeadTrainer, "start_epoch", ends)
        # The report: half of the time, and not the question here.
        patch.setattr("cellbench.execution.experiment_run.write_report", lambda *_: None)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
        try:
            return main(question)
        except KeyboardInterrupt:
            return 130


def curve(project: Path, name: str = "val/loss") -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "same"]
    (run,) = [run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" in run.data.tags]
    return [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]


def kept(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "cache" / "checkpoints").glob("*.pt"))


def test_a_run_that_starts_from_another_stores_checkpoint_has_its_whole_curve_and_leaves_it(question, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert ask(question, first, monkeypatch, until=3) == 130
    before = kept(tmp_path)
    assert len(before) == 1
    assert ask(question, second, monkeypatch) == 0
    assert "after epoch 3, from a checkpoint of the same run in another store" in capsys.readouterr().out
    assert kept(tmp_path) == before  # the first's is still there, the second's own is gone
    assert ask(question, first, monkeypatch) == 0
    assert "resumes after epoch 3.\n" in capsys.readouterr().out
    assert kept(tmp_path) == []
    assert [step for step, _ in curve(first)] == [0, 1, 2, 3, 4]
    assert curve(second) == curve(first)


def test_a_copied_project_resumes_without_taking_the_originals_checkpoint(question, tmp_path, monkeypatch):
    first, copy = tmp_path / "first", tmp_path / "copy"
    assert ask(question, first, monkeypatch, until=3) == 130
    shutil.copytree(first, copy)  # with the run, under the same id
    before = kept(tmp_path)
    assert ask(question, copy, monkeypatch, until=4) == 130
    assert len(kept(tmp_path)) == 2
    assert ask(question, copy, monkeypatch) == 0
    assert kept(tmp_path) == before
    assert [step for step, _ in curve(copy)] == [0, 1, 2, 3, 4]  # none of them twice


def test_another_runs_damaged_file_is_skipped_and_left(tmp_path):
    mine, other, third = (checkpoints.checkpoint_path("f" * 16, name) for name in ("a", "b", "c"))
    assert checkpoints.read_other_store(mine) is None
    checkpoints.write_checkpoint(third, {"progress": {"epoch": 2, "ended": ""}, "x": torch.ones(2)})
    other.write_bytes(third.read_bytes()[:-20])
    found = checkpoints.read_other_store(mine)
    assert found is not None
    assert found["progress"]["epoch"] == 2
    assert other.is_file()
    other.write_bytes(third.read_bytes())
    os.remove(third)
    checkpoints.write_checkpoint(other, {"progress": {"epoch": 4, "ended": "pruned"}})
    assert checkpoints.read_other_store(mine) is None


def test_the_state_that_has_come_furthest_is_taken_and_no_other_fingerprints():
    mine = checkpoints.checkpoint_path("f" * 16, "mine")
    for name, epoch, fingerprint in (("a", 3, "f" * 16), ("b", 7, "f" * 16), ("c", 5, "f" * 16), ("d", 9, "e" * 16)):
        checkpoints.write_checkpoint(checkpoints.checkpoint_path(fingerprint, name), {"progress": {"epoch": epoch, "ended": ""}})
    checkpoints.write_checkpoint(mine, {"progress": {"epoch": 8, "ended": ""}})
    found = checkpoints.read_other_store(mine)
    assert found is not None
    assert found["progress"]["epoch"] == 7
