"""A search space: which settings vary and how, the objectives, and the settings of the sampler. No Optuna here.

``[space]`` holds the settings that vary: a list is a choice, a table with ``low`` and ``high`` a range. ``[run]`` holds the fixed settings.
``[head.fpn]`` holds the settings of a head, which may also vary and then exist only in trials of that head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from cellbench.config.base import Scalar, StrictModel, checked
from cellbench.config.experiment import DataSpec, Experiment, expand
from cellbench.config.registry import Registry
from cellbench.config.run import AFTER_TRAINING, RUN_KEYS, RunSpec
from cellbench.errors import CellbenchError, unknown_name
from cellbench.files import facts_digest

DIMENSIONS = ("backbone", "head", *(name for name in RUN_KEYS if name not in ("seed", "fold")))
"""Settings that may vary. Not the seed, and not the fold, since one fold tests on the training images of another."""
GRID_ONLY = {
    "ensemble_best": "a search tests its best setting alone, so there are no other models to average. ensemble_seeds = true averages its repeats",
    "baselines": "a search compares settings of heads. A grid with the best setting, which best.toml holds, compares it with baselines",
    "baseline": "a search compares settings of heads, and has no baselines",
    "tiles_per_epoch": "the trials of a search all have the same crops. Set crops_per_image in [run]",
    "pair": "a search has backbones and heads in [space], and tries them together",
    "grid": "a search has [space] in its place, from which trials are drawn",
}
"""Parts of an experiment that a search does not have, and why."""


class Settings(StrictModel):
    """The table ``[search]``."""

    trials: int = Field(default=40, ge=1, le=1_000_000)
    """Total number, including those of earlier calls."""
    batch: int = Field(default=8, ge=1, le=1000)
    """Trials that are proposed together and share passes of the backbone."""
    seed: int = Field(default=2026, ge=0, lt=2**31)
    """Seed of the sampler and of the random first trials."""
    sampler: Literal["tpe", "gp", "random", "qmc", "nsga2"] = "tpe"
    """Optuna's sampler."""
    startup: int = Field(default=10, ge=1)
    """Number of first trials of ``tpe`` and ``gp`` that are random, with pairs of backbone and head in turn."""
    pruner: Literal["none", "median", "halving", "hyperband"] = "none"
    """Optuna's pruner, which ends unpromising trials early; only with one objective that is validated each epoch."""
    objective: str | list[str] = "val/dice"
    """The metric to optimise, or several for a Pareto front."""
    direction: str | list[str] | None = None
    """``maximize`` or ``minimize``, one for each objective; by default the metric's own."""
    max: dict[str, float] = Field(default_factory=dict)
    """Upper bounds: ``"cost/latency_ms" = 500``. Trials beyond a bound are kept but never the best."""
    min: dict[str, float] = Field(default_factory=dict)
    """Lower bounds, in the same way."""
    repeat_best: int = Field(default=3, ge=1, le=100)
    """Number of seeds with which the best setting is trained and tested at the end."""
    max_failed: int = Field(default=3, ge=1)
    """The search stops when this number of trials has failed and none has succeeded."""

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)

    def excess(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """By how much each bound is exceeded; 0 or less if it is met."""
        over = {f"max {name}": metrics[name] - bound for name, bound in self.max.items()}
        return over | {f"min {name}": bound - metrics[name] for name, bound in self.min.items()}

    def within_bounds(self, metrics: Mapping[str, float]) -> bool:
        return all(over <= 0 for over in self.excess(metrics).values())


class Dimension(StrictModel):
    """A setting that varies: ``choices``, or a range from ``low`` to ``high``, both included."""

    name: str
    """``lr``, or ``fpn.width`` for a setting of a head."""
    head: str = ""
    """The head to which it belongs; empty: to all."""
    choices: tuple[Scalar, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    whole: bool = False
    """Whether the range is of integers."""

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The values that are checked: all choices, or both ends of the range."""
        return self.choices or ((int(self.low), int(self.high)) if self.whole else (self.low, self.high))

    def describe(self) -> str:
        """``1e-4 to 1e-2, log``, or the choices."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        return f"{self.low:g} to {self.high:g}" + (", log" if self.log else "") + (f", step {self.step:g}" if self.step else "")


Number = Annotated[int, Field(gt=-(2**63), lt=2**63)] | float


class _Range(StrictModel):
    low: Number
    high: Number
    log: bool = False
    step: Number | None = None


class _File(StrictModel):
    experiment: str = Field(min_length=1, max_length=200)
    dataset: str
    ensemble_seeds: bool = False
    data: DataSpec = DataSpec()
    search: Settings = Settings()
    space: dict[str, Any] = Field(default_factory=dict)
    run: dict[str, Any] = Field(default_factory=dict)
    head: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Space:
    """A search as in its file, checked."""

    experiment: str
    dataset: str
    data: DataSpec
    settings: Settings
    dimensions: tuple[Dimension, ...]
    """Backbone and head first."""
    run: Mapping[str, Any]
    """Fixed settings."""
    head: Mapping[str, Mapping[str, Any]]
    """Fixed settings of each head."""
    directions: tuple[str, ...]
    """``maximize`` or ``minimize``, of each objective."""
    ensemble_seeds: bool = False
    """Whether the repeats of the best setting are also tested together."""

    @classmethod
    def of(cls, tree: Mapping[str, Any], where: str, registry: Registry, objectives: Mapping[str, str]) -> Space:
        """A space from the tree of a TOML file, with both ends of every dimension checked. Raises CellbenchError.

        ``objectives``: what a search may optimise, with the better direction, as :func:`cellbench.metrics.catalog.search_objectives` gives it.
        """
        for name in tree.keys() & GRID_ONLY:
            raise CellbenchError(f"{where}: '{name}' is for grids: {GRID_ONLY[name]}.")
        file = checked(_File, tree, where)
        directions = _directions(file.search, where, objectives, {f"val/{name}" for name in registry.names("metrics")})
        for name in file.space:
            if name not in DIMENSIONS:
                why = " A seed is no setting: repeat_best repeats the best one." if name == "seed" else ""
                raise CellbenchError(f"{unknown_name('setting', name, DIMENSIONS, where=f'{where}: [space]')}{why}")
            if name in AFTER_TRAINING:
                raise CellbenchError(f"{where}: [space] {name}: trials are compared in validation, which does not use it. Set it in [run].")
            if name in file.run:
                raise CellbenchError(f"{where}: '{name}' is set in [space] and in [run]. Keep one of them.")
        for name in file.run:
            if name not in RUN_KEYS:
                raise unknown_name("setting", name, RUN_KEYS, where=f"{where}: [run]")
        if missing := {"backbone", "head"} - set(file.space):
            raise CellbenchError(f"{where}: [space] needs a list of {' and of '.join(sorted(missing))}, of one name at least.")
        order = ["backbone", "head", *(name for name in file.space if name not in ("backbone", "head"))]
        dimensions = [_dimension(name, "", file.space[name], _kind(name), f"{where}: [space] {name}") for name in order]
        heads = next(one.choices for one in dimensions if one.name == "head")
        fixed: dict[str, dict[str, Any]] = {}
        for head, settings in file.head.items():
            card = registry.head(head)
            fixed[head] = {}
            for name, value in settings.items():
                if not isinstance(value, list | dict):
                    fixed[head][name] = value
                elif name in file.space:
                    raise CellbenchError(f"{where}: '{name}' varies in [space] and in [head.{head}]. Keep one of them.")
                elif head in heads:
                    kind = type(card.options[name]) if name in card.options else _kind(name) if name in RUN_KEYS else None
                    if kind is None:
                        raise unknown_name("setting", name, card.options, where=f"{where}: [head.{head}]")
                    dimensions.append(_dimension(f"{head}.{name}", head, value, kind, f"{where}: [head.{head}] {name}"))
        made = cls(
            experiment=file.experiment, dataset=file.dataset, data=file.data, settings=file.search, dimensions=tuple(dimensions),
            run=file.run, head=fixed, directions=directions, ensemble_seeds=file.ensemble_seeds,
        )  # fmt: skip
        made._check(where, registry)
        return made

    def _check(self, where: str, registry: Registry) -> None:
        if all(len(one.choices) == 1 for one in self.dimensions):
            raise CellbenchError(f"{where}: [space] leaves nothing open: every setting has one value. `grid` runs a single setting.")
        for head in self.choices("head"):
            mine = [one for one in self.dimensions if one.head in ("", head)]
            base = {one.name: one.ends[0] for one in mine} | {"head": head}
            for one in mine:
                for value in one.ends if one.name != "head" else (head,):
                    for run in expand(Experiment.of(self.tree({**base, one.name: value}), where)):
                        registry.complete(run)

    @property
    def fold(self) -> int:
        """The only fold of a search, including its test: other folds would test on its training images."""
        return int(self.run.get("fold", 0))

    def choices(self, name: str) -> tuple[Scalar, ...]:
        """The values that may be chosen for a setting that varies."""
        return next(one.choices for one in self.dimensions if one.name == name)

    def best_tree(self, point: Mapping[str, Scalar]) -> dict[str, Any]:
        """The best point as an experiment file, repeated with ``repeat_best`` seeds."""
        seed = int(self.run.get("seed", 0))
        return self.tree(point, seeds=range(seed, seed + self.settings.repeat_best))

    def tree(self, point: Mapping[str, Scalar], seeds: Sequence[int] = ()) -> dict[str, Any]:
        """One point as the tree of an experiment file; ``seeds``: instead of the fixed one."""
        head = str(point["head"])
        plain = {name: value for name, value in point.items() if name not in ("backbone", "head") and "." not in name}
        own = {name.partition(".")[2]: value for name, value in point.items() if "." in name}
        run = {name: value for name, value in self.run.items() if name != "seed"}
        run |= {"fold": self.fold} if self.data.folds else {}
        grid = {"backbone": [point["backbone"]], "head": [head], "seed": list(seeds) or [self.run.get("seed", 0)]}
        options = {**self.head.get(head, {}), **own}
        tree: dict[str, Any] = {
            "experiment": self.experiment,
            "dataset": self.dataset,
            "data": self.data.given,
            "grid": grid,
            "run": {**run, **plain},
        }
        tree |= {"ensemble_seeds": True} if self.ensemble_seeds and len(seeds) > 1 else {}
        return {**tree, "head": {head: options}} if options else tree

    @cached_property
    def facts(self) -> dict[str, str]:
        """Everything that must stay the same within a study, by name. Numbers of trials and repeats may change."""
        kept = ("seed", "sampler", "startup", "pruner", "objective", "direction", "max", "min")
        facts = {f"space.{one.name}": one.describe() for one in self.dimensions}
        facts |= {f"run.{name}": json.dumps(value) for name, value in self.run.items()}
        facts |= {f"head.{head}.{name}": json.dumps(value) for head, own in self.head.items() for name, value in own.items()}
        facts |= {f"data.{name}": json.dumps(value) for name, value in self.data.model_dump(exclude={"tests", "perturb"}).items()}
        return facts | {f"search.{name}": json.dumps(getattr(self.settings, name)) for name in kept} | {"dataset": self.dataset}

    def digest(self, more: Iterable[str] = ()) -> str:
        """Sixteen hex digits over ``facts`` and ``more``."""
        return facts_digest([self.experiment, self.facts, *more])


def _kind(name: str) -> type | None:
    """The type of a setting of a run: float, int, bool or str; None for names of cards."""
    annotation = RunSpec.model_fields[name].annotation
    return annotation if isinstance(annotation, type) else None


def _dimension(name: str, head: str, value: Any, kind: type | None, where: str) -> Dimension:
    if isinstance(value, dict):
        span = checked(_Range, value, where)
        if kind not in (int, float):
            raise CellbenchError(f"{where}: a range is for numbers. Give a list of choices.")
        if kind is int and any(isinstance(x, float) and not x.is_integer() for x in (span.low, span.high, span.step or 1)):
            raise CellbenchError(f"{where} = {value}: whole numbers are expected.")
        if not span.low < span.high:
            raise CellbenchError(f"{where}: low = {span.low} is not below high = {span.high}.")
        if span.log and span.low <= 0:
            raise CellbenchError(f"{where}: low = {span.low}: a log range starts above 0.")
        if span.step is not None and (span.step <= 0 or span.log):
            raise CellbenchError(f"{where}: step = {span.step}: above 0 is expected, and none beside log.")
        return Dimension(name=name, head=head, low=span.low, high=span.high, log=span.log, step=span.step, whole=kind is int)
    choices = value if isinstance(value, list) else [value]
    if not choices:
        raise CellbenchError(f"{where} is an empty list. Name at least one value, or remove the line.")
    for one in choices:
        if not isinstance(one, Scalar) or (isinstance(one, float) and not math.isfinite(one)):
            raise CellbenchError(f"{where} holds {one!r}. Numbers, strings, true or false are expected.")
    if len(choices) != len({json.dumps(one) for one in choices}):
        raise CellbenchError(f"{where} names a value twice: {choices}.")
    return Dimension(name=name, head=head, choices=tuple(choices))


def _directions(settings: Settings, where: str, known: Mapping[str, str], own: Set[str]) -> tuple[str, ...]:
    place = f"{where}: [search]"
    names = settings.objectives
    for name in (*names, *settings.max, *settings.min):
        if name.startswith("test"):
            raise CellbenchError(
                f"{place} '{name}': test images are only used for the best trial at the end. Use val/dice, or another of: {', '.join(known)}."
            )
        if name not in known:
            raise unknown_name("metric", name, known, where=place)
    if not names or len(set(names)) != len(names):
        raise CellbenchError(f"{place} objective = {settings.objective!r}: one metric, or several different ones, are expected.")
    given = settings.direction
    directions = tuple(known[name] for name in names) if given is None else (given,) if isinstance(given, str) else tuple(given)
    if len(directions) != len(names) or not set(directions) <= {"maximize", "minimize"}:
        raise CellbenchError(f"{place} direction = {settings.direction!r}: 'maximize' or 'minimize' is expected for each objective.")
    if settings.pruner != "none" and (len(names) > 1 or not names[0].startswith("val/") or names[0] in own):
        raise CellbenchError(
            f"{place} pruner = '{settings.pruner}': pruning follows one objective that is validated each epoch, which own metrics are not. Use pruner = 'none'."
        )
    for name in set(settings.max) & set(settings.min):
        if settings.min[name] > settings.max[name]:
            raise CellbenchError(f"{place} {name}: min {settings.min[name]} is above max {settings.max[name]}: nothing can be found.")
    return directions
