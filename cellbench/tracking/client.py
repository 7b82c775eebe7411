"""MLflow's client, whose refusals are told in one line: a full disk, a read-only or locked store, a server that does not answer.

A server may be away for a while. What it is only told then waits in an outbox, and training goes on; what it is asked waits for its answer.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from cellbench.errors import CellbenchError, one_line, redact_passwords
from cellbench.tracking.offline_queue import (
    EVERY_S,
    PATIENCE_S,
    CallRejectedError,
    NotFoundError,
    QueuedCall,
    ServerUnavailableError,
    abandoned_queues,
    offline_queue,
    print_warning,
)

FIRE_AND_FORGET = {"log_batch", "set_tag", "set_terminated", "log_artifacts"}
"""Calls that need no answer, and do no harm when they come twice."""


class ResilientClient:
    """``mlflow.MlflowClient``; each call of it raises CellbenchError where MLflow raises its own."""

    def __init__(self, mlflow: Any) -> None:
        self._client, self._mlflow = mlflow.MlflowClient(), mlflow
        self._uri = mlflow.get_tracking_uri()
        self._shown = redact_passwords(self._uri)
        self._outbox = offline_queue(self._uri, self._send, self._shown) if self._uri.startswith(("http:", "https:")) else None
        self._met = False

    def __getattr__(self, name: str) -> Any:
        getattr(self._client, name)  # AttributeError, here

        def told_call(*arguments: Any, **named: Any) -> Any:
            if name in FIRE_AND_FORGET and self._outbox is not None:
                return self._tell(name, arguments, named)
            return self._ask(name, arguments, named)

        return told_call

    def settle(self) -> None:
        """Waits until the server has been told everything. Raises CellbenchError where it stays away."""
        if self._outbox is not None and not self._outbox.flushed(PATIENCE_S):
            raise CellbenchError(
                f"MLflow at {self._shown} has not answered for {PATIENCE_S / 60:.0f} minutes. {len(self._outbox)} calls are kept in "
                f"{self._outbox.folder}: the same command sends them first, when it is back."
            )

    def send_left(self) -> None:
        """Sends what processes that are gone could not. Raises CellbenchError where the server does not answer."""
        if self._outbox is None:
            return
        for folder, letters in abandoned_queues(self._uri):
            try:
                for letter in letters:
                    self._outbox.take(letter, folder)
            except ServerUnavailableError as error:
                raise to_error(error, self._uri) from error
            shutil.rmtree(folder, ignore_errors=True)
            print_warning(f"MLflow is told what an earlier process could not: {len(letters)} calls.")

    def _ask(self, name: str, arguments: Any, named: Any) -> Any:
        """The answer, waited for once the server has answered before: it then is known to be there."""
        end = time.monotonic() + (PATIENCE_S if self._met and self._outbox is not None else 0)
        silent = False
        while True:
            self.settle()  # or the answer would not know what was told
            try:
                answer = self._call(name, arguments, named)
                self._met = True
                return answer
            except ServerUnavailableError as error:
                if time.monotonic() > end:
                    raise to_error(error, self._uri) from error
            if not silent:
                print_warning(f"MLflow at {self._shown} does not answer. It is asked again for {PATIENCE_S / 60:.0f} minutes.")
                silent = True
            time.sleep(EVERY_S)

    def _tell(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert self._outbox is not None
        if not len(self._outbox):  # else it would overtake what waits
            try:
                self._call(name, arguments, named)
                return
            except CallRejectedError:
                raise
            except (ServerUnavailableError, CellbenchError):  # the latter for now only: a log-in that has expired, say
                pass
        if name == "set_terminated":
            named = {**named, "end_time": int(time.time() * 1000)}
        carries = Path(arguments[1]) if name == "log_artifacts" else None
        plain = [_plain(one) for one in (arguments[:1] if carries else arguments)]
        self._outbox.put({"call": name, "arguments": plain, "named": {key: _plain(value) for key, value in named.items()}}, carries)

    def _send(self, letter: QueuedCall) -> None:
        entities = self._mlflow.entities
        arguments = [*letter["arguments"], *([letter["folder"]] if "folder" in letter else [])]
        self._call(letter["call"], arguments, {key: _lively(value, entities) for key, value in letter["named"].items()})

    def _call(self, name: str, arguments: Any, named: Any) -> Any:
        """Raises Away, Absent, Rejected, or CellbenchError for any other trouble."""
        try:
            return getattr(self._client, name)(*arguments, **named)
        except (self._mlflow.exceptions.MlflowException, OSError) as error:
            if is_unavailable(error):
                raise ServerUnavailableError(one_line(error)) from error
            if isinstance(error, OSError) and _status(error) is None:
                raise
            raise to_error(error, self._uri) from error


def is_unavailable(error: Exception) -> bool:
    """Whether a server may take the same call later: it does not answer, is starting, has too much to do, or has lost its database for now."""
    if (status := _status(error)) is not None:
        return status in (429, 500, 502, 503, 504)
    if type(error).__module__.partition(".")[0] in ("requests", "urllib3"):  # no answer at all
        return True
    if getattr(error, "error_code", "") in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
        return True
    # The last two are those of a file, in the words of requests, which MLflow collects into one error of its own.
    signs = (
        r"API request to \S+ failed with (timeout )?exception",
        r"failed with error code (50[0234]|429)",
        r"\b(50[0234] Server|429 Client) Error",
        r"HTTPS?ConnectionPool\(|Connection aborted|RemoteDisconnected|Read timed out",
    )
    return bool(re.search("|".join(signs), str(error)))


def _status(error: Exception) -> int | None:
    """The status with which a server answered, of an error of requests."""
    return getattr(getattr(error, "response", None), "status_code", None)


_REJECTED = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST", "MALFORMED_REQUEST"}
"""What MLflow calls errors that are the caller's."""


def _kind(error: Exception) -> type[CellbenchError]:
    code, status = getattr(error, "error_code", ""), _status(error)
    if code == "RESOURCE_DOES_NOT_EXIST" or status == 404:
        return NotFoundError
    return CallRejectedError if code in _REJECTED or status == 400 else CellbenchError


_FIELDS = {"Metric": ("key", "value", "timestamp", "step"), "Param": ("key", "value"), "RunTag": ("key", "value")}


def _plain(value: Any) -> Any:
    """MLflow's numbers, params and tags as JSON has them."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    name = type(value).__name__
    return {name: [getattr(value, field) for field in _FIELDS[name]]} if name in _FIELDS else value


def _lively(value: Any, entities: Any) -> Any:
    if isinstance(value, list):
        return [_lively(one, entities) for one in value]
    if isinstance(value, dict):
        ((name, fields),) = value.items()
        return getattr(entities, name)(*fields)
    return value


def command_line() -> str:
    """This process's command line as pages and runs may keep it: without passwords."""
    return redact_passwords(shlex.join(["cellbench", *sys.argv[1:]]))


def to_error(error: Exception, uri: str) -> CellbenchError:
    text, uri = redact_passwords(one_line(error)), redact_passwords(uri)
    for sign, words in _REFUSALS.items():
        if sign in text:
            return CellbenchError(f"MLflow's store {uri}: {words} What is logged already is kept; the same command goes on.")
    return _kind(error)(f"MLflow at {uri}: {text[:300]}. Mend it, or name another MLFLOW_TRACKING_URI.")


_REFUSALS = {
    "disk is full": "no space left on the device. Free some.",
    "readonly database": "it may not be written to. Make the file and its folder writable, or call from another folder.",
    "unable to open database": "it cannot be made here. Make the folder writable, or call from another folder.",
    "database is locked": "another process has held it for 20 s. Wait for it, or end it.",
}
