"""MLflow's client, whose refusals are told in one line: a full disk, a read-only or locked store, a server that does not answer."""

from __future__ import annotations

import re
from typing import Any

from cellbench.errors import CellbenchError, one_line


class Client:
    """``mlflow.MlflowClient``; each call of it raises CellbenchError where MLflow raises its own."""

    def __init__(self, mlflow: Any) -> None:
        self._client, self._mlflow = mlflow.MlflowClient(), mlflow

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def told_call(*arguments: Any, **named: Any) -> Any:
            try:
                return call(*arguments, **named)
            except self._mlflow.exceptions.MlflowException as error:
                raise refused(error, self._mlflow.get_tracking_uri()) from error

        return told_call


def unlocked(text: str) -> str:
    """The text without the passwords of the addresses in it.

    >>> unlocked("postgresql://lab:secret@db/mlflow does not answer")
    'postgresql://lab:***@db/mlflow does not answer'
    """
    return re.sub(r"(\w+://[^\s/:@]*):\S*@", r"\1:***@", text)


def refused(error: Exception, uri: str) -> CellbenchError:
    text, uri = unlocked(one_line(error)), unlocked(uri)
    for sign, words in _REFUSALS.items():
        if sign in text:
            return CellbenchError(f"MLflow's store {uri}: {words} What is logged already is kept; the same command goes on.")
    return CellbenchError(f"MLflow at {uri}: {text[:300]}. Mend it, or name another MLFLOW_TRACKING_URI.")


_REFUSALS = {
    "disk is full": "no space left on the device. Free some.",
    "readonly database": "it may not be written to. Make the file and its folder writable, or call from another folder.",
    "unable to open database": "it cannot be made here. Make the folder writable, or call from another folder.",
    "database is locked": "another process has held it for 20 s. Wait for it, or end it.",
}
