"""``search``: settings are sought instead of listed, many trials to each pass of a backbone.

A batch of trials is asked for, grouped into cohorts as a grid's runs are, trained and pruned together, and told. Trials end after
validation: the best setting alone is tested, at the end, as a grid of its own with several seeds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from tqdm import tqdm

from cellbench import moved, on_ray, ray_cohorts, ray_helpers
from cellbench import workers as processes
from cellbench.backbones.weights import weights_folder
from cellbench.commands import cache_budget, open_folds, read_tree, say
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.errors import CellbenchError
from cellbench.grid import Crew, alone, everything, parent
from cellbench.jobs import Job, jobs_of
from cellbench.logged import STATUS, Logged, params_of
from cellbench.machine import Machine, machine
from cellbench.orders import Order, order
from cellbench.registry import Registry
from cellbench.report import about, conclude
from cellbench.runner import Outcome, Runner
from cellbench.space import Space
from cellbench.spec import Experiment, RunSpec, cohorts
from cellbench.study import DEFAULT, REASON, RUN_ID, SAME, Pending, Study, Told
from cellbench.study_figures import pictures, table
from cellbench.system import watched
from cellbench.track import Run, Tracker

TRIAL, STUDY, STATE = "optuna.trial", "optuna.study", "optuna.state"
"""Tags of a trial's run in MLflow."""


@dataclass(kw_only=True)
class Stop:
    """Ctrl-C: once, the batch that runs is the last; twice, at once."""

    asked: bool = False
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """They have sessions of their own: the terminal's Ctrl-C reaches them through this process, once."""
    leader: int = 0
    """The process that a helper helps; when that is gone, the helper's batch is its last too."""

    @property
    def now(self) -> bool:
        return self.asked or (self.leader > 0 and os.getppid() != self.leader)

    @contextlib.contextmanager
    def heard(self) -> Iterator[Stop]:
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


@dataclass(kw_only=True)
class Worker:
    """Asks for batches, runs them and tells what came of them, until all are told."""

    space: Space
    study: Study
    runner: Runner
    where: str

    def __post_init__(self) -> None:
        self.runner.watch = self
        self._by_job: dict[str, Pending] = {}

    def work(self, stop: Stop, deadline_s: float, bar: tqdm) -> None:
        """Raises CellbenchError where the first trials all fail."""
        while not stop.now and time.monotonic() < deadline_s:
            batch = self.study.ask()
            if not batch:
                return
            self._batch(batch)
            told = self.study.told()
            self.show(told, bar)
            failed = [t for t in told if t.state == "failed"]
            if len(failed) >= self.space.settings.max_failed and not any(t.state in ("complete", "pruned") for t in told):
                raise CellbenchError(
                    f"the first {len(failed)} trials have all failed, so the search stops. Trial {failed[0].number}: {failed[0].reason}"
                )

    def show(self, told: list[Told], bar: tqdm) -> None:
        bar.n = sum(t.state != "running" for t in told)
        best = self.study.best()
        bar.set_postfix_str(f"best {self.space.settings.objectives[0]} {best[0].values[0]:.4f} (trial {best[0].number})" if best else "")

    # --- one batch ----------------------------------------------------------------------------------------------------------------

    def _batch(self, batch: Sequence[Pending]) -> None:
        jobs: list[tuple[Pending, Job]] = []
        seen = {t.same for t in self.study.told() if t.state == "complete"}
        again = []
        for pending in batch:
            try:
                job = self._job(pending)
            except CellbenchError as error:  # two settings that cannot go together: a fact about the space, worth a told trial
                self.study.note(pending, REASON, str(error))
                self.study.tell_failed(pending, str(error))
                continue
            same = hashlib.sha256(repr(job.run).encode()).hexdigest()[:16]
            self.study.note(pending, SAME, same)
            (again if same in seen else jobs).append((pending, job))
            seen.add(same)
        self._train(jobs)
        told = {t.same: t for t in self.study.told() if t.state == "complete"}
        same_of = {t.number: t.same for t in self.study.told()}
        for pending, job in again:
            first = told.get(same_of[pending.number])
            self._train([(pending, job)]) if first is None else self._copy(pending, job, first)

    def _job(self, pending: Pending) -> Job:
        experiment = Experiment.of(self.space.tree(pending.point), self.where)
        (job,) = jobs_of(experiment, self.runner.registry, self.runner.datasets, self.runner.weights, self.where)
        # Of this trial in this study: a run of a grid with these settings is tested, and this one must not be.
        own = hashlib.sha256(f"{job.fingerprint}:{self.study.name}:{pending.number}".encode()).hexdigest()[:16]
        return replace(job, name=f"trial {pending.number} · {job.run.model}", fingerprint=own)

    def _train(self, jobs: Sequence[tuple[Pending, Job]]) -> None:
        self._by_job = {job.fingerprint: pending for pending, job in jobs}
        by_run = {id(job.run): (pending, job) for pending, job in jobs}
        groups = cohorts(job.run for _, job in jobs)
        for group in groups:
            members = [by_run[id(run)] for run in group]
            out = Outcome()
            numbers = ", ".join(str(pending.number) for pending, _ in members)
            self.runner.cohort([job for _, job in members], f"trial{'s' * (len(members) > 1)} {numbers}", out)
            for pending, job in members:
                self._tell(pending, job, out)

    def _tell(self, pending: Pending, job: Job, out: Outcome) -> None:
        if job.name in out.busy:
            return  # its run is another process's: so is its trial
        ended = out.validated.get(job.name) or out.pruned.get(job.name)
        if ended is None:
            self.study.tell_failed(pending, out.failed.get(job.name, "no result"))
        elif ended.status == "pruned":
            self.study.tell_pruned(pending, contract(ended.metrics), ended.reason)
        else:
            self.study.tell(pending, contract(ended.metrics))

    def _copy(self, pending: Pending, job: Job, first: Told) -> None:
        """The trial has the settings of one that is told: the same numbers would come of it, so they are taken."""
        tracker, metrics = self.runner.tracker, {name.replace("val/", "best/val_"): value for name, value in first.metrics.items()}
        with tracker.run(job.name, job.fingerprint, parent=self.runner.parent_id, known=tracker.known().get(job.fingerprint)) as run:
            run.log(metrics, params=params_of(job.run, self.runner.dataset.name), tags={"cellbench.same_as": first.run_id})
            self.opened(job, run, pending)
            run.end("validated", f"the settings of trial {first.number}, whose numbers these are")
        self.study.tell(pending, first.metrics)

    # --- followed by the runner ---------------------------------------------------------------------------------------------------

    def opened(self, job: Job, run: Run, pending: Pending | None = None) -> None:
        """Each half learns of the other before anything is trained."""
        pending = pending or self._by_job[job.fingerprint]
        self.study.note(pending, RUN_ID, run.run_id)
        run.log({}, tags={STUDY: self.study.name, TRIAL: str(pending.number)})

    def epoch(self, job: Job, epoch: int, metrics: dict[str, float]) -> bool:
        objective = self.space.settings.objectives[0]
        if self.space.settings.pruner == "none" or objective not in metrics:
            return True
        return self.study.goes_on(self._by_job[job.fingerprint], epoch, metrics[objective])


def contract(metrics: Any) -> dict[str, float]:
    """A validated run's numbers under the names that a search may seek."""
    return {name.replace("best/val_", "val/"): float(value) for name, value in metrics.items() if name.startswith(("best/val_", "cost/"))}


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
    here: Machine | None = None,
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
) -> int:
    """``cellbench search``. Exit code 0; 130 where Ctrl-C ended it.

    ``helper``: of a worker beside the first one, which only works on trials, its number. ``here``: its share of a machine elsewhere.
    """
    started_s = time.monotonic()
    disk, _ = cache_budget(cache, cache_url)
    registry = Registry(extra)
    changes = [*changes, *([f"search.trials={trials}"] if trials is not None else [])]
    space, text = read_space(file, changes, data, limit, registry)
    weights = weights_folder(weights)
    if workers != 1 and on is not None:
        raise CellbenchError("--workers and --on: either processes of this machine or a cluster. Give one of them.")
    if on is not None:
        on_ray.checked(on, gpu_share)
    whole = here or machine(device, precision, memory, elsewhere=on is not None)
    shares = whole.shares(processes.checked(workers, whole))
    pins = processes.cores_of(shares) if workers > 1 else [[]]
    experiment = Experiment.of(space.tree({one.name: one.ends[0] for one in space.dimensions if not one.head}), file)
    datasets = open_folds(experiment, registry, data)
    dataset = datasets[space.fold]
    backbones(space, registry, datasets, weights, file)
    for line in () if helper else (*dataset.notes, *moved.heal()):
        say(line)
    url = storage or os.environ.get("OPTUNA_STORAGE") or DEFAULT
    if url.startswith("sqlite:///"):  # a process elsewhere may have another folder
        url = f"sqlite:///{Path(url.removeprefix('sqlite:///')).absolute()}"
    asked = {**space.asked, "images": dataset.digest}
    tracker = Tracker(space.experiment)
    with (
        on_ray.joined(on, whole) if on is not None else contextlib.nullcontext() as ray,
        Study(url, space.experiment, space.settings, space.dimensions, asked, epochs(space)) as study,
        Stop().heard() as stop,
    ):
        key = space.digest([dataset.digest])
        top = (
            _top_of(tracker, key) if helper else parent(tracker, f"search: {Path(file).stem}", key, _params(space, dataset), kind="search")
        )
        with top as run:
            runner = Runner(
                experiment=experiment, registry=registry, datasets=datasets, machine=shares[helper if here is None else 0], weights=weights, tracker=tracker,
                parent_id=run.run_id, disk_bytes=disk, prefer_disk=True, say=say,
            )  # fmt: skip
            worker = Worker(space=space, study=study, runner=runner, where=file)
            deadline_s = started_s + timeout_s if timeout_s is not None else float("inf")
            if helper:
                stop.leader = os.getppid()
                with tqdm(disable=True) as bar, processes.pinned(pins[helper] if here is None else []):
                    worker.work(stop, deadline_s, bar)
                return 0
            told = order(
                experiment, run.run_id, whole, where=file, data=data, weights=weights, extra=extra, disk_bytes=disk, prefer_disk=True
            )  # fmt: skip
            place = str(Path(file).absolute()) if Path(file).is_file() else file
            work = partial(
                helped, file=place, changes=changes, limit=limit, storage=url, seconds=timeout_s and timeout_s - (time.monotonic() - started_s)
            )  # fmt: skip
            before = [t for t in study.told() if t.state != "running"]
            say(
                f"{space.experiment}: {space.settings.trials} trials, {len(before)} of them told already, in batches of {space.settings.batch}, "
                f"on {dataset.name} ({len(dataset.train)} training and {len(dataset.val)} validation images), on {whole.name}."
            )
            for sentence in reconcile(study, tracker):
                say(sentence)
            try:
                total, desc = space.settings.trials, space.experiment
                bar = tqdm(total=total, initial=len(before), desc=desc, unit="trial", dynamic_ncols=True)
                with watched(tracker, [run.run_id]), bar:
                    if ray is not None:
                        params_m = max(registry.backbone(str(name)).params_m for name in _named(space))
                        num = -(-(space.settings.trials - len(before)) // space.settings.batch)
                        with ray_helpers.Helpers(ray, told, url, work, num, params_m, gpu_share) as helpers:
                            _followed(helpers, study, stop, worker, bar, deadline_s)
                    else:
                        with _helpers(workers, stop), processes.pinned(pins[0]):
                            worker.work(stop, deadline_s, bar)
                            _wait(study, stop, worker, bar, deadline_s)
            finally:
                with contextlib.suppress(CellbenchError):
                    _picture(space, study, run)
            left = space.settings.trials - sum(t.state != "running" for t in study.told())
            if stop.asked or left > 0:
                why = "Ctrl-C" if stop.asked else "the time is over"
                say(f"{why}: {left} trials are left, and the best is not tested yet. The same command goes on.")
                run.end("interrupted", why)
                return 130 if stop.asked else 0
            runner = replace(runner, watch=None, machine=whole)
            return _test(space, study, runner, run, text, lambda best: ray_cohorts.Crew(ray, replace(told, experiment=best), gpu_share) if ray else alone)


def helped(
    order: Order, *, file: str, changes: Sequence[str], limit: int | None, storage: str, seconds: float | None
) -> None:  # fmt: skip
    """Works on the trials of a search that was started elsewhere, until all are told. Raises CellbenchError."""
    search(
        file, helper=1, here=order.machine, changes=changes, limit=limit, storage=storage, timeout_s=seconds,
        data=order.data, weights=order.weights, extra=order.extra, cache=f"{order.cache}:{order.disk_bytes // 2**20}M",
    )  # fmt: skip


def read_space(file: str, changes: Sequence[str], data: Path | None, limit: int | None, registry: Registry) -> tuple[Space, str]:
    """The space of a file, or of a shipped file's name, and the file's text. Raises CellbenchError."""
    path, tree = read_tree(file, changes, limit)
    if "space" not in tree:
        raise CellbenchError(f"{path}: has no [space] in which to search. `cellbench grid {file}` runs it as it is.")
    space = Space.of(tree, str(path), registry)
    if data is not None and registry.dataset(space.dataset).draw:
        tree["dataset"] = "folder"
        tree.get("data", {}).pop("draw", None)
        tree["experiment"] = f"{space.experiment} on {data.absolute().name}"
        space = Space.of(tree, str(path), registry)
    return space, path.read_text(encoding="utf-8")


def epochs(space: Space) -> int:
    """The most that a trial may take."""
    for one in space.dimensions:
        if one.name == "epochs":
            return int(max(float(x) for x in one.ends))
    return int(space.run.get("epochs", RunSpec.model_fields["epochs"].default))


def _named(space: Space) -> Sequence[Any]:
    return next(one.choices for one in space.dimensions if one.name == "backbone")


def backbones(space: Space, registry: Registry, datasets: Sequence[Dataset], weights: Path | None, where: str) -> None:
    """Refuses a space with a backbone that cannot be had: its trials would all fail."""
    base = {one.name: one.ends[0] for one in space.dimensions if not one.head}
    for name in _named(space):
        (job,) = jobs_of(Experiment.of(space.tree({**base, "backbone": name}), where), registry, datasets, weights, where)
        if job.unavailable:
            raise CellbenchError(f"{where}: [space] backbone '{name}': {job.unavailable} Or take it out of the list.")


def _params(space: Space, dataset: Dataset) -> dict[str, str]:
    return {name: value for name, value in space.asked.items() if not name.startswith(("data.", "run."))} | {"dataset": dataset.name}


@contextlib.contextmanager
def _top_of(tracker: Tracker, key: str) -> Iterator[Logged]:
    """The parent run that the first worker holds open."""
    found = tracker.known().get(key)
    if found is None:
        raise CellbenchError("the search that this worker was to help is not there.")
    yield found


@contextlib.contextmanager
def _helpers(workers: int, stop: Stop) -> Iterator[None]:
    """The other workers, as processes of this same command; they end with their search."""
    call = [sys.executable, "-m", "cellbench.run", *sys.argv[1:], "--helper"]
    numbers = range(1, workers)
    stop.helpers = [subprocess.Popen([*call, str(k)], stdout=subprocess.DEVNULL, start_new_session=True) for k in numbers]
    try:
        yield
    except BaseException:
        for process in stop.helpers:
            process.terminate()
        raise
    finally:
        for process in stop.helpers:
            process.wait()


def _wait(study: Study, stop: Stop, worker: Worker, bar: tqdm, deadline_s: float) -> None:
    """Until the other workers' trials are told, too; those of a worker that died meanwhile are taken up."""
    while not stop.asked and time.monotonic() < deadline_s and any(t.state == "running" for t in study.told()):
        time.sleep(2)
        worker.work(stop, deadline_s, bar)


def _followed(helpers: ray_helpers.Helpers, study: Study, stop: Stop, worker: Worker, bar: tqdm, deadline_s: float) -> None:
    """Until the trials are told by processes elsewhere, or Ctrl-C ends those: what they were at goes on from its checkpoints."""
    while not stop.asked and time.monotonic() < deadline_s and helpers.working:
        if words := helpers.look(2.0):
            say(words)
        worker.show(study.told(), bar)


def reconcile(study: Study, tracker: Tracker) -> list[str]:
    """Marks what only one of the two stores still has, and removes nothing. Gives sentences for people."""
    trials = {t.number: t for t in study.told()}
    runs = {run.run_id: run for run in tracker.stored() if run.tags.get(STUDY) == study.name}
    lost_runs = [t.number for t in trials.values() if t.run_id and t.run_id not in runs]
    known = {t.run_id for t in trials.values()}
    orphans = [run for run in runs.values() if run.run_id not in known and run.tags.get(STATE) != "lost"]
    sentences = []
    if lost_runs:
        study.mark("lost_runs", lost_runs)
        sentences.append(
            f"MLflow has lost the runs of {len(lost_runs)} trials ({', '.join(map(str, lost_runs[:5]))}); their values are kept in the study."
        )
    for run in orphans:
        tracker.client.set_tag(run.run_id, STATE, "lost")
        if run.status == "running":
            tracker.client.set_tag(run.run_id, STATUS, "interrupted")
    if orphans:
        sentences.append(f"the study has lost the trials of {len(orphans)} runs in MLflow; they are marked {STATE} = lost and stay.")
    return sentences


def _picture(space: Space, study: Study, run: Run) -> None:
    """The study so far onto its parent run: curves, pictures, the table, and the best setting as a file that ``grid`` runs."""
    told, best = study.told(), study.best()
    sign, record = (1 if space.settings.directions[0] == "maximize" else -1), None
    for t in told:
        if (
            t.state == "complete"
            and all(over <= 0 for over in space.settings.excess(t.metrics).values())
            and (record is None or sign * t.values[0] > sign * record)
        ):
            record = t.values[0]
            run.keep(t.number, {"search/best": record})
    run.log({f"search/{state}": sum(t.state == state for t in told) for state in ("complete", "pruned", "failed")})
    with tempfile.TemporaryDirectory(prefix="cellbench-") as name:
        folder = Path(name)
        (folder / "trials.csv").write_text(table(told, space), encoding="utf-8")
        if best:
            (folder / "best.toml").write_text(best_file(space, best[0]), encoding="utf-8")
        (folder / "figures").mkdir()
        for title, data in pictures(study, space):
            (folder / "figures" / f"{title}.png").write_bytes(data)
        run.artifacts(folder)


def best_file(space: Space, best: Told) -> str:
    """The best setting as an experiment file, for ``grid``."""
    seed = int(space.run.get("seed", 0))
    tree = space.tree(best.point, seeds=range(seed, seed + space.settings.repeat_best))
    found = ", ".join(f"{name} {value:.6g}" for name, value in zip(space.settings.objectives, best.values, strict=True))
    head = f"# The best setting of the search '{space.experiment}': trial {best.number}, {found}"
    return f"{head}\n#   python -m cellbench.run grid best.toml\n{tomli_w.dumps(tree)}"


def _test(space: Space, study: Study, runner: Runner, run: Run, text: str, crew_of: Callable[[Experiment], Crew]) -> int:
    """The best trial's setting, and no other, is tested: as a grid, with its seeds."""
    best = study.best()
    if not best:
        say("no trial was told that keeps the bounds, so there is no best one to test.")
        return 0
    seed = int(space.run.get("seed", 0))
    experiment = Experiment.of(space.tree(best[0].point, seeds=range(seed, seed + space.settings.repeat_best)), "best.toml")
    runner = replace(runner, experiment=experiment)
    jobs = jobs_of(experiment, runner.registry, runner.datasets, runner.weights, "best.toml")
    found = ", ".join(f"{name} {value:.4f}" for name, value in zip(space.settings.objectives, best[0].values, strict=True))
    setting = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in best[0].point.items())
    say(f"best is trial {best[0].number}: {found} ({setting}). It is now trained with {len(jobs)} seeds and tested.")
    if len(space.settings.objectives) > 1:
        say(f"{len(best)} trials are on the front of {' and '.join(space.settings.objectives)}: figures/pareto.png, trials.csv.")
    outcome = everything(runner, jobs, crew_of(experiment))
    ids = {logged.run_id for logged in outcome.finished.values()}
    splits = {split: [sample.name for sample in runner.datasets[space.fold].samples(split)] for split in SPLITS}
    conclude(runner.tracker, run, ids, about(text, runner.datasets[space.fold], runner.machine.name), splits, outcome.skipped, outcome.failed, say)
    tests = [logged.metrics["test/dice"] for logged in outcome.finished.values() if "test/dice" in logged.metrics]
    if tests:
        run.log({"search/test_dice": sum(tests) / len(tests)})
    say(f"best.toml, trials.csv and pictures are artifacts of the parent run: `cellbench ui`, experiment '{space.experiment}'.")
    return 1 if outcome.failed else 0
