"""A grid's cohorts side by side on one machine: processes, each pinned to its share of the cores, fed by the driver, replaced when they die.

Started afresh (``spawn``), since a copy of a process in which torch has threads may hang. A worker that is lost costs what it did since its
last checkpoint: the next one takes up the same runs. When the driver is gone, its workers end themselves.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from cellbench.errors import CellbenchError
from cellbench.execution.planning import PlannedRun
from cellbench.execution.runner import Outcome, Runner
from cellbench.execution.worker_job import MOST_DEATHS, CohortWorker, JobSpec, WorkItem, merge_outcomes, work_items
from cellbench.hardware import Hardware

END_S = 20.0
"""How long a worker may take to mark its runs as interrupted before it is killed."""


def check_num_workers(num: int, machine: Hardware) -> int:
    """``num`` as a number of workers that this machine can keep busy. Raises CellbenchError."""
    if num < 1:
        raise CellbenchError(f"--workers {num}: expected 1 or more.")
    if num > machine.most_shares:
        raise CellbenchError(
            f"--workers {num}: at most {machine.most_shares} here ({machine.name}): more would take cores from each other. Leave some out."
        )
    return num


class ProcessExecutor:
    """``num`` worker processes for the cohorts of one grid."""

    def __init__(self, num: int, order: JobSpec) -> None:
        self._num, self._order = num, order

    def __call__(self, runner: Runner, groups: Sequence[Sequence[PlannedRun]], out: Outcome) -> None:
        """Runs the cohorts to their ends. What a worker says is said by ``runner``, which also marks what no worker could finish."""
        num = min(self._num, len(groups))  # a worker without a cohort would only keep cores from the others
        if num == 0:
            return
        waiting = deque(work_items(groups, runner.registry))
        orders = [
            replace(self._order, machine=machine, disk_bytes=self._order.disk_bytes // num) for machine in self._order.machine.shares(num)
        ]
        workers = [_Worker(mine, cores) for mine, cores in zip(orders, assign_cores([one.machine for one in orders]), strict=True)]
        runner.say(f"{num} worker{'s' * (num > 1)}, each {orders[0].machine.name}.")
        try:
            for worker in workers:
                worker.take(waiting)
            while busy := [worker for worker in workers if worker.piece is not None]:
                for pipe in wait([worker.pipe for worker in busy]):
                    worker = next(one for one in busy if one.pipe is pipe)
                    self._hear(worker, waiting, runner, out)
        finally:
            for worker in workers:
                worker.leave(kindly=worker.piece is None)
            end = time.monotonic() + END_S
            for worker in workers:
                worker.join(end - time.monotonic())

    def _hear(self, worker: _Worker, waiting: deque[WorkItem], runner: Runner, out: Outcome) -> None:
        """One message of a worker, or its end."""
        piece = worker.piece
        assert piece is not None
        try:
            kind, what = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            ended = worker.buried()
            piece.deaths.append(ended)
            if len(piece.deaths) < MOST_DEATHS:
                runner.say(f"{piece.title}: its worker {ended}; another one goes on from the checkpoints.")
                waiting.appendleft(piece)
            else:
                runner.give_up(piece.jobs, f"its process was lost {MOST_DEATHS} times, the last one {ended}. Is there enough memory?", out)
            worker.take(waiting)
            return
        if kind == "say":
            runner.say(what)
        elif kind == "done":
            merge_outcomes(out, what)
            worker.take(waiting)
        elif kind == "refused":
            raise CellbenchError(what)
        else:
            raise RuntimeError(f"in a worker process:\n{what}")  # our own bug


class _Worker:
    """The driver's side of one process, which is started when there is something to do."""

    def __init__(self, order: JobSpec, cores: Sequence[int]) -> None:
        self._order, self._cores = order, cores
        self._process: Any = None
        self.pipe: Connection[Any, Any]
        self.piece: WorkItem | None = None

    def take(self, waiting: deque[WorkItem]) -> None:
        """The next cohort, if there is one; else the process may go, and its memory with it."""
        self.piece = waiting.popleft() if waiting else None
        if self.piece is None:
            self.leave(kindly=True)
            return
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # it died just now: told by the pipe's end
            self.pipe.send(([job.fingerprint for job in self.piece.jobs], self.piece.title, self.piece.halvings))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        num_threads = str(self._order.machine.threads)
        # Before torch is imported there: several progress bars would overwrite each other, and a library's own threads count too.
        with _environment({"TQDM_DISABLE": "1", "OMP_NUM_THREADS": num_threads}):
            self._process = context.Process(target=_work, args=(theirs, self._order, self._cores), daemon=True, name="cellbench worker")
            self._process.start()
        theirs.close()

    def buried(self) -> str:
        """How the dead process ended. Waited for, since its runs count as alive while the system knows its number."""
        self._process.join()
        code, self._process = self._process.exitcode, None
        self.pipe.close()
        return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"

    def leave(self, kindly: bool = False) -> None:
        """Asks the process to end: after its work, or now."""
        if self._process is None:
            return
        if kindly:
            with contextlib.suppress(BrokenPipeError):
                self.pipe.send(None)
        elif self._process.is_alive():
            self._process.terminate()

    def join(self, wait_s: float) -> None:
        """Waits for the process, and kills it when it takes too long."""
        if self._process is None:
            return
        self._process.join(max(0.0, wait_s))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None
        self.pipe.close()


def assign_cores(machines: Sequence[Hardware]) -> list[list[int]]:
    """The processors that each worker is pinned to, none twice; empty lists where the system cannot pin."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in machines]
    there = sorted(os.sched_getaffinity(0))
    out, first = [], 0
    for machine in machines:
        num = machine.lanes * machine.threads
        out.append(there[first : first + num])
        first += num
    return out


@contextlib.contextmanager
def pin_to_cores(cores: Sequence[int]) -> Iterator[None]:
    """Inside ``with``, this thread and those that it starts keep to these processors; with none named, nothing is changed."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(pipe: Connection[Any, Any], order: JobSpec, cores: Sequence[int]) -> None:
    """A worker process, from its start to its end."""
    if cores:
        os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGTERM, _told_to_end)
    signal.signal(signal.SIGINT, _told_to_end)
    threading.Thread(target=_outlive_no_driver, daemon=True).start()
    try:
        hand = CohortWorker(order, lambda text: pipe.send(("say", text)))
        while (asked := pipe.recv()) is not None:
            pipe.send(("done", hand.cohort(*asked)))
    except CellbenchError as error:
        pipe.send(("refused", str(error)))
    except (EOFError, BrokenPipeError):
        return  # the driver is gone
    except Exception:  # a bug: its traceback is told where somebody reads it
        pipe.send(("broke", traceback.format_exc()))


def _told_to_end(number: int, frame: object) -> NoReturn:
    # Once: what follows marks the runs as interrupted, and Ctrl-C reaches a worker both from the terminal and from its driver.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _outlive_no_driver() -> None:
    """Ends the process as if it were told to, when its driver was killed."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os.kill(os.getpid(), signal.SIGTERM)
