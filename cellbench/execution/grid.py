"""Runs an experiment: finished runs are not run again, unavailable ones are marked as skipped, the rest is executed cohort by cohort."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from cellbench.execution.planning import ResolvedRun, group_cohorts
from cellbench.execution.runner import Outcome, Runner
from cellbench.tracking.schema import DATA
from cellbench.tracking.tracker import Run, Tracker


class Executor(Protocol):
    """Runs cohorts to their ends, in any order and anywhere: in this process (:class:`InProcessExecutor`), in local processes
    (``multiprocess.ProcessExecutor``) or on Ray (``ray_grid.RayExecutor``)."""

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        """Adds the result of every run to ``out``. Messages go through ``runner``."""


class InProcessExecutor:
    """One cohort after the other in this process."""

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        for number, cohort in enumerate(cohorts, 1):
            runner.cohort(cohort, f"cohort {number} of {len(cohorts)}", out)


def run_all(runner: Runner, runs: Sequence[ResolvedRun], executor: Executor | None = None) -> Outcome:
    """Runs what is not finished yet; without an executor, in this process."""
    out, known = Outcome(), runner.tracker.known()
    todo: list[ResolvedRun] = []
    for resolved in runs:
        old = known.get(resolved.fingerprint)
        if old is not None and old.status == "finished":
            out.finished[resolved.name] = old
        elif resolved.unavailable:
            runner.skip(resolved, old)
            out.skipped[resolved.name] = resolved.unavailable
        else:
            todo.append(resolved)
    if out.finished:
        runner.say(f"{len(out.finished)} of {len(runs)} runs are finished already and are not run again.")
    for reason in sorted(set(out.skipped.values())):
        names = [name for name, why in out.skipped.items() if why == reason]
        runner.say(f"skipped {len(names)} runs ({names[0]}, …): {reason}" if len(names) > 1 else f"skipped {names[0]}: {reason}")
    (executor or InProcessExecutor()).run(runner, group_cohorts(todo), out)
    return out


@contextlib.contextmanager
def parent_run(tracker: Tracker, name: str, fingerprint: str, params: Mapping[str, str], data: str, kind: str = "grid") -> Iterator[Run]:
    """The parent run of a grid or search: the same one whenever the same one is started again.

    ``params``: for people to read. ``data``: the digest of its data.
    """
    old = tracker.known(fingerprint).get(fingerprint)
    with tracker.run(name, fingerprint, known=old, tags={"cellbench.kind": kind, DATA: data}) as run:
        if old is None:  # a param is written once, and a folder may have another name today
            run.log({}, params=params)
        yield run
    tracker.flush()
