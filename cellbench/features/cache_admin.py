"""The features that are kept on disk: where they lie, listing, removal, and how much may be kept."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cellbench.features.remote_cache import set_shared_url, shared_url
from cellbench.files import cache_dir, make_folder
from cellbench.hardware import is_size, parse_bytes


def features_dir() -> Path:
    """Where kept features lie."""
    return cache_dir() / "features"


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One kept pass."""

    folder: Path
    backbone: str
    dataset: str
    what: str
    num_tiles: int
    size_bytes: int
    used: float
    """Seconds since the epoch, of the last use."""


def cache_entries() -> list[CacheEntry]:
    """All kept passes, the longest unused first. A folder that is not ours is left out."""
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
    """Removes kept passes; returns the bytes freed."""
    for entry in chosen:
        shutil.rmtree(entry.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            entry.folder.parent.rmdir()  # only when empty
    return sum(entry.size_bytes for entry in chosen)


def cache_budget(text: str | None, url: str | None = None) -> tuple[int, bool]:
    """What ``--cache`` says: the cache folder, how many bytes of features may lie there, and whether to prefer it to memory.

    ``DIR``, ``SIZE`` or ``DIR:SIZE``. With a size, features are kept there for later calls. Without one they go there only where memory
    is too small, into at most a fifth of what is free. With ``--cache-url``, which names what machines share, they are kept for those too.
    Sets ``CELLBENCH_CACHE`` and ``CELLBENCH_CACHE_URL`` for this process.
    """
    if url is not None:
        set_shared_url(url)
    folder, size = None, None
    if text is not None:
        head, colon, tail = text.rpartition(":")
        if is_size(text):
            size = text
        elif colon and is_size(tail) and head:
            folder, size = head, tail
        else:
            folder = text
    if folder is not None:
        os.environ["CELLBENCH_CACHE"] = str(make_folder(Path(folder).absolute()))
    if size is not None:
        return parse_bytes(size, "--cache"), True
    there = cache_dir()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free // 5, bool(shared_url())
