"""CPU load by other processes during a measurement; timings are only meaningful together with it."""

from __future__ import annotations

import contextlib
import os
import time

import psutil

SHORTEST_S = 0.1
"""Minimum duration: the system counts in hundredths of a second, so shorter intervals would give noise."""


class SystemLoad:
    """Load by other processes since this object was created, on the cores that this process may use. Two readings of counters; no thread."""

    def __init__(self) -> None:
        self._before = _counters()

    def others_pct(self) -> float | None:
        """The share of the CPU that other processes used, 0..100 %; None if too little time has passed.

        Processes that this one started count as its own: they draw pictures while the next runs train.
        """
        total_s, busy_s, own_s = (now - then for now, then in zip(_counters(), self._before, strict=True))
        if total_s <= SHORTEST_S:
            return None
        return 100 * min(1.0, max(0.0, (busy_s - own_s) / total_s))


def _counters() -> tuple[float, float, float]:
    """Total seconds of all cores, busy seconds, and seconds of this process and of those that it started."""
    times = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        mine = [times[core] for core in os.sched_getaffinity(0) if core < len(times)]
        times = mine or times
    # Linux includes a guest's time in the user's.
    total_s = sum(sum(one) - getattr(one, "guest", 0.0) - getattr(one, "guest_nice", 0.0) for one in times)
    idle_s = sum(one.idle + getattr(one, "iowait", 0.0) for one in times)
    return total_s, total_s - idle_s, time.process_time() + _children_s()


def _children_s() -> float:
    """CPU seconds of the processes that this one started: of those that still run, and where the system counts them, of those that ended."""
    ended = os.times()
    total_s = ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total_s += times.user + times.system
    return total_s


def describe_load(pct: float | None) -> str:
    """``while other processes used 45 % of the processor``; empty if unknown."""
    return "" if pct is None else f"while other processes used {pct:.0f} % of the processor"
