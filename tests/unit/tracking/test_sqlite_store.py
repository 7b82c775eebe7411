"""MLflow's store is created atomically, also while another program creates it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlflow
import pytest

from cellbench.errors import CellbenchError
from cellbench.files import cache_dir
from cellbench.tracking import sqlite_store
from cellbench.tracking.store import newest_experiment
from cellbench.tracking.tracker import Tracker

OTHER = """
import mlflow, sys
print("ready", flush=True)
sys.stdin.readline()
mlflow.MlflowClient().search_experiments()
"""

COPY, KEEP = sqlite_store._copy, sqlite_store._keep_as_template  # before conftest.py shortens them for the other tests


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_store, "_copy", COPY)
    monkeypatch.setattr(sqlite_store, "_keep_as_template", KEEP)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path / "mlflow.db"


@pytest.mark.slow
@pytest.mark.parametrize("ahead_s", [0.0, 0.4])
def test_a_store_that_another_program_makes_at_the_same_time_serves_both(store, ahead_s):
    call = [sys.executable, "-c", OTHER]
    with subprocess.Popen(
        call, env=os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        time.sleep(ahead_s)
        Tracker("mine")
        assert other.wait(60) == 0
    assert {one.name for one in mlflow.MlflowClient().search_experiments()} == {"Default", "mine"}


def test_no_partial_file_remains_beside_the_store(store):
    Path(f"{store.parent}/.mlflow.db.making").write_text("of one who was killed")
    Tracker("mine")
    assert [path.name for path in store.parent.iterdir() if "making" in path.name] == []


def test_a_store_that_was_never_made_to_its_end_is_refused_in_one_line(store):
    with sqlite3.connect(store) as half:
        half.execute("CREATE TABLE runs (run_uuid VARCHAR(32) NOT NULL, name VARCHAR(250), status VARCHAR(9))")
    os.utime(store, (time.time() - 60,) * 2)
    with pytest.raises(CellbenchError, match=r"mlflow\.db.*Move it away") as error:
        Tracker("mine")
    assert "\n" not in str(error.value)


def test_a_folder_in_the_place_of_the_store_is_refused_at_once(store):
    store.mkdir()
    with pytest.raises(CellbenchError, match="is a folder"):
        Tracker("x")


def test_a_folder_with_any_name_gets_its_store(tmp_path, monkeypatch):
    folder = tmp_path / "100%_sure [x%20y] ü"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Tracker("mine")
    assert [path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"] == ["mlflow.db"]


def test_an_experiment_of_the_same_name_elsewhere_is_no_damaged_store(store):
    tracker = Tracker("mine")
    with pytest.raises(CellbenchError, match="already exists") as error:
        tracker.client.create_experiment("mine")
    assert "ove it away" not in str(error.value)


@pytest.mark.parametrize(
    "opens", [newest_experiment, partial(Tracker, "mine"), partial(Tracker, "mine", make=False)], ids=["reader", "maker", "looker"]
)
def test_an_address_of_no_kind_that_mlflow_knows_is_reported(monkeypatch, opens):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://loft")
    with pytest.raises(CellbenchError, match=r"MLflow at carrier-pigeon://loft: .* or set another MLFLOW_TRACKING_URI\.$"):
        opens()


def _schema(store):
    with contextlib.closing(sqlite3.connect(store)) as opened:
        return sorted(opened.execute("SELECT type, name, sql FROM sqlite_master").fetchall(), key=str)


def test_the_next_folders_store_is_a_copy_that_holds_nothing_of_the_first(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        tracker = Tracker(name)
        monkeypatch.setattr("mlflow.store.db.utils._initialize_tables", lambda engine: pytest.fail("MLflow makes it from the beginning"))
    assert _schema(tmp_path / "second" / "mlflow.db") == _schema(tmp_path / "first" / "mlflow.db")
    found = {one.name: one.artifact_location for one in tracker.client.search_experiments()}
    assert set(found) == {"Default", "second"}
    assert all(str(tmp_path / "second") in place for place in found.values())


def test_a_damaged_template_is_made_anew(store, monkeypatch):
    template = cache_dir() / "mlflow_store" / f"{mlflow.__version__}.db"
    template.parent.mkdir(parents=True)
    template.write_bytes(b"SQLite format 3\0" + bytes(4000))
    Tracker("mine")
    assert _schema(template) == _schema(store)
