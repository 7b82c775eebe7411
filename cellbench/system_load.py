"""How busy other processes keep the processor while something is measured: seconds mean little without it."""

from __future__ import annotations

import os
import time

import psutil

SHORTEST_S = 0.1
"""The system counts in hundredths of a second: of less the share would be chance."""


class SystemLoad:
    """The load by others since it was made, of the cores that this process may use. Two readings of the system's counters; no thread."""

    def __init__(self) -> None:
        self._before = _counters()

    def others_pct(self) -> float | None:
        """The share of the processor that other processes used, 0..100 %; None where too little time has passed or the system does not say.

        Processes that this one started and that still run count as others.
        """
        total_s, busy_s, own_s = (now - then for now, then in zip(_counters(), self._before, strict=True))
        if total_s <= SHORTEST_S:
            return None
        return 100 * min(1.0, max(0.0, (busy_s - own_s) / total_s))


def _counters() -> tuple[float, float, float]:
    """Seconds of all cores together, those that they were busy, and those that this process used."""
    times = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        mine = [times[core] for core in os.sched_getaffinity(0) if core < len(times)]
        times = mine or times
    # Linux counts a guest's time in the user's too.
    total_s = sum(sum(one) - getattr(one, "guest", 0.0) - getattr(one, "guest_nice", 0.0) for one in times)
    idle_s = sum(one.idle + getattr(one, "iowait", 0.0) for one in times)
    return total_s, total_s - idle_s, time.process_time()


def describe_load(pct: float | None) -> str:
    """``while other processes used 45 % of the processor``; empty where that is not known."""
    return "" if pct is None else f"while other processes used {pct:.0f} % of the processor"
