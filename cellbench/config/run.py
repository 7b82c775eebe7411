"""The words of the project: what a run is, what an experiment asks, and which runs follow from it.

A run is one point of a grid; runs that see the same tiles through the same backbone are a cohort. Records are frozen and refuse
what they do not know. No torch and no I/O here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cellbench.errors import CellbenchError, unknown_name

Scalar = bool | int | float | str
T = TypeVar("T", bound=BaseModel)

# Raised whenever a change of code changes the numbers of an unchanged spec: finished runs of older numerics are then not taken for these.
NUMERICS_VERSION = 4

LOSS_TERMS = ("bce", "ce", "dice", "focal", "jaccard", "lovasz", "tversky")


class StrictModel(BaseModel):
    """A frozen record that refuses unknown keys and does not read numbers out of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSpec(StrictModel):
    """Everything about one run that can change its numbers, apart from the data and the weights themselves."""

    backbone: str | None = None
    head: str | None = None
    baseline: str | None = None
    options: dict[str, Scalar] = Field(default_factory=dict)
    """The head's or baseline's own settings, by the names on its card."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Starts the head's weights, nothing else: which tiles are seen in which order is ``data_seed``'s."""

    framing: Literal["tile", "pad", "resize"] = "tile"
    """``tile``: cut into squares. ``pad``: whole, padded to multiples of ``tile_px``. ``resize``: whole, squeezed into one square."""
    tile_px: int = Field(224, ge=16, le=4096)
    tile_scale: float = Field(1.0, ge=0.25, le=4)
    """The image is scaled by it first: at 2 a tile shows a quarter of the area, each cell twice as wide. ``resize``: the square is so much larger."""
    overlap: float = Field(0.5, ge=0, le=0.9)
    """Share of a tile that its neighbour also covers, in testing and prediction."""
    val_overlap: float = Field(0.0, ge=0, le=0.9)
    sampling: Literal["crops", "tiles"] = "crops"
    """``crops``: random places, anew each epoch. ``tiles``: every tile of every image once an epoch."""
    crops_per_image: int = Field(1, ge=1, le=10_000)
    repeat_views_every: int = Field(0, ge=0, le=1000)
    """Training views repeat every so many epochs; 0: never. Lets augmentation and a feature cache live together."""
    flips: bool = True
    rotations: bool = True
    """Right angles only: they cost no interpolation."""
    brightness: float = Field(0.2, ge=0, lt=1)
    contrast: float = Field(0.2, ge=0, lt=1)
    saturation: float = Field(0.1, ge=0, lt=1)
    hue: float = Field(0.05, ge=0, le=0.5)
    hed: float = Field(0.0, ge=0, le=1)
    """How far training tiles vary in their stains: each of haematoxylin, eosin and DAB times 1 - ``hed`` to 1 + ``hed``, and shifted. 0.05 is
    light, 0.2 strong."""
    normalise: Literal["none", "reinhard", "macenko"] = "none"
    """All images are brought to the colours of the run's training images first. Baselines that learn nothing see images as they are."""
    data_seed: int = Field(2026, ge=0, lt=2**31)
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training images that are learned from, smaller shares within larger ones. An epoch stays as long: those images come oftener."""

    fold: int = Field(0, ge=0)
    """Which of ``[data] folds`` is the test, from 0."""

    epochs: int = Field(20, ge=1, le=10_000)
    batch_size: int = Field(8, ge=1, le=4096)
    lr: float = Field(1e-3, gt=0, le=1)
    weight_decay: float = Field(1e-4, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = Field(1.0, ge=0)
    patience: int = Field(10, ge=0)
    """Epochs without a better ``select`` before the run stops; 0: never."""
    loss: str = "0.5 ce + 0.5 dice"
    targets: Literal["cell", "cell+distance", "cell+border+distance"] = "cell"
    """What the head learns beside the classes, so that touching cells part better: how deep in its cell a pixel lies, and where two meet."""
    unfreeze: int = Field(0, ge=0, le=100)
    """The backbone's last so many blocks are trained too, each run its own copy; what comes before stays frozen and shared."""
    tail_lr_scale: float = Field(0.01, gt=0, le=1)
    """The learning rate of the last block of an unfrozen tail, as a share of ``lr``."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """And of each block before it, as a share of the next."""
    select: Literal["val/dice", "val/loss"] = "val/dice"

    @field_validator("loss")
    @classmethod
    def _loss_is_known(cls, value: str) -> str:
        loss_weights(value)
        return value

    @model_validator(mode="after")
    def _one_model(self) -> RunSpec:
        if (self.baseline is None) == (self.backbone is None) or (self.backbone is None) != (self.head is None):
            raise ValueError("a run is either a backbone with a head, or a baseline")
        side = self.tile_px * self.tile_scale
        if self.framing == "resize" and side != round(side):
            raise ValueError(f"resize makes squares of tile_px * tile_scale = {side:g} px: a whole number is needed")
        return self

    @property
    def model(self) -> str:
        """What is compared, seeds aside: ``dinobloom-s · fpn`` or ``otsu``."""
        return self.baseline or f"{self.backbone} · {self.head}"

    @property
    def stream(self) -> tuple[Any, ...]:
        """What decides which tiles are seen through which backbone: runs with equal streams are one cohort."""
        return tuple(getattr(self, name) for name in SAMPLING_FIELDS)


SAMPLING_FIELDS = (
    "backbone", "framing", "tile_px", "tile_scale", "val_overlap", "overlap", "sampling", "crops_per_image", "repeat_views_every", "flips", "rotations",
    "brightness", "contrast", "saturation", "hue", "hed", "normalise", "data_seed", "fraction", "fold", "unfreeze",
)  # fmt: skip

# What [run] may set for all runs, and [head.x] or [baseline.x] for the runs of that part alone.
RUN_KEYS = tuple(name for name in RunSpec.model_fields if name not in ("backbone", "head", "baseline", "options"))
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


def fingerprint(run: RunSpec, dataset_digest: str, parts_digest: str) -> str:
    """Sixteen hex digits over everything that can change a run's numbers; not device, paths or workers. ``parts_digest`` stands for the weights,
    the cards and their code, and the precision."""
    facts = {"numerics": NUMERICS_VERSION, "run": run.model_dump(), "dataset": dataset_digest, "parts": parts_digest}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def loss_weights(text: str) -> dict[str, float]:
    """The terms of a loss and their weights.

    >>> loss_weights("0.5 ce + 0.5 dice")
    {'ce': 0.5, 'dice': 0.5}
    """
    weights: dict[str, float] = {}
    for term in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*?\s+)?([a-z]+)\s*", term)
        if not match:
            raise ValueError(f"a loss is written like '0.5 ce + 0.5 dice', not {text!r}")
        weight, name = float(match[1] or 1), match[2]
        if name not in LOSS_TERMS:
            raise ValueError(str(unknown_name("loss", name, LOSS_TERMS)))
        if name in weights:
            raise ValueError(f"'{name}' stands twice in {text!r}")
        weights[name] = weight
    if not any(weights.values()):
        raise ValueError(f"all weights of {text!r} are 0")
    return weights


def checked(record: type[T], tree: Mapping[str, Any], where: str) -> T:
    """``record`` from a tree, or one CellbenchError that names the place, the value and what would be right."""
    try:
        # Through JSON, where strictness still takes a list for a tuple; TOML's dates become strings and are refused as such.
        return record.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise _told(record, error, where) from None


def _told(record: type[BaseModel], error: ValidationError, where: str) -> CellbenchError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields: Iterable[str] = record.model_fields
        for part in first["loc"][:-1]:
            inner = record.model_fields[str(part)].annotation
            fields = getattr(inner, "model_fields", ())
        return unknown_name("setting", str(first["loc"][-1]), fields, where=where)
    if first["type"] == "missing":
        return CellbenchError(f"{where}: '{path}' is missing.")
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" and not path else f" = {first['input']!r}"
    more = f" ({len(error.errors()) - 1} more like it.)" if len(error.errors()) > 1 else ""
    return CellbenchError(f"{where}: {path}{given}: {message[:1].lower() + message[1:].rstrip('.')}.{more}")
