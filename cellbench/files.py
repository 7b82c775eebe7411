"""Files that outlive a crash: written whole or not at all, hashed once, kept under one cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cellbench.errors import CellbenchError


def cache_dir() -> Path:
    """Where downloads, drawn data, hashes and checkpoints live: ``CELLBENCH_CACHE``, else ``~/.cache/cellbench``."""
    return Path(os.environ.get("CELLBENCH_CACHE") or Path.home() / ".cache" / "cellbench").expanduser().absolute()


def writable(folder: Path) -> bool:
    """Whether files may be put there. A folder without a write bit counts as read-only for root too, who could write all the same."""
    return folder.is_dir() and bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


@contextlib.contextmanager
def told(doing: str) -> Iterator[None]:
    """Turns the operating system's refusals (no space, no permission) into one line that says what was being done and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CellbenchError(f"{doing}: no space left on the device. Free some, or name another folder; nothing half-written remains.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CellbenchError(f"{doing}: not permitted ({error.strerror}). Make the folder writable, or name another one.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise CellbenchError(f"{doing}: a file stands where a folder is needed. Move it, or name another folder.") from error
        raise


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents. Raises CellbenchError where that is not permitted."""
    with told(f"making the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomic(path: Path, data: bytes | str) -> None:
    """The whole file or, after a crash, the old one: written beside, synced, renamed. Raises CellbenchError for a full disk."""
    make_folder(path.parent)
    with told(f"writing {path}"):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def sha256(path: Path) -> str:
    """The content hash of a file as 64 hex digits; remembered by size and time of change, so that large sets are read once."""
    hashes = Hashes()
    digest = hashes[path]
    hashes.save()
    return digest


class Hashes:
    """Content hashes remembered in the cache folder between calls; ``save`` keeps what was learned. Used for many files at once."""

    def __init__(self) -> None:
        self._path = cache_dir() / "hashes.json"
        try:
            self._known: dict[str, list[object]] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}  # a damaged memory costs a second reading, nothing else
        self._learned: dict[str, list[object]] = {}

    def __getitem__(self, path: Path) -> str:
        name, facts = str(path.absolute()), path.stat()
        stamp = [facts.st_size, facts.st_mtime_ns]
        known = self._known.get(name)
        if isinstance(known, list) and known[:2] == stamp:
            return str(known[2])
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        self._known[name] = self._learned[name] = [*stamp, digest.hexdigest()]
        return digest.hexdigest()

    def save(self) -> None:
        """Adds what this object learned to the file. Losing a race with another process costs that one a second reading."""
        if self._learned and (writable(self._path.parent) or not self._path.parent.exists()):
            with contextlib.suppress(CellbenchError):  # only a memory: a full disk must not stop a run
                write_atomic(self._path, json.dumps(self._known))
            self._learned = {}
