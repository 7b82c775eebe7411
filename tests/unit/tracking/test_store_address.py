"""Which file an address of SQLite means, as SQLAlchemy opens it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
import sqlalchemy

from cellbench.errors import CellbenchError
from cellbench.tracking.store_address import absolute, is_database_server, store_file
from cellbench.tracking.tracker import Tracker

ADDRESSES = [
    "sqlite:///runs.db",
    "sqlite:///runs.db?timeout=60",
    "sqlite:///sub/runs.db?timeout=60&check_same_thread=false",
    "sqlite+pysqlite:///runs.db",
    "sqlite:///file:runs.db?uri=true",
    "sqlite:///file:runs.db?mode=rwc&uri=true",
    "sqlite:///{here}/a b/runs.db?timeout=5",
    "sqlite:///file:{here}/runs.db?cache=private&uri=true",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_file_of_an_address_is_the_one_that_sqlalchemy_opens(address, tmp_path):
    address = address.format(here=tmp_path)
    file = store_file(address)
    file.parent.mkdir(exist_ok=True)
    for one in (address, absolute(address)):
        engine = sqlalchemy.create_engine(one)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS mark (x)")
        engine.dispose()
    with closing(sqlite3.connect(file)) as found:
        assert found.execute("SELECT name FROM sqlite_master").fetchall() == [("mark",)]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("address", ["sqlite:///runs.db?timeout=60", "sqlite:///file:runs.db?uri=true&timeout=60"])
def test_a_store_is_made_and_used_at_an_address_with_options(address, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    Tracker("mine")
    Tracker("mine", make=False)
    assert {one.name for one in mlflow.MlflowClient().search_experiments()} == {"Default", "mine"}
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".lock"] == ["runs.db"]


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_store_in_memory_is_refused_in_one_line(address, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(CellbenchError, match=r"in memory is lost .* sqlite:///mlflow\.db"):
        Tracker("mine")
    assert not list(Path.cwd().iterdir())


def test_servers_and_files_are_told_apart():
    servers = ["postgresql://me@db/x", "postgresql+psycopg://db/x", "mysql+pymysql://db/x"]
    assert all(map(is_database_server, servers))
    assert not any(map(is_database_server, ["sqlite:///x.db", "http://x", "journal:x.log", "databricks"]))
