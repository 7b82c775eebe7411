"""A queue of calls to a tracking server that is unavailable: stored in a folder, in order, and sent when the server responds again.

Only calls that need no reply are queued: metrics, tags, a run's end, artifacts. Each may be sent twice; the server stores the same value once.
A process that exits with unsent calls leaves them in the cache folder, and the next process that opens this server sends them first.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cellbench.console import warn
from cellbench.errors import CellbenchError, one_line
from cellbench.files import cache_dir, os_errors_as, text_digest
from cellbench.liveness import is_alive, owner_as_file_name, owner_of_file_name, this_owner

RETRY_S = 5.0
"""Interval between attempts to reach an unavailable server."""
CALLS_FILE = "calls.jsonl"

QueuedCall = dict[str, Any]
"""``call``, ``arguments`` and ``named`` in plain JSON, and ``folder`` if it uploads files."""


class ServerUnavailableError(Exception):
    """The server does not respond; the same call may succeed later."""


class CallRejectedError(CellbenchError):
    """The store rejects this call for good: its arguments are wrong, or its object was deleted."""


class NotFoundError(CallRejectedError):
    """The requested object does not exist in the store."""


class TakenOverError(CallRejectedError):
    """Another process executes the run, since this one gave no sign of life for long: its machine slept, for example."""


class AlreadyExistsError(CallRejectedError):
    """An object of this name exists in the store: another process was faster, or it was there before."""


class OfflineQueue:
    """The unsent calls of one process to one server. A thread sends them."""

    def __init__(self, uri: str, send: Callable[[QueuedCall], None], shown_uri: str) -> None:
        owner = owner_as_file_name(this_owner())
        self.folder = _server_folder(uri) / f"{owner}@{uuid.uuid4().hex[:6]}"
        self._send, self._shown_uri = send, shown_uri
        self._calls: deque[QueuedCall] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def put(self, call: QueuedCall, upload: Path | None = None) -> None:
        """Queues a call, with a copy of all files below ``upload``. Raises CellbenchError if the disk cannot be written."""
        with self._changed, os_errors_as(f"keeping in {self.folder} what MLflow does not take now"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if upload is not None:
                call = {**call, "folder": uuid.uuid4().hex}
                shutil.copytree(upload, self.folder / call["folder"])
            with (self.folder / CALLS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(call) + "\n")
            self._calls.append(call)
            if self._thread is None or not self._thread.is_alive():
                warn(f"MLflow at {self._shown_uri} does not answer. What is logged is kept in {self.folder} and sent when it is back.")
                self._thread = threading.Thread(target=self._send_all, daemon=True, name="offline-queue")
                self._thread.start()

    def wait_until_sent(self, patience_s: float) -> bool:
        """Whether all calls were sent within this time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls, patience_s)

    def send(self, call: QueuedCall, folder: Path) -> None:
        """Sends one call and removes its files. Raises ServerUnavailableError, also for temporary errors such as a missing log-in."""
        try:
            self._send({**call, "folder": str(folder / call["folder"])} if "folder" in call else call)
        except CallRejectedError as error:
            warn(f"MLflow rejects a call that was kept for it: {error}")  # of a run that was deleted meanwhile, for example
        except CellbenchError as error:
            raise ServerUnavailableError(one_line(error)) from error
        if "folder" in call:
            shutil.rmtree(folder / call["folder"], ignore_errors=True)

    def _send_all(self) -> None:
        num = 0
        while True:
            try:
                self.send(self._calls[0], self.folder)
            except ServerUnavailableError:
                time.sleep(RETRY_S)
                continue
            num += 1
            with self._changed:
                self._calls.popleft()
                if not self._calls:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    warn(f"MLflow answers again: {num} kept calls are sent.")
                    self._thread = None
                    self._changed.notify_all()
                    return


def abandoned_queues(uri: str) -> Iterator[tuple[Path, list[QueuedCall]]]:
    """The unsent calls of dead processes, by folder, the oldest first. The caller removes a folder after sending its calls."""
    for folder in sorted(_server_folder(uri).glob("*@*@*"), key=lambda path: path.stat().st_mtime):
        owner = owner_of_file_name(folder.name.rpartition("@")[0])
        if owner == this_owner() or is_alive(owner, folder.stat().st_mtime):
            continue
        with contextlib.suppress(FileNotFoundError):
            calls = []
            for line in (folder / CALLS_FILE).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a process was killed while writing its last line
                    calls.append(json.loads(line))
            yield folder, calls


def _server_folder(uri: str) -> Path:
    # A hash, because folder names are public and a URL may contain a password.
    return cache_dir() / "offline_queue" / text_digest(uri)
