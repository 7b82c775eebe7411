"""Waiting for a store that cannot be used for a while: an SQLite file that another program has locked, a database server that does not answer.

Within five seconds it is said what is waited for, and for how long.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cellbench.console import warn
from cellbench.errors import CellbenchError, SystemFault, one_line, redact_passwords
from cellbench.tracking.store_address import is_database_server

LOCK_PATIENCE_S = 120.0
"""How long a command waits for an SQLite file that another program has locked."""
DATABASE_PATIENCE_S = 30.0
"""How long a command waits at its start for a database server: as long as a restart takes. MLflow alone takes 100 s, in silence."""
FIRST_S, RETRY_S = 3.0, 2.0
"""Time of the first attempt, after which the reason is said, and between further ones."""


def connect(file: Path, timeout_s: float = 20.0, *, read_only: bool = False) -> sqlite3.Connection:
    """Opens an existing SQLite file, to read only also where it may not be written to."""
    return sqlite3.connect(f"{file.as_uri()}?mode={'rw' if writable(file) and not read_only else 'ro'}", uri=True, timeout=timeout_s)


def writable(file: Path) -> bool:
    """Whether an SQLite file may be written to, which needs its folder too: the journal lies beside it."""
    return os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)


def is_locked(error: BaseException | str) -> bool:
    return re.search("database (table )?is locked", str(error)) is not None


def why_locked(file: Path) -> str:
    """Who has locked an SQLite file, as far as the system says."""
    names = holders(file)
    who = f"by {', '.join(names[:3])}" if names else "by another program, perhaps on another machine"
    return f"{file} is locked {who}"


def holders(file: Path) -> list[str]:
    """Other programs of this machine that have the file open: ``name (process 12)``."""
    found, target = [], os.path.realpath(file)
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(one.path == target for one in process.open_files()):
                found.append(f"{process.info['name']} (process {process.pid})")
    return found


def locked_error(file: Path) -> SystemFault:
    return SystemFault(
        f"MLflow's store {why_locked(file)}, for {LOCK_PATIENCE_S:.0f} s and longer. The store is sound: wait until that program is done, or "
        "end it. Then the same command goes on."
    )


class LockWait:
    """Patience with a locked SQLite file. :meth:`again` waits, says once who has locked it, and raises the error when the time is over."""

    def __init__(self, file: Path) -> None:
        self._file, self._end, self._said = file, time.monotonic() + LOCK_PATIENCE_S, False

    def again(self) -> None:
        if time.monotonic() > self._end:
            raise locked_error(self._file)
        if not self._said:
            warn(f"{why_locked(self._file)}. It is waited for, up to {LOCK_PATIENCE_S:.0f} s.")
            self._said = True
        time.sleep(0.2)


def wait_until_unlocked(file: Path) -> None:
    """Returns when an SQLite file can be read. Raises CellbenchError if another program holds it for ``LOCK_PATIENCE_S``."""
    waiting = LockWait(file)
    while True:
        try:
            with contextlib.closing(connect(file, FIRST_S)) as store:
                store.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
            return
        except sqlite3.Error as error:
            if not is_locked(error):
                return  # whoever opens it next says what is wrong
            waiting.again()


PATIENCE_S = 600.0
"""How long a command that is at work waits for a server that has answered before."""

# Of a login, not of an absence: waiting does not help.
_FINAL = re.compile(r"authentication|does not exist|pg_hba|Access denied|Unknown database|permission|SSL|no password", re.IGNORECASE)


class AwayError(SystemFault):
    """A server has not answered for as long as it was waited for."""


def wait_for_database(uri: str, what: str, patience_s: float | None = None) -> None:
    """Returns when a database server answers; at once for any other address. Arguments and errors are those of :func:`open_connection`."""
    if is_database_server(uri):
        open_connection(uri, what, patience_s).close()


def open_connection(uri: str, what: str, patience_s: float | None = None) -> Any:
    """A connection of SQLAlchemy in autocommit mode, when a database server answers.

    ``what``: what it is, for messages; ``patience_s``: by default ``DATABASE_PATIENCE_S``.
    Raises CellbenchError for a wrong login, and AwayError for a server that does not answer.
    """
    patience_s = DATABASE_PATIENCE_S if patience_s is None else patience_s
    shown, end, said = redact_passwords(uri), time.monotonic() + patience_s, False
    attempt = _connection(uri)
    while isinstance(reason := attempt(), str):
        if _FINAL.search(reason):
            raise CellbenchError(f"{what} at {shown} refuses: {reason}. Are its name, user and password right?")
        if time.monotonic() > end:
            raise AwayError(
                f"{what} at {shown} has not answered for {patience_s:.0f} s: {reason}. "
                "Start it or correct its address, and give the same command again."
            )
        if not said:
            warn(f"{what} at {shown} does not answer ({reason}). It is asked again for {patience_s:.0f} s.")
            said = True
        time.sleep(RETRY_S)
    return reason


def _connection(uri: str) -> Callable[[], Any]:
    """A function that connects once: the connection, or why not."""
    import sqlalchemy  # comes with MLflow; takes 0.3 s to import

    settings: dict[str, Any] = {} if uri.startswith(("mssql", "oracle")) else {"connect_timeout": round(FIRST_S)}

    def attempt() -> Any:
        try:
            return engine.connect()
        except sqlalchemy.exc.SQLAlchemyError as error:
            text = one_line(getattr(error, "orig", None) or error).partition(" (Background")[0]
            return redact_passwords(re.sub(r" Is the server running on.*|^connection failed: ", "", text)[:200]).rstrip(".")

    try:
        engine = sqlalchemy.create_engine(uri, connect_args=settings, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT")
    except ModuleNotFoundError as error:
        raise CellbenchError(
            f"{redact_passwords(uri)}: {error.name}, its driver, is not installed. Install it; for PostgreSQL `pip install 'cellbench[postgresql]'`."
        ) from None
    except sqlalchemy.exc.SQLAlchemyError as error:  # an address that cannot be parsed
        raise CellbenchError(f"{redact_passwords(uri)}: {one_line(error)}. Correct the address.") from None
    return attempt
