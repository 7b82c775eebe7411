"""The file of MLflow's SQLite store: creates it atomically, or waits while another program creates it.

MLflow creates it in about forty steps, which takes seconds, in place and without a lock. Two programs that do so at once break it permanently
(measured on 3.17.2), and the other one may be ``mlflow ui``. So we create it under another name and move it. The empty store is kept in the
cache folder, and the next folder's store begins as a copy of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, make_folder, os_errors_as
from cellbench.tracking.availability import LockWait, connect, is_locked, wait_until_unlocked
from cellbench.tracking.client import ResilientClient, to_error
from cellbench.tracking.store_address import file_part, renamed, store_file

CREATION_S, STEP_S = 60.0, 5.0
"""Time that another program may take to create the whole store, and for one step."""


def open_or_create(mlflow: Any, make: bool) -> ResilientClient:
    """The client of the configured store, after waiting for other programs that create it. With ``make``, creates it if there is none.

    The caller holds the store's lock. Raises CellbenchError.
    """
    import alembic.util
    import sqlalchemy.exc

    uri = mlflow.get_tracking_uri()
    file = store_file(uri)
    try:
        if file is not None:
            if file.is_dir():  # as Docker makes where a file is to be mounted that is not there; MLflow would try for minutes
                raise CellbenchError(f"MLflow's store {file} is a folder. Remove it, or name another file by MLFLOW_TRACKING_URI.")
            if file.exists():
                wait_until_unlocked(file)
            elif make:
                _create(file, uri, mlflow)
            end = time.monotonic() + CREATION_S
            while file.exists() and not _is_complete(file) and time.monotonic() < end and time.time() - _changed_s(file) < STEP_S:
                time.sleep(0.2)
        return ResilientClient(mlflow)
    except (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, alembic.util.CommandError) as error:
        if file is not None and file.exists() and not is_locked(error) and not _is_complete(file):
            why = "is incomplete or damaged. Move it away, and a new one is created; or put a backup in its place."
            raise CellbenchError(f"MLflow's store {file} {why}") from error
        raise to_error(error, uri) from error


def find_runs(file: Path, experiment_id: str, key: str, values: Sequence[str]) -> list[str]:
    """Ids of the runs of an experiment that are not deleted and have one of these values of a tag. Raises CellbenchError.

    Read directly: MLflow's search takes such a list for ids only, and reading all runs takes minutes where there are 100,000.
    """
    query = (
        "SELECT t.run_uuid FROM tags t JOIN runs r ON r.run_uuid = t.run_uuid "
        "WHERE t.key = ? AND t.value IN (SELECT value FROM json_each(?)) AND r.experiment_id = ? AND r.lifecycle_stage = 'active'"
    )
    waiting = LockWait(file)
    while True:
        try:
            with contextlib.closing(connect(file)) as store:
                return [run_id for (run_id,) in store.execute(query, (key, json.dumps(list(values)), int(experiment_id)))]
        except sqlite3.Error as error:
            if not is_locked(error):
                raise CellbenchError(f"MLflow's store {file}: {error}.") from error
            waiting.again()


def _create(file: Path, uri: str, mlflow: Any) -> None:
    written = file_part(uri)  # in the form of the URI, which MLflow parses in its own way
    name = written.rpartition("/")[2].removeprefix("file:")
    beside_uri = renamed(uri, f"{written.removesuffix(name)}.{name}.making")
    beside = store_file(beside_uri)
    assert beside is not None
    with os_errors_as(f"creating MLflow's store in {make_folder(file.parent)}"):
        for left in (beside, _journal(beside)):  # left by a killed process: we hold the lock
            left.unlink(missing_ok=True)
        beside.touch()  # fails at once if no file can be created, where MLflow would retry for minutes
        try:
            template = cache_dir() / "mlflow_store" / f"{mlflow.__version__}.db"
            copied = _copy(template, beside)
            with _closed_after_use():
                _fill(beside, beside_uri)
            if not copied:
                _keep_as_template(beside, template)
            try:
                os.link(beside, file)  # does not overwrite a store that another program has begun meanwhile
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                beside.rename(file)
        finally:
            beside.unlink(missing_ok=True)


def _fill(file: Path, uri: str) -> None:
    """Has MLflow make the tables and its default experiment, whose artifacts are in ``./mlruns``.

    MLflow writes their place into a statement of SQL as it is, which a folder with both kinds of quotes, or with a colon, does not survive. So it is
    given another one first.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.utils.uri import append_to_uri_path, resolve_uri_if_local

    SqlAlchemyStore(uri, "file:///mlruns")
    with contextlib.closing(sqlite3.connect(file)) as store, store:
        place = append_to_uri_path(resolve_uri_if_local("./mlruns"), "0")
        store.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", [place])


def _copy(template: Path, file: Path) -> bool:
    """Copies the template, in which MLflow then makes its default experiment; False where there is none, or a damaged one."""
    try:
        shutil.copyfile(template, file)
        with contextlib.closing(sqlite3.connect(file)) as store:
            if store.execute("PRAGMA quick_check").fetchone() == ("ok",) and store.execute("SELECT * FROM alembic_version").fetchone():
                return True
    except (OSError, sqlite3.Error):
        pass
    file.unlink(missing_ok=True)
    return False


def _keep_as_template(file: Path, template: Path) -> None:
    """Keeps a new store for the next folder, without its experiment, whose artifacts are in this one. A cache that cannot be written is no error."""
    copy = template.with_name(f"{template.name}.{os.getpid()}.making")
    try:
        template.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        with contextlib.closing(sqlite3.connect(copy)) as store, store:
            store.execute("DELETE FROM experiments")
        copy.replace(template)
    except (OSError, sqlite3.Error):
        copy.unlink(missing_ok=True)


@contextlib.contextmanager
def _closed_after_use() -> Iterator[None]:
    """Closes MLflow's connections to a store that is opened inside ``with``, since Windows cannot move an open file, and leaves out waiting for the disk.

    A store that is lost in a power cut before it is moved is made anew. Waiting took more than half of the time.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    name = "MLFLOW_SQLALCHEMYSTORE_POOLCLASS"
    before = os.environ.get(name)
    os.environ[name] = "NullPool"
    event.listen(Engine, "connect", _without_waiting)
    try:
        yield
    finally:
        event.remove(Engine, "connect", _without_waiting)
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _without_waiting(connection: Any, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def _is_complete(file: Path) -> bool:
    """Whether its last step is done: the experiment *Default* exists."""
    try:
        with contextlib.closing(connect(file, read_only=True)) as store:
            return bool(store.execute("SELECT 1 FROM experiments LIMIT 1").fetchall())
    except sqlite3.Error:
        return False


def _changed_s(file: Path) -> float:
    """When the store was last written to, in seconds since 1970."""
    times = []
    for one in (file, _journal(file)):
        with contextlib.suppress(FileNotFoundError):
            times.append(one.stat().st_mtime)
    return max(times, default=0.0)


def _journal(file: Path) -> Path:
    return file.with_name(f"{file.name}-journal")
