"""Runs an experiment cohort by cohort. Finished runs are not run again; unavailable runs are marked as skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cellbench.execution.planning import ResolvedRun
from cellbench.execution.runner import Outcome, Runner


class Executor(Protocol):
    """Runs cohorts to completion, in any order.

    Implemented by :class:`InProcessExecutor`, ``multiprocess.ProcessExecutor`` (local processes) and ``ray_grid.RayExecutor`` (a Ray cluster).
    """

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        """Adds the result of every run to ``out``. Prints messages through ``runner``."""


class InProcessExecutor:
    """Runs cohorts in this process, one after the other."""

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        for number, cohort in enumerate(cohorts, 1):
            runner.cohort(cohort, f"cohort {number} of {len(cohorts)}", out)


def group_cohorts(runs: Sequence[ResolvedRun]) -> list[list[ResolvedRun]]:
    """Groups the runs that can share one backbone pass over the same tiles. Keeps their order."""
    groups: dict[tuple[Any, ...], list[ResolvedRun]] = {}
    for one in runs:
        groups.setdefault(one.run.cohort_key, []).append(one)
    return list(groups.values())


def run_all(runner: Runner, runs: Sequence[ResolvedRun], executor: Executor | None = None) -> Outcome:
    """Executes the unfinished runs; without an executor, in this process."""
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
    with runner:
        (executor or InProcessExecutor()).run(runner, group_cohorts(todo), out)
    return out
