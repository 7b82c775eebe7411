"""The runs of a command in the store: which it claims, which it leaves to others, and how those end that have no result.

A run that another process is executing is left to that process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cellbench.data.dataset import Dataset
from cellbench.errors import one_line
from cellbench.execution.failures import TRACEBACK
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.run_logger import TrialCallback
from cellbench.liveness import describe_owner
from cellbench.tracking.offline_queue import CallRejectedError, NotFoundError, TakenOverError
from cellbench.tracking.open_run import Run
from cellbench.tracking.schema import LIMIT, WEIGHTS, RunRecord, RunState, run_params
from cellbench.tracking.tracker import Tracker
from cellbench.training import checkpoints


@dataclass(kw_only=True)
class Outcome:
    """The results of an experiment's runs, by run name."""

    finished: dict[str, RunState] = field(default_factory=dict)
    validated: dict[str, RunState] = field(default_factory=dict)
    """Trials of a search, trained and validated but not tested."""
    pruned: dict[str, RunState] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    untested: dict[str, str] = field(default_factory=dict)
    """Finished, but not tested on all further images, and why."""
    busy: list[str] = field(default_factory=list)
    """Being executed by another process."""
    missing: list[str] = field(default_factory=list)
    """Without a result or a reason at the end, such as a run that was deleted meanwhile."""

    def note_missing(self, runs: Sequence[ResolvedRun]) -> None:
        """Sets ``missing``; ``runs``: all that were to be executed."""
        self.missing = [one.name for one in runs if one.name not in {**self.finished, **self.skipped, **self.failed}]


@dataclass(kw_only=True)
class ActiveRun:
    """A run of the current cohort: resolved, and open in MLflow."""

    resolved: ResolvedRun
    run: Run
    evaluated: bool = False
    """Whether its results are complete and about to be logged."""

    @property
    def ended(self) -> bool:
        """Whether nothing is left to compute."""
        return self.evaluated or bool(self.run.ended)

    @property
    def name(self) -> str:
        return self.resolved.name

    @property
    def checkpoint(self) -> Path:
        return checkpoints.checkpoint_path(self.resolved.fingerprint, self.run.key)


@dataclass(frozen=True, kw_only=True)
class RunClaims:
    """The runs of one command in the store."""

    tracker: Tracker
    parent_id: str
    datasets: Sequence[Dataset]
    """One, or one per fold."""
    limit: int | None
    """``[data] limit`` of the experiment."""
    say: Callable[[str], None]

    def tidy(self, resolved: ResolvedRun, ended: RunState) -> None:
        """Removes the checkpoint of an ended run, where a process was killed after it ended the run."""
        key = self.tracker.reopen(ended).key
        checkpoints.delete_checkpoint(checkpoints.checkpoint_path(resolved.fingerprint, key))

    def skip(self, resolved: ResolvedRun, old: RunState | None) -> None:
        """Marks a run as skipped, unless it already is for the same reason."""
        if old is not None and old.status == "skipped" and old.reason == resolved.unavailable[:4000]:
            return
        with self._open(resolved, old) as run:
            run.end("skipped", resolved.unavailable)

    def give_up(self, cohort: Sequence[ResolvedRun], reason: str, out: Outcome, trace: str = "") -> None:
        """Marks the unfinished runs of a cohort as failed, after its workers were lost or had an error with the traceback ``trace``."""
        with self.tracker.lock():
            known = self.tracker.known(*[one.fingerprint for one in cohort])
            for resolved in cohort:
                old = known.get(resolved.fingerprint)
                if old is not None and old.status == "finished":
                    out.finished[resolved.name] = old
                    continue
                with self._open(resolved, old) as run:
                    self.fail(ActiveRun(resolved=resolved, run=run), reason, out, trace)

    def release(self, cohort: Sequence[ResolvedRun], owner: str) -> None:
        """Marks the runs of ``owner``, a lost process on another machine, as interrupted, so that the next worker can claim them at once."""
        with self.tracker.lock():
            known = self.tracker.known(*[one.fingerprint for one in cohort])
            for resolved in cohort:
                old = known.get(resolved.fingerprint)
                if old is not None and old.status == "running" and old.owner == owner:
                    self.tracker.mark_interrupted(old)

    @contextlib.contextmanager
    def _open(self, resolved: ResolvedRun, old: RunState | None) -> Iterator[Run]:
        """Context manager that opens the run in MLflow: a new one with its params, or ``old``, resumed."""
        dataset = self.datasets[resolved.run.fold]
        params = run_params(resolved.run, dataset.name, resolved.precision)
        tags = {name: str(params[name]) for name in ("backbone", "head", "baseline", "seed", "dataset")} | {"model": resolved.run.model}
        if dataset.limited:
            tags[LIMIT] = str(self.limit)
        if resolved.weights_digest:
            tags[WEIGHTS] = resolved.weights_digest
        with self.tracker.run(resolved.name, resolved.fingerprint, parent=self.parent_id, known=old, tags=tags) as run:
            if old is None:
                run.log({}, params=params)
            yield run

    def claim(
        self, cohort: Sequence[ResolvedRun], stack: contextlib.ExitStack, out: Outcome, watch: TrialCallback | None
    ) -> tuple[list[ActiveRun], Mapping[str, RunRecord]]:
        """Opens the cohort's runs, except those that have ended or that another process is executing.

        ``watch``: set for the trials of a search, which end validated or pruned. Also returns what the store knew of these runs, and of those
        with the same training, by fingerprint.
        """
        active = []
        with self.tracker.lock():
            asked = [digest for one in cohort for digest in (one.fingerprint, *(digest for _, digest in one.same_training))]
            known = self.tracker.known(*asked)
            for resolved in cohort:
                old = known.get(resolved.fingerprint)
                if old is not None and old.status == "finished":
                    self.tidy(resolved, old)
                    out.finished[resolved.name] = old
                elif old is not None and watch is not None and old.status in ("validated", "pruned"):
                    self.tidy(resolved, old)
                    (out.validated if old.status == "validated" else out.pruned)[resolved.name] = old
                elif old is not None and old.alive:
                    out.busy.append(resolved.name)
                    self.say(f"{resolved.name} is being run by {describe_owner(old.owner)} and is left to it.")
                else:
                    try:
                        run = stack.enter_context(self._open(resolved, old))
                        if old is None:
                            dataset = self.datasets[resolved.run.fold]
                            run.log_input(dataset.name, dataset.digest, str(dataset.root), "training")
                    except CallRejectedError as error:  # deleted since it was listed, for example
                        out.failed[resolved.name] = one_line(error)
                        self.say(f"failed {resolved.name}: {one_line(error)}")
                        continue
                    if watch is not None:
                        watch.opened(resolved, run)
                    active.append(ActiveRun(resolved=resolved, run=run))
        return active, known

    def fail(self, one: ActiveRun, reason: str, out: Outcome, trace: str = "", *, anew: bool = False) -> None:
        """Ends a run as failed. ``trace``: the traceback of an error, kept with it. Its checkpoint is kept to resume from.

        ``anew``: its checkpoint leads to the same failure, and is removed.
        """
        if one.ended:
            return
        try:
            one.run.require_ownership()
            if trace:
                one.run.log_text(TRACEBACK, trace)
            one.run.end("failed", reason)
        except TakenOverError as error:
            one.run.ended = "taken over"
            out.busy.append(one.name)
            self.say(f"{one.name} is left to another process: {one_line(error)}.")
            return
        except CallRejectedError as error:
            gone = isinstance(error, NotFoundError) or "deleted" in str(error)
            reason = "it was deleted in MLflow while it was executed. The same command executes it anew." if gone else one_line(error)
            one.run.ended = "deleted"
        if anew:
            checkpoints.delete_checkpoint(one.checkpoint)
        out.failed[one.name] = reason
        self.say(f"failed {one.name}: {reason}")

    @staticmethod
    def skip_all(active: Sequence[ActiveRun], reason: str, out: Outcome) -> None:
        for one in active:
            if not one.ended:
                one.run.end("skipped", reason)
                out.skipped[one.name] = reason
