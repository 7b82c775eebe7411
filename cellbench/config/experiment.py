"""An experiment: which backbones, heads and settings are compared on which data, and the runs that follow from it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cellbench.config.base import Scalar, StrictModel, checked
from cellbench.config.run import RUN_KEYS, RunSpec
from cellbench.errors import CellbenchError, unknown_name

GRID_KEYS = ("backbone", "head", *RUN_KEYS)


class DataSpec(StrictModel):
    """How the images are split and, for drawn data, drawn. ``draw`` holds the drawing's own settings, by the names on its card."""

    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the training images kept for validation (published: 0.2)."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of all images kept for the test, where the data has no test folder of its own."""
    split_seed: int = Field(2026, ge=0, lt=2**31)
    folds: int = Field(0, ge=0, le=1000)
    """k: cross-validation. Every image, those of a test folder too, is tested in one of k folds; 0: one split as above."""
    fold: int = Field(0, ge=0)
    """Which of them is the test, from 0."""
    group: Literal["auto", "none", "column", "prefix", "near-duplicates"] = "auto"
    """What must not be torn apart by a split: images of one patient, slide, … ``column``: as the manifest says. ``prefix``: as the names
    say. ``near-duplicates``: images that show the same picture, whole or in part, however turned. ``auto``: ``column`` where there is one;
    otherwise a split that is drawn keeps near-duplicates together."""
    group_pattern: str = r"^(.+)[-_ ]\d+$"
    """For ``prefix``: a regular expression on the stem of the name; its first group is the name of the group."""
    stratify: Literal["none", "label", "foreground", "size"] = "none"
    """What each part gets its share of: the manifest's labels, fifths of the share of cells in the image, or sizes of images."""
    limit: int | None = Field(None, ge=1)
    """At most so many images of each of train, validation and test."""
    draw: dict[str, Scalar] = Field(default_factory=dict)

    @field_validator("group_pattern")
    @classmethod
    def _pattern_has_a_group(cls, value: str) -> str:
        try:
            num = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        if num < 1:
            raise ValueError("has no group in parentheses, which would be the name of the patient or slide")
        return value

    @model_validator(mode="after")
    def _fold_is_one_of_them(self) -> DataSpec:
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise ValueError(f"fold {self.fold} of {self.folds}: folds are two or more (0: none), counted from 0")
        return self


class Experiment(StrictModel):
    """One question: which backbones, heads and settings are to be compared on which data."""

    experiment: str = Field(min_length=1, max_length=200)
    dataset: str
    baselines: tuple[str, ...] = ()
    data: DataSpec = DataSpec()
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    run: dict[str, Any] = Field(default_factory=dict)
    head: dict[str, dict[str, Any]] = Field(default_factory=dict)
    baseline: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @classmethod
    def of(cls, tree: Mapping[str, Any], where: str) -> Experiment:
        """An experiment from the tree of a TOML file; ``where`` names the file in errors. Raises CellbenchError."""
        experiment = checked(cls, tree, where)
        for table, allowed in (("grid", GRID_KEYS), ("run", RUN_KEYS)):
            for key in getattr(experiment, table):
                if key not in allowed:
                    raise unknown_name("setting", key, allowed, where=f"{where}: [{table}]")
        for key, values in experiment.grid.items():
            if not values:
                raise CellbenchError(f"{where}: [grid] {key} is an empty list. Name at least one value, or remove the line.")
            if len(values) != len({json.dumps(v) for v in values}):
                raise CellbenchError(f"{where}: [grid] {key} names a value twice: {values}. Every point of the grid is one run.")
            if key in experiment.run:
                raise CellbenchError(f"{where}: '{key}' stands in [grid] and in [run]. Keep one of them.")
        for key in ("backbone", "head"):
            if ("backbone" in experiment.grid) != ("head" in experiment.grid):
                raise CellbenchError(f"{where}: [grid] needs both 'backbone' and 'head', or neither where only baselines run.")
            for name in experiment.grid.get(key, []):
                if not isinstance(name, str):
                    raise CellbenchError(f"{where}: [grid] {key} holds {name!r}. Names of cards are expected, in quotes.")
        if "backbone" not in experiment.grid:
            if not experiment.baselines:
                raise CellbenchError(f"{where}: asks for nothing. Give [grid] backbone and head lists, or baselines.")
            for key in experiment.grid:
                if key not in ("seed", "fold"):
                    raise CellbenchError(f"{where}: [grid] {key} is for backbones with heads. Baselines take it from [run].")
        if experiment.data.fold:
            raise CellbenchError(
                f"{where}: [data] fold = {experiment.data.fold}: a grid runs all folds. For some of them set [grid] fold or [run] fold."
            )
        seen: set[str] = set()
        for run in expand(experiment, where):  # every value is checked now, not when its turn comes
            if run.fold >= max(experiment.data.folds, 1):
                told = f"there are {experiment.data.folds}, counted from 0" if experiment.data.folds else "set [data] folds to have any"
                raise CellbenchError(f"{where}: fold {run.fold}: {told}.")
            facts = run.model_dump_json()
            if facts in seen:
                raise CellbenchError(
                    f"{where}: asks for '{run.model} · seed {run.seed}' twice with the same settings. "
                    "Name each value and baseline once, and no key of [grid] in a table of its own too."
                )
            seen.add(facts)
        return experiment


def expand(experiment: Experiment, where: str = "experiment", trained: Mapping[str, bool] | None = None) -> list[RunSpec]:
    """All runs of an experiment: the product of its grid, then its baselines. Folds are all run, unless ``[grid]`` or ``[run]`` names some.

    A baseline runs with ``[run]`` and its own table; once for each ``seed`` of the grid, or once where ``trained`` says that it learns nothing;
    in each fold.
    """
    runs: list[RunSpec] = []
    folds = experiment.grid.get(
        "fold", [experiment.run["fold"]] if "fold" in experiment.run else list(range(max(experiment.data.folds, 1)))
    )
    if "backbone" in experiment.grid:
        grid = {**experiment.grid, "fold": folds}
        names = list(grid)
        for values in itertools.product(*grid.values()):
            point = dict(zip(names, values, strict=True))
            own = experiment.head.get(point["head"], {})
            runs.append(_run({**experiment.run, **point}, own, where, f"head.{point['head']}"))
    for baseline in experiment.baselines:
        learns = True if trained is None else trained[baseline]
        seeds = experiment.grid.get("seed", [experiment.run.get("seed", 0)]) if learns else [0]
        for seed, fold in itertools.product(seeds, folds):
            own = experiment.baseline.get(baseline, {})
            runs.append(_run({**experiment.run, "seed": seed, "fold": fold, "baseline": baseline}, own, where, f"baseline.{baseline}"))
    return runs


def _run(settings: Mapping[str, Any], own: Mapping[str, Any], where: str, table: str) -> RunSpec:
    mine = {key: value for key, value in own.items() if key in RUN_KEYS}
    options = {key: value for key, value in own.items() if key not in RUN_KEYS}
    for key, value in options.items():
        if not isinstance(value, Scalar):
            raise CellbenchError(f"{where}: [{table}] {key} = {value!r}. A number, a string, true or false is expected.")
    return checked(RunSpec, {**settings, **mine, "options": options}, where)


def cohorts(runs: Iterable[RunSpec]) -> list[list[RunSpec]]:
    """The runs grouped by what they can share: one pass of one backbone over one stream of tiles. Order is kept."""
    groups: dict[tuple[Any, ...], list[RunSpec]] = {}
    for run in runs:
        groups.setdefault((run.stream, run.baseline), []).append(run)
    return list(groups.values())


def labels(runs: list[RunSpec]) -> list[str]:
    """A name for each run that tells it from all others: model and seed, then whatever else differs within the list."""
    varied = [
        key for key in RUN_KEYS if key != "seed" and len({getattr(run, key) for run in runs if run.baseline is None or key == "fold"}) > 1
    ]
    return [
        " · ".join([
            run.model,
            *(f"{key} {getattr(run, key)}" for key in varied if run.baseline is None or key == "fold"),
            f"seed {run.seed}",
        ])
        for run in runs
    ]  # fmt: skip
