"""Runs the cohorts of a grid in parallel on one machine, in processes that are pinned to disjoint cores.

The driver starts and stops the processes. They are spawned, because forking a process with torch threads may deadlock. Workers exit on their
own when the driver dies.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from cellbench.errors import CellbenchError, Terminated, quantity
from cellbench.execution.claims import Outcome
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.progress import Report
from cellbench.execution.runner import Runner
from cellbench.execution.work_queue import Message, WorkItem, WorkQueue
from cellbench.execution.worker_job import CohortWorker, JobSpec
from cellbench.hardware import Hardware
from cellbench.startup import restored_environment

END_S = 20.0
"""Time a worker has to mark its runs as interrupted, before it is killed."""


def check_num_workers(num: int, machine: Hardware) -> int:
    """Returns ``num`` if this machine has cores for so many workers. Raises CellbenchError otherwise."""
    if num < 1:
        raise CellbenchError(f"--workers {num}: expected 1 or more.")
    if num > machine.most_shares:
        raise CellbenchError(
            f"--workers {num}: at most {machine.most_shares} here ({machine.name}): more would take cores from each other. Leave some out."
        )
    return num


class ProcessExecutor:
    """``num`` worker processes for the cohorts of one grid."""

    def __init__(self, num: int, job: JobSpec) -> None:
        self._num, self._job = num, job

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        num = min(self._num, len(cohorts))  # an idle worker would take cores from the others
        if num == 0:
            return
        machines = self._job.machine.shares(num)
        runner.say(f"{quantity(num, 'worker')}, each {machines[0].name}.")
        jobs = [
            replace(self._job, experiment=runner.experiment, machine=machine, disk_bytes=self._job.disk_bytes // num)
            for machine in machines
        ]
        workers = [_Worker(job, cores) for job, cores in zip(jobs, assign_cores(machines), strict=True)]
        WorkQueue(runner, cohorts, out).run(_LocalWorkers(workers))


class _LocalWorkers:
    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers

    def assign(self, queue: WorkQueue) -> None:
        for worker in self._workers:
            if worker.item is None and not worker.left:
                if (item := queue.take()) is not None:
                    worker.send(item)
                elif worker.running:
                    worker.request_exit()  # and its memory with it

    def messages(self) -> Iterator[Message]:
        busy = {worker.pipe: worker for worker in self._workers if worker.item is not None}
        for pipe in wait(list(busy)):
            yield busy[pipe].receive()  # type: ignore[index]

    def stop(self) -> list[tuple[WorkItem, str]]:
        for worker in self._workers:
            worker.request_exit(now=worker.item is not None)
        end = time.monotonic() + END_S
        for worker in self._workers:
            worker.join(end - time.monotonic())
        return []  # they marked their own runs as interrupted


class _Worker:
    """The driver's handle of one worker process. The process starts with its first item."""

    def __init__(self, job: JobSpec, cores: Sequence[int]) -> None:
        self._job, self._cores = job, cores
        self._process: Any = None
        self.pipe: Connection[Any, Any]
        self.item: WorkItem | None = None
        self.left = False
        """Whether it was asked to exit; it gets no more work."""

    @property
    def running(self) -> bool:
        return self._process is not None

    def send(self, item: WorkItem) -> None:
        self.item = item
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # the process just died; `receive` reports it
            self.pipe.send((item.fingerprints, item.title, item.halvings))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        num_threads = str(self._job.machine.threads)
        # Must be set before the worker imports torch. Several progress bars would overwrite each other, and libraries start threads too.
        with restored_environment("TQDM_DISABLE", "OMP_NUM_THREADS"):
            os.environ.update({"TQDM_DISABLE": "1", "OMP_NUM_THREADS": num_threads})
            self._process = context.Process(target=_work, args=(theirs, self._job, self._cores), daemon=True, name="cellbench worker")
            self._process.start()
        theirs.close()

    def receive(self) -> Message:
        """The next message about its item, or one that says how the process died."""
        item = self.item
        assert item is not None
        try:
            kind, content = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            kind, content = "lost", self._reap()
        if kind not in ("say", "progress"):
            self.item = None
        if kind in ("refused", "error"):  # it has ended, and the next item needs a new process
            self._reap()
        return Message(item=item, kind=kind, content=content)

    def _reap(self) -> str:
        """Joins the dead process and describes how it ended. Its runs count as alive as long as its process id exists."""
        self._process.join()
        code, self._process = self._process.exitcode, None
        self.pipe.close()
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def request_exit(self, now: bool = False) -> None:
        """Asks the process to exit: after its current item, or now."""
        self.left = True
        if self._process is None:
            return
        if not now:
            with contextlib.suppress(BrokenPipeError):
                self.pipe.send(None)
        elif self._process.is_alive():
            self._process.terminate()

    def join(self, wait_s: float) -> None:
        """Waits for the process; kills it after the timeout."""
        if self._process is None:
            return
        self._process.join(max(0.0, wait_s))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None
        self.pipe.close()


def assign_cores(machines: Sequence[Hardware]) -> list[list[int]]:
    """Disjoint cores for each worker; empty lists if the operating system cannot pin processes."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in machines]
    free = iter(sorted(os.sched_getaffinity(0)))
    return [list(itertools.islice(free, machine.lanes * machine.threads)) for machine in machines]


@contextlib.contextmanager
def pin_to_cores(cores: Sequence[int]) -> Iterator[None]:
    """Pins this thread, and those that it starts, to ``cores`` inside ``with``. Does nothing if ``cores`` is empty."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _work(pipe: Connection[Any, Any], job: JobSpec, cores: Sequence[int]) -> None:
    """Main function of a worker process."""
    if cores:
        os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGTERM, _exit_once)
    signal.signal(signal.SIGINT, _ignore)  # Ctrl-C in a terminal reaches the driver too, which ends its workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        worker = CohortWorker(job, lambda text: pipe.send(("say", text)), _Throttled(lambda *part: pipe.send(("progress", part))))
        while (task := pipe.recv()) is not None:
            pipe.send(("done", worker.cohort(*task)))
    except CellbenchError as error:
        pipe.send(("refused", str(error)))
    except (EOFError, BrokenPipeError):
        return  # the driver is gone
    except Exception:  # the driver fails the cohort with this traceback, and starts another worker
        pipe.send(("error", traceback.format_exc()))


class _Throttled:
    """Passes progress on at most twice a second."""

    def __init__(self, report: Report) -> None:
        self._report, self._sent_s = report, 0.0

    def __call__(self, part: float, doing: str) -> None:
        if time.monotonic() - self._sent_s > 0.5:
            self._sent_s = time.monotonic()
            self._report(part, doing)


def _exit_once(number: int, frame: object) -> NoReturn:
    # A second signal must not stop it from marking its runs as interrupted. Not SIG_IGN: Python warns of a signal that is pending then.
    signal.signal(signal.SIGTERM, _ignore)
    raise Terminated(128 + number)


def _ignore(number: int, frame: object) -> None:
    pass


def _end_with_driver() -> None:
    """Exits as on SIGTERM when the driver was killed."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os.kill(os.getpid(), signal.SIGTERM)
