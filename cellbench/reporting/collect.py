"""The finished runs of an experiment, read back from MLflow and sorted: what a leaderboard and a report are made of.

Runs meet only on the same test images: each set of them, known by the digest of its data, is a world of its own
(:class:`~cellbench.reporting.model_groups.TestSet`), and nothing is paired across. What cannot be used is left out with a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellbench.errors import CellbenchError
from cellbench.reporting.model_groups import MEASURES, FinishedRun, TestSet, group_models
from cellbench.tracking.schema import DATA, EVALUATION, RunRecord
from cellbench.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperimentResults:
    """An experiment's finished runs by test set, the newest whole one first, and what became of the others."""

    experiment: str
    sets: tuple[TestSet, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """Run name: reason."""
    failed: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Sentences about runs that are not in the tables, and why."""
    parents: tuple[RunRecord, ...] = ()
    """The grids and searches behind the runs, the one that was started last first."""

    @property
    def num_runs(self) -> int:
        return sum(len(model.runs) for one in self.sets for model in one.models)


def collect_runs(trackers: Sequence[Tracker], only: Collection[str] | None = None) -> ExperimentResults:
    """The evidence of one experiment, or of several taken together; ``only``: no other runs than these ids.

    Raises CellbenchError where there is no finished run with per-image scores.
    """
    tested: list[FinishedRun] = []
    skipped, failed, parents, left_out = {}, {}, [], []
    names = " + ".join(tracker.name for tracker in trackers)
    num_finished = num_foreign = num_open = 0
    for tracker in trackers:
        latest: dict[str, RunRecord] = {}
        for run in tracker.stored():
            if run.is_parent:
                if run.tags["cellbench.kind"] != EVALUATION:  # a run tested once more, on data that others were not tested on
                    parents.append(run)
            elif not run.fingerprint:
                num_foreign += 1
            elif only is not None and run.run_id not in only:
                continue
            elif (old := latest.get(run.fingerprint)) is None or old.status != "finished":
                latest[run.fingerprint] = run
        for run in latest.values():
            if run.status == "finished":
                num_finished += 1
                told = _per_image(tracker, run)
                if isinstance(told, str):
                    left_out.append(f"'{run.name}' is left out: {told}.")
                else:
                    tested.append(FinishedRun(stored=run, told=told))
            elif run.status in ("skipped", "failed"):
                (skipped if run.status == "skipped" else failed)[run.name] = run.reason
            else:
                num_open += 1
        if only is None and (num := tracker.num_deleted()):
            left_out.append(f"{_runs(num)} of '{tracker.name}' {_were(num)} deleted in MLflow and {_is(num)} left out.")
    if num_open:
        left_out.append(f"{_runs(num_open)} {_is(num_open)} not finished: running, pruned or interrupted.")
    if num_foreign:
        left_out.append(f"{_runs(num_foreign)} in the experiment {_is(num_foreign)} not cellbench's and {_is(num_foreign)} ignored.")
    if not tested:
        found = f"{num_finished} finished without usable scores" if num_finished else "no finished run"
        why = f" ({left_out[0]})" if left_out else ""
        raise CellbenchError(f"experiment '{names}': {found}, so there is nothing to compare{why}. `cellbench grid` makes runs.")
    unique = {(run.told["dataset"], *sorted(run.stored.params.items())): run for run in sorted(tested, key=lambda run: run.stored.start_s)}
    if num := len(tested) - len(unique):
        left_out.append(
            f"{_runs(num)} {_is(num)} left out: later ones have the same settings, with other weights, cards or code, or a newer version."
        )
    started_s = {run.tags[DATA]: run.last_s for run in sorted(parents, key=lambda run: run.last_s) if DATA in run.tags}
    sets, incomplete = group_models(unique.values(), started_s)
    left_out += incomplete
    if not sets:
        raise CellbenchError(
            f"experiment '{names}': no model has all its folds, so there is nothing to compare ({incomplete[0]}). Run the grid to its end."
        )
    return ExperimentResults(
        experiment=names,
        sets=tuple(sets),
        skipped=skipped,
        failed=failed,
        left_out=tuple(left_out),
        parents=tuple(sorted(parents, key=lambda run: -run.last_s)),
    )


def _per_image(tracker: Tracker, run: RunRecord) -> dict[str, Any] | str:
    """The run's per-image scores, or why there are none."""
    data = tracker.artifact(run, "per_image.json")
    if data is None:
        return "its per_image.json is gone"
    try:
        told = json.loads(data, parse_constant=_refused)  # null is an image without a score, NaN is a fault
        num = len(told["images"])
        if not num or not isinstance(told["dataset"], str) or any(len(told[key]) != num for key in MEASURES if key in told):
            return "its per_image.json does not hold one score an image"
        if np.isinf(np.asarray(told["dice"], float)).any():
            return "its per_image.json holds what is no number"
    except NonFiniteValueError:
        return "its per_image.json holds what is no number"
    except (ValueError, KeyError, TypeError):
        return "its per_image.json is damaged"
    return told


class NonFiniteValueError(ValueError):
    """NaN or an infinity in JSON."""


def _refused(constant: str) -> float:
    raise NonFiniteValueError(constant)


def _runs(num: int) -> str:
    return f"{num} run{'s' * (num != 1)}"


def _is(num: int) -> str:
    return "is" if num == 1 else "are"


def _were(num: int) -> str:
    return "was" if num == 1 else "were"
