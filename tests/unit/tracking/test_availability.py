"""A store that cannot be used for a while is waited for, and it is said why."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from cellbench.errors import CellbenchError
from cellbench.tracking import availability
from cellbench.tracking.tracker import Tracker

HOLD = """
import sqlite3, sys
store = sqlite3.connect(sys.argv[1])
store.execute("begin " + sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
"""


@contextmanager
def held(file, how="exclusive"):
    """Another program that holds a lock; gives the function that ends it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        release(process)


def release(process):
    if process.poll() is None:
        process.communicate("\n")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(availability, "FIRST_S", 0.1)
    with Tracker("mine").run("one", "f1"):
        pass
    return tmp_path / "mlflow.db"


def test_a_locked_store_is_waited_for_and_used_when_it_is_free(store, capsys, monkeypatch):
    with held(store) as other:
        monkeypatch.setattr(availability, "warn", lambda line: (print(line), release(other)))
        assert set(Tracker("mine").known()) == {"f1"}
    assert f"(process {other.pid}). It is waited for, up to 120 s." in capsys.readouterr().out


def test_a_store_that_stays_locked_is_reported_with_its_holder_and_never_replaced(store, monkeypatch):
    monkeypatch.setattr(availability, "LOCK_PATIENCE_S", 0.2)
    with held(store) as other, pytest.raises(CellbenchError, match=rf"is locked by \S+ \(process {other.pid}\).*store is sound") as error:
        Tracker("mine")
    assert "backup" not in str(error.value)
    assert "ove it away" not in str(error.value)


def test_a_store_that_is_locked_against_writing_is_waited_for_too(store, monkeypatch):
    tracker = Tracker("mine")
    real = tracker.client._client.create_run

    def impatient(*arguments, **named):  # MLflow itself waits 20 s first
        with sqlite3.connect(store, timeout=0) as connection:
            try:
                connection.execute("begin immediate")
            except sqlite3.OperationalError as error:
                raise tracker.mlflow.exceptions.MlflowException(f"(sqlite3.OperationalError) {error}", error_code=3) from error
        return real(*arguments, **named)

    monkeypatch.setattr(tracker.client._client, "create_run", impatient)
    with held(store, "immediate") as other:
        monkeypatch.setattr(availability, "warn", lambda line: release(other))
        with tracker.run("two", "f2"):
            pass
    assert set(tracker.known()) == {"f1", "f2"}


def test_a_database_that_is_away_is_reported_within_seconds_without_its_password(monkeypatch, capsys):
    monkeypatch.setattr(availability, "DATABASE_PATIENCE_S", 3.0)
    monkeypatch.setattr(availability, "RETRY_S", 0.1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://lab:s3cret@127.0.0.1:1/mlflow")
    start = time.monotonic()
    with pytest.raises(CellbenchError, match=r"lab:\*\*\*@127\.0\.0\.1:1/mlflow has not answered"):
        Tracker("mine")
    assert time.monotonic() - start < 5
    said = capsys.readouterr().err
    assert "does not answer (" in said
    assert "It is asked again for" in said
    assert "s3cret" not in said


def test_a_database_that_takes_connections_and_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(availability, "DATABASE_PATIENCE_S", 0.0)
    monkeypatch.setattr(availability, "FIRST_S", 2.0)  # the least that PostgreSQL's client takes
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        start = time.monotonic()
        with pytest.raises(availability.AwayError):
            availability.wait_for_database(f"postgresql://lab@127.0.0.1:{mute.getsockname()[1]}/x", "the database")
        assert time.monotonic() - start < 5


@pytest.mark.skipif(os.name == "nt", reason="reads the table of open files")
def test_nobody_is_accused_of_a_lock_that_another_machine_holds(tmp_path):
    (tmp_path / "x.db").touch()
    assert "perhaps on another machine" in availability.why_locked(tmp_path / "x.db")


@pytest.mark.parametrize(
    ("version", "advice"),
    [("ffffffffffff", r"newer MLflow.*pip install --upgrade mlflow"), ("bd07f7e963c5", r"older MLflow.*mlflow db upgrade")],
)
def test_tables_of_another_mlflow_are_told_apart_by_age(store, tmp_path, monkeypatch, version, advice):
    other = tmp_path / "other.db"  # which MLflow has not opened in this process
    shutil.copy(store, other)
    with sqlite3.connect(other) as connection:
        connection.execute("update alembic_version set version_num = ?", (version,))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    with pytest.raises(CellbenchError, match=advice):
        Tracker("mine")
