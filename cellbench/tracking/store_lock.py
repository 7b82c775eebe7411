"""A lock on a store that all machines see which use the store: held while it is created, and while runs and trials are claimed.

Where it lies depends on the store. SQLite and journal files: a lock file beside them. PostgreSQL and MySQL: a lock of the database, which ends with
its connection. MLflow's server: the entry of a registered model, since the server accepts each name once; the holder renews it, and an entry that
is not renewed for ``LEASE_S`` is removed by the next one who waits.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from cellbench.console import warn
from cellbench.errors import CellbenchError, one_line
from cellbench.files import text_digest
from cellbench.liveness import is_alive, this_owner
from cellbench.parallel import repeating
from cellbench.tracking.availability import PATIENCE_S, open_connection
from cellbench.tracking.offline_queue import AlreadyExistsError, CallRejectedError, NotFoundError
from cellbench.tracking.store_address import is_database_server, store_file

LEASE_S = 60.0
"""An entry on MLflow's server that its holder has not renewed for this time is the entry of a dead process."""


def file_lock(uri: str) -> FileLock:
    """A lock file beside the file of an SQLite or journal address; for other addresses, and where no file may be written, in the temporary folder."""
    file = Path(uri.removeprefix("journal:").removeprefix("//")).absolute() if uri.startswith("journal:") else store_file(uri)
    if file is not None and os.access(file.parent, os.W_OK):
        return FileLock(file.with_name(f".{file.name}.lock"), mode=0o666)
    # A hash, because file names are public and a URL may contain a password.
    key = text_digest(str(file) if file else uri)
    return FileLock(Path(tempfile.gettempdir()) / f"cellbench-{os.getuid() if hasattr(os, 'getuid') else 0}-{key}.lock")


@contextlib.contextmanager
def store_lock(uri: str, scope: str = "", client: Any = None) -> Iterator[None]:
    """Holds the lock inside ``with``. ``scope``: what is claimed, such as an experiment. ``client``: of MLflow's server, if it is one."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(file_lock(uri))  # first, so that the processes of one machine do not ask the server in turns
        if is_database_server(uri):
            stack.enter_context(_database_lock(uri, scope))
        elif client is not None:
            stack.enter_context(_server_lock(client, scope))
        yield


def _database_lock(uri: str, scope: str) -> AbstractContextManager[Any]:
    return _postgresql_lock(uri, scope) if uri.startswith("postgres") else _mysql_lock(uri, scope)


@contextlib.contextmanager
def _postgresql_lock(uri: str, scope: str) -> Iterator[None]:
    number = int.from_bytes(bytes.fromhex(text_digest(f"cellbench {scope}")), "big", signed=True)
    with _connection(uri) as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({number})")
        yield


@contextlib.contextmanager
def _mysql_lock(uri: str, scope: str) -> Iterator[None]:
    if not uri.startswith(("mysql", "mariadb")):
        yield  # of other databases only those of one machine are kept apart
        return
    name = text_digest(f"cellbench {scope}", 32)
    with _connection(uri) as connection:
        connection.exec_driver_sql(f"SELECT GET_LOCK('{name}', 600)")
        yield


@contextlib.contextmanager
def _connection(uri: str) -> Iterator[Any]:
    """A connection of its own, whose end releases the lock. Raises CellbenchError."""
    import sqlalchemy

    connection = open_connection(uri, "the database", PATIENCE_S)
    try:
        yield connection
    finally:
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):  # it is gone, and the lock with it
            connection.close()


@contextlib.contextmanager
def _server_lock(client: Any, scope: str) -> Iterator[None]:
    name = f"cellbench-lock-{text_digest(scope)}"
    token = uuid.uuid4().hex
    if not _acquire(client, name, token, scope):
        yield
        return
    try:
        with repeating(partial(_renew, client, name), LEASE_S / 4, wait_s=0):
            yield
    finally:
        with contextlib.suppress(CellbenchError):  # else its lease ends
            if client.get_registered_model(name).tags.get("token") == token:
                client.delete_registered_model(name)


def _acquire(client: Any, name: str, token: str, scope: str) -> bool:
    """Waits for the entry. False where the server keeps no models."""
    last, since = "", time.monotonic()
    about = f"Held for moments while runs of '{scope}' are claimed, so that no two machines claim the same."
    while True:
        try:
            client.create_registered_model(name, tags={"token": token, "owner": this_owner()}, description=about)
            return True
        except AlreadyExistsError:
            pass
        except CallRejectedError as error:
            warn(f"MLflow keeps no registered models here ({one_line(error)}), so two machines that start one grid may run the same runs.")
            return False
        with contextlib.suppress(NotFoundError):  # it was released meanwhile
            tags = client.get_registered_model(name).tags
            if tags["token"] == token:  # the reply to the call that made it was lost
                return True
            # By this process's own clock, which cannot jump: another machine's may differ.
            if (state := tags["token"] + tags.get("renewed", "")) != last:
                last, since = state, time.monotonic()
            elif time.monotonic() - since > LEASE_S or not is_alive(tags.get("owner", ""), time.time()):
                client.delete_registered_model(name)
        time.sleep(random.uniform(0.05, 0.25))  # noqa: S311  not for secrets


def _renew(client: Any, name: str) -> None:
    with contextlib.suppress(CellbenchError):
        client.set_registered_model_tag(name, "renewed", uuid.uuid4().hex)  # whoever waits sees that it changes
