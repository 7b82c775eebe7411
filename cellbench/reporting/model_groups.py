"""Runs lined up: those that differ in seed and fold alone are one model, and models of the same test images one test set.

Seeds are repeats. Folds are parts: each image is tested once, by the run that did not learn from it, so the folds of one seed make one row
of scores over all images. Pooled scores are had from the counts of all folds, not as a mean of the folds' scores.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cellbench.config.run import RUN_KEYS
from cellbench.metrics.pixel import count_empty_images, pixel_scores, pooled_classes
from cellbench.statistics.bootstrap import Interval, bootstrap_intervals, unit_labels, unit_numbers, unit_sums
from cellbench.statistics.hypothesis_tests import is_decidable
from cellbench.statistics.scores import Difference, ModelScores
from cellbench.tracking.schema import LIMIT, RunRecord

MEASURES = {
    "dice": "Dice", "nsd": "outline (NSD)", "boundary_dice": "boundary Dice", "ap50": "AP50", "ap50_95": "AP50-95", "aji": "AJI", "pq": "PQ",
}  # fmt: skip
"""Per-image scores that models are compared by, as they are called in print; higher is better."""
REPEATS = ("seed", "fold")
"""Params that tell runs of one model apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """A finished run and what it scored on each image."""

    __test__ = False  # not pytest's

    stored: RunRecord
    told: dict[str, Any]
    """Its ``per_image.json``."""

    @property
    def seed(self) -> int:
        return int(self.stored.params.get("seed", 0))

    @property
    def fold(self) -> int | None:
        """The part of the data that it was tested on; None where there is one test for all."""
        return self.told.get("fold")

    @property
    def world(self) -> str:
        """What runs must share to be compared: the same test images, or the same data cut into the same folds."""
        if self.fold is not None:
            return f"{self.told['pool']} {self.told['num_folds']} folds"
        return f"{self.told['dataset']} {hash(tuple(self.told['images']))}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelGroup:
    """Runs that differ in seed and fold alone, in the order of both."""

    name: str
    backbone: str
    head: str
    baseline: bool
    plain: bool
    """Whether backbone and head say all that tells it from the others."""
    runs: tuple[FinishedRun, ...]
    groups: tuple[Hashable, ...] | None = None
    """The patient, slide or smear of each image, where known."""

    @property
    def by_seed(self) -> list[list[FinishedRun]]:
        """The runs of each seed: one, or one a fold."""
        seeds: dict[int, list[FinishedRun]] = {}
        for run in self.runs:
            seeds.setdefault(run.seed, []).append(run)
        return list(seeds.values())

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(image for run in self.by_seed[0] for image in run.told["images"])

    @property
    def folds(self) -> tuple[int, ...] | None:
        """The fold that tested each image; None without folds."""
        if self.runs[0].fold is None:
            return None
        return tuple(run.fold for run in self.by_seed[0] for _ in run.told["images"] if run.fold is not None)

    def has(self, measure: str) -> bool:
        return all(measure in run.told for run in self.runs)

    def scores(self, measure: str = "dice") -> ModelScores:
        """Per-image scores, one row a seed."""
        # null: the image has no cell and none was found
        values = [np.concatenate([np.array(run.told[measure], np.float64) for run in runs]) for runs in self.by_seed]
        return ModelScores(model=self.name, images=self.images, values=np.array(values), groups=self.groups, folds=self.folds)

    def rating(self, measure: str = "dice") -> float:
        """What models are sorted by: the mean over images, or 1 where no image has a cell and none was found."""
        mean = self.scores(measure).mean
        return 1.0 if math.isnan(mean) else mean

    def empty(self) -> tuple[int, float]:
        """How many test images have no cell, and in how many of them one was found, in the mean of the seeds; 0 where it is not recorded."""
        if not self.has("confusion"):
            return 0, 0.0
        each = [count_empty_images(np.concatenate([np.array(run.told["confusion"]) for run in runs])) for runs in self.by_seed]
        return each[0][0], float(np.mean([found for _, found in each]))

    @property
    def chosen(self) -> FinishedRun:
        """The run to use: the one with the best validation Dice, since the test is not to choose by."""
        return max(self.runs, key=lambda run: run.stored.metrics.get("best/val_dice", 0.0))

    def pooled(self, measure: str) -> list[float]:
        """Dice, IoU, precision, recall or accuracy of the cell class over all pixels, one a seed."""
        if self.folds is None:
            return [run.stored.metrics.get(f"test/{measure}", math.nan) for run in self.runs]
        counts = [np.sum([np.sum(run.told["confusion"], axis=0) for run in runs], axis=0) for runs in self.by_seed]
        return [pixel_scores(one).of(pooled_classes(one))[measure] for one in counts]

    def mean(self, metric: str) -> float | None:
        """The mean over runs of a logged metric; None where a run has none."""
        values = [run.stored.metrics.get(metric) for run in self.runs]
        return None if None in values else float(np.mean(np.array(values, float)))


@dataclass(frozen=True, kw_only=True, eq=False)
class TestSet:
    """The models that were tested on one set of images, best mean Dice over images first."""

    __test__ = False  # not pytest's

    dataset: str
    digest: str
    images: tuple[str, ...]
    models: tuple[ModelGroup, ...]
    groups: tuple[Hashable, ...] | None = None
    num_folds: int = 0
    """0 where every model had one test."""
    num_images: Mapping[str, int] = field(default_factory=dict)
    """Of each split; with folds, of the first one's. Empty for runs that did not record it."""
    limit: str = ""
    """Of images of each split, where a part of the data was tried; empty for whole data."""
    last_s: float = 0.0
    """When its newest run gave its last sign of life, or a grid on its data was started last, in seconds since 1970."""
    differences: dict[str, list[Difference]] = field(default_factory=dict)
    """By measure, kept once they are computed (``cellbench.reporting.leaderboard.pairwise_differences``)."""
    _intervals: dict[str, list[Interval]] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """What was learned from and tested, in words: ``folder: 19 training, 5 validation and 6 test images``."""
        if self.num_folds:
            counted = f"{len(self.images)} images in {self.num_folds} folds"
        else:
            counted = describe_sizes(self.num_images) or f"{len(self.images)} test image{'s' * (len(self.images) != 1)}"
        return f"{self.dataset}: {counted}{describe_limit(self.limit)}"

    @property
    def best(self) -> ModelGroup:
        """By the mean over images, which is what is tested; the table is sorted by it too."""
        return self.models[0]

    def intervals(self, measure: str) -> list[Interval]:
        """Each model's mean over the images with its 95 % interval; all at once, since they share their resamples."""
        if measure not in self._intervals:
            values_MI = np.stack([model.scores(measure).per_image for model in self.models])
            labels = np.arange(len(self.images)) if self.groups is None else unit_numbers(self.groups)
            found = [Interval(mean=math.nan, low=None, high=None, num=0, note="no image has a score")] * len(self.models)
            patterns: dict[bytes, list[int]] = {}
            for k, row_I in enumerate(~np.isnan(values_MI)):
                patterns.setdefault(row_I.tobytes(), []).append(k)
            for members in patterns.values():  # models with scores for the same images; mostly all
                kept = ~np.isnan(values_MI[members[0]])
                if kept.any():
                    unit_I = unit_numbers(labels[kept].tolist())
                    some = bootstrap_intervals(unit_sums(values_MI[members][:, kept], unit_I), np.bincount(unit_I), word=self.unit)
                    for k, interval in zip(members, some, strict=True):
                        found[k] = interval
            self._intervals[measure] = found
        return self._intervals[measure]

    @property
    def unit(self) -> str:
        """What is one observation: 'image' or 'group'."""
        return "image" if self.groups is None else "group"

    @property
    def num_units(self) -> int:
        """Images, or groups of them, that any model has a score for: those without a cell and without a find tell models apart in nothing."""
        empty = np.all([model.scores().empty for model in self.models], axis=0)
        labels = self.images if self.groups is None else self.groups
        return len({label for label, none in zip(labels, empty, strict=True) if not none})

    @property
    def num_pairs(self) -> int:
        """Of models: what p is adjusted for."""
        return len(self.models) * (len(self.models) - 1) // 2

    @property
    def decidable(self) -> bool:
        """Whether its images can decide anything between its models."""
        return is_decidable(self.num_units, self.num_pairs)

    def measures(self) -> list[str]:
        """The per-image scores that every model has: runs of older versions lack some."""
        return [measure for measure in MEASURES if all(model.has(measure) for model in self.models)]


def describe_sizes(num_images: Mapping[str, int]) -> str:
    """``19 training, 5 validation and 6 test images``; empty where they were not recorded."""
    if not num_images:
        return ""
    return f"{num_images['train']} training, {num_images['val']} validation and {num_images['test']} test images"


def describe_limit(limit: str) -> str:
    """Says of a part of the data that it is one."""
    return f" (a part of the data, --limit {limit})" if limit else ""


def group_models(runs: Iterable[FinishedRun], started_s: Mapping[str, float] | None = None) -> tuple[list[TestSet], list[str]]:
    """Test sets, whole ones before those under ``--limit``, of each kind the newest first, and sentences about runs that are left out because
    folds are missing. ``started_s``: when a grid was last started on data of this digest."""
    worlds: dict[str, list[FinishedRun]] = {}
    for run in runs:
        worlds.setdefault(run.world, []).append(run)
    sets, told = [], []
    for members in worlds.values():
        kept, words = _whole(members)
        told += words
        if kept:
            sets.append(_test_set(kept))
    sets = [replace(one, last_s=max(one.last_s, (started_s or {}).get(one.digest, 0.0))) for one in sets]
    return sorted(sets, key=lambda one: (bool(one.limit), -one.last_s)), told


def _whole(runs: list[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """Without the seeds that lack a fold: their images would be fewer than the others'."""
    if runs[0].fold is None:
        return runs, []
    asked = {run.fold for run in runs}  # a person may run some folds only
    seeds: dict[tuple[Hashable, ...], list[FinishedRun]] = {}
    for run in runs:
        seeds.setdefault((_settings(run), run.seed), []).append(run)
    kept, told = [], []
    for members in seeds.values():
        if missing := sorted(str(fold) for fold in asked - {run.fold for run in members}):
            name = _part(dict(members[0].stored.params))
            what = f"fold{'s' * (len(missing) > 1)} {', '.join(missing)}"
            told.append(f"{name}, seed {members[0].seed}, is left out: {what} {'are' if len(missing) > 1 else 'is'} missing.")
        else:
            kept += members
    return kept, told


def _test_set(runs: list[FinishedRun]) -> TestSet:
    groups = _groups(runs)
    models = tuple(sorted(_models(runs, groups), key=lambda model: -model.rating()))
    first = models[0]
    return TestSet(
        dataset=runs[0].stored.params.get("dataset", "?"),
        digest=runs[0].told["dataset"] if first.folds is None else runs[0].told["pool"],
        images=first.images,
        models=models,
        groups=first.groups,
        num_folds=len(set(first.folds or ())),
        num_images=next((told for run in runs if (told := run.told.get("num_images"))), {}),
        limit=next((limit for run in runs if (limit := run.stored.tags.get(LIMIT))), ""),
        last_s=max(run.stored.last_s for run in runs),
    )


def _groups(runs: list[FinishedRun]) -> dict[str, Hashable]:
    """The group of each image, as the newest run that knows any tells them."""
    found: dict[str, Hashable] = {}
    for run in sorted(runs, key=lambda run: run.stored.start_s):
        found |= {image: group for image, group in zip(run.told["images"], run.told.get("groups") or (), strict=False) if group}
    return found


def _settings(run: FinishedRun) -> tuple[tuple[str, str], ...]:
    ignored = {*REPEATS, "dataset"}  # a set has one dataset, under whatever name
    return tuple(sorted((name, value) for name, value in run.stored.params.items() if name not in ignored))


def _models(runs: list[FinishedRun], groups: dict[str, Hashable]) -> list[ModelGroup]:
    """Runs put together by all their settings but seed and fold, and named by what tells them apart."""
    together: dict[tuple[tuple[str, str], ...], list[FinishedRun]] = {}
    for run in runs:
        together.setdefault(_settings(run), []).append(run)
    settings = [dict(key) for key in together]
    parts = [_part(one) for one in settings]
    out = []
    for mine, part, members in zip(settings, parts, together.values(), strict=True):
        trained = mine["baseline"] == "none"
        rivals = [one for one, other in zip(settings, parts, strict=True) if other == part or (trained and one["baseline"] == "none")]
        # Settings of a head are compared within its own head, since others have none of that name.
        own = [one for one, other in zip(settings, parts, strict=True) if other == part]
        varied = [name for name in (*RUN_KEYS, "precision") if name not in REPEATS and len({one.get(name) for one in rivals}) > 1]
        varied += sorted({name for one in own for name in one if "." in name and len({other.get(name) for other in own}) > 1})
        out.append(
            ModelGroup(
                name=" · ".join([part, *(f"{name} {mine.get(name, '?')}" for name in varied)]),
                backbone=mine["backbone"],
                head=mine["head"],
                baseline=mine["baseline"] != "none",
                plain=len(own) == 1,
                runs=tuple(sorted(members, key=lambda run: (run.seed, run.fold or 0))),
            )
        )
    if not groups:
        return out
    return [replace(one, groups=unit_labels(one.images, [groups.get(image, "") for image in one.images])) for one in out]


def _part(params: dict[str, str]) -> str:
    for name in ("backbone", "head", "baseline"):
        params.setdefault(name, "none")
    return params["baseline"] if params["baseline"] != "none" else f"{params['backbone']} · {params['head']}"


@dataclass(frozen=True, kw_only=True)
class PlotRow:
    """One model as it is drawn: ``measures`` by label, each the interval of its mean over images."""

    model: str
    baseline: bool
    measures: Mapping[str, Interval]
    backbone: str = ""
