"""Measures trials per minute of a search: in batches that share backbone passes, and one at a time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cellbench.config.experiment import Experiment, expand
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.config.search_space import Space
from cellbench.metrics.catalog import objectives
from cellbench.search.study import Study
from cellbench.training.trainer import HeadTrainer

FitCohort = Callable[[list[RunSpec]], tuple[float, list[HeadTrainer]]]
"""Trains runs of one backbone as a cohort; returns the seconds and the trainers."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Trials per minute: proposed, trained, validated and reported."""

    num: int
    """Trials that were timed."""
    together: float
    alone: float
    same: bool
    """Whether both searches proposed the same trials and found the same values."""


def measure_throughput(
    registry: Registry,
    backbone: str,
    heads: tuple[str, ...],
    run: Mapping[str, Any],
    fit_cohort: FitCohort,
    num: int = 8,
    tolerance: float = 0.0,
) -> Throughput:
    """Two random searches of ``num`` trials: one in a single batch, one trial by trial. Values within ``tolerance`` count as the same."""
    search = {"trials": num, "sampler": "random"}
    tree: dict[str, Any] = {
        "experiment": "bench",
        "dataset": "folder",
        "space": {"backbone": [backbone], "head": list(heads), "lr": {"low": 3e-4, "high": 3e-3, "log": True}},
        "run": dict(run),
    }
    (together_s, together), (alone_s, alone) = (
        _search(Space.of({**tree, "search": {**search, "batch": batch}}, "bench", registry, objectives()), registry, fit_cohort)
        for batch in (num, 1)
    )
    same = all(
        trial == trial_alone and all(abs(x - y) <= tolerance for x, y in zip(values, values_alone, strict=True))
        for (*trial, values), (*trial_alone, values_alone) in zip(together, alone, strict=True)
    )
    return Throughput(num=num, together=60 * num / together_s, alone=60 * num / alone_s, same=same)


def _search(space: Space, registry: Registry, fit_cohort: FitCohort) -> tuple[float, list[tuple[Any, ...]]]:
    with tempfile.TemporaryDirectory(prefix="cellbench-bench-") as folder:
        study = Study(f"sqlite:///{folder}/optuna.db", space, space.facts, int(space.run["epochs"]))
        start = time.perf_counter()
        with study:
            while batch := study.ask():
                runs = [registry.complete(run) for pending in batch for run in expand(Experiment.of(space.tree(pending.point), "bench"))]
                _, trainers = fit_cohort(runs)
                for pending, trainer in zip(batch, trainers, strict=True):
                    study.tell(pending, trainer.history[trainer.best_epoch])
        return time.perf_counter() - start, [(t.number, *sorted(t.point.items()), t.values) for t in study.trials()]
