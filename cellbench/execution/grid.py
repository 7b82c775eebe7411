"""Runs an experiment: what is finished by its fingerprint is not run again, what cannot be had is marked *skipped* with the reason, and the
rest goes cohort by cohort."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from cellbench.config.experiment import cohorts
from cellbench.execution.planning import PlannedRun
from cellbench.execution.runner import Outcome, Runner
from cellbench.tracking.schema import DATA
from cellbench.tracking.tracker import Run, Tracker

Executor = Callable[[Runner, Sequence[Sequence[PlannedRun]], Outcome], None]
"""Runs cohorts to their ends, in whatever order and wherever, and says in the outcome what became of them."""


def run_sequential(runner: Runner, groups: Sequence[Sequence[PlannedRun]], out: Outcome) -> None:
    """The crew of one: cohort by cohort in this process."""
    for number, group in enumerate(groups, 1):
        runner.cohort(list(group), f"cohort {number} of {len(groups)}", out)


def run_all(runner: Runner, jobs: list[PlannedRun], crew: Executor = run_sequential) -> Outcome:
    """Runs what is not finished yet."""
    out = Outcome()
    known = runner.tracker.known()
    todo: list[PlannedRun] = []
    for job in jobs:
        old = known.get(job.fingerprint)
        if old is not None and old.status == "finished":
            out.finished[job.name] = old
        elif job.unavailable:
            runner.skip(job, old)
            out.skipped[job.name] = job.unavailable
        else:
            todo.append(job)
    if out.finished:
        runner.say(f"{len(out.finished)} of {len(jobs)} runs are finished already and are not run again.")
    for reason in sorted(set(out.skipped.values())):
        names = [name for name, why in out.skipped.items() if why == reason]
        runner.say(f"skipped {len(names)} runs ({names[0]}, …): {reason}" if len(names) > 1 else f"skipped {names[0]}: {reason}")
    by_run = {id(job.run): job for job in todo}
    crew(runner, [[by_run[id(run)] for run in group] for group in cohorts(job.run for job in todo)], out)
    return out


@contextlib.contextmanager
def parent_run(tracker: Tracker, name: str, fingerprint: str, asked: Mapping[str, str], data: str, kind: str = "grid") -> Iterator[Run]:
    """The parent run of a grid or search: the same one whenever the same one is started again. ``asked``: its params, for people to read;
    ``data``: the digest of its data."""
    old = tracker.known(fingerprint).get(fingerprint)
    with tracker.run(name, fingerprint, known=old, tags={"cellbench.kind": kind, DATA: data}) as run:
        if old is None:  # a param is written once, and a folder may have another name today
            run.log({}, params=asked)
        yield run
    tracker.settle()
