"""The finished runs of an experiment, read back from MLflow and sorted: what a leaderboard and a report are made of.

Runs that differ in their seed alone are one model, its seeds repeats. Runs meet only on the same test images: each set of them, known by
the digest of its data, is a world of its own (:class:`TestSet`), and nothing is paired across. What cannot be used is left out with a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellbench.errors import CellbenchError
from cellbench.logged import Stored
from cellbench.significance import Interval, intervals
from cellbench.spec import RUN_KEYS
from cellbench.stats import Scores
from cellbench.track import Tracker

MEASURES = {
    "dice": "Dice", "nsd": "outline (NSD)", "boundary_dice": "boundary Dice", "ap50": "AP50", "ap50_95": "AP50-95", "aji": "AJI", "pq": "PQ",
}  # fmt: skip
"""Per-image scores that models are compared by, as they are called in print; higher is better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tested:
    """A finished run and what it scored on each image."""

    stored: Stored
    told: dict[str, Any]
    """Its ``per_image.json``."""

    @property
    def seed(self) -> int:
        return int(self.stored.params.get("seed", 0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Runs that differ in their seed alone."""

    name: str
    backbone: str
    head: str
    baseline: bool
    plain: bool
    """Whether backbone and head say all that tells it from the others."""
    runs: tuple[Tested, ...]

    def has(self, measure: str) -> bool:
        return all(measure in run.told for run in self.runs)

    def scores(self, measure: str = "dice") -> Scores:
        """Per-image scores, one row a seed."""
        images = tuple(self.runs[0].told["images"])
        return Scores(model=self.name, images=images, values=np.array([run.told[measure] for run in self.runs]))

    @property
    def chosen(self) -> Tested:
        """The run to use: of the seeds the one with the best validation Dice, since the test is not to choose by."""
        return max(self.runs, key=lambda run: run.stored.metrics.get("best/val_dice", 0.0))

    def mean(self, metric: str) -> float | None:
        """The mean over seeds of a logged metric; None where a run has none."""
        values = [run.stored.metrics.get(metric) for run in self.runs]
        return None if None in values else float(np.mean(np.array(values, float)))


@dataclass(frozen=True, kw_only=True, eq=False)
class TestSet:
    """The models that were tested on one set of images, best pooled Dice first."""

    __test__ = False  # not pytest's

    dataset: str
    digest: str
    images: tuple[str, ...]
    models: tuple[Model, ...]
    _intervals: dict[str, list[Interval]] = field(default_factory=dict)

    @property
    def best(self) -> Model:
        """By the mean over images, which is what is tested; the table is sorted by it too."""
        return self.models[0]

    def intervals(self, measure: str) -> list[Interval]:
        """Each model's mean over the images with its 95 % interval; all at once, since they share their resamples."""
        if measure not in self._intervals:
            values_MI = np.stack([model.scores(measure).per_image for model in self.models])
            self._intervals[measure] = intervals(values_MI, np.ones(len(self.images), int))
        return self._intervals[measure]

    def measures(self) -> list[str]:
        """The per-image scores that every model has: runs of older versions lack some."""
        return [measure for measure in MEASURES if all(model.has(measure) for model in self.models)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """An experiment's finished runs by test set, the one with most runs first, and what became of the others."""

    experiment: str
    sets: tuple[TestSet, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """Run name: reason."""
    failed: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Sentences about runs that are not in the tables, and why."""
    parents: tuple[Stored, ...] = ()
    """The grids and searches behind the runs, the latest first."""

    @property
    def num_runs(self) -> int:
        return sum(len(model.runs) for one in self.sets for model in one.models)


def collect(trackers: Sequence[Tracker], only: Collection[str] | None = None) -> Evidence:
    """The evidence of one experiment, or of several taken together; ``only``: no other runs than these ids.

    Raises CellbenchError where there is no finished run with per-image scores.
    """
    tested: list[Tested] = []
    skipped, failed, parents, left_out = {}, {}, [], []
    names = " + ".join(tracker.name for tracker in trackers)
    num_finished = num_foreign = num_open = 0
    for tracker in trackers:
        latest: dict[str, Stored] = {}
        for run in tracker.stored():
            if run.is_parent:
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
                    tested.append(Tested(stored=run, told=told))
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
        left_out.append(f"{_runs(num)} {_is(num)} left out: later ones have the same settings, with other weights or a newer version.")
    sets: dict[str, list[Tested]] = {}
    for run in unique.values():
        sets.setdefault(f"{run.told['dataset']} {hash(tuple(run.told['images']))}", []).append(run)
    return Evidence(
        experiment=names,
        sets=tuple(sorted((_test_set(runs) for runs in sets.values()), key=lambda one: -sum(len(m.runs) for m in one.models))),
        skipped=skipped,
        failed=failed,
        left_out=tuple(left_out),
        parents=tuple(reversed(parents)),
    )


def _per_image(tracker: Tracker, run: Stored) -> dict[str, Any] | str:
    """The run's per-image scores, or why there are none."""
    data = tracker.artifact(run, "per_image.json")
    if data is None:
        return "its per_image.json is gone"
    try:
        told = json.loads(data)
        num = len(told["images"])
        if not num or not isinstance(told["dataset"], str) or any(len(told[key]) != num for key in MEASURES if key in told):
            return "its per_image.json does not hold one score an image"
        if not np.isfinite(np.asarray(told["dice"], float)).all():
            return "its per_image.json holds what is no number"
    except (ValueError, KeyError, TypeError):
        return "its per_image.json is damaged"
    return told


def _test_set(runs: list[Tested]) -> TestSet:
    models = tuple(sorted(_models(runs), key=lambda model: -model.scores().mean))
    first = runs[0]
    return TestSet(
        dataset=first.stored.params.get("dataset", "?"), digest=first.told["dataset"], images=tuple(first.told["images"]), models=models
    )


def _models(runs: list[Tested]) -> list[Model]:
    """Runs put together by all their settings but the seed, and named by what tells them apart."""
    ignored = {"seed", "dataset"}  # a set has one dataset, under whatever name
    groups: dict[tuple[tuple[str, str], ...], list[Tested]] = {}
    for run in runs:
        key = tuple(sorted((name, value) for name, value in run.stored.params.items() if name not in ignored))
        groups.setdefault(key, []).append(run)
    settings = [dict(key) for key in groups]
    parts = [_part(one) for one in settings]
    out = []
    for mine, part, members in zip(settings, parts, groups.values(), strict=True):
        trained = mine["baseline"] == "none"
        rivals = [one for one, other in zip(settings, parts, strict=True) if other == part or (trained and one["baseline"] == "none")]
        # Settings of a head are compared within its own head, since others have none of that name.
        own = [one for one, other in zip(settings, parts, strict=True) if other == part]
        varied = [name for name in RUN_KEYS if name not in ignored and len({one.get(name) for one in rivals}) > 1]
        varied += sorted({name for one in own for name in one if "." in name and len({other.get(name) for other in own}) > 1})
        out.append(
            Model(
                name=" · ".join([part, *(f"{name} {mine.get(name, '?')}" for name in varied)]),
                backbone=mine["backbone"],
                head=mine["head"],
                baseline=mine["baseline"] != "none",
                plain=len(own) == 1,
                runs=tuple(sorted(members, key=lambda run: run.seed)),
            )
        )
    return out


def _part(params: dict[str, str]) -> str:
    for name in ("backbone", "head", "baseline"):
        params.setdefault(name, "none")
    return params["baseline"] if params["baseline"] != "none" else f"{params['backbone']} · {params['head']}"


def _runs(num: int) -> str:
    return f"{num} run{'s' * (num != 1)}"


def _is(num: int) -> str:
    return "is" if num == 1 else "are"


def _were(num: int) -> str:
    return "was" if num == 1 else "were"
