"""Runs an experiment: finished runs are not run again, unavailable ones are marked as skipped, the rest is executed cohort by cohort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cellbench.execution.planning import ResolvedRun
from cellbench.execution.runner import Outcome, Runner


class Executor(Protocol):
    """Runs cohorts to their ends, in any order.

    In this process (:class:`InProcessExecutor`), in local processes (``multiprocess.ProcessExecutor``) or on Ray (``ray_grid.RayExecutor``).
    """

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        """Adds the result of every run to ``out``. Messages go through ``runner``."""


class InProcessExecutor:
    """One cohort after the other in this process."""

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        for number, cohort in enumerate(cohorts, 1):
            runner.cohort(cohort, f"cohort {number} of {len(cohorts)}", out)


def group_cohorts(runs: Sequence[ResolvedRun]) -> list[list[ResolvedRun]]:
    """The runs grouped by what they can share: one pass of one backbone over one stream of tiles. Order is kept."""
    groups: dict[tuple[Any, ...], list[ResolvedRun]] = {}
    for one in runs:
        groups.setdefault((one.run.stream, one.run.baseline), []).append(one)
    return list(groups.values())


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
