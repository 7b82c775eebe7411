"""The features cached on disk: their folder, listing, removal, and the budget."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cellbench.features.remote_cache import shared_url
from cellbench.files import cache_dir
from cellbench.hardware import is_size, parse_bytes


def features_dir() -> Path:
    """The folder of cached features."""
    return cache_dir() / "features"


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One cached pass."""

    folder: Path
    backbone: str
    dataset: str
    what: str
    num_tiles: int
    size_bytes: int
    used: float
    """Time of the last use, in seconds since the epoch."""


def cache_entries() -> list[CacheEntry]:
    """All cached passes, least recently used first. Other folders are ignored."""
    found = []
    for path in sorted(features_dir().glob("*/*/facts.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            facts = json.loads(path.read_text())
            found.append(
                CacheEntry(
                    folder=path.parent,
                    backbone=facts["backbone"],
                    dataset=facts["dataset"],
                    what=facts["what"],
                    num_tiles=facts["num"],
                    size_bytes=sum(f.stat().st_size for f in path.parent.iterdir()),
                    used=path.stat().st_mtime,
                )
            )
    return sorted(found, key=lambda entry: entry.used)


def remove_entries(chosen: list[CacheEntry]) -> int:
    """Removes cached passes; returns the bytes freed."""
    for entry in chosen:
        shutil.rmtree(entry.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            entry.folder.parent.rmdir()  # removed only if empty
    return sum(entry.size_bytes for entry in chosen)


def parse_cache(text: str | None) -> tuple[str | None, int | None]:
    """The folder and the size in bytes of ``--cache``: ``DIR``, ``SIZE`` or ``DIR:SIZE``; None for a part that is not given. Raises CellbenchError."""
    if text is None:
        return None, None
    if is_size(text):
        return None, parse_bytes(text, "--cache")
    folder, _, size = text.rpartition(":")
    return (folder, parse_bytes(size, "--cache")) if folder and is_size(size) else (text, None)


def disk_budget(size_bytes: int | None) -> tuple[int, bool]:
    """How many bytes of features may be cached on disk, and whether to prefer disk to memory.

    With a size, features are cached there for later calls. Without one the disk is used only if memory is too small, and at most a fifth of
    its free space. With a shared cache, features are cached for other machines too.
    """
    if size_bytes is not None:
        return size_bytes, True
    there = cache_dir()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free // 5, bool(shared_url())
