"""Logs a run's epochs to MLflow together with its checkpoint, and calls the callback of a search."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cellbench.execution.planning import ResolvedRun
from cellbench.tracking.open_run import Run
from cellbench.training import checkpoints


class TrialCallback(Protocol):
    """Callback for the trials of a search. They end after validation; the test images are never read for them."""

    def opened(self, job: ResolvedRun, run: Run) -> None:
        """Called when a run starts or is resumed."""

    def epoch(self, job: ResolvedRun, epoch: int, metrics: dict[str, float]) -> bool:
        """Receives the metrics of an epoch; False ends the run as pruned."""


@dataclass
class RunLogger:
    """Logs a run's metrics to MLflow and writes its checkpoints."""

    job: ResolvedRun
    run: Run
    place: Path
    watch: TrialCallback | None = None
    _written_s: float = 0.0

    def resumed(self) -> tuple[dict[str, Any] | None, bool]:
        """The checkpoint to resume from (None: start from scratch), and whether another run wrote it.

        That run has the same fingerprint and may be in another store. Its epochs are then logged for this run too.
        """
        if (state := checkpoints.read_checkpoint(self.place)) is not None:
            return state, False
        if (state := checkpoints.read_other_store(self.place)) is None:
            return None, False
        history = list(enumerate(state["progress"]["history"]))
        if self.watch is not None and not all(self.watch.epoch(self.job, epoch, row) for epoch, row in history):
            return None, False  # pruned in this study but not in the other: train again, up to the epoch at which it was pruned
        held = self.run.steps("train/loss")
        for epoch, row in history:
            if epoch not in held:
                self.run.buffer(epoch, row)
        self.run.log({})
        return state, True

    def epoch(self, epoch: int, metrics: dict[str, float]) -> bool:
        self.run.buffer(epoch, metrics)
        return self.watch is None or self.watch.epoch(self.job, epoch, metrics)

    def checkpoint(self, state: dict[str, Any]) -> None:
        # Not after every epoch: with few images, an epoch takes less time than logging it and writing a checkpoint. MLflow comes
        # first, so that it has every epoch of a checkpoint, however the process ends.
        if state["progress"]["ended"] or time.monotonic() - self._written_s > checkpoints.EVERY_S:
            self.run.log({})
            checkpoints.write_checkpoint(self.place, state)
            self._written_s = time.monotonic()
