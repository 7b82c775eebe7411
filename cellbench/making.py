"""MLflow's SQLite store as a file: made whole or not at all, and waited for while another program makes it.

MLflow makes it in some forty steps, for seconds, in place and without a lock: two programs that do so at once break it for good
(measured on 3.17.2), and the other one may be ``mlflow ui``. So ours is made beside its place and moved there.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellbench.files import make_folder, told

MAKING_S, STILL_S = 60.0, 5.0
"""How long another program may take over the whole store, and over one of its steps."""


def settle(file: Path, make: bool, mlflow: Any) -> None:
    """Returns when nobody is making the store; with ``make`` there is one then. The caller holds the store's lock."""
    if make and not file.exists():
        _make(file, mlflow)
    end = time.monotonic() + MAKING_S
    while file.exists() and not _whole(file) and time.monotonic() < end and time.time() - _changed(file) < STILL_S:
        time.sleep(0.2)


def _make(file: Path, mlflow: Any) -> None:
    with told(f"making MLflow's store in {make_folder(file.parent)}"):
        for left in file.parent.glob(f".{file.name}.making*"):  # by one who was killed over it: we hold the lock
            left.unlink()
        beside = file.with_name(f".{file.name}.making")
        beside.touch()  # MLflow would try for minutes where nothing can be made
        try:
            with _closed_after_use():
                mlflow.MlflowClient(f"sqlite:///{beside}")
            try:
                os.link(beside, file)  # which leaves what another program has begun meanwhile
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                beside.rename(file)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _closed_after_use() -> Iterator[None]:
    """MLflow keeps no connection to a store that is opened inside: Windows moves no open file."""
    name = "MLFLOW_SQLALCHEMYSTORE_POOLCLASS"
    before = os.environ.get(name)
    os.environ[name] = "NullPool"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _whole(file: Path) -> bool:
    """Whether the last step of its making is done: the experiment *Default* is entered."""
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as store:
            return bool(store.execute("SELECT 1 FROM experiments LIMIT 1").fetchall())
    except sqlite3.Error:
        return False


def _changed(file: Path) -> float:
    """When the store was last written to, in seconds since the epoch."""
    times = []
    for one in (file, file.with_name(f"{file.name}-journal")):
        with contextlib.suppress(FileNotFoundError):
            times.append(one.stat().st_mtime)
    return max(times, default=0.0)
