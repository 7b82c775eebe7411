"""Whether another process is alive: numbers that are used again, containers, restarts, clocks that jump."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellbench import liveness
from cellbench.liveness import STALE_S, ask_also, describe_owner, is_alive, this_owner

linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
CODE = "from cellbench.liveness import this_owner; print(this_owner(), flush=True); input()"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process and its owner string."""
    process = subprocess.Popen([sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def changed(owner: str, host: str = "", start: str = "", boot: str = "", space: str = "") -> str:
    """The owner string of a process that differs in these parts."""
    name, pid, identity = owner.split(":")
    parts = identity.split(".")
    return f"{host or name}:{pid}:{start or parts[0]}.{boot or parts[1]}.{space or parts[2]}"


def test_a_process_is_alive_until_it_is_killed(other: tuple[subprocess.Popen[str], str]) -> None:
    process, owner = other
    assert is_alive(owner)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(owner, time.time()) and time.monotonic() < deadline:  # not yet waited for: it is a zombie
        time.sleep(0.01)
    assert not is_alive(owner, time.time())
    process.wait()
    assert not is_alive(owner, time.time())


def test_a_number_that_is_used_again_is_another_process() -> None:
    assert is_alive(this_owner())
    assert not is_alive(changed(this_owner(), start="17"), heartbeat_s=time.time())


def test_this_process_is_the_same_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = this_owner()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 365 * 86400)
    liveness._hold.cache_clear()
    assert this_owner() == owner
    assert is_alive(owner, now)


@linux
def test_a_container_on_the_same_machine_lives_as_long_as_it_holds_its_lock(other: tuple[subprocess.Popen[str], str]) -> None:
    process, owner = other
    inside = changed(owner, space="77")  # as seen from another namespace: the number says nothing here
    held, seen = liveness._lock_file(owner), liveness._lock_file(inside)
    held.rename(seen)
    assert is_alive(inside)
    process.kill()
    process.wait()
    assert not is_alive(inside, heartbeat_s=time.time())


@linux
def test_a_container_without_a_lock_here_is_judged_by_its_sign_of_life() -> None:
    inside = changed(this_owner(), space="77")
    assert is_alive(inside, time.time() - 60)
    assert not is_alive(inside, time.time() - STALE_S - 60)


@pytest.mark.parametrize(("age_s", "alive"), [(60, True), (STALE_S + 60, False), (-60, True), (-STALE_S - 60, False)])
def test_another_machine_is_judged_by_its_sign_of_life_which_may_not_lie_far_in_the_future(age_s: float, alive: bool) -> None:
    assert is_alive("elsewhere:7:123.abc.4", time.time() - age_s) == alive
    assert is_alive("elsewhere:7", time.time() - age_s) == alive  # of an older version


@linux
def test_a_process_of_before_the_restart_of_this_machine_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = changed(this_owner(), boot="0ld")
    monkeypatch.setattr("psutil.boot_time", lambda: time.time() - 60)
    assert not is_alive(before, time.time() - 120)
    assert is_alive(before, time.time() - 5)  # another machine of this name


def test_another_machine_can_be_asked() -> None:
    owner = "node-2:7:123.abc.4"
    with ask_also({owner: False}.get):
        assert not is_alive(owner, time.time())
        assert is_alive("node-3:7:123.abc.4", time.time())
    assert is_alive(owner, time.time())


def test_locks_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    old = tmp_path / "cache" / "alive" / "gone@1@2.lock"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (1, 1))
    liveness._hold.cache_clear()
    assert liveness._lock_file(this_owner()).exists()
    assert not old.exists()


def test_an_owner_is_shown_without_its_identity() -> None:
    assert describe_owner(this_owner()) == f"process {os.getpid()} on {this_owner().partition(':')[0]}"


@linux
def test_a_process_that_sleeps_is_alive_on_its_own_machine(other: tuple[subprocess.Popen[str], str]) -> None:
    """A laptop that slept, or SIGSTOP: no sign of life for an hour, and nobody here takes its runs."""
    process, owner = other
    os.kill(process.pid, signal.SIGSTOP)
    assert is_alive(owner, time.time() - 3600)
    os.kill(process.pid, signal.SIGCONT)
    assert is_alive(owner, time.time() - 3600)
