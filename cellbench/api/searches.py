"""``cellbench.search``: a hyperparameter search from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cellbench.api.experiments import Place, as_changes, as_command, as_path
from cellbench.config.options import SearchOptions
from cellbench.search import driver
from cellbench.search.driver import StopRequest
from cellbench.search.results import best_experiment


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SearchResult:
    """The trials of a search."""

    name: str
    """Of the experiment, for :func:`cellbench.results`: it has the tests of the best setting."""
    trials: pd.DataFrame
    """One row a trial: ``trial``, ``state`` (``complete``, ``pruned``, ``failed`` or ``running``), its settings, its objectives, ``seconds``."""
    best: str
    """The best setting as the text of an experiment file, for :func:`cellbench.grid`; empty if no trial is complete within the bounds."""
    finished: bool
    """Whether all trials have ended and the best setting was tested."""

    def __repr__(self) -> str:
        return f"<SearchResult '{self.name}': {len(self.trials)} trials{'' if self.finished else ', not finished'}>"


def search(
    file: Place = "search",
    *,
    data: Place | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    storage: str | None = None,
    unfit: bool = False,
    set: Mapping[str, Any] | None = None,
    limit: int | None = None,
    weights: Place | None = None,
    registry: Place | None = None,
    device: str = "auto",
    precision: str = "auto",
    memory: str = "auto",
    cache: Place | None = None,
    cache_url: str | None = None,
    on: str | None = None,
    gpu_share: float = 1.0,
    progress: bool = True,
) -> SearchResult:
    """Searches for the best settings, as the command ``cellbench search`` does: same trials, same study, same MLflow store.

    The same call resumes a search that was interrupted. Helper processes (``--workers``) are for the command.

    Args:
        file: a search file, or the name of a shipped one.
        data: the folder of images and masks.
        trials: the total number of trials, those of earlier calls included; by default as in the file.
        timeout: start no more trials after so many seconds.
        storage: the database of the study; by default ``OPTUNA_STORAGE``, else ``sqlite:///mlruns/optuna.db``.
        unfit, set, limit, weights, registry, device, precision, memory, cache, cache_url, on, gpu_share, progress: as for
            :func:`cellbench.grid`.

    Raises CellbenchError for wrong input.

    >>> cellbench.search(data="BCCD", trials=20).trials  # doctest: +SKIP

    """
    options = SearchOptions(
        file=os.fspath(file),
        data=as_path(data),
        trials=trials,
        timeout=timeout,
        storage=storage,
        unfit=unfit,
        changes=as_changes(set or {}),
        limit=limit,
        weights=as_path(weights),
        registry=as_path(registry),
        device=device,
        precision=precision,
        memory=memory,
        cache=os.fspath(cache) if cache is not None else None,
        cache_url=cache_url,
        on=on,
        gpu_share=gpu_share,
    )
    with as_command(options, progress):
        plan = driver.prepare(options)
        driver.search(plan, options, StopRequest.after(timeout))
        with plan.study() as study:
            found, best = study.trials(), study.best()
    goals = plan.space.settings.objectives
    rows = [
        {"trial": one.number, "state": one.state, **one.point, **dict(zip(goals, one.values, strict=False)), "seconds": one.seconds}
        for one in found
    ]
    return SearchResult(
        name=plan.space.experiment,
        trials=pd.DataFrame(rows),
        best=best_experiment(plan.space, best[0]) if best else "",
        finished=sum(one.state != "running" for one in found) >= plan.space.settings.trials,
    )
