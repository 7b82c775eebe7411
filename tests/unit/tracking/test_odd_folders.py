"""A store is made in a folder of any name, and the default experiment's artifacts are in it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cellbench.tracking.tracker import Tracker


@pytest.mark.parametrize("name", ['it\'s "this"', "10:30 :later", "100% #1 ?", "ü"])
def test_a_folder_of_any_name_takes_a_store_and_its_artifacts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    tracker = Tracker("odd")
    with tracker.run("one", "f1") as run:
        run.log_text("note.txt", "kept")
    record = tracker.known()["f1"]
    assert tracker.artifact(record, "note.txt") == b"kept"
    assert [path.name for path in folder.rglob("note.txt")] == ["note.txt"]
    with sqlite3.connect(folder / "mlflow.db") as store:
        (place,) = store.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
    assert place == f"{folder}/mlruns/0"
