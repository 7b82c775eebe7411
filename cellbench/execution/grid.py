"""Runs an experiment cohort by cohort. Finished runs are not run again; unavailable runs are marked as skipped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cellbench.errors import quantity
from cellbench.execution.claims import Outcome, RunClaims
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.progress import GridProgress
from cellbench.execution.wanted_tests import missing_tests, wanted_tests

if TYPE_CHECKING:
    from cellbench.config.experiment import DataSpec
    from cellbench.execution.runner import Runner

POLL_S = 5.0
"""How often the store is asked for runs that other processes execute."""


class Executor(Protocol):
    """Runs cohorts to completion, in any order.

    Implemented by :class:`InProcessExecutor`, ``multiprocess.ProcessExecutor`` (local processes) and ``ray_grid.RayExecutor`` (a Ray cluster).
    """

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        """Adds the result of every run to ``out``. Prints messages through ``runner``."""


class InProcessExecutor:
    """Runs cohorts in this process, one after the other."""

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        with GridProgress(cohorts, runner.say) as progress:
            for number, cohort in enumerate(cohorts, 1):
                runner.report = progress.of(cohort)
                runner.cohort(cohort, f"cohort {number} of {len(cohorts)}", out)
                progress.update(cohort, 1.0)


def group_cohorts(runs: Sequence[ResolvedRun]) -> list[list[ResolvedRun]]:
    """Groups the runs that can share one backbone pass over the same tiles. Keeps their order."""
    groups: dict[tuple[Any, ...], list[ResolvedRun]] = {}
    for one in runs:
        groups.setdefault(one.run.cohort_key, []).append(one)
    return list(groups.values())


def describe_skipped(runs: Sequence[ResolvedRun]) -> list[str]:
    """A line for each baseline that is skipped, and one for all runs whose backbones cannot be used."""
    lines = list(dict.fromkeys(f"skipped {one.run.baseline}: {one.unavailable}" for one in runs if one.run.baseline))
    others = [one for one in runs if one.run.backbone]
    num, reasons = f"skipped {quantity(len(others), 'run')}", {one.unavailable for one in others}
    if len(reasons) > 1:
        names = ", ".join(dict.fromkeys(one.run.backbone or "" for one in others))
        return [*lines, f"{num}: {names} cannot be used here. `cellbench doctor` says why and what to do."]
    return [*lines, *(f"{num}: {reason}" for reason in reasons)]


def find_unfinished(claims: RunClaims, runs: Sequence[ResolvedRun], data: DataSpec) -> tuple[list[ResolvedRun], Outcome]:
    """The runs that are to be executed, and the others as an outcome: finished already, or marked as skipped. Needs no torch."""
    out = Outcome()
    todo: list[ResolvedRun] = []
    incomplete: list[ResolvedRun] = []
    with claims.tracker.lock():  # else two processes would mark the same runs as skipped
        known = claims.tracker.known(*[one.fingerprint for one in runs])
        for resolved in runs:
            old = known.get(resolved.fingerprint)
            if old is not None and old.status == "finished":
                out.finished[resolved.name] = old
                claims.tidy(resolved, old)
                if missing_tests(old, wanted_tests(data, claims.datasets[resolved.run.fold])):
                    (incomplete if resolved.unavailable else todo).append(resolved)
            elif resolved.unavailable:
                claims.skip(resolved, old)
                out.skipped[resolved.name] = resolved.unavailable
            else:
                todo.append(resolved)
    if out.finished:
        claims.say(f"{len(out.finished)} of {len(runs)} runs are finished already and are not run again.")
    if incomplete:
        claims.say(f"{len(incomplete)} of them cannot be tested on more images: {incomplete[0].unavailable}")
    for line in describe_skipped([one for one in runs if one.name in out.skipped]):
        claims.say(line)
    return todo, out


def run_all(runner: Runner, runs: Sequence[ResolvedRun], executor: Executor | None = None) -> Outcome:
    """Executes the unfinished runs; without an executor, in this process."""
    todo, out = find_unfinished(runner.claims, runs, runner.experiment.data)
    execute(runner, todo, out, executor)
    out.note_missing(runs)
    return out


def execute(runner: Runner, todo: Sequence[ResolvedRun], out: Outcome, executor: Executor | None = None) -> None:
    """Executes runs, and waits for those that other processes execute; adds their results to ``out``."""
    executor = executor or InProcessExecutor()
    with runner:
        executor.run(runner, group_cohorts(todo), out)
    _await_others(runner, todo, executor, out)


def _await_others(runner: Runner, runs: Sequence[ResolvedRun], executor: Executor, out: Outcome) -> None:
    """Waits for the runs that other processes execute, and executes those that their process leaves behind."""
    if out.busy:
        runner.say(
            f"waiting for {len(out.busy)} runs of other processes. A run whose process is gone is taken over; Ctrl-C ends the waiting."
        )
    while out.busy:
        time.sleep(POLL_S)
        busy, left = [one for one in runs if one.name in out.busy], []
        known = runner.tracker.known(*[one.fingerprint for one in busy])
        out.busy = []
        for one in busy:
            state = known.get(one.fingerprint)
            if state is not None and state.status == "finished":
                out.finished[one.name] = state
            elif state is not None and state.alive:
                out.busy.append(one.name)
            elif state is not None and state.status == "skipped":
                out.skipped[one.name] = state.reason
            elif state is not None and state.status == "failed":
                out.failed[one.name] = f"in another process: {state.reason}"
            else:
                left.append(one)
        if left:
            with runner:
                executor.run(runner, group_cohorts(left), out)
