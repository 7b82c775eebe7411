"""Files that outlive a crash: written whole or not at all, hashed once, kept under one cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cellbench.errors import CellbenchError


def cache_dir() -> Path:
    """Where downloads, drawn data, hashes and checkpoints live: ``CELLBENCH_CACHE``, else ``~/.cache/cellbench``."""
    return Path(os.environ.get("CELLBENCH_CACHE") or Path.home() / ".cache" / "cellbench").expanduser().absolute()


def is_writable(folder: Path) -> bool:
    """Whether files may be put there. A folder without a write bit counts as read-only for root too, who could write all the same."""
    return folder.is_dir() and bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


@contextlib.contextmanager
def os_errors_as(doing: str) -> Iterator[None]:
    """Turns the operating system's refusals (no space, no permission) into one line that says what was being done and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CellbenchError(
                f"{doing}: no space left on the device. Free some, or name another folder; nothing half-written remains."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CellbenchError(f"{doing}: not permitted ({error.strerror}). Make the folder writable, or name another one.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise CellbenchError(f"{doing}: a file stands where a folder is needed. Move it, or name another folder.") from error
        if error.errno is None:
            raise  # a library's own kind of OSError, not the operating system's: the hub's "gated", say, which has words of its own
        raise CellbenchError(f"{doing}: {error.strerror}. Name another folder.") from error


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents. Raises CellbenchError where that is not permitted."""
    with os_errors_as(f"making the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def to_nfc(text: str) -> str:
    """The text in Unicode's composed form: ``é`` is one name, whether written as one character (Linux, Windows) or as two (macOS)."""
    return unicodedata.normalize("NFC", text)


def case_folded(name: str) -> str:
    """What two names have in common that some file system, or a person, takes for the same: Unicode form (NFC) and case left aside."""
    return to_nfc(to_nfc(name).casefold())


def file_name(name: str, most: int = 60) -> str:
    """A name of at most ``most`` characters for a file or folder, which no other name is given on any file system.

    A plain lower-case name is its own; of any other the plain letters are kept, with a hash of the whole behind a ``~``.

    >>> file_name("bccd"), file_name("a/b"), file_name("a-b")
    ('bccd', 'a-b~c14cddc0', 'a-b')
    """
    if len(name) <= most and re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*(?<!\.)", name) and name.partition(".")[0] not in _RESERVED:
        return name
    name = to_nfc(name)
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[: most - 9]
    return f"{plain}~{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
"""Names that Windows gives to devices."""


def write_atomic(path: Path, data: bytes | str | Callable[[BinaryIO], object]) -> None:
    """The whole file or, after a crash, the old one: written beside, synced, renamed. Raises CellbenchError for a full disk.

    ``data`` may be what writes into an open file, so that a large file never lies in memory as a whole.
    """
    with os_errors_as(f"writing {path}"), atomic_file(path) as temporary, temporary.open("wb") as file:
        data(file) if callable(data) else file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, which takes its place where the block ends well, and is removed where it does not."""
    handle, name = tempfile.mkstemp(dir=make_folder(path.parent), prefix=f".{path.name[:40]}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would lock a shared cache to one person
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask




def compute_sha256(path: Path) -> str:
    """The content hash of a file, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()




