"""``search``: settings are sought instead of listed, many trials to each pass of a backbone.

Its processes work on batches of trials, which end after validation: the best setting alone is tested, at the end, as a grid of its own with
several seeds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cellbench.config.experiment import Experiment
from cellbench.config.loading import read_space
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.config.search_space import Space
from cellbench.console import say
from cellbench.data.audit import quick_check
from cellbench.data.dataset import Dataset
from cellbench.errors import CellbenchError
from cellbench.execution import multiprocess as processes
from cellbench.execution import ray_cluster, ray_grid, ray_search
from cellbench.execution.artifacts import pool_folds
from cellbench.execution.grid import Executor, InProcessExecutor, parent_run
from cellbench.execution.planning import open_folds, resolve_runs
from cellbench.execution.runner import Runner
from cellbench.execution.worker_job import JobSpec, job_spec
from cellbench.features.cache_admin import cache_budget
from cellbench.hardware import Hardware, detect_hardware
from cellbench.models.backbones.weights import weights_folder
from cellbench.reporting.report import log_request
from cellbench.search import results as search_results
from cellbench.search.study import DEFAULT, Study
from cellbench.search.worker import SearchWorker
from cellbench.tracking import relocate
from cellbench.tracking.schema import RunState
from cellbench.tracking.system_metrics import log_system_metrics
from cellbench.tracking.tracker import Tracker


@dataclass(kw_only=True)
class StopRequest:
    """When a search ends before its trials do: at its deadline, or with Ctrl-C, once after the batch that runs, twice at once."""

    deadline_s: float = float("inf")
    """On time's monotonic clock."""
    asked: bool = False
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """They have sessions of their own: the terminal's Ctrl-C reaches them through this process, once."""
    leader: int = 0
    """The process that a helper helps; when that is gone, the helper's batch is its last too."""

    def over(self) -> bool:
        return self.asked or time.monotonic() > self.deadline_s or (self.leader > 0 and os.getppid() != self.leader)

    @contextlib.contextmanager
    def heard(self) -> Iterator[StopRequest]:
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        for process in self.helpers:
            process.send_signal(signal.SIGINT)
        say("ending after this batch; Ctrl-C once more ends at once. Nothing that is told is lost either way.")


def search(
    file: str,
    *,
    trials: int | None = None,
    timeout_s: float | None = None,
    workers: int = 1,
    storage: str | None = None,
    helper: int = 0,
    on: str | None = None,
    gpu_share: float = 1.0,
    here: Hardware | None = None,
    changes: Sequence[str] = (),
    data: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    memory: str = "auto",
    cache: str | None = None,
    cache_url: str | None = None,
    extra: Path | None = None,
    limit: int | None = None,
    text: str | None = None,
) -> int:
    """``cellbench search``. Exit code 0; 130 where Ctrl-C ended it.

    ``helper``: of a worker beside the first one, which only works on trials, its number. ``here``: its share of a machine elsewhere. ``text``:
    what the first one read, changes included; ``file`` is then only its name.
    """
    deadline_s = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    disk, _ = cache_budget(cache, cache_url)
    registry = Registry(extra)
    changes = [*changes, *([f"search.trials={trials}"] if trials is not None else [])]
    if text is None:
        space, text = read_space(file, changes, data, limit, registry)
    else:
        space = Space.of(tomllib.loads(text), file, registry)
    weights = weights_folder(weights)
    if workers != 1 and on is not None:
        raise CellbenchError("--workers and --on: either processes of this machine or a cluster. Give one of them.")
    if on is not None:
        ray_cluster.check_address(on, gpu_share)
    whole = here or detect_hardware(device, precision, memory, elsewhere=on is not None)
    shares = whole.shares(processes.check_num_workers(workers, whole))
    pins = processes.assign_cores(shares) if workers > 1 else [[]]
    experiment = Experiment.of(space.tree({one.name: one.ends[0] for one in space.dimensions if not one.head}), file)
    datasets = open_folds(experiment, registry, data)
    dataset = datasets[space.fold]
    check_backbones(space, registry, datasets, weights, file, whole.precision_name)
    for line in (
        ()
        if helper
        else (*dataset.notes, *quick_check.severe_findings(registry.dataset(experiment.dataset), dataset), *relocate.fix_artifact_paths())
    ):
        say(line)
    url = storage or os.environ.get("OPTUNA_STORAGE") or DEFAULT
    if url.startswith("sqlite:///"):  # a process elsewhere may have another folder
        url = f"sqlite:///{Path(url.removeprefix('sqlite:///')).absolute()}"
    asked = {**space.asked, "images": dataset.digest, "precision": whole.precision_name}
    tracker = Tracker(space.experiment)
    with (
        ray_cluster.connect(on, whole) if on is not None else contextlib.nullcontext() as ray,
        Study(url, space.experiment, space.settings, space.dimensions, asked, max_epochs(space)) as study,
        StopRequest(deadline_s=deadline_s).heard() as stop,
    ):
        key = space.digest([dataset.digest])
        top = (
            _top_of(tracker, key)
            if helper
            else parent_run(tracker, f"search: {Path(file).stem}", key, _params(space, dataset), pool_folds(datasets), kind="search")
        )
        with top as run:
            runner = Runner(
                experiment=experiment, registry=registry, datasets=datasets, machine=shares[helper if here is None else 0], weights=weights, tracker=tracker,
                parent_id=run.run_id, disk_bytes=disk, prefer_disk=True, say=say,
            )  # fmt: skip
            worker = SearchWorker(space=space, study=study, runner=runner, where=file)
            if helper:
                stop.leader = os.getppid()
                with tqdm(disable=True) as bar, processes.pin_to_cores(pins[helper] if here is None else []):
                    worker.work(stop.over, bar)
                return 0
            request = log_request(run, text, dataset, whole.name)
            told = job_spec(
                experiment, run.run_id, whole, where=file, data=data, weights=weights, extra=extra, disk_bytes=disk, prefer_disk=True
            )  # fmt: skip
            place = str(Path(file).absolute()) if Path(file).is_file() else file
            work = partial(
                help_search, file=place, text=text, storage=url, seconds=timeout_s and deadline_s - time.monotonic()
            )  # fmt: skip
            before = [t for t in study.told() if t.state != "running"]
            say(
                f"{space.experiment}: {space.settings.trials} trials, {len(before)} of them told already, in batches of {space.settings.batch}, "
                f"on {dataset.name} ({len(dataset.train)} training and {len(dataset.val)} validation images), on {whole.name}."
            )
            for sentence in search_results.sync_study(study, tracker):
                say(sentence)
            try:
                total, desc = space.settings.trials, space.experiment
                bar = tqdm(total=total, initial=len(before), desc=desc, unit="trial", dynamic_ncols=True)
                with log_system_metrics(tracker, [run.run_id]), bar:
                    if ray is not None:
                        params_m = max(registry.backbone(str(name)).params_m for name in _named(space))
                        num = -(-(space.settings.trials - len(before)) // space.settings.batch)
                        with ray_search.SearchHelpers(ray, told, url, work, num, params_m, gpu_share) as helpers:
                            _followed(helpers, study, stop, worker, bar)
                    else:
                        with _helpers(workers, stop, text), processes.pin_to_cores(pins[0]):
                            worker.work(stop.over, bar)
                            _wait(study, stop, worker, bar)
            finally:
                with contextlib.suppress(CellbenchError):
                    search_results.log_progress(space, study, run)
            left = space.settings.trials - sum(t.state != "running" for t in study.told())
            if stop.asked or left > 0:
                why = "Ctrl-C" if stop.asked else "the time is over"
                say(f"{why}: {left} trials are left, and the best is not tested yet. The same command goes on.")
                run.end("interrupted", why)
                return 130 if stop.asked else 0
            runner = replace(runner, watch=None, machine=whole)

            def crew_of(best: Experiment) -> Executor:
                return ray_grid.RayExecutor(ray, replace(told, experiment=best), gpu_share) if ray is not None else InProcessExecutor()

            return search_results.test_best(space, study, runner, run, request, crew_of)


def help_search(
    order: JobSpec, *, file: str, text: str, storage: str, seconds: float | None
) -> None:  # fmt: skip
    """Works on the trials of a search that was started elsewhere, until all are told. Raises CellbenchError."""
    search(
        file, helper=1, here=order.machine, text=text, storage=storage, timeout_s=seconds,
        data=order.data, weights=order.weights, extra=order.extra, cache=f"{order.cache}:{order.disk_bytes // 2**20}M",
    )  # fmt: skip




def max_epochs(space: Space) -> int:
    """The most that a trial may take."""
    for one in space.dimensions:
        if one.name == "epochs":
            return int(max(float(x) for x in one.ends))
    return int(space.run.get("epochs", RunSpec.model_fields["epochs"].default))


def _named(space: Space) -> Sequence[Any]:
    return next(one.choices for one in space.dimensions if one.name == "backbone")


def check_backbones(
    space: Space, registry: Registry, datasets: Sequence[Dataset], weights: Path | None, where: str, precision: str
) -> None:
    """Refuses a space with a backbone that cannot be had: its trials would all fail."""
    base = {one.name: one.ends[0] for one in space.dimensions if not one.head}
    for name in _named(space):
        (job,) = resolve_runs(
            Experiment.of(space.tree({**base, "backbone": name}), where), registry, datasets, weights, where, precision=precision
        )
        if job.unavailable:
            raise CellbenchError(f"{where}: [space] backbone '{name}': {job.unavailable} Or take it out of the list.")


def _params(space: Space, dataset: Dataset) -> dict[str, str]:
    return {name: value for name, value in space.asked.items() if not name.startswith(("data.", "run."))} | {"dataset": dataset.name}


@contextlib.contextmanager
def _top_of(tracker: Tracker, key: str) -> Iterator[RunState]:
    """The parent run that the first worker holds open."""
    found = tracker.known().get(key)
    if found is None:
        raise CellbenchError("the search that this worker was to help is not there.")
    yield found


@contextlib.contextmanager
def _helpers(workers: int, stop: StopRequest, text: str) -> Iterator[None]:
    """The other workers, as processes of this same command, which read ``text`` instead of the file; they end with their search."""
    call = [sys.executable, "-m", "cellbench.run", *sys.argv[1:], "--helper"]
    numbers = range(1, workers)
    stop.helpers = [
        subprocess.Popen([*call, str(k)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) for k in numbers
    ]
    for process in stop.helpers:
        with contextlib.suppress(OSError), process.stdin as pipe:  # one that ended at once says why itself
            pipe.write(text.encode())
    try:
        yield
    except BaseException:
        for process in stop.helpers:
            process.terminate()
        raise
    finally:
        for process in stop.helpers:
            process.wait()


def _wait(study: Study, stop: StopRequest, worker: SearchWorker, bar: tqdm) -> None:
    """Until the other workers' trials are told, too; those of a worker that died meanwhile are taken up."""
    while not stop.over() and any(t.state == "running" for t in study.told()):
        time.sleep(2)
        worker.work(stop.over, bar)


def _followed(helpers: ray_search.SearchHelpers, study: Study, stop: StopRequest, worker: SearchWorker, bar: tqdm) -> None:
    """Until the trials are told by processes elsewhere, or Ctrl-C ends those: what they were at goes on from its checkpoints."""
    while not stop.over() and helpers.working:
        if words := helpers.look(2.0):
            say(words)
        worker.show(study.told(), bar)
