"""Finished runs as models and test sets: runs that differ only in seed and fold are one model, and models with the same test images one test set.

Seeds are repeats. Folds are parts: each image is tested once, by the run that was not trained on it, so the folds of one seed make one row
of scores over all images. Pooled scores come from the summed pixel counts of all folds, not from a mean over folds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cellbench.errors import quantity
from cellbench.metrics import catalog
from cellbench.metrics.calibration import pooled_calibration
from cellbench.metrics.catalog import Metric
from cellbench.metrics.pixel import count_empty_images, pixel_scores, pooled_classes
from cellbench.statistics.bootstrap import Interval, bootstrap_intervals, unit_numbers, unit_sums
from cellbench.statistics.comparison import compare_all
from cellbench.statistics.hypothesis_tests import is_decidable
from cellbench.statistics.scores import Difference, ModelScores, swap_sides
from cellbench.tracking.schema import RunRecord

REPEATS = ("seed", "fold")
"""Params that distinguish runs of one model."""
MARGIN = 0.005
"""Models whose Dice differs by less are equal for practical purposes, where a report states no other margin."""
MAX_MODELS_ALL_PAIRS = 40
"""Up to this number of models, every pair is compared (0.8 s per metric); with more, each is compared with the best."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """A finished run and its per-image scores."""

    __test__ = False  # not pytest's

    record: RunRecord
    per_image: Mapping[str, Any]
    """Its ``per_image.json``."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """Its ``tests.json``: scores on further test sets and on perturbed images."""
    repeat: int | None = None
    """On a further test set, which all runs of a model are tested on, its place among them instead of the seed."""

    @property
    def seed(self) -> int:
        return int(self.record.params.get("seed", 0)) if self.repeat is None else self.repeat

    @property
    def fold(self) -> int | None:
        """The fold that it was tested on; None without folds."""
        return self.per_image.get("fold")

    @property
    def test_set_key(self) -> str:
        """Equal for comparable runs: the same test images, or the same data split into the same folds."""
        if self.fold is not None:
            return f"{self.per_image['pool']} {self.per_image['num_folds']} folds"
        return f"{self.per_image['dataset']} {hash(tuple(self.per_image['images']))}"

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """Params that distinguish models. The dataset's name is excluded: a test set has one dataset, whatever its name."""
        return tuple(sorted((name, value) for name, value in self.record.params.items() if name not in (*REPEATS, "dataset")))


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelGroup:
    """The runs of one model, sorted by seed and fold."""

    name: str
    backbone: str
    head: str
    baseline: bool
    """Whether it is no backbone with a head: a baseline, or masks of another tool."""
    plain: bool
    """Whether backbone and head alone distinguish it from the others."""
    runs: tuple[FinishedRun, ...]
    groups: tuple[Hashable, ...] | None = None
    """The patient, slide or smear of each image, where known."""

    @property
    def external(self) -> bool:
        """Whether it is another tool, of which only masks are known."""
        return self.runs[0].record.is_external

    @property
    def can_predict(self) -> bool:
        """Whether it is a model: not another tool's masks, nor the mean of several models."""
        return self.runs[0].record.can_predict

    @property
    def kind(self) -> str:
        """``baseline``, ``external``, or nothing for a backbone with a head and the mean of several models."""
        return "external" if self.external else "baseline" if self.baseline else ""

    @cached_property
    def by_seed(self) -> list[list[FinishedRun]]:
        """The runs of each seed: one, or one a fold."""
        seeds: dict[int, list[FinishedRun]] = {}
        for run in self.runs:
            seeds.setdefault(run.seed, []).append(run)
        return list(seeds.values())

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(image for run in self.by_seed[0] for image in run.per_image["images"])

    @property
    def classes(self) -> list[str]:
        return list(self.runs[0].per_image.get("classes", []))

    @property
    def folds(self) -> tuple[int, ...] | None:
        """The fold that tested each image; None without folds."""
        if self.runs[0].fold is None:
            return None
        return tuple(run.fold for run in self.by_seed[0] for _ in run.per_image["images"] if run.fold is not None)

    @property
    def own_metrics(self) -> tuple[Metric, ...]:
        """The metrics of a user that its runs recorded."""
        return catalog.from_record(self.runs[0].per_image.get("own_metrics", ()))

    def has(self, *keys: str) -> bool:
        return all(key in run.per_image for key in keys for run in self.runs)

    def scores(self, metric: str = "dice") -> ModelScores:
        """Per-image scores, one row per seed. NaN: the image has no cell and none was predicted."""
        values = [np.concatenate([np.array(run.per_image[metric], np.float64) for run in runs]) for runs in self.by_seed]
        lower_is_better = catalog.metric(metric, self.own_metrics).direction == "minimize"
        return ModelScores(
            model=self.name,
            images=self.images,
            values=np.array(values),
            groups=self.groups,
            folds=self.folds,
            lower_is_better=lower_is_better,
        )

    def sort_key(self, metric: str = "dice") -> float:
        """Sort key, ascending from the best model: the mean over images, or the ideal score if no image has a score."""
        scores = self.scores(metric)
        mean = scores.best if math.isnan(scores.mean) else scores.mean
        return mean if scores.lower_is_better else -mean

    @cached_property
    def empty_images(self) -> tuple[int, float]:
        """Number of test images without a cell, and in how many of them a cell was predicted (mean over seeds); 0 if not recorded."""
        if not self.has("confusion"):
            return 0, 0.0
        each = [count_empty_images(np.concatenate([np.array(run.per_image["confusion"]) for run in runs])) for runs in self.by_seed]
        return each[0][0], float(np.mean([num_found for _, num_found in each]))

    @cached_property
    def absent_classes(self) -> list[str]:
        """With several classes of cells, those that are in no test mask; empty if runs did not record pixel counts."""
        if not self.has("confusion") or len(self.classes) < 3:
            return []
        truth = np.sum([np.sum(run.per_image["confusion"], axis=(0, 2)) for run in self.by_seed[0]], axis=0)
        return [name for k, name in enumerate(self.classes) if k and not truth[k]]

    @property
    def cell_confusions(self) -> list[np.ndarray]:
        """For each seed the classes of the cells of all test images, as :func:`cellbench.metrics.cell_classes.cell_confusion` counts them."""
        return self._summed("cell_confusion")

    def _summed(self, matrices: str) -> list[np.ndarray]:
        """For each seed the sum of the matrices of all test images."""
        return [np.sum([np.sum(run.per_image[matrices], axis=0) for run in runs], axis=0) for runs in self.by_seed]

    def num_predicted_images(self, name: str) -> float:
        """Test images in which a class is predicted, mean over seeds."""
        k = self.classes.index(name)
        each = [sum(int(np.count_nonzero(np.sum(run.per_image["confusion"], axis=1)[:, k])) for run in runs) for runs in self.by_seed]
        return float(np.mean(each))

    @property
    def chosen(self) -> FinishedRun:
        """The run for inference: the one with the best validation Dice, because the test set must not select a model."""
        return max(self.runs, key=lambda run: run.record.metrics.get("best/val_dice", 0.0))

    @property
    def example_run(self) -> FinishedRun:
        """The run whose pictures a report shows: of the first seed, with folds the one that tested the worst image."""
        return min(self.by_seed[0], key=lambda run: min((dice for dice in run.per_image["dice"] if dice is not None), default=math.inf))

    def pooled(self, metric: str) -> list[float]:
        """An overlap score of the cell class over all pixels, one per seed; NaN where runs did not record pixel counts."""
        if self.folds is None and self.runs[0].repeat is None:
            return [run.record.metrics.get(f"test/{metric}", math.nan) for run in self.runs]
        if not self.has("confusion"):
            return [math.nan] * len(self.by_seed)
        return [pixel_scores(one).of(pooled_classes(one))[metric] for one in self._summed("confusion")]

    def calibration(self, *, corrected: bool) -> dict[str, list[float]] | None:
        """Probabilities against observed shares over all runs, ``corrected`` by the temperature; None where a run has none."""
        records = [run.per_image.get("calibration_corrected" if corrected else "calibration") for run in self.runs]
        return pooled_calibration([one for one in records if one]) if all(records) else None

    def mean(self, name: str) -> float | None:
        """The mean over runs of a metric in MLflow; None where a run lacks it."""
        values = [run.record.metrics.get(name) for run in self.runs]
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
    """0 without folds."""
    num_images: Mapping[str, int] = field(default_factory=dict)
    """By split; with folds, of the first one. Empty for runs that did not record it."""
    limit: str = ""
    """The ``--limit`` on images of each split; empty for whole data."""
    last_s: float = 0.0
    """Last heartbeat of its newest run, or the last start of a grid on its data, in seconds since 1970."""
    margin: float = MARGIN
    """Differences of Dice below it do not matter in practice."""
    _intervals: dict[str, list[Interval]] = field(default_factory=dict)
    _differences: dict[str, list[Difference]] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """The data and its size: ``folder: 19 training, 5 validation and 6 test images``."""
        if self.num_folds:
            size = f"{len(self.images)} images in {self.num_folds} folds"
        else:
            size = describe_sizes(self.num_images) or quantity(len(self.images), "test image")
        return f"{self.dataset}: {size}{describe_limit(self.limit)}"

    @property
    def best(self) -> ModelGroup:
        """The best model by mean Dice over images, which the tests compare."""
        return self.models[0]

    @property
    def best_own(self) -> ModelGroup:
        """The best model that can predict: no masks of another tool, and not the mean of several models. The best of all where there is no other."""
        return next((model for model in self.models if model.can_predict), self.best)

    @property
    def best_by_validation(self) -> ModelGroup | None:
        """The model with the best validation Dice, mean over its runs; None where no model was validated."""
        known = [(score, model) for model in self.models if (score := model.mean("best/val_dice")) is not None]
        return max(known, key=lambda one: one[0])[1] if known else None

    @property
    def example_models(self) -> list[ModelGroup]:
        """The models whose figures a report shows: the best, and if it has no training, also the best trained one."""
        trained = next((model for model in self.models if "best/val_dice" in model.runs[0].record.metrics), self.best)
        return list(dict.fromkeys((self.best, trained)))

    def best_by(self, metric: str) -> ModelGroup:
        return min(self.models, key=lambda model: model.sort_key(metric))

    @property
    def own_metrics(self) -> tuple[Metric, ...]:
        """The metrics of users that any of its models recorded."""
        return tuple({metric.key: metric for model in self.models for metric in model.own_metrics}.values())

    def compared_metrics(self) -> list[Metric]:
        """The per-image scores that every model has; runs of older versions lack some."""
        return [metric for metric in catalog.compared(self.own_metrics) if all(model.has(metric.key) for model in self.models)]

    def intervals(self, metric: str = "dice") -> list[Interval]:
        """Each model's mean over the images with its 95 % interval. All models share the same resamples."""
        if metric not in self._intervals:
            values_MI = np.stack([model.scores(metric).per_image for model in self.models])
            labels = np.arange(len(self.images)) if self.groups is None else unit_numbers(self.groups)
            intervals = [Interval(mean=math.nan, low=None, high=None, num=0, note="no image has a score")] * len(self.models)
            patterns: dict[bytes, list[int]] = {}
            for k, row_I in enumerate(~np.isnan(values_MI)):
                patterns.setdefault(row_I.tobytes(), []).append(k)
            for members in patterns.values():  # models with scores for the same images; mostly all
                kept = ~np.isnan(values_MI[members[0]])
                if kept.any():
                    unit_I = unit_numbers(labels[kept].tolist())
                    some = bootstrap_intervals(unit_sums(values_MI[members][:, kept], unit_I), np.bincount(unit_I), unit=self.unit)
                    for k, interval in zip(members, some, strict=True):
                        intervals[k] = interval
            self._intervals[metric] = intervals
        return self._intervals[metric]

    def differences(self, metric: str = "dice") -> list[Difference]:
        """Differences of every pair of models; with more than ``MAX_MODELS_ALL_PAIRS`` models, only to the best. p is adjusted for every pair."""
        if metric not in self._differences:
            scores = [model.scores(metric) for model in self.models]
            if len(scores) < 2:
                self._differences[metric] = []
            elif len(scores) <= MAX_MODELS_ALL_PAIRS:
                self._differences[metric] = compare_all(scores)
            else:
                self._differences[metric] = compare_all(scores, against=self.best_by(metric).name, picked=True)
        return self._differences[metric]

    def differences_to_best(self, metric: str = "dice") -> list[Difference]:
        """Every model against the best by this metric, the best as second; empty for a single model.

        The best was selected by the same scores that are tested, so p is adjusted for every pair of models, not only for these pairs.
        """
        best = self.best_by(metric).name
        return [d if d.b == best else swap_sides(d) for d in self.differences(metric) if best in (d.a, d.b)]

    def tied_winners(self, most: int = 3) -> list[ModelGroup]:
        """The best model and, best first, those that do not differ significantly from it, up to ``most`` in all.

        Only the best if there are too few images for a significant difference.
        """
        tied = {d.a for d in self.differences_to_best() if d.better is None} if self.decidable else set()
        return [model for model in self.models if model is self.best or model.name in tied][:most]

    @property
    def unit(self) -> str:
        """The unit of observation: 'image' or 'group'."""
        return "image" if self.groups is None else "group"

    @cached_property
    def num_units(self) -> int:
        """Images, or groups of them, that any model has a score for."""
        empty = np.all([model.scores().empty for model in self.models], axis=0)
        labels = self.images if self.groups is None else self.groups
        return len({label for label, none in zip(labels, empty, strict=True) if not none})

    @property
    def num_pairs(self) -> int:
        """Number of pairs of models that p is adjusted for."""
        return len(self.models) * (len(self.models) - 1) // 2

    @property
    def decidable(self) -> bool:
        """Whether there are enough images for a significant difference."""
        return is_decidable(self.num_units, self.num_pairs)


def describe_sizes(num_images: Mapping[str, int]) -> str:
    """``19 training, 5 validation and 6 test images``; empty where they were not recorded."""
    if not num_images:
        return ""
    return f"{num_images['train']} training, {num_images['val']} validation and {num_images['test']} test images"


def describe_limit(limit: str) -> str:
    return f" (a part of the data, --limit {limit})" if limit else ""
