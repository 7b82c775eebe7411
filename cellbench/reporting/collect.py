"""Reads the finished runs of an experiment from MLflow and groups them by test set: the first step of every report.

Models are compared only on the same test images. Each set of test images, identified by the digest of its data, is one
:class:`~cellbench.reporting.model_groups.TestSet`. Unusable runs are left out, and a sentence names them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cellbench.errors import CellbenchError, one_line, quantity
from cellbench.reporting.grouping import group_models
from cellbench.reporting.model_groups import FinishedRun, TestSet
from cellbench.reporting.shift import read_further
from cellbench.reporting.stored_records import RunRequest, odd_settings, read_scores
from cellbench.tracking.schema import COUNTED, DATA, EVALUATION, SHIFT_TESTS, TESTED, RunRecord
from cellbench.tracking.tracker import Tracker

REQUEST_FILE = "about.json"
"""Artifact of the parent run with its :class:`~cellbench.reporting.stored_records.RunRequest`."""
EXAMPLE_FIGURES = ("worst", "median", "best", "scores", "curves")
"""Figures of a run that the report shows of the best model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperimentResults:
    """An experiment's finished runs by test set, the newest complete one first, and the reasons why others are missing."""

    experiment: str
    sets: tuple[TestSet, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Run name: reason."""
    failed: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Sentences about runs that are not in the tables, and why."""
    parents: tuple[RunRecord, ...] = ()
    """The parent runs (grids and searches), the most recently started first."""
    parent: RunRecord | None = None
    """The parent run that recorded ``request``; if there is none, the most recently started one."""
    counted: tuple[RunRecord, ...] = ()
    """Evaluations of counts on images without masks."""
    request: RunRequest = field(default_factory=RunRequest)
    examples: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """PNGs of ``EXAMPLE_FIGURES`` of the runs that the report shows, by run id and name."""

    @property
    def num_runs(self) -> int:
        return sum(len(model.runs) for one in self.sets for model in one.models)


def collect_runs(trackers: Sequence[Tracker], only: Collection[str] | None = None) -> ExperimentResults:
    """The results of one experiment, or of several together; ``only``: ids of the runs to use, beside masks of other tools for the same images.

    Raises CellbenchError if there is no finished run with per-image scores.
    """
    tested: list[FinishedRun] = []
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    parents: list[RunRecord] = []
    counted: list[RunRecord] = []
    left_out: list[str] = []
    names = " + ".join(tracker.name for tracker in trackers)
    num_finished = num_foreign = num_open = 0
    for tracker in trackers:
        latest: dict[str, RunRecord] = {}
        for run in tracker.stored():
            if run.is_parent:
                if run.tags["cellbench.kind"] != EVALUATION:  # an evaluation has other test images
                    parents.append(run)
                elif COUNTED in run.tags and run.status == "finished":
                    counted.append(run)
            elif not run.fingerprint:
                num_foreign += 1
            elif only is not None and run.run_id not in only and not run.is_external:
                continue
            elif (old := latest.get(run.fingerprint)) is None or old.status != "finished":
                latest[run.fingerprint] = run
        for run in latest.values():
            if run.status == "finished":
                num_finished += 1
                per_image = _per_image(tracker, run)
                if isinstance(per_image, str):
                    left_out.append(f"'{run.name}' is left out: {per_image}.")
                else:
                    further = read_further(tracker.artifact(run, SHIFT_TESTS), len(per_image["images"])) if TESTED in run.tags else {}
                    tested.append(FinishedRun(record=run, per_image=per_image, further=further))
            elif run.status in ("skipped", "failed"):
                (skipped if run.status == "skipped" else failed)[run.name] = run.reason
            else:
                num_open += 1
        if only is None and (num := tracker.num_deleted()):
            left_out.append(f"{quantity(num, 'run')} of '{tracker.name}' {_were(num)} deleted in MLflow and {_are(num)} left out.")
    if num_open:
        left_out.append(f"{quantity(num_open, 'run')} {_are(num_open)} not finished: running, pruned or interrupted.")
    if num_foreign:
        left_out.append(
            f"{quantity(num_foreign, 'run')} in the experiment {_are(num_foreign)} not cellbench's and {_are(num_foreign)} ignored."
        )
    if not tested:
        found = f"{num_finished} finished without usable scores" if num_finished else "no finished run"
        why = f" ({left_out[0]})" if left_out else ""
        raise CellbenchError(f"experiment '{names}': {found}, so there is nothing to compare{why}. `cellbench grid` makes runs.")
    if only is not None:  # masks of other tools stand beside the runs asked for, where they are of the same images
        asked = {run.test_set_key for run in tested if not run.record.is_external}
        tested = [run for run in tested if run.test_set_key in asked]
    tested.sort(key=lambda run: run.record.start_s)
    unique = {(run.per_image["dataset"], *sorted(run.record.params.items())): run for run in tested}
    if num := len(tested) - len(unique):
        left_out.append(
            f"{quantity(num, 'run')} {_are(num)} left out: later ones have the same settings, with other weights, cards or code, or a newer version."
        )
    parents.sort(key=lambda run: run.last_s)
    started_s = {run.tags[DATA]: run.last_s for run in parents if DATA in run.tags}
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
        parents=tuple(reversed(parents)),
        counted=tuple(counted),
    )


def collect_report(
    trackers: Sequence[Tracker], *, only: Collection[str] | None = None, request: RunRequest | None = None
) -> ExperimentResults:
    """Collects the content of a report: the runs, the request (read from MLflow if not given), and figures of the best models."""
    results = collect_runs(trackers, only)
    read = trackers[0].artifact  # of any experiment in the store
    parent = next(iter(results.parents), None)
    if request is None:
        request = RunRequest()
        digests = {run.per_image["dataset"] for model in results.sets[0].models for run in model.runs}
        for run in results.parents:
            found = RunRequest.from_json(read(run, REQUEST_FILE))
            if found.dataset.digest in digests:
                request, parent = found, run
                break
    examples = {
        model.example_run.record.run_id: {
            name: png for name in EXAMPLE_FIGURES if (png := read(model.example_run.record, f"figures/{name}.png")) is not None
        }
        for here in results.sets
        for model in here.example_models
    }
    return replace(results, request=request, parent=parent, examples=examples)


def _per_image(tracker: Tracker, run: RunRecord) -> dict[str, Any] | str:
    """The run's per-image scores, or the reason why they are missing or cannot be used."""
    if odd := odd_settings(run.params):
        return odd
    data = tracker.artifact(run, "per_image.json")
    if data is None:
        return "its per_image.json is gone"
    try:
        return read_scores(data)
    except ValueError as error:
        return f"its per_image.json is damaged ({one_line(error)[:160]})"


def _are(num: int) -> str:
    return "is" if num == 1 else "are"


def _were(num: int) -> str:
    return "was" if num == 1 else "were"
