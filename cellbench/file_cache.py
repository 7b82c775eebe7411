"""Facts about files, cached by path, size and modification time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, compute_sha256, file_stamp, is_writable, write_atomic

T = TypeVar("T")


def sha256(path: Path) -> str:
    """The content hash of a file as 64 hex digits; cached, so that large files are read once."""
    with FileFactCache("hashes", compute_sha256) as hashes:
        return hashes[path]


def read_cached(path: Path) -> dict[str, Any]:
    """The table of a JSON file in the cache folder; empty where it is missing or damaged, so that it is made again."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


class FileFactCache(Generic[T]):
    """Results of a function of files, cached in the cache folder by each file's path, size and modification time.

    ``with FileFactCache("hashes", compute_sha256) as hashes: hashes[path]``; saved on leaving, also after an error. Values must survive JSON.
    If two processes write at the same time, some files are read again later, nothing else.
    """

    def __init__(self, name: str, learn: Callable[[Path], T]) -> None:
        self._path = cache_dir() / f"{name}.json"
        self._learn = learn
        self._learned: dict[str, list[Any]] = {}
        self._known = read_cached(self._path)

    def __enter__(self) -> FileFactCache[T]:
        return self

    def knows(self, path: Path) -> bool:
        known = self._known.get(str(path.absolute()))
        return isinstance(known, list) and known[:2] == [*file_stamp(path)]

    def __getitem__(self, path: Path) -> T:
        name = str(path.absolute())
        if not self.knows(path):
            stamp = file_stamp(path)  # taken before reading: a file that changes meanwhile is read again next time
            self._known[name] = self._learned[name] = [*stamp, self._learn(path)]
        value: T = self._known[name][2]
        return value

    def __exit__(self, *_: object) -> None:
        folder = self._path.parent
        if self._learned and (is_writable(folder) or not folder.exists()):
            with contextlib.suppress(CellbenchError):  # only a cache: a full disk must not stop a run
                write_atomic(self._path, json.dumps({**read_cached(self._path), **self._learned}))
            self._learned = {}
