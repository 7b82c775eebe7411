"""Shift: the same models on further test sets, on perturbed images and by appearance. Which one is the safest, and how far each falls.

Scores of further test sets are paired and tested as those of the main one. Seeds and folds are repeats there, because each run was tested on all images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cellbench.config.experiment import UNCHANGED
from cellbench.metrics.pixel import nan_mean
from cellbench.reporting.model_groups import ModelGroup, TestSet
from cellbench.reporting.stored_records import read_tests
from cellbench.statistics.bootstrap import unit_labels
from cellbench.statistics.scores import ModelScores

OWN, APPEARANCE, FURTHER = "own", "appearance", "test set"
"""Kinds of conditions beside the perturbations, which have a kind each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """The images on which every model is tested, under one condition."""

    name: str
    """``blur-2``, ``appearance 1`` or the name of a test set."""
    kind: str
    dice: Mapping[str, np.ndarray]
    """By model, each (N,): the mean over seeds, NaN where an image has no score."""
    before: Mapping[str, np.ndarray] | None = None
    """The same images without the perturbation."""

    def mean(self, model: str) -> float:
        return nan_mean(self.dice[model])

    def fall(self, model: str) -> float | None:
        """By how much the mean is lower than without the perturbation; None for other images."""
        return None if self.before is None else nan_mean(self.before[model]) - self.mean(model)


@dataclass(frozen=True, kw_only=True)
class FallRow:
    """One model: mean Dice on the own images, and under each condition."""

    model: str
    own: float
    conditions: Sequence[tuple[str, str, float]]
    """Kind, name and mean Dice."""
    lowest: tuple[str, float]
    """The condition with the lowest mean Dice."""
    safest: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Shift:
    """The conditions under which all models were tested that were tested under any."""

    here: TestSet
    models: tuple[str, ...]
    """Best first."""
    conditions: tuple[Condition, ...]
    """The own test images first."""
    sets: tuple[TestSet, ...]
    """The further test sets."""
    missing: Mapping[str, tuple[str, ...]]
    """By model, the conditions under which it was not tested and another one was; without masks of other tools, which cannot be."""

    def lowest(self, model: str) -> Condition:
        """The condition with the lowest mean Dice of a model."""
        return min(self.conditions, key=lambda one: one.mean(model))

    @cached_property
    def safest(self) -> str:
        """The model whose lowest mean Dice is the highest; of equal ones the one that is better on the own images."""
        return max(self.models, key=lambda model: self.lowest(model).mean(model))

    def own(self, model: str) -> float:
        """Mean Dice on the own test images."""
        return self.conditions[0].mean(model)

    def of_kind(self, kind: str) -> list[Condition]:
        return [one for one in self.conditions if one.kind == kind]

    @property
    def kinds(self) -> list[str]:
        """Those beside the own test images."""
        return list(dict.fromkeys(one.kind for one in self.conditions[1:]))


def shift_of(here: TestSet) -> Shift | None:
    """The conditions under which models of a test set were tested; None where there is none."""
    every = {model.name: _conditions(model) for model in here.models}
    names = list(dict.fromkeys(name for found in every.values() for name in found))
    looks = _appearances(here)
    missing = {model: tuple(name for name in names if name not in found) for model, found in every.items()}
    models = tuple(model for model, found in every.items() if found or not names)
    common = [name for name in names if all(name in every[model] for model in models)]
    if names and not common:
        models, common = tuple(model for model, lacks in missing.items() if not lacks), names
    conditions = [_condition(name, {model: every[model] for model in models}) for name in common if name != UNCHANGED]
    scores = {model.name: model.scores().per_image for model in here.models if model.name in models}
    for look in sorted({*looks} - {""}, key=lambda look: (len(look), look)) if len({*looks}) > 1 else ():
        mine = np.array([one == look for one in looks])
        conditions.append(Condition(name=look, kind=APPEARANCE, dice={model: values[mine] for model, values in scores.items()}))
    conditions = [one for one in conditions if not any(math.isnan(one.mean(model)) for model in models)]
    if not models or not conditions or any(np.isnan(values).all() for values in scores.values()):
        return None
    conditions.insert(0, Condition(name=OWN, kind=OWN, dice=scores))
    return Shift(
        here=here,
        models=models,
        conditions=tuple(conditions),
        sets=tuple(further_sets(here)),
        missing={model.name: missing[model.name] for model in here.models if missing[model.name] and not model.external},
    )


def _conditions(model: ModelGroup) -> dict[str, tuple[str, np.ndarray]]:
    """By name, the kind and the Dice (N,) of each condition that all runs of a model have."""
    out: dict[str, tuple[str, np.ndarray]] = {}
    for name in _common([run.further.get("perturbed", {}) for run in model.runs]):
        rows = [[value for run in runs for value in run.further["perturbed"][name]] for runs in model.by_seed]
        out[name] = name.rpartition("-")[0] or name, _per_image(model.name, rows)
    for name in _common([run.further.get("sets", {}) for run in model.runs]):
        rows = [run.further["sets"][name]["dice"] for run in model.runs]
        if len({len(row) for row in rows}) == 1:
            out[name] = FURTHER, _per_image(model.name, rows)
    return out


def _per_image(model: str, rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    values = np.array(rows, np.float64)
    return ModelScores(model=model, images=tuple(map(str, range(values.shape[1]))), values=values).per_image


def _common(each: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in each[0] if all(name in other for other in each)]


def _condition(name: str, models: Mapping[str, dict[str, tuple[str, np.ndarray]]]) -> Condition:
    kind = next(iter(models.values()))[name][0] if models else ""
    before = None if kind == FURTHER else {model: found[UNCHANGED][1] for model, found in models.items()}
    return Condition(name=name, kind=kind, dice={model: found[name][1] for model, found in models.items()}, before=before)


def _appearances(here: TestSet) -> list[str]:
    """The appearance of each test image; empty strings where none was recorded."""
    known: dict[str, str] = {}
    for run in (run for model in here.models for run in model.runs):
        known |= dict(zip(run.per_image["images"], run.per_image.get("appearance", ()), strict=False))
    return [known.get(image, "") for image in here.images]


def further_sets(here: TestSet) -> list[TestSet]:
    """The further test sets with the models of ``here`` that were tested on them, best first on each."""
    records = {
        (name, record["dataset"]) for model in here.models for run in model.runs for name, record in run.further.get("sets", {}).items()
    }
    out = []
    for name, digest in sorted(records):
        models = [moved for model in here.models if (moved := _moved(model, name, digest)) is not None]
        if models:
            first = models[0]
            out.append(
                TestSet(
                    dataset=name,
                    digest=digest,
                    images=first.images,
                    models=tuple(sorted(models, key=ModelGroup.sort_key)),
                    groups=first.groups,
                    limit=here.limit,
                    last_s=here.last_s,
                )
            )
    return out


def _moved(model: ModelGroup, name: str, digest: str) -> ModelGroup | None:
    """The model with the scores of a further test set; None if a run of it lacks them."""
    records = [run.further.get("sets", {}).get(name) for run in model.runs]
    if any(record is None or record["dataset"] != digest for record in records):
        return None
    runs = [replace(run, per_image=record, repeat=k) for k, (run, record) in enumerate(zip(model.runs, records, strict=True))]
    first = runs[0].per_image
    groups = unit_labels(first["images"], first["groups"]) if any(first.get("groups", ())) else None
    return replace(model, runs=tuple(runs), groups=groups)


def read_further(data: bytes | None, num_images: int) -> dict[str, Any]:
    """The content of a run's ``tests.json``; empty where it is missing or damaged. ``num_images``: of its test set, on which perturbations are tested."""
    try:
        return read_tests(data or b"{}", num_images)
    except ValueError:
        return {}
