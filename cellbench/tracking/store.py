"""Opens MLflow's store, and finds experiments in it.

No tracking URI is ever set: MLflow's default (``./mlflow.db`` and ``./mlruns/``) or ``MLFLOW_TRACKING_URI`` applies, so that a plain
``mlflow ui`` shows the runs.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cellbench.console import warn
from cellbench.files import os_errors_as
from cellbench.tracking import relocate, sqlite_store, store_address
from cellbench.tracking.availability import wait_for_database
from cellbench.tracking.client import ResilientClient
from cellbench.tracking.offline_queue import NotFoundError
from cellbench.tracking.schema import LIMIT, STATUS, to_record
from cellbench.tracking.store_lock import store_lock

for _noisy in (
    "mlflow.store.db.utils", "mlflow.store.db_migrations", "mlflow.system_metrics", "alembic", "alembic.runtime.migration",
    "urllib3.connectionpool",
):  # fmt: skip
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)  # their errors are raised as well, and reported in one line


def newest_experiment(*, whole: bool = False) -> str | None:
    """The experiment with the newest finished run of cellbench in MLflow's store; None if there is none.

    ``whole``: runs on part of their data (``--limit``) count only if there are no others.
    """
    client = _reader()
    names = {one.experiment_id: one.name for one in client.search_experiments()}
    newest, order = None, ["attributes.start_time DESC"]
    for run in pages(client.search_runs, list(names), f"tags.`{STATUS}` = 'finished'", order_by=order, max_results=100):
        # Grids, evaluations and explorations are no models. Filtered here: servers of an older MLflow do not know IS NULL.
        if not (record := to_record(run)).is_parent:
            newest = newest or run
            if not whole or LIMIT not in record.tags:
                newest = run
                break
    return None if newest is None else names[newest.info.experiment_id]


def all_experiments() -> list[str]:
    """The names of all experiments in MLflow's store."""
    return [one.name for one in _reader().search_experiments()]


def experiment_of(run_id: str) -> str | None:
    """The name of the experiment that a run belongs to; None if no run has this id."""
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):  # a run's name may contain quotes, so it must not enter a query
        return None
    client = _reader()
    with contextlib.suppress(NotFoundError):
        return client.get_experiment(client.get_run(run_id).info.experiment_id).name
    return None


def _reader() -> ResilientClient:
    """The store's client, for functions that must not create one."""
    with open_store(make=False) as (_, client):
        return client


_relocated: set[Path | None] = set()
"""Stores whose paths this process has checked."""


@contextlib.contextmanager
def open_store(make: bool) -> Iterator[tuple[Any, ResilientClient]]:
    """MLflow and the client of its store, which is locked inside ``with``. Raises CellbenchError."""
    import mlflow  # 1 to 2 s, too long for `--help` and `list`

    uri = mlflow.get_tracking_uri()
    if (file := store_address.store_file(uri)) not in _relocated:  # before anything is logged: a copy must not write into its original
        for line in relocate.fix_artifact_paths(uri):
            warn(line)
        _relocated.add(file)
    wait_for_database(uri, "MLflow's database")
    with os_errors_as("opening MLflow's store here"), store_lock(uri):  # concurrent creation broke the store in 5 of 5 tests
        client = sqlite_store.open_or_create(mlflow, make)
        yield mlflow, client


def pages(search: Callable[..., Any], *arguments: Any, **named: Any) -> Iterator[Any]:
    """The results of all pages of one of MLflow's searches."""
    token = None
    while True:
        page = search(*arguments, **named, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
