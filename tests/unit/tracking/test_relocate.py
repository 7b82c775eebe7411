"""A project that was copied, moved or renamed finds its artifacts, and a copy never writes into its original."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3

import mlflow
import pytest
from finished_runs import EXPERIMENT

from cellbench.errors import CellbenchError
from cellbench.metrics import catalog
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.report import report_dir
from cellbench.run import main
from cellbench.tracking import relocate
from cellbench.tracking.tracker import Tracker


def results():
    return collect_runs([Tracker(EXPERIMENT, make=False)])


@pytest.mark.parametrize("name", ["moved project ü", "100%_sure"])
def test_a_moved_project_finds_its_artifacts_again(made, tmp_path, monkeypatch, name):
    first = tmp_path / "first"
    shutil.copytree(made, first)
    with sqlite3.connect(first / "mlflow.db") as store:
        for table, column in relocate.COLUMNS:
            store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (made.as_uri(), first.as_uri()))
            store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(made), str(first)))
    store.close()
    monkeypatch.chdir(first)
    assert relocate.fix_artifact_paths() == []
    second = tmp_path / name
    monkeypatch.chdir(tmp_path)
    first.rename(second)
    monkeypatch.chdir(second)
    mlflow.set_tracking_uri(None)
    (said,) = relocate.fix_artifact_paths()
    assert str(second / "mlruns") in said
    assert relocate.fix_artifact_paths() == []
    assert results().num_runs == 9
    assert str(first) not in " ".join(str(row) for row in sqlite3.connect("mlflow.db").execute("SELECT artifact_uri FROM runs"))


def _at_home(folder):
    """The project ``made`` in another folder, as if it had been made there."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        for table, column in relocate.COLUMNS:
            where = f"CASE WHEN {column} LIKE 'file:%' THEN ? ELSE ? END || substr({column}, instr({column}, '/mlruns'))"
            store.execute(f"UPDATE {table} SET {column} = {where} WHERE {column} LIKE '%/mlruns%'", (folder.as_uri(), str(folder)))
    return folder


def _stamps(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.mark.slow
def test_a_copy_writes_into_itself_beside_its_original(made, tmp_path, monkeypatch):
    first = _at_home(shutil.copytree(made, tmp_path / "first"))
    second = shutil.copytree(first, tmp_path / "second")
    before = _stamps(first)
    monkeypatch.chdir(second)
    mlflow.set_tracking_uri(None)
    assert main(["report", EXPERIMENT]) == 0  # with no word of the copy: the store is opened by any verb
    tracker = Tracker(EXPERIMENT, make=False)
    with tracker.run("one more", "f00") as run:
        (tmp_path / "left").mkdir()
        (tmp_path / "left" / "a.txt").write_text("a")
        run.log_artifacts(tmp_path / "left")
    assert _stamps(first) == before
    assert len(list((second / "mlruns").rglob("a.txt"))) == 1
    for table, column in relocate.COLUMNS:
        with contextlib.closing(sqlite3.connect("mlflow.db")) as store:
            assert not [place for (place,) in store.execute(f"SELECT {column} FROM {table}") if "/first/" in place]
    assert relocate.fix_artifact_paths() == []


def test_a_copy_without_its_artifacts_names_both_folders(made, tmp_path, monkeypatch):
    first = _at_home(shutil.copytree(made, tmp_path / "first"))
    (tmp_path / "second").mkdir()
    shutil.copy(first / "mlflow.db", tmp_path / "second")
    monkeypatch.chdir(tmp_path / "second")
    with pytest.raises(CellbenchError, match=rf"copy of {first}/mlflow.db, .* Copy that folder to {tmp_path}/second/mlruns/"):
        relocate.fix_artifact_paths()


def test_a_store_that_people_keep_apart_from_its_artifacts_stays(made, tmp_path, monkeypatch):
    first = _at_home(shutil.copytree(made, tmp_path / "first"))
    (tmp_path / "stores" / "mlruns" / "another").mkdir(parents=True)
    (first / "mlflow.db").rename(tmp_path / "stores" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/stores/mlflow.db")
    assert relocate.fix_artifact_paths() == []


def test_the_ui_names_the_experiments_that_have_a_leaderboard(project):
    assert relocate.experiment_names() == []
    tracker = Tracker(EXPERIMENT)
    tracker.describe("**why?**", catalog.view_columns())
    assert relocate.experiment_names() == [(EXPERIMENT, tracker.experiment_id)]


@pytest.mark.slow
def test_experiments_whose_names_differ_share_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/names.db")
    mlflow.set_tracking_uri(None)
    names = ["a/b", "a-b", "a_b", "A-b", "a b", "ä", "ö", "x" * 80, "x" * 81, "12", "e-12", "12/", "../a-b", "con"]
    for name in names:
        Tracker(name)
    folders = [path.name for path in (tmp_path / "mlruns").iterdir()]
    assert len({name.casefold() for name in folders}) == len(names)
    assert len({str(report_dir(name)).casefold() for name in names}) == len(names)
    assert {path.name for path in tmp_path.iterdir()} - {".names.db.lock"} == {"mlruns", "names.db"}
