"""How many trials of a search a minute: in batches that share each pass of the backbone, and one at a time."""

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
from cellbench.search.study import Study
from cellbench.training.trainer import HeadTrainer

LinearFit = Callable[[list[RunSpec]], tuple[float, list[HeadTrainer]]]
"""Trains runs of one backbone as a cohort of their own: seconds, and what was learned."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Trials a minute, asked, trained, validated and told."""

    num: int
    """Trials that were timed."""
    together: float
    alone: float
    same: bool
    """Whether both ways asked the same trials and told the same values."""


def measure_throughput(
    registry: Registry,
    backbone: str,
    heads: tuple[str, ...],
    run: Mapping[str, Any],
    fitted: LinearFit,
    num: int = 8,
    tolerance: float = 0.0,
) -> Throughput:
    """Two small random searches of ``num`` trials each: one in a single batch, one trial by trial. Values within ``tolerance`` are the same."""
    tree = {
        "experiment": "bench",
        "dataset": "folder",
        "search": {"trials": num, "sampler": "random"},
        "space": {"backbone": [backbone], "head": list(heads), "lr": {"low": 3e-4, "high": 3e-3, "log": True}},
        "run": dict(run),
    }
    found = [
        _searched(Space.of({**tree, "search": {**tree["search"], "batch": batch}}, "bench", registry), registry, fitted)
        for batch in (num, 1)
    ]
    (together_s, together), (alone_s, alone) = found
    same = all(
        asked == asked_alone and all(abs(x - y) <= tolerance for x, y in zip(told, told_alone, strict=True))
        for (*asked, told), (*asked_alone, told_alone) in zip(together, alone, strict=True)
    )
    return Throughput(num=num, together=60 * num / together_s, alone=60 * num / alone_s, same=same)


def _searched(space: Space, registry: Registry, fitted: LinearFit) -> tuple[float, list[tuple[Any, ...]]]:
    with tempfile.TemporaryDirectory(prefix="cellbench-bench-") as folder:
        study = Study(
            f"sqlite:///{folder}/optuna.db", space.experiment, space.settings, space.dimensions, space.asked, int(space.run["epochs"])
        )
        start = time.perf_counter()
        with study:
            while batch := study.ask():
                runs = [registry.complete(run) for pending in batch for run in expand(Experiment.of(space.tree(pending.point), "bench"))]
                _, learners = fitted(runs)
                for pending, learner in zip(batch, learners, strict=True):
                    study.tell(pending, learner.history[learner.best_epoch])
        return time.perf_counter() - start, [(t.number, *sorted(t.point.items()), t.values) for t in study.told()]
