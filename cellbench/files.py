"""Files and folders: the cache folder, atomic writes, names that are valid everywhere, errors of the operating system."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import time
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cellbench.errors import SystemFault


def cache_dir() -> Path:
    """The folder of downloads, drawn data, hashes and checkpoints: ``CELLBENCH_CACHE``, else ``cellbench`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises SystemFault where there is no home folder.
    """
    try:
        if given := os.environ.get("CELLBENCH_CACHE"):
            return Path(given).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "cellbench"
    except RuntimeError as error:
        raise SystemFault(f"there is no home folder for the cache ({error}). {_OTHER_CACHE}") from None


def require_cache() -> None:
    """Raises SystemFault if the cache folder cannot be written, before hours are spent on what it should hold."""
    folder = cache_dir()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir():
        make_folder(folder)  # raises, and says what is in the way
    if not is_writable(there):
        raise SystemFault(f"{folder}: the cache folder may not be written. {_OTHER_CACHE}")


_OTHER_CACHE = "Name another folder for it with --cache DIR, or with CELLBENCH_CACHE."


def is_writable(folder: Path) -> bool:
    """Whether files may be written there. A folder without a write bit counts as read-only for root too."""
    return folder.is_dir() and bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


@contextlib.contextmanager
def os_errors_as(doing: str) -> Iterator[None]:
    """Converts errors of the operating system (no space, no permission) to SystemFault. ``doing``: the failed operation, for the message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SystemFault(
                f"{doing}: no space left on the device. Free some, or name another folder; nothing half-written remains."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            other = _OTHER_CACHE if str(cache_dir()) in doing else "Make the folder writable, or name another one."
            raise SystemFault(f"{doing}: not permitted ({error.strerror}). {other}") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise SystemFault(f"{doing}: a file stands where a folder is needed. Move it, or name another folder.") from error
        if error.errno is None:
            raise  # an OSError of a library, such as the hub's for gated files, with its own message
        raise SystemFault(f"{doing}: {error.strerror}. Name another folder.") from error


def make_folder(folder: Path) -> Path:
    """The folder, created with its parents. Raises SystemFault where that is not permitted."""
    with os_errors_as(f"making the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_text(path: Path) -> str:
    """The text of a file that a person wrote, in any encoding that editors on Windows write. Raises OSError, and UnicodeDecodeError for other bytes."""
    data = path.read_bytes()
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding)
    if b"\0" in data[:2]:  # UTF-16 without a mark; TOML and CSV begin with ASCII
        return data.decode("utf-16-be" if data[:1] == b"\0" else "utf-16-le")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252")


def file_stamp(path: Path) -> tuple[int, int]:
    """The size of a file and the time of its last change, which tell whether it is still the file that was read. Raises OSError."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises TOMLDecodeError, also for what is nested too deeply and for endless numbers."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # a number of more digits than Python reads
        raise tomllib.TOMLDecodeError(" ".join(str(error).split())) from None


_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def to_nfc(text: str) -> str:
    """The text in Unicode's composed form: ``é`` is one name, whether written as one character (Linux, Windows) or as two (macOS)."""
    return unicodedata.normalize("NFC", text)


def case_folded(name: str) -> str:
    """A key that is equal for names that some file system treats as equal: NFC, case-folded."""
    return to_nfc(to_nfc(name).casefold())


def file_name(name: str, most: int = 60) -> str:
    """A valid file name of at most ``most`` characters, different for different names on any file system.

    A plain lower-case name stays as it is; any other keeps its plain letters and gets a hash behind a ``~``.

    >>> file_name("bccd"), file_name("a/b"), file_name("a-b")
    ('bccd', 'a-b~c14cddc0', 'a-b')
    """
    if len(name) <= most and re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*(?<!\.)", name) and name.partition(".")[0] not in _RESERVED:
        return name
    name = to_nfc(name)
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[: most - 9]
    return f"{plain}~{text_digest(name, 8)}"


_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
"""Names of devices on Windows."""


def write_atomic(path: Path, data: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically (temporary file, sync, rename), so that a crash leaves the old one. Raises SystemFault for a full disk.

    ``data`` may be a function that writes into an open file, so that a large file is never in memory as a whole.
    """
    with os_errors_as(f"writing {path}"), atomic_file(path) as temporary, temporary.open("wb") as file:
        data(file) if callable(data) else file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, which replaces it when the block ends without an error, and is removed otherwise."""
    handle, name = tempfile.mkstemp(dir=make_folder(path.parent), prefix=f".{path.name[:40]}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # with mkstemp's mode 0600 other users could not read a shared cache
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def remove_half_written(folder: Path) -> int:
    """Removes the temporary files that :func:`atomic_file` left in a folder since its process was killed, a day ago or earlier; returns their number."""
    num = 0
    for path in folder.glob(".*.????????"):
        with contextlib.suppress(OSError):  # another process was faster
            if path.is_file() and time.time() - path.stat().st_mtime > 86_400:
                path.unlink()
                num += 1
    return num


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def compute_sha256(path: Path) -> str:
    """The content hash of a file, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str, digits: int = 16) -> str:
    """The first hex digits, at most 64, of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]


def facts_digest(facts: object, digits: int = 16) -> str:
    """The same of facts that JSON can hold, such as what identifies a run; the order of keys does not count."""
    return text_digest(json.dumps(facts, sort_keys=True), digits)
