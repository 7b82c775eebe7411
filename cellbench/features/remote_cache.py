"""The shared cache: files at a URL of any protocol that fsspec speaks, for machines without a folder in common.

It only saves time. The cache folder stays what is read from; a URL that does not answer, is full or lacks its protocol's package is told once and
asked again later, and what it could not give is computed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cellbench.errors import CellbenchError, one_line, redact_passwords
from cellbench.files import atomic_file, cache_dir

T = TypeVar("T")

PUT_IS_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss"}
"""Protocols of object stores: a put is seen whole or not at all, folders need not be made, and a rename would copy. Elsewhere a file is put beside
its place and renamed."""
REST_S = 60.0
"""How long a URL that failed is left alone, or ten times as long as the failure took: waiting for it may cost a tenth of the time at most."""


def shared_url() -> str:
    """``CELLBENCH_CACHE_URL``, or nothing."""
    return os.environ.get("CELLBENCH_CACHE_URL", "")


class _Damaged(Exception):
    """What was fetched does not fit."""


class RemoteCache:
    """The files below a URL, under the names that they have below the cache folder."""

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        self._url, self._tell = url.rstrip("/"), tell
        self._rests: dict[str, float] = {}
        """Until when, by what could not be done."""
        self._told: set[str] = set()

    @property
    def shown(self) -> str:
        """The URL for people."""
        return redact_passwords(self._url)

    def fetch(self, path: Path, fits: Callable[[Path], bool]) -> bool:
        """Copies a file of the cache folder here, where it is there and ``fits``; one that does not fit is removed there. Says whether it did."""
        return bool(self._tried("read", lambda: self._fetched(path, fits)))

    def send(self, path: Path) -> None:
        """Copies a file of the cache folder there, unless one of its name is."""
        self._tried("written to", lambda: self._sent(path))

    def probe(self) -> None:
        """Writes a file, reads it back and removes it. Raises CellbenchError."""
        name = f".probe-{uuid.uuid4().hex}"
        with tempfile.TemporaryDirectory(prefix="cellbench-") as folder:
            ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
            ours.write_text(name)
            try:
                fs, place = self._place(name)
                self._put(fs, ours, place)
                fs.get_file(place, str(theirs))
                fs.rm_file(place)
            except Exception as error:  # each protocol has errors of its own
                raise CellbenchError(f"{self.shown}: {self._why(error)}. Is it up, and are name and credentials right?") from None
            if theirs.read_text() != name:
                raise CellbenchError(f"{self.shown}: gives back other bytes than it was sent. Name another CELLBENCH_CACHE_URL.")

    def _tried(self, what: str, work: Callable[[], T]) -> T | None:
        start = time.monotonic()
        if start < self._rests.get(what, 0.0):
            return None
        try:
            return work()
        except Exception as error:  # each protocol has errors of its own, and none of them may end a run
            now = time.monotonic()
            self._rests[what] = now + max(REST_S, 10 * (now - start))
            if what not in self._told:
                self._told.add(what)
                self._tell(f"the shared cache {self.shown} cannot be {what} ({self._why(error)}). It is left out, and tried again later.")
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
            with contextlib.suppress(FileNotFoundError):  # another machine was faster
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
            with contextlib.suppress(Exception):  # it may be gone, with what held it; the first error is the one to tell
                fs.rm_file(part)
            raise

    def _place(self, name: str) -> tuple[Any, str]:
        """The file system and the path there."""
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(self._url)
        return fs, f"{root.rstrip('/')}/{name}"

    @staticmethod
    def _why(error: Exception) -> str:
        return f"{type(error).__name__}: {redact_passwords(one_line(error))[:200].rstrip('.')}"


def _name(path: Path) -> str:
    return path.relative_to(cache_dir()).as_posix()
