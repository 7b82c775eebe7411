"""What the machine does while runs are open: processors, memory and GPUs, under MLflow's own names, in each run's "System metrics".

MLflow's monitor is one thread a run, and logs every sample on its own: nine runs of a cohort would measure the same machine nine times.
Here one thread measures for all runs that are open and writes every five minutes, 60 numbers a run. Disk and network are left out: they are the
whole machine's, and as many numbers again (with them, once a minute, nine runs cost 0.9 s of a busy minute).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from cellbench.errors import CellbenchError
from cellbench.tracking.schema import HEARTBEAT
from cellbench.tracking.tracker import Tracker

EVERY_S = 20.0
WRITTEN_EVERY_S = 300.0
FIRST_S = 1.0
"""Runs of a few seconds have a value as well: the first samples come sooner, each twice as late as the one before."""


@contextlib.contextmanager
def log_system_metrics(tracker: Tracker, run_ids: Sequence[str]) -> Iterator[None]:
    """Inside ``with``, what the machine does is logged to all of these runs."""
    watch = _Watch(tracker, run_ids)
    try:
        yield
    finally:
        watch.end()


class _Watch:
    def __init__(self, tracker: Tracker, run_ids: Sequence[str]) -> None:
        self._tracker, self._run_ids = tracker, run_ids
        self._monitors, self._process = _monitors(), psutil.Process()
        self._samples: list[tuple[int, int, dict[str, float]]] = []
        self._step = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go, daemon=True, name="system-metrics")
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _go(self) -> None:
        psutil.cpu_percent()  # is the load since this thread's call before, and so 0 at the first
        wait_s, written_s = FIRST_S, time.monotonic()
        while not self._over.wait(wait_s):
            self._take()
            wait_s = min(EVERY_S, 2 * wait_s)
            if time.monotonic() - written_s > WRITTEN_EVERY_S:
                self._write()
                written_s = time.monotonic()
        self._take()
        self._write()

    def _take(self) -> None:
        found = {"process_memory_megabytes": self._process.memory_info().rss / 1e6}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self._samples.append((int(time.time() * 1000), self._step, found))
        self._step += 1

    def _write(self) -> None:
        metric, alive = (
            self._tracker.mlflow.entities.Metric,
            {HEARTBEAT: str(time.time())},
        )  # an epoch may be longer than a run may be silent
        values = [metric(f"system/{name}", float(v), now, step) for now, step, found in self._samples for name, v in found.items()]
        self._samples = []
        with contextlib.suppress(CellbenchError):  # a full or locked store stops a run where its scores are written, not here
            for run_id in self._run_ids:
                self._tracker.log(run_id, values, tags=alive)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[Any] = [CPUMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # what it raises without NVIDIA's library, and without a GPU
        monitors.append(GPUMonitor())
    return monitors
