"""MLflow's client with one-line errors: a full disk, a read-only or locked store, a server that does not answer.

A server may be unavailable for a while. Calls that need no reply then wait in an :class:`OfflineQueue`, and training continues. Other calls
block until the server replies.
"""

from __future__ import annotations

import random
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from cellbench.console import warn
from cellbench.errors import CellbenchError, SystemFault, one_line, redact_passwords
from cellbench.escaping import readable
from cellbench.tracking.availability import PATIENCE_S, LockWait, is_locked, locked_error
from cellbench.tracking.offline_queue import (
    RETRY_S,
    AlreadyExistsError,
    CallRejectedError,
    NotFoundError,
    OfflineQueue,
    QueuedCall,
    ServerUnavailableError,
    abandoned_queues,
)
from cellbench.tracking.store_address import is_database_server, is_http, store_file

FIRE_AND_FORGET = {"log_batch", "set_tag", "set_terminated", "log_artifacts"}
"""Calls that need no reply and may be sent twice."""


class ResilientClient:
    """Wraps ``mlflow.MlflowClient``. Methods raise CellbenchError instead of MLflow's own errors."""

    def __init__(self, mlflow: Any) -> None:
        self._client, self._mlflow = mlflow.MlflowClient(), mlflow
        self._uri = mlflow.get_tracking_uri()
        self._shown_uri = redact_passwords(self._uri)
        away = is_http(self._uri) or is_database_server(self._uri)  # what may be away for a while
        self._queue = OfflineQueue(self._uri, self._replay, self._shown_uri) if away else None
        self._has_answered = False

    def __getattr__(self, name: str) -> Any:
        getattr(self._client, name)  # AttributeError, here

        def call(*arguments: Any, **named: Any) -> Any:
            if name in FIRE_AND_FORGET and self._queue is not None:
                return self._send_or_queue(self._queue, name, arguments, named)
            return self._ask(name, arguments, named)

        return call

    def flush(self) -> None:
        """Waits until all queued calls are sent. Raises CellbenchError if the server stays unavailable."""
        if self._queue is not None and not self._queue.wait_until_sent(PATIENCE_S):
            raise SystemFault(
                f"MLflow at {self._shown_uri} has not answered for {PATIENCE_S / 60:.0f} minutes. {len(self._queue)} calls are kept in "
                f"{self._queue.folder}: the same command sends them first, when it is back."
            )

    def send_abandoned(self) -> None:
        """Sends the unsent calls of dead processes. Raises CellbenchError if the server does not respond."""
        if self._queue is None:
            return
        for folder, calls in abandoned_queues(self._uri):
            try:
                for call in calls:
                    self._queue.send(call, folder)
            except ServerUnavailableError as error:
                raise to_error(error, self._uri) from error
            shutil.rmtree(folder, ignore_errors=True)
            warn(f"MLflow has received {len(calls)} calls that an earlier process could not send.")

    def _ask(self, name: str, arguments: Any, named: Any) -> Any:
        """Calls and returns the reply. Waits only for a server that has replied before; otherwise the address may be wrong."""
        end = time.monotonic() + (PATIENCE_S if self._has_answered and self._queue is not None else 0)
        warned, waiting = False, None
        while True:
            self.flush()  # the reply depends on the queued calls
            try:
                answer = self._call(name, arguments, named)
                self._has_answered = True
                return answer
            except ServerUnavailableError as error:
                if self._queue is None and is_locked(error) and (file := store_file(self._uri)) is not None:
                    waiting = waiting or LockWait(file)
                    waiting.again()
                    continue
                if time.monotonic() > end:
                    raise to_error(error, self._uri) from error
            if not warned:
                warn(f"MLflow at {self._shown_uri} does not answer. It is tried for {PATIENCE_S / 60:.0f} minutes.")
                warned = True
            time.sleep(RETRY_S)

    def _send_or_queue(self, queue: OfflineQueue, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not len(queue):  # else it would overtake the queued calls
            try:
                self._call(name, arguments, named)
                return
            except CallRejectedError:
                raise
            except (ServerUnavailableError, CellbenchError):  # the latter may be temporary: an expired log-in, for example
                pass
        if name == "set_terminated":
            named = {**named, "end_time": int(time.time() * 1000)}
        upload = Path(arguments[1]) if name == "log_artifacts" else None
        plain = [_to_json(one) for one in (arguments[:1] if upload else arguments)]
        queue.put({"call": name, "arguments": plain, "named": {key: _to_json(value) for key, value in named.items()}}, upload)

    def _replay(self, call: QueuedCall) -> None:
        entities = self._mlflow.entities
        arguments = [*call["arguments"], *([call["folder"]] if "folder" in call else [])]
        self._call(call["call"], arguments, {key: _from_json(value, entities) for key, value in call["named"].items()})

    def _call(self, name: str, arguments: Any, named: Any) -> Any:
        """Raises ServerUnavailableError, NotFoundError, CallRejectedError, or CellbenchError for any other error of MLflow."""
        for races_left in reversed(range(MAX_RACES)):
            try:
                return getattr(self._client, name)(*arguments, **named)
            except (self._mlflow.exceptions.MlflowException, OSError) as error:
                if races_left and _LOST_RACE.search(str(error)):  # the other process has written it: now it is found
                    time.sleep(random.uniform(0.02, 0.3))  # noqa: S311  not for secrets
                    continue
                if is_unavailable(error) or is_locked(error):
                    raise ServerUnavailableError(one_line(error)) from error
                if isinstance(error, OSError) and _http_status(error) is None:
                    raise
                raise to_error(error, self._uri) from error
        raise AssertionError("the last round returns or raises")


MAX_RACES = 6
"""How often a call is repeated that another process was faster with: two nodes register one dataset, for example, and the store keeps it once."""
_LOST_RACE = re.compile(
    r"UniqueViolation|UNIQUE constraint failed|duplicate key value|Duplicate entry|[Dd]eadlock (detected|found)|could not serialize access"
)
# In the texts of MLflow's errors. The last two come from requests: MLflow collects errors of files into one of its own.
_UNAVAILABLE = re.compile(
    r"API request to \S+ failed with (timeout )?exception"
    r"|failed with error code (50[0234]|429)"
    r"|\b(50[0234] Server|429 Client) Error"
    r"|HTTPS?ConnectionPool\(|Connection aborted|RemoteDisconnected|Read timed out"
)


def is_unavailable(error: Exception) -> bool:
    """Whether the same call may succeed later: the server does not respond, is starting or overloaded, or has lost its database for now."""
    if (status := _http_status(error)) is not None:
        return status in (429, 500, 502, 503, 504)
    if type(error).__module__.partition(".")[0] in ("requests", "urllib3"):  # no reply at all
        return True
    return getattr(error, "error_code", "") in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED") or bool(
        _UNAVAILABLE.search(str(error))
    )


def _http_status(error: Exception) -> int | None:
    """The HTTP status of an error of ``requests``."""
    return getattr(getattr(error, "response", None), "status_code", None)


_FIELDS = {"Metric": ("key", "value", "timestamp", "step"), "Param": ("key", "value"), "RunTag": ("key", "value")}


def _to_json(value: Any) -> Any:
    """MLflow's metrics, params and tags as plain JSON."""
    if isinstance(value, list | tuple):
        return [_to_json(one) for one in value]
    name = type(value).__name__
    return {name: [getattr(value, field) for field in _FIELDS[name]]} if name in _FIELDS else value


def _from_json(value: Any, entities: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one, entities) for one in value]
    if isinstance(value, dict):
        ((name, fields),) = value.items()
        return getattr(entities, name)(*fields)
    return value


def command_line() -> str:
    """This process's command line without passwords, for reports and runs."""
    return readable(redact_passwords(shlex.join(["cellbench", *sys.argv[1:]])))


_REJECTED = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST", "MALFORMED_REQUEST"}
"""MLflow's error codes for wrong calls."""
_SQLITE_ERRORS = {
    "disk is full": "no space left on the device. Free some.",
    "readonly database": "it may not be written to. Make the file and its folder writable, or call from another folder.",
    "unable to open database": "it cannot be created here. Make the folder writable, or call from another folder.",
}


def to_error(error: Exception, uri: str) -> CellbenchError:
    """An error of MLflow in one line, without passwords."""
    text, address, uri = redact_passwords(one_line(error)), uri, redact_passwords(uri)
    if is_locked(text) and (file := store_file(address)) is not None:
        return locked_error(file)
    if match := _OTHER_SCHEMA.search(text):
        return SystemFault(f"MLflow's store {uri}: {_describe_schema(match[1], address)}")
    for sign, reason in _SQLITE_ERRORS.items():
        if sign in text:
            return SystemFault(f"MLflow's store {uri}: {reason} What is logged already is kept; the same command continues.")
    if "Max retries exceeded" in text:
        why = re.search(r"(?<=\] )[\w ]+(?=['\"])|\w+ timed out|Failed to resolve", text)
        shown = f" ({why[0]})" if why else ""
        return SystemFault(f"MLflow at {uri} does not answer{shown}. Start it, or set another MLFLOW_TRACKING_URI.")
    if "Invalid Host header" in text:
        return CellbenchError(f"MLflow at {uri}: {WRONG_HOST}")
    code, status = getattr(error, "error_code", ""), _http_status(error)
    kind: type[CellbenchError] = SystemFault
    if code == "RESOURCE_DOES_NOT_EXIST" or status == 404:
        kind = NotFoundError
    elif code == "RESOURCE_ALREADY_EXISTS":
        kind = AlreadyExistsError
    elif code in _REJECTED or status == 400:
        kind = CallRejectedError
    return kind(f"MLflow at {uri}: {text[:300]}. Fix it, or set another MLFLOW_TRACKING_URI.")


WRONG_HOST = "the server refuses this name of its own. Start it with --allowed-hosts NAME, or MLFLOW_SERVER_ALLOWED_HOSTS=NAME:*."
_OTHER_SCHEMA = re.compile(r"out-of-date database schema \(found version (\w+)|Can't locate revision identified by '(\w+)'")


def _describe_schema(version: str | None, uri: str) -> str:
    """What to do with a store whose tables another version of MLflow has made. ``version``: of the tables; None if this MLflow does not know it."""
    import mlflow

    if version is not None and _knows(version):
        return (
            f"an older MLflow has made it. Copy it to a safe place, then `mlflow db upgrade {shlex.quote(uri)}` changes it for MLflow "
            f"{mlflow.__version__}, which is installed here."
        )
    return f"a newer MLflow has written it than the {mlflow.__version__} installed here. `pip install --upgrade mlflow`, then the same command again."


def _knows(version: str) -> bool:
    """Whether this MLflow has made or can upgrade tables of that version."""
    import alembic.util
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    try:
        return ScriptDirectory.from_config(_get_alembic_config("")).get_revision(version) is not None
    except alembic.util.CommandError:
        return False
