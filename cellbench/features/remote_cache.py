"""The shared cache: files at a URL of any protocol of fsspec, for machines without a common folder.

It only saves time: features that the URL cannot provide are computed. A URL that does not answer, is full or lacks the package of its protocol
is reported once and tried again later.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cellbench.errors import CellbenchError, one_line, redact_passwords
from cellbench.files import atomic_file, cache_dir
from cellbench.temporary import TemporaryFolder

T = TypeVar("T")

PUT_IS_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss"}
"""Protocols of object stores, where a put is atomic, folders need not exist, and a rename would copy. Elsewhere files are put under another name
and renamed."""
PAUSE_S = 60.0
"""Minimum pause after a failure. The pause is ten times the duration of the failure, if that is longer, so failures cost a tenth of the time at most."""


def shared_url() -> str:
    """``CELLBENCH_CACHE_URL``, or an empty string."""
    return os.environ.get("CELLBENCH_CACHE_URL", "")


class _Damaged(Exception):
    """The downloaded file is damaged."""


class RemoteCache:
    """Files below a URL, with the same relative names as in the cache folder. ``tell`` is called with messages."""

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        self._url, self._tell = url.rstrip("/"), tell
        self._pauses: dict[str, float] = {}
        """By operation: the time at which the pause after a failure ends."""
        self._reported: set[str] = set()

    @property
    def shown(self) -> str:
        """The URL without passwords."""
        return redact_passwords(self._url)

    def fetch(self, path: Path, fits: Callable[[Path], bool]) -> bool:
        """Downloads a file of the cache folder, if it exists at the URL and ``fits`` accepts it; a rejected one is removed there. Returns success."""
        return bool(self._tried("read", lambda: self._fetched(path, fits)))

    def send(self, path: Path) -> None:
        """Uploads a file of the cache folder, unless it exists at the URL."""
        self._tried("written to", lambda: self._sent(path))

    def probe(self) -> None:
        """Writes a file, reads it back and removes it. Raises CellbenchError."""
        name = f".probe-{uuid.uuid4().hex}"
        with TemporaryFolder() as folder:
            ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
            ours.write_text(name)
            try:
                fs, place = self._place(name)
                self._put(fs, ours, place)
                fs.get_file(place, str(theirs))
                fs.rm_file(place)
            except Exception as error:  # each protocol has its own errors
                raise CellbenchError(f"{self.shown}: {self._why(error)}. Is it up, and are name and credentials right?") from None
            if theirs.read_text() != name:
                raise CellbenchError(f"{self.shown}: returns other bytes than it was sent. Name another CELLBENCH_CACHE_URL.")

    def _tried(self, what: str, work: Callable[[], T]) -> T | None:
        start = time.monotonic()
        if start < self._pauses.get(what, 0.0):
            return None
        try:
            return work()
        except Exception as error:  # each protocol has its own errors, and none may end a run
            now = time.monotonic()
            self._pauses[what] = now + max(PAUSE_S, 10 * (now - start))
            if what not in self._reported:
                self._reported.add(what)
                self._tell(f"the shared cache {self.shown} cannot be {what} ({self._why(error)}). It is skipped and tried again later.")
            return None

    def _fetched(self, path: Path, fits: Callable[[Path], bool]) -> bool:
        fs, place = self._place(_name(path))
        try:
            with atomic_file(path) as temporary:
                fs.get_file(place, str(temporary))
                if not fits(temporary):
                    raise _Damaged
        except FileNotFoundError:
            return False
        except _Damaged:
            with contextlib.suppress(FileNotFoundError):  # another machine has uploaded it meanwhile
                fs.rm_file(place)
            return False
        return True

    def _sent(self, path: Path) -> None:
        fs, place = self._place(_name(path))
        if not fs.exists(place):
            self._put(fs, path, place)

    def _put(self, fs: Any, path: Path, place: str) -> None:
        if PUT_IS_WHOLE & set(fs.protocol if isinstance(fs.protocol, tuple | list) else [fs.protocol]):
            fs.put_file(str(path), place)
            return
        fs.makedirs(fs._parent(place), exist_ok=True)
        part = f"{place}.{uuid.uuid4().hex[:8]}.part"
        try:
            fs.put_file(str(path), part)
            fs.mv(part, place)
        except BaseException:
            with contextlib.suppress(Exception):  # cleaning up may fail too; the first error is the one to raise
                fs.rm_file(part)
            raise

    def _place(self, name: str) -> tuple[Any, str]:
        """The file system, and the path in it."""
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(self._url)
        return fs, f"{root.rstrip('/')}/{name}"

    @staticmethod
    def _why(error: Exception) -> str:
        return f"{type(error).__name__}: {redact_passwords(one_line(error))[:200].rstrip('.')}"


def _name(path: Path) -> str:
    return path.relative_to(cache_dir()).as_posix()
