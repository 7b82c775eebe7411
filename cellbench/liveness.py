"""Who this process is, and whether another one is still alive: for whatever belongs to one process, such as a run that is being trained.

A process number alone says nothing: it is used again, and in containers it is 1 everywhere. An owner is therefore ``HOST:PID:IDENTITY``, and the
identity holds the moment at which the process started, by a clock that nobody can set, the start of the machine, and the process namespace. The
first of these that can tell decides:

1. The same kernel and namespace: the table of processes.
2. The same kernel, another namespace (a container beside this one, or this one before its restart): a file that the owner holds locked.
3. Another machine that can be asked, such as a node of a Ray cluster (:func:`ask_also`).
4. Else the owner's last sign of life, of which it gives one every :data:`HEARTBEAT_S`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from cellbench.files import cache_dir

HEARTBEAT_S = 120.0
"""Interval between two signs of life."""
STALE_S = 15 * 60.0
"""An owner that nobody can ask counts as gone after this time without a sign of life."""


def this_owner() -> str:
    """This process, as an owner. It can be seen to live as long as it does, from the first call on."""
    return _hold(os.getpid())


def describe_owner(owner: str) -> str:
    """An owner for messages.

    >>> describe_owner("lab-2:71:8123.5f0c.40265")
    'process 71 on lab-2'
    """
    host, _, rest = owner.partition(":")
    return f"process {rest.partition(':')[0]} on {host}"


def owner_as_file_name(owner: str) -> str:
    """An owner in the name of a file: Windows allows no colon there."""
    return owner.replace(":", "@")


def owner_of_file_name(name: str) -> str:
    return name.replace("@", ":")


def is_alive(owner: str, heartbeat_s: float = 0.0, stale_s: float = STALE_S) -> bool:
    """Whether a process still exists. ``heartbeat_s``: the time of its last sign of life, in seconds since 1970."""
    for ask in (seen_here, *_others):
        if (answer := ask(owner)) is not None:
            return answer
    if owner.partition(":")[0] == socket.gethostname() and heartbeat_s < psutil.boot_time():
        return False  # of this machine before its restart
    # A sign of life from the future is as wrong as an old one: a clock was set. Else its owner would be alive for ever.
    return abs(time.time() - heartbeat_s) < stale_s


def seen_here(owner: str) -> bool | None:
    """Whether a process exists, as far as this machine sees it; None where it cannot tell."""
    host, _, rest = owner.partition(":")
    pid, _, identity = rest.partition(":")
    if not pid.isdigit():
        return None
    if not identity:  # of an older version
        return False if host == socket.gethostname() and not psutil.pid_exists(int(pid)) else None
    start, _, where = identity.partition(".")
    boot, _, _ = where.partition(".")
    if boot != _boot() if boot else host != socket.gethostname():
        return None
    if where not in ("", _where()):
        return _is_locked(owner)
    found = _started(int(pid))
    return None if found == "hidden" else found == start


_others: list[Callable[[str], bool | None]] = []


@contextlib.contextmanager
def ask_also(source: Callable[[str], bool | None]) -> Iterator[None]:
    """Inside ``with``, ``source`` is asked for owners on other machines: whether they live, or None where it does not know."""
    _others.append(source)
    try:
        yield
    finally:
        _others.remove(source)


# --- what identifies a process --------------------------------------------------------------------------------------------------------


@functools.cache
def _boot() -> str:
    """This start of the machine; empty where the operating system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
    return ""


@functools.cache
def _where() -> str:
    """This start of the machine and the process namespace, in which process numbers have one meaning; empty where there are no namespaces."""
    with contextlib.suppress(OSError):
        return f"{_boot()}.{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _started(pid: int) -> str:
    """When a process of this namespace started; empty if there is none, or one that has ended; ``hidden`` if that cannot be seen.

    On Linux in ticks since the machine's start. Psutil would give a date, which moves when the clock is set.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        pass
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.NoSuchProcess:
        return ""
    except psutil.AccessDenied:
        return "hidden"


# --- the lock -------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _hold(pid: int) -> str:
    """The owner string of this process, whose lock it holds until it ends, however it ends. By process number, which a fork changes."""
    owner = f"{socket.gethostname()}:{pid}:{'.'.join(filter(None, (_started(pid), _where())))}"
    with contextlib.suppress(OSError, ImportError):  # a cache that may not be written; Windows, which has no namespaces
        import fcntl

        place = _lock_file(owner)
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob("*.lock"):
            if time.time() - old.stat().st_mtime > STALE_S and not _is_locked_file(old):
                old.unlink()
        handle = os.open(place, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the kernel: ends with the process
    return owner


def _lock_file(owner: str) -> Path:
    return cache_dir() / "alive" / f"{owner_as_file_name(owner)}.lock"


def _is_locked(owner: str) -> bool | None:
    """Whether the owner holds its lock; None if there is no such file here."""
    with contextlib.suppress(OSError, ImportError):
        return _is_locked_file(_lock_file(owner))
    return None


def _is_locked_file(place: Path) -> bool:
    import fcntl

    handle = os.open(place, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
