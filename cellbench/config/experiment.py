"""An experiment: which backbones, heads and settings are compared on which data. Its runs, and their cohorts."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from cellbench.config.base import Scalar, StrictModel, checked
from cellbench.config.run import RUN_KEYS, RunSpec
from cellbench.errors import CellbenchError, one_line, unknown_name
from cellbench.files import parse_toml

UNCHANGED = "none"
"""The name of the test images without a perturbation, tested as perturbed ones are: what the fall is measured from."""
Perturbed = Literal["all", "stain", "brightness", "blur", "noise", "jpeg", "scale"]
GRID_KEYS = ("backbone", "head", *RUN_KEYS)


class DataSpec(StrictModel):
    """How the images are split, and for synthetic data how they are drawn: ``draw`` holds the settings on the dataset's card."""

    val_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the training images used for validation (published: 0.2)."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of all images used for the test, where the data has no test folder."""
    split_seed: int = Field(default=2026, ge=0, lt=2**31)
    """Seed of random splits and folds."""
    folds: int = Field(default=0, ge=0, le=1000)
    """k-fold cross-validation: every image, those of a test folder too, is tested in one of k folds; 0: one split as above."""
    fold: int = Field(default=0, ge=0)
    """Index of the fold that is tested, from 0."""
    auto_folds: bool = False
    """Whether a grid chooses ``folds`` by itself where one split would test fewer than 30 images, unless ``folds`` or ``fold`` is set."""
    group: Literal["auto", "none", "column", "prefix", "near-duplicates", "appearance"] = "auto"
    """Which images a split keeps together: those of one patient, slide, … ``column``: by a column of the manifest. ``prefix``: by their names.
    ``near-duplicates``: images of the same scene, whole or in part, in any orientation. ``appearance``: images that look alike, so that each fold
    tests what its models have not seen; patients and slides stay whole. ``auto``: ``column`` where there is one; otherwise a random split keeps
    near-duplicates together."""
    group_pattern: str = r"^(.+)[-_ ]\d+$"
    """For ``prefix``: a regular expression for the stem of a name; its first group is the name of the group."""
    stratify: Literal["none", "label", "foreground", "size"] = "none"
    """Quantity that is distributed evenly over the parts: the manifest's labels, quintiles of the cells' area, or image sizes."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of images of each of train, validation and test."""
    draw: dict[str, Scalar] = Field(default_factory=dict)
    """Settings of a synthetic dataset, by the names on its card."""
    tests: tuple[str, ...] = ()
    """Further test sets: folders of labelled images with the same classes, on which every finished run is tested too. The data's own test images,
    which may be named ``own``, stay the main test set."""
    perturb: tuple[Perturbed, ...] = ()
    """Perturbations of the own test images, each at three strengths, on which every finished run is tested too."""

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

    @property
    def given(self) -> dict[str, Any]:
        """Its settings without those that are empty, so that files and identities of older experiments stay as they are."""
        return {key: value for key, value in self.model_dump(mode="json").items() if value not in (None, {}, [])}

    @property
    def perturbations(self) -> tuple[str, ...]:
        """The kinds of ``perturb``, each once."""
        kinds = get_args(Perturbed)[1:]
        return tuple(kind for kind in kinds if {kind, "all"} & {*self.perturb})

    @property
    def test_folders(self) -> tuple[str, ...]:
        """``tests`` without ``own``, each once."""
        return tuple(dict.fromkeys(folder for folder in self.tests if folder != "own"))

    @model_validator(mode="after")
    def _fold_is_one_of_them(self) -> DataSpec:
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise ValueError(f"fold {self.fold} of {self.folds}: folds are two or more (0: none), counted from 0")
        return self


class Experiment(StrictModel):
    """Which backbones, heads and settings are compared on which data."""

    experiment: str = Field(min_length=1, max_length=200)
    """Name of the experiment, in MLflow and in reports. ``{data}`` in it stands for the name of the folder given as ``--data``."""
    dataset: str
    """Card of the dataset; ``folder`` for images without a card of their own."""
    baselines: tuple[str, ...] = ()
    """Baselines to compare with."""
    data: DataSpec = DataSpec()
    """How the images are split."""
    ensemble_seeds: bool = False
    """Whether the seeds of each model are also tested together: an ensemble with their mean prediction, in its own row, without more training."""
    ensemble_best: int = Field(default=0, ge=0, le=20)
    """Above 0: the mean prediction of this many models is tested too, the best by validation Dice, in its own row, without more training."""
    tiles_per_epoch: int = Field(default=0, ge=0, le=10**6)
    """Where ``crops_per_image`` is not set: about this many training tiles in an epoch, at least one of each image. 0: as ``crops_per_image`` says."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Lists of backbones, heads, seeds and any setting of ``[run]``: one run for each combination."""
    pair: tuple[dict[str, Any], ...] = ()
    """``[[pair]]`` tables, in place of backbones and heads in ``[grid]``: a ``backbone``, a ``head``, and settings and options for their runs only."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Settings that all runs share."""
    head: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """``[head.NAME]``: options and settings for the runs of this head only."""
    baseline: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """``[baseline.NAME]``: options and settings for the runs of this baseline only."""

    @property
    def may_choose_crops(self) -> bool:
        """Whether ``crops_per_image`` is still to be chosen from the number of training images."""
        return self.tiles_per_epoch > 0 and "crops_per_image" not in self.run and "crops_per_image" not in self.grid

    @property
    def may_choose_folds(self) -> bool:
        """Whether the number of folds is still to be chosen: ``auto_folds`` is on and nothing else says which images are tested."""
        said = "folds" in self.data.model_fields_set or "fold" in self.grid or "fold" in self.run or self.data.limit is not None
        return self.data.auto_folds and not said

    @classmethod
    def of_text(cls, text: str | bytes, where: str) -> Experiment:
        """An experiment from a run's ``config.toml``. Raises CellbenchError where it is damaged."""
        try:
            tree = parse_toml(text if isinstance(text, str) else text.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CellbenchError(f"{where} is damaged ({one_line(error)[:120]}). Run it again.") from None
        return cls.of(tree, where)

    @classmethod
    def of(cls, tree: Mapping[str, Any], where: str) -> Experiment:
        """An experiment from the tree of a TOML file; ``where``: the file's name, for messages. Raises CellbenchError."""
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
                raise CellbenchError(f"{where}: '{key}' is set in [grid] and in [run]. Keep one of them.")
        experiment._check_models(where)
        if experiment.ensemble_best == 1:
            raise CellbenchError(f"{where}: ensemble_best = 1: an ensemble has two members or more. 0 makes none.")
        if experiment.data.fold:
            raise CellbenchError(
                f"{where}: [data] fold = {experiment.data.fold}: a grid runs all folds. For some of them set [grid] fold or [run] fold."
            )
        seen: set[str] = set()
        for run in expand(experiment, where):  # checks every value now
            if run.fold >= max(experiment.data.folds, 1):
                why = f"there are {experiment.data.folds}, counted from 0" if experiment.data.folds else "set [data] folds to have any"
                raise CellbenchError(f"{where}: fold {run.fold}: {why}.")
            facts = run.model_dump_json()
            if facts in seen:
                raise CellbenchError(
                    f"{where}: has '{run.model} · seed {run.seed}' twice with the same settings. "
                    "Name each value and baseline once, and no key of [grid] in a table of its own too."
                )
            seen.add(facts)
        return experiment

    def _check_models(self, where: str) -> None:
        """Raises CellbenchError unless there is something to run: backbones and heads, pairs of them, or baselines."""
        for key in ("backbone", "head"):
            if self.pair and key in self.grid:
                raise CellbenchError(f"{where}: '{key}' is set in [grid] and in [[pair]]. Keep one of them.")
        if ("backbone" in self.grid) != ("head" in self.grid):
            raise CellbenchError(f"{where}: [grid] needs both 'backbone' and 'head', or neither where only baselines or pairs run.")
        for key in ("backbone", "head"):
            for name in self.grid.get(key, []):
                if not isinstance(name, str):
                    raise CellbenchError(f"{where}: [grid] {key} holds {name!r}. Names of cards are expected, in quotes.")
        for number, pair in enumerate(self.pair, 1):
            for key in ("backbone", "head"):
                if not isinstance(pair.get(key), str):
                    raise CellbenchError(f"{where}: [[pair]] {number} needs '{key}', the name of a card in quotes.")
            for key in ("seed", "fold", *self.grid):
                if key in pair:
                    raise CellbenchError(
                        f"{where}: '{key}' is set in [[pair]] {number}. Set it in [grid], which is the same for all pairs."
                    )
        if "backbone" not in self.grid and not self.pair:
            if not self.baselines:
                raise CellbenchError(f"{where}: has no runs. Give [grid] backbone and head lists, [[pair]] tables, or baselines.")
            for key in self.grid:
                if key not in ("seed", "fold"):
                    raise CellbenchError(f"{where}: [grid] {key} is for backbones with heads. Baselines take it from [run].")


def expand(experiment: Experiment, where: str = "experiment", trained: Mapping[str, bool] | None = None) -> list[RunSpec]:
    """All runs of an experiment: the product of its grid, then its baselines; in all folds, unless ``[grid]`` or ``[run]`` selects some.

    Where it lists pairs, each of them runs at every point of the grid. A baseline has the settings of ``[run]`` and of its own table. It runs once
    for each ``seed`` of the grid, or once in total if it is not trained. Ensembles of seeds come last.
    """
    runs: list[RunSpec] = []
    folds = experiment.grid.get(
        "fold", [experiment.run["fold"]] if "fold" in experiment.run else list(range(max(experiment.data.folds, 1)))
    )
    pairs: tuple[dict[str, Any], ...] = experiment.pair
    if "backbone" in experiment.grid:
        pairs = ({},)  # the grid itself names backbones and heads
    grid = {**experiment.grid, "fold": folds}
    for pair, *values in itertools.product(pairs, *grid.values()):
        point = dict(zip(grid, values, strict=True)) | {key: pair[key] for key in ("backbone", "head") if key in pair}
        own = experiment.head.get(point["head"], {}) | {key: value for key, value in pair.items() if key not in point}
        runs.append(_run({**experiment.run, **point}, own, where, f"head.{point['head']}"))
    for baseline in experiment.baselines:
        learns = True if trained is None else trained[baseline]
        seeds = experiment.grid.get("seed", [experiment.run.get("seed", 0)]) if learns else [0]
        for seed, fold in itertools.product(seeds, folds):
            own = experiment.baseline.get(baseline, {})
            runs.append(_run({**experiment.run, "seed": seed, "fold": fold, "baseline": baseline}, own, where, f"baseline.{baseline}"))
    return runs + (_ensembles(runs) if experiment.ensemble_seeds else [])


def _ensembles(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """An ensemble of each group of runs that differ in their seed only."""
    groups: dict[str, list[RunSpec]] = {}
    for run in runs:
        groups.setdefault(run.model_copy(update={"seed": 0}).model_dump_json(), []).append(run)
    return [
        members[0].model_copy(update={"ensemble": ", ".join(str(run.seed) for run in members)})
        for members in groups.values()
        if len(members) > 1
    ]


def _run(settings: Mapping[str, Any], own: Mapping[str, Any], where: str, table: str) -> RunSpec:
    mine = {key: value for key, value in own.items() if key in RUN_KEYS}
    options = {key: value for key, value in own.items() if key not in RUN_KEYS}
    for key, value in options.items():
        if not isinstance(value, Scalar):
            raise CellbenchError(f"{where}: [{table}] {key} = {value!r}. A number, a string, true or false is expected.")
    return checked(RunSpec, {**settings, **mine, "options": options}, where)


def cohorts(runs: Iterable[RunSpec]) -> list[list[RunSpec]]:
    """The runs grouped into cohorts, which share one pass of one backbone over one stream of tiles. Keeps the order."""
    groups: dict[tuple[Any, ...], list[RunSpec]] = {}
    for run in runs:
        groups.setdefault(run.cohort_key, []).append(run)
    return list(groups.values())


def named_runs(experiment: Experiment, where: str, trained: Mapping[str, bool]) -> list[tuple[str, RunSpec]]:
    """As :func:`expand`, each run with its name."""
    runs = expand(experiment, where, trained)
    return list(zip(labels(runs), runs, strict=True))


def labels(runs: list[RunSpec]) -> list[str]:
    """A unique name for each run: the model, what else differs within the list, and the seed."""
    varied = [
        key
        for key in RUN_KEYS
        if key not in ("seed", "ensemble") and len({getattr(run, key) for run in runs if run.baseline is None or key == "fold"}) > 1
    ]
    return [
        " · ".join([
            run.model,
            *(f"{key} {getattr(run, key)}" for key in varied if run.baseline is None or key == "fold"),
            f"seed {run.seed}" if run.ensemble == "none" else f"ensemble of seeds {run.ensemble}",
        ])
        for run in runs
    ]  # fmt: skip
