"""The lock on a store that all machines see."""

from __future__ import annotations

from types import SimpleNamespace

from cellbench.tracking.store_lock import store_lock


def test_a_lock_of_a_database_takes_one_connection_and_ends_with_it(monkeypatch):
    import sqlalchemy

    events: list[str] = []
    connection = SimpleNamespace(exec_driver_sql=events.append, close=lambda: events.append("closed"))

    def connect():
        events.append("connected")
        return connection

    monkeypatch.setattr(sqlalchemy, "create_engine", lambda *_, **__: SimpleNamespace(connect=connect))
    with store_lock("postgresql://lab@db/mlflow", "cells"):
        events.append("held")
    assert [event.partition("(")[0] for event in events] == ["connected", "SELECT pg_advisory_lock", "held", "closed"]
