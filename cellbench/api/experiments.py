"""``cellbench.grid``, ``results`` and ``score``: an experiment run from Python, the results of earlier ones, and masks of other tools beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from cellbench import console, startup
from cellbench.api.results import Results
from cellbench.config.options import GridOptions, TrainingOptions
from cellbench.config.registry import Registry
from cellbench.console import say
from cellbench.errors import CellbenchError
from cellbench.execution.claims import Outcome
from cellbench.execution.experiment_run import plan_experiment, run_experiment
from cellbench.execution.external import check_name, open_test_images, score_masks
from cellbench.features.cache_admin import parse_cache
from cellbench.tracking.tracker import Tracker, open_experiment, open_experiments

Place = str | os.PathLike[str]
"""A path."""


def grid(
    experiment: Place | Mapping[str, Any] | None = None,
    *,
    data: Place | None = None,
    unfit: bool = False,
    set: Mapping[str, Any] | None = None,
    limit: int | None = None,
    tests: Sequence[Place] = (),
    perturb: bool = False,
    weights: Place | None = None,
    registry: Place | None = None,
    device: str = "auto",
    precision: str = "auto",
    memory: str = "auto",
    cache: Place | None = None,
    cache_url: str | None = None,
    workers: int | None = None,
    on: str | None = None,
    gpu_share: float = 1.0,
    progress: bool = True,
) -> Results:
    """Trains, tests and compares every run of an experiment, as the command ``cellbench grid`` does, and returns the results.

    The runs are those of the command: same numbers, same MLflow store (``mlflow.db`` in the working folder, or ``MLFLOW_TRACKING_URI``),
    same report. Runs that are finished there are not run again. Ctrl-C raises KeyboardInterrupt; what is finished is kept, and the same call
    resumes. torch's number of threads and the cache folder are set during the call and restored at its end.

    Args:
        experiment: an experiment file, the name of a shipped one, or a mapping with the keys of such a file. By default ``quickstart``,
            or with ``data`` ``own``, which compares what a laboratory would.
        data: the folder of images and masks.
        unfit: whether to train although ``cellbench check`` calls the data not fit.
        set: settings to change for this call, by key: ``{"run.epochs": 3}``.
        limit: use at most so many images of each of train, validation and test, for a quick try.
        tests: further folders of images and masks, on which every model is tested too.
        perturb: also test every model on images of other stain, brightness, focus, noise, compression and scale.
        weights: a folder of backbone weights: ``<backbone>.safetensors``, ``.pth`` or ``.bin``.
        registry: a folder of your own cards.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        memory: for decoded images and features, like ``4G``; ``auto``: half of the free memory.
        cache: the cache folder, ``~/.cache/cellbench`` by default; ``DIR:SIZE`` keeps features there.
        cache_url: features that several machines share, like ``s3://bucket/folder``.
        workers: run so many processes, each on its share of the cores. A script that uses them needs the usual
            ``if __name__ == "__main__":``.
        on: run on Ray: ``ray``, or ``ray://HOST:PORT``.
        gpu_share: with ``on``, the part of a GPU that each process asks for.
        progress: whether to print progress bars and messages; errors are raised either way.

    Returns:
        The results of this experiment's runs. Runs without a result are in ``skipped`` and ``failed``, with the reason.

    Raises CellbenchError for wrong input, and where no run has a result.

    >>> results = cellbench.grid("experiments/bccd.toml", data="BCCD", set={"run.epochs": 3})  # doctest: +SKIP
    >>> results.leaderboard()  # doctest: +SKIP

    """
    tree = experiment if isinstance(experiment, Mapping) else None
    file = str(experiment.get("experiment", "experiment")) if isinstance(experiment, Mapping) else os.fspath(experiment or "")
    options = GridOptions(
        file=file,
        data=as_path(data),
        unfit=unfit,
        changes=as_changes(set or {}),
        limit=limit,
        tests=tuple(os.fspath(one) for one in tests),
        perturb=perturb,
        weights=as_path(weights),
        registry=as_path(registry),
        device=device,
        precision=precision,
        memory=memory,
        cache=os.fspath(cache) if cache is not None else None,
        cache_url=cache_url,
        workers=workers,
        on=on,
        gpu_share=gpu_share,
    )
    with as_command(options, progress):
        plan = plan_experiment(options, say, tree)
        tracker = Tracker(plan.experiment.experiment)
        outcome = run_experiment(plan, tracker, say, _no_line, command=_call(experiment, data))
    if not outcome.finished:
        raise CellbenchError(f"{plan.experiment.experiment}: no run has a result. {_reasons(outcome)}")
    return Results.collect([tracker], {run.run_id for run in outcome.finished.values()}, skipped=outcome.skipped, failed=outcome.failed)


def results(*experiments: str) -> Results:
    """The results of finished runs, read from MLflow; runs nothing.

    Args:
        *experiments: names of experiments in MLflow's store (``mlflow.db`` in the working folder, or ``MLFLOW_TRACKING_URI``). Several are
            taken together; without a name, the one with the newest finished run.

    Raises CellbenchError if there is no such experiment, or no finished run in it.

    >>> cellbench.results("bccd").leaderboard()  # doctest: +SKIP

    """
    startup.set_environment()
    return Results.collect(open_experiments(experiments))


def score(
    name: str,
    masks: Place,
    *,
    data: Place | None = None,
    experiment: str | None = None,
    registry: Place | None = None,
    progress: bool = True,
) -> Results:
    """Scores the masks of another tool on an experiment's own test images, as the command ``cellbench score`` does, and returns its results.

    They stand in the results as one more model, with paired tests, and as a finished run of kind *external* in MLflow.

    Args:
        name: how the tool is called in tables, like ``cellpose``.
        masks: a folder with a mask for each test image, a pattern like ``masks/*_seg.npy``, or a COCO file.
        data: the folder of images and masks; by default where the experiment's data lay.
        experiment: the name of an experiment in MLflow; by default the one with the newest finished run.
        registry: a folder of your own cards.
        progress: whether to print progress bars and messages.

    Raises CellbenchError for wrong input, such as a test image without a mask.

    >>> cellbench.score("cellpose", "cellpose-masks", data="BCCD").compare("cellpose", "otsu")  # doctest: +SKIP

    """
    startup.set_environment()
    tracker, cards = open_experiment(experiment), Registry(as_path(registry))
    name = check_name(name, tracker)
    with console.silent(not progress):
        score_masks(name, as_path(masks), open_test_images(tracker, cards, as_path(data)), tracker, cards, say)
    return Results.collect([tracker])


@contextmanager
def as_command(options: TrainingOptions, progress: bool) -> Iterator[None]:
    """Inside ``with`` the process is as a command with these options has it: environment, cache, threads. Raises CellbenchError."""
    startup.set_environment()
    with (
        console.silent(not progress),
        startup.temporary_cache(parse_cache(options.cache)[0], options.cache_url),
        startup.threads_for(options.device),
    ):
        yield


@overload
def as_path(place: Place) -> Path: ...
@overload
def as_path(place: None) -> None: ...
@overload
def as_path(place: Place | None) -> Path | None: ...
def as_path(place: Place | None) -> Path | None:
    """An argument of the API as a path."""
    return Path(place) if place is not None else None


def as_changes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """``{"run.epochs": 3}`` as the options of the command line: ``run.epochs=3``."""
    changes = []
    for key, value in settings.items():
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)  # valid TOML too, unless it is None or a mapping
        except (TypeError, ValueError):
            text = ""
        if not text or value is None or isinstance(value, Mapping):
            raise CellbenchError(f"set: {key} is {value!r}. Expected a number, a string, True or False, or a list of them.")
        changes.append(f"{key}={text}")
    return tuple(changes)


def _call(experiment: Place | Mapping[str, Any] | None, data: Place | None) -> str:
    """The call in short, for the report."""
    what = [] if experiment is None else ["{…}" if isinstance(experiment, Mapping) else repr(os.fspath(experiment))]
    return f"cellbench.grid({', '.join(what + ([f'data={os.fspath(data)!r}'] if data is not None else []))})"


def _reasons(outcome: Outcome) -> str:
    """Why runs have no result, the first reason of each kind."""
    reasons = [
        f"{len(some)} {kind}, first {name}: {reason}"
        for kind, some in (("skipped", outcome.skipped), ("failed", outcome.failed))
        for name, reason in list(some.items())[:1]
    ]
    return "; ".join([*reasons, *([f"{len(outcome.missing)} missing"] if outcome.missing else [])])


def _no_line(text: str) -> None:
    """The leaderboard and the verdict are returned, not printed."""
