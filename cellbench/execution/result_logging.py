"""Logs evaluated runs while the next cohort runs: other processes draw their pictures, and a thread uploads one run after the other."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from cellbench.background import BackgroundCalls
from cellbench.errors import SystemFault
from cellbench.execution import artifacts
from cellbench.execution.claims import ActiveRun, Outcome
from cellbench.files import os_errors_as
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.schema import RunState
from cellbench.training import checkpoints


class ResultLogging:
    """``drawing``: processes that draw, which their owner closes; None: it has its own."""

    def __init__(self, drawing: BackgroundCalls | None) -> None:
        self._given = drawing
        self._drawing: BackgroundCalls | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: list[Future[None]] = []

    def start_drawing(self) -> None:
        """Starts the processes that draw, unless they run."""
        if self._drawing is None:
            self._drawing = self._given or BackgroundCalls()
            self._drawing.import_ahead("cellbench.reporting.plots.run", "cellbench.reporting.plots.significance")

    def draw(self, drawings: Mapping[str, partial[bytes]]) -> dict[str, Future[bytes]]:
        """The pictures to come of a run."""
        assert self._drawing is not None
        return {name: self._drawing.submit(drawing) for name, drawing in drawings.items()}

    def log(
        self,
        one: ActiveRun,
        folder: TemporaryFolder,
        drawn: dict[str, Future[bytes]],
        metrics: dict[str, float],
        tags: dict[str, str],
        out: Outcome,
        fail: Callable[[Exception], None],
    ) -> None:
        """Has an evaluated run logged, once its pictures are drawn; its status ``finished`` is written last.

        ``folder``: its other artifacts. ``fail`` is called with an error.
        """
        one.evaluated = True

        def upload() -> None:
            with folder:
                pictures = {name: picture.result() for name, picture in drawn.items()}
                with os_errors_as(f"writing a run's pictures to {folder.name}"):
                    artifacts.write_pictures(Path(folder.name), pictures)
                one.run.log_artifacts(Path(folder.name))
            one.run.end("finished", metrics=metrics, tags=tags)
            checkpoints.delete_checkpoint(one.checkpoint)
            out.finished[one.name] = RunState(run_id=one.run.run_id, name=one.name, status="finished", metrics=metrics)

        def log() -> None:
            try:
                upload()
            except SystemFault:
                raise
            except Exception as error:
                one.evaluated = False
                fail(error)

        self._submit(log)

    def close_runs(self, opened: contextlib.ExitStack) -> None:
        """Closes the runs of a cohort once those before are logged: at once where there are none."""
        if logged := list(self._under_way):
            self._submit(partial(_close, opened.pop_all(), logged))

    def _submit(self, call: Callable[[], None]) -> None:
        """Calls in a thread, one after the other. :meth:`settle` waits and raises the first error."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "logging")
        self._under_way.append(self._thread.submit(call))

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def wait_for_first(self, num: int) -> None:
        """Waits for the first calls, and raises what went wrong."""
        for _ in range(num):
            self._under_way.pop(0).result()

    def settle(self) -> None:
        """Waits until all evaluated runs are logged, and raises what went wrong."""
        under_way, self._under_way = self._under_way, []
        if under_way:
            importlib.import_module("cellbench.reporting.sections")  # meanwhile: the report comes next
        wait(under_way)
        for job in under_way:
            job.result()

    def close(self) -> None:
        """Ends its own processes."""
        if self._drawing is not None and self._drawing is not self._given:
            self._drawing.close()
        self._drawing = None


def _close(opened: contextlib.ExitStack, logged: Sequence[Future[None]]) -> None:
    """Closes the runs of a cohort. Where one could not be logged, it and those that are not ended have failed."""
    with opened:
        for job in logged:
            job.result()
