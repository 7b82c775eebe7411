"""What a tracking server is told later, when it does not answer now: letters in a folder, in their order, sent when it is back.

A letter is one call that only tells: numbers, tags, an end, artifacts. Each may be sent twice, since the server takes the same number twice as once.
A process that ends with unsent letters leaves them in the cache folder, and the next one that opens this server sends them first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cellbench.errors import CellbenchError, one_line
from cellbench.files import cache_dir, os_errors_as
from cellbench.tracking.schema import RunState, this_owner

EVERY_S = 5.0
"""How often a server that does not answer is tried."""
PATIENCE_S = 600.0
"""How long what needs an answer waits for one."""

QueuedCall = dict[str, Any]
"""``call``, its ``arguments``, in plain JSON; and ``folder``, where it carries files."""


class ServerUnavailableError(Exception):
    """The server does not answer now; the same call may well be taken later."""


class CallRejectedError(CellbenchError):
    """The store does not take a call, and never will: its arguments are wrong, or what it is about is gone."""


class NotFoundError(CallRejectedError):
    """What was asked for is not there: the store answered, and says so."""


class OfflineQueue:
    """The letters of one process to one server, sent by a thread of its own while there are any."""

    def __init__(self, folder: Path, send: Callable[[QueuedCall], None], uri: str) -> None:
        self.folder, self._send, self._uri = folder, send, uri
        self._letters: deque[QueuedCall] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._letters)

    def put(self, letter: QueuedCall, carries: Path | None = None) -> None:
        """Keeps a letter, with a copy of all files below ``carries``. Raises CellbenchError where the disk refuses."""
        with self._changed, os_errors_as(f"keeping in {self.folder} what MLflow is to be told"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if carries is not None:
                letter = {**letter, "folder": uuid.uuid4().hex}
                shutil.copytree(carries, self.folder / letter["folder"])
            with (self.folder / "letters.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(letter) + "\n")
            self._letters.append(letter)
            if self._thread is None or not self._thread.is_alive():
                print_warning(f"MLflow at {self._uri} does not answer. What is logged is kept in {self.folder} and sent when it is back.")
                self._thread = threading.Thread(target=self._go, daemon=True, name="outbox")
                self._thread.start()

    def flushed(self, patience_s: float) -> bool:
        """Whether everything is sent, waited for so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._letters, patience_s)

    def take(self, letter: QueuedCall, folder: Path) -> None:
        """Sends one, and removes what it carried. Raises Away, also where the server refuses for now, as it does without a log-in."""
        try:
            self._send({**letter, "folder": str(folder / letter["folder"])} if "folder" in letter else letter)
        except CallRejectedError as error:
            print_warning(f"MLflow refuses what was kept for it: {error}")  # a run that was deleted meanwhile, say
        except CellbenchError as error:
            raise ServerUnavailableError(one_line(error)) from error
        if "folder" in letter:
            shutil.rmtree(folder / letter["folder"], ignore_errors=True)

    def _go(self) -> None:
        num = 0
        while True:
            try:
                self.take(self._letters[0], self.folder)
            except ServerUnavailableError:
                time.sleep(EVERY_S)
                continue
            num += 1
            with self._changed:
                self._letters.popleft()
                if not self._letters:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    print_warning(f"MLflow answers again: {num} kept calls are sent.")
                    self._thread = None
                    self._changed.notify_all()
                    return


def print_warning(text: str) -> None:
    """For people, beside what a verb prints: it may be one of several processes that cannot reach the server."""
    tqdm.write(text, file=sys.stderr)


def _root(uri: str) -> Path:
    # An address may hold a password, and the name of a folder is for everybody to read.
    return cache_dir() / "outbox" / hashlib.sha256(uri.encode()).hexdigest()[:16]


def offline_queue(uri: str, send: Callable[[QueuedCall], None], shown: str) -> OfflineQueue:
    """A new one, for letters to a server. ``shown``: its address for people."""
    owner = this_owner().replace(":", "@")  # which Windows does not take in a name
    return OfflineQueue(_root(uri) / f"{owner}@{uuid.uuid4().hex[:6]}", send, shown)


def abandoned_queues(uri: str) -> Iterator[tuple[Path, list[QueuedCall]]]:
    """The letters that processes left which are gone, each with their folder, the oldest first. Those that were read are the caller's to remove."""
    for folder in sorted(_root(uri).glob("*@*@*"), key=lambda path: path.stat().st_mtime):
        owner = ":".join(folder.name.rsplit("@", 2)[:2])
        if owner == this_owner() or RunState(run_id="", name="", status="running", owner=owner, heartbeat_s=folder.stat().st_mtime).alive:
            continue
        with contextlib.suppress(FileNotFoundError):
            lines = (folder / "letters.jsonl").read_text(encoding="utf-8").splitlines()
            letters = []
            for line in lines:
                with contextlib.suppress(ValueError):  # the last line of a process that was killed over it
                    letters.append(json.loads(line))
            yield folder, letters
