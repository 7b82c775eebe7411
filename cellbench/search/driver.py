"""Runs a search from its file to the test of its best setting: prepare, spawn, follow, conclude.

Its processes work on batches of trials, which end after validation. Only the best setting is tested, at the end, as a separate grid with several
seeds.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cellbench import startup
from cellbench.config.experiment import Experiment
from cellbench.config.loading import read_space
from cellbench.config.options import SearchOptions
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.config.search_space import Space
from cellbench.config.trust import describe_code
from cellbench.console import say, say_lines
from cellbench.data.audit import quick_check
from cellbench.data.dataset import Dataset
from cellbench.data.loading import open_folds, pool_folds
from cellbench.errors import CellbenchError
from cellbench.execution import ray_cluster, ray_grid, ray_search
from cellbench.execution.grid import Executor, InProcessExecutor
from cellbench.execution.multiprocess import assign_cores, pin_to_cores
from cellbench.execution.planning import resolve_tree
from cellbench.execution.resources import Resources, check_options, prepare_cache
from cellbench.execution.runner import Runner
from cellbench.execution.worker_job import JobSpec, job_spec
from cellbench.files import parse_toml
from cellbench.hardware import Hardware
from cellbench.metrics.catalog import search_objectives
from cellbench.reporting.report import log_request
from cellbench.reporting.stored_records import RunRequest
from cellbench.search import best_setting
from cellbench.search import results as search_results
from cellbench.search.study import DEFAULT, Study
from cellbench.search.worker import SearchProgress, SearchWorker
from cellbench.tracking import relocate
from cellbench.tracking.open_run import Run
from cellbench.tracking.store_address import absolute
from cellbench.tracking.tracker import Tracker


@dataclass(kw_only=True)
class StopRequest:
    """Whether a search stops early: at its deadline, on Ctrl-C, or when its main process is gone."""

    deadline_s: float = float("inf")
    """On the clock of :func:`time.monotonic`."""
    interrupted: bool = False
    parent_pid: int = 0
    """Process id of the main process, in a helper. If the main process is gone, the helper stops after its current batch."""
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Helper processes of this one. They have their own sessions, so the terminal's Ctrl-C does not reach them."""

    @classmethod
    def after(cls, timeout_s: float | None) -> StopRequest:
        return cls() if timeout_s is None else cls(deadline_s=time.monotonic() + timeout_s)

    def over(self) -> bool:
        return self.interrupted or time.monotonic() > self.deadline_s or (self.parent_pid > 0 and os.getppid() != self.parent_pid)


# --- prepare --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search file with its data and its resources."""

    space: Space
    text: str
    """The search file with the command's options applied."""
    file: str
    """Its path or name."""
    data: Path | None
    storage: str
    """URL of the study's database."""
    experiment: Experiment
    """Experiment of one point of the space."""
    datasets: list[Dataset]
    resources: Resources

    @property
    def dataset(self) -> Dataset:
        return self.datasets[self.space.fold]

    def study(self) -> Study:
        facts = {**self.space.facts, "images": self.dataset.digest, "precision": self.resources.machine.precision_name}
        return Study(self.storage, self.space, facts, max_epochs(self.space))

    def worker(self, study: Study, tracker: Tracker, parent_id: str, machine: Hardware) -> SearchWorker:
        """The worker that trains trials in this process, on ``machine``, its share of the resources."""
        runner = Runner(
            experiment=self.experiment,
            resources=replace(self.resources, machine=machine),
            datasets=self.datasets,
            tracker=tracker,
            parent_id=parent_id,
            say=say,
        )
        return SearchWorker(space=self.space, study=study, runner=runner, where=self.file)


def prepare(options: SearchOptions) -> SearchPlan:
    """Reads the file and the data, and prints notes on them. Raises CellbenchError."""
    check_options(options, elsewhere=options.on is not None)
    prepare_cache()
    registry = Registry(options.registry)
    say_lines(describe_code(registry, options.registry))
    space, text = read_space(options.file, options.all_changes, options.data, options.limit, registry, search_objectives(registry))
    resources = Resources.of(options, elsewhere=options.on is not None)  # after the file: it may measure the machine
    plan = plan_search(space, text, options.file, options.data, options.storage, resources)
    say_lines(plan.dataset.notes)
    quick_check.require_fit(plan.dataset, options.unfit, say, compares=False)
    say_lines(relocate.fix_artifact_paths())
    return plan


def plan_search(space: Space, text: str, file: str, data: Path | None, storage: str | None, resources: Resources) -> SearchPlan:
    url = absolute(storage or os.environ.get("OPTUNA_STORAGE") or DEFAULT)  # a process on another node may have another working folder
    experiment = Experiment.of(space.tree({one.name: one.ends[0] for one in space.dimensions if not one.head}), file)
    plan = SearchPlan(
        space=space,
        text=text,
        file=file,
        data=data,
        storage=url,
        experiment=experiment,
        datasets=open_folds(experiment, resources.registry, data),
        resources=replace(resources, prefer_disk=True),
    )
    _check_backbones(plan)
    return plan


def max_epochs(space: Space) -> int:
    """Maximum number of epochs of a trial."""
    for one in space.dimensions:
        if one.name == "epochs":
            return int(max(float(x) for x in one.ends))
    return int(space.run.get("epochs", RunSpec.model_fields["epochs"].default))


def _check_backbones(plan: SearchPlan) -> None:
    """Raises CellbenchError for a backbone without weights: all its trials would fail."""
    space = plan.space
    base = {one.name: one.ends[0] for one in space.dimensions if not one.head}
    for name in space.choices("backbone"):
        _, (resolved,) = resolve_tree(space.tree({**base, "backbone": name}), plan.resources, plan.datasets, plan.file)
        if resolved.unavailable:
            raise CellbenchError(f"{plan.file}: [space] backbone '{name}': {resolved.unavailable} Or remove it from the list.")


# --- the main process -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchSession:
    """A running search: its study, its parent run in MLflow, and the worker of this process."""

    plan: SearchPlan
    study: Study
    parent: Run
    request: RunRequest
    worker: SearchWorker
    tracker: Tracker
    job: JobSpec
    """The job for processes on other nodes."""
    ray: Any = None
    gpu_share: float = 1.0

    @property
    def num_left(self) -> int:
        return self.plan.space.settings.trials - sum(t.state != "running" for t in self.study.trials())


def search(plan: SearchPlan, options: SearchOptions, stop: StopRequest) -> int:
    """Runs a search. Returns exit code 0, 130 after Ctrl-C, or 1 if a run of the test failed."""
    with _open(plan, options) as session:
        startup.freeze_imports()  # of torch and MLflow
        try:
            num = plan.space.settings.trials
            with SearchProgress(num, num - session.num_left, say) as session.worker.progress:
                if session.ray is not None:
                    _follow_ray(session, stop)
                else:
                    _work_with_helpers(session, options.workers or 1, stop)
        finally:
            with contextlib.suppress(CellbenchError):
                search_results.log_progress(plan.space, session.study, session.parent)
        return _conclude(session, stop)


@contextlib.contextmanager
def _open(plan: SearchPlan, options: SearchOptions) -> Iterator[SearchSession]:
    space, dataset, resources = plan.space, plan.dataset, plan.resources
    tracker = Tracker(space.experiment)
    params = {name: value for name, value in space.facts.items() if not name.startswith(("data.", "run."))} | {"dataset": dataset.name}
    with (
        ray_cluster.connect(options.on, resources.machine) if options.on is not None else contextlib.nullcontext() as ray,
        plan.study() as study,
        tracker.parent_run(f"search: {Path(plan.file).stem}", _key(plan), params, pool_folds(plan.datasets), kind="search") as parent,
    ):
        session = SearchSession(
            plan=plan,
            study=study,
            parent=parent,
            request=log_request(parent, plan.text, dataset, resources.machine.name),
            worker=plan.worker(study, tracker, parent.run_id, resources.machine.shares(options.workers or 1)[0]),
            tracker=tracker,
            job=job_spec(plan.experiment, parent.run_id, resources, where=plan.file, data=plan.data),
            ray=ray,
            gpu_share=options.gpu_share,
        )
        settings = space.settings
        say(
            f"{space.experiment}: {settings.trials} trials, {settings.trials - session.num_left} of them finished, in batches of {settings.batch}, "
            f"on {dataset.name} ({len(dataset.train)} training and {len(dataset.val)} validation images), on {resources.machine.name}."
        )
        say_lines(search_results.sync_study(study, tracker))
        with parent.system_metrics():
            yield session


def _key(plan: SearchPlan) -> str:
    return plan.space.digest([plan.dataset.digest])


def _work_with_helpers(session: SearchSession, num_workers: int, stop: StopRequest) -> None:
    """Works on trials together with helper processes until all have ended; takes over the trials of a dead process."""
    cores = assign_cores(session.plan.resources.machine.shares(num_workers))[0] if num_workers > 1 else []
    with _spawn_helpers(num_workers - 1, session.plan.text, stop), pin_to_cores(cores):
        session.worker.work(stop.over)
        while not stop.over() and any(t.state == "running" for t in session.worker.show()):
            time.sleep(2)
            session.worker.work(stop.over)


@contextlib.contextmanager
def _spawn_helpers(num: int, text: str, stop: StopRequest) -> Iterator[None]:
    """Starts ``num`` helper processes with the same command, which read ``text`` instead of the file. They end with the search."""
    call = [sys.executable, "-m", "cellbench.run", *sys.argv[1:], "--helper"]
    stop.helpers = [
        subprocess.Popen([*call, str(k)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        for k in range(1, num + 1)
    ]
    for process in stop.helpers:
        assert process.stdin is not None
        with contextlib.suppress(OSError), process.stdin as pipe:  # a process that already exited has printed the reason
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


def _follow_ray(session: SearchSession, stop: StopRequest) -> None:
    """Waits until processes on other nodes have finished the trials. Ctrl-C kills these processes; their trials resume from checkpoints."""
    plan, settings = session.plan, session.plan.space.settings
    place = str(Path(plan.file).absolute()) if Path(plan.file).is_file() else plan.file
    seconds = None if stop.deadline_s == float("inf") else stop.deadline_s - time.monotonic()
    work = partial(help_search, file=place, text=plan.text, storage=plan.storage, seconds=seconds)
    num = -(-session.num_left // settings.batch)
    params_m = max(plan.resources.registry.backbone(str(name)).params_m for name in plan.space.choices("backbone"))
    with ray_search.SearchHelpers(session.ray, session.job, plan.storage, work, num, params_m, session.gpu_share) as helpers:
        while not stop.over() and helpers.working:
            if words := helpers.poll(2.0):
                say(words)
            session.worker.show()


def _conclude(session: SearchSession, stop: StopRequest) -> int:
    """Tests the best setting if all trials have ended."""
    if stop.interrupted or session.num_left > 0:
        why = "Ctrl-C" if stop.interrupted else "the time is over"
        say(f"{why}: {session.num_left} trials are left, and the best is not tested yet. The same command resumes.")
        session.parent.end("interrupted", why)
        return 130 if stop.interrupted else 0

    executor: Executor = InProcessExecutor()
    if session.ray is not None:
        executor = ray_grid.RayExecutor(session.ray, session.job, session.gpu_share)
    machine = session.plan.resources.machine
    return best_setting.test_best(
        session.plan.space, session.study, session.worker.runner, machine, session.parent, session.request, executor
    )


# --- the other processes --------------------------------------------------------------------------------------------------------------


def assist(plan: SearchPlan, machine: Hardware, cores: Sequence[int], stop: StopRequest) -> None:
    """Works on the trials of another process's search, on ``machine``, pinned to ``cores``, until all have ended. Raises CellbenchError."""
    tracker = Tracker(plan.space.experiment)
    with plan.study() as study:
        parent = tracker.known(_key(plan)).get(_key(plan))
        if parent is None:
            raise CellbenchError(f"the search '{plan.space.experiment}' has no parent run in MLflow's store, so it cannot be assisted.")
        worker = plan.worker(study, tracker, parent.run_id, machine)
        with pin_to_cores(cores):
            worker.work(stop.over)


def assist_here(options: SearchOptions, resources: Resources, text: str, stop: StopRequest) -> None:
    """Main function of a helper process (``--workers``). ``text``: the search file as the main process read it."""
    stop.parent_pid = os.getppid()
    plan = _plan_from_text(text, options.file, options.data, options.storage, resources)
    shares = resources.machine.shares(options.workers or 1)
    assist(plan, shares[options.helper], assign_cores(shares)[options.helper], stop)


def help_search(job: JobSpec, *, file: str, text: str, storage: str, seconds: float | None) -> None:
    """Main function of a worker on Ray. Raises CellbenchError."""
    stop = StopRequest.after(seconds)
    stop.parent_pid = os.getppid()  # Ray's own process on that node
    assist(_plan_from_text(text, file, job.data, storage, job.resources()), job.machine, [], stop)


def _plan_from_text(text: str, file: str, data: Path | None, storage: str | None, resources: Resources) -> SearchPlan:
    space = Space.of(parse_toml(text), file, resources.registry, search_objectives(resources.registry))
    return plan_search(space, text, file, data, storage, resources)
