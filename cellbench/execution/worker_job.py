"""What a process elsewhere needs to run cohorts of the same grid: small, picklable, and held against the driver's fingerprints.

A worker opens the data, the cards and the weights itself, from the same paths. Where they, or the code, are not the driver's, its runs have
other fingerprints, and it refuses: two versions of an experiment never end in one table.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from cellbench import __version__
from cellbench.config.experiment import Experiment
from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError
from cellbench.execution.planning import PlannedRun, open_folds, planned_runs
from cellbench.execution.runner import Outcome, Runner
from cellbench.features.extractor import FeaturePass
from cellbench.features.remote_cache import shared_url
from cellbench.files import cache_dir
from cellbench.hardware import Hardware
from cellbench.parallel import WorkerPool
from cellbench.tracking.schema import this_owner
from cellbench.tracking.sqlite_store import store_file, store_uri
from cellbench.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One grid as its workers are told of it. Paths are absolute; credentials are in no fields but ``store`` and ``cache_url``, which nothing shows."""

    experiment: Experiment
    parent_id: str
    machine: Hardware
    """Of the driver, or a worker's share of it."""
    where: str = ""
    """The experiment's file, for messages."""
    data: Path | None = None
    weights: Path | None = None
    extra: Path | None = None
    """Cards laid over the shipped ones."""
    disk_bytes: int = 0
    prefer_disk: bool = False
    cache: Path
    store: str
    cache_url: str = ""
    """Of the shared cache. Where there is one, machines may have a cache folder each."""

    def __repr__(self) -> str:
        return f"Order({self.experiment.experiment!r})"


def job_spec(
    experiment: Experiment,
    parent_id: str,
    machine: Hardware,
    *,
    where: str,
    data: Path | None,
    weights: Path | None,
    extra: Path | None,
    disk_bytes: int,
    prefer_disk: bool,
) -> JobSpec:
    """The order of a grid that was started here."""
    file = store_file()
    return JobSpec(
        experiment=experiment,
        parent_id=parent_id,
        machine=machine,
        where=where,
        data=data.absolute() if data else None,
        weights=weights.absolute() if weights else None,
        extra=extra.absolute() if extra else None,
        disk_bytes=disk_bytes,
        prefer_disk=prefer_disk,
        cache=cache_dir(),
        store=f"sqlite:///{file}" if file else store_uri(),
        cache_url=shared_url(),
    )


@dataclass(kw_only=True)
class WorkItem:
    """A cohort on its way: handed to one worker after the other until its runs have ended."""

    jobs: list[PlannedRun]
    title: str
    deaths: list[str]
    """How the workers ended that were lost over it."""

    @property
    def halvings(self) -> int:
        """The first loss may be chance; after another it is taken for a lack of memory."""
        return max(0, len(self.deaths) - 1)


MOST_DEATHS = 3


def work_items(groups: Sequence[Sequence[PlannedRun]], registry: Registry) -> list[WorkItem]:
    """The cohorts, the dearest first, so that the workers end together."""

    def price(jobs: Sequence[PlannedRun]) -> float:
        params_m = registry.backbone(jobs[0].run.backbone).params_m if jobs[0].run.backbone else 0.0
        return (10 + params_m) * max(job.run.epochs for job in jobs) + sum(job.run.epochs for job in jobs)

    made = [WorkItem(jobs=list(jobs), title=f"cohort {k} of {len(groups)}", deaths=[]) for k, jobs in enumerate(groups, 1)]
    return sorted(made, key=lambda piece: -price(piece.jobs))


@functools.cache
def code_version() -> str:
    """What computes here, for people, with a hash of the package's own code: two checkouts may both be 0.2.0."""
    folder = Path(__file__).parents[1]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py"))))
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "numpy"))
    return f"cellbench {__version__} ({code.hexdigest()[:8]}), {libraries}"


def check_same_version(theirs: str) -> None:
    """Raises CellbenchError where the process that started the grid has another version."""
    if code_version() != theirs:
        raise CellbenchError(f"{this_owner()} has {code_version()}; the grid was started with {theirs}. Install the same on all machines.")


def apply_job_environment(order: JobSpec) -> JobSpec:
    """The order, once this process has its cache folder, store and cores."""
    os.environ |= {"CELLBENCH_CACHE": str(order.cache), "CELLBENCH_CACHE_URL": order.cache_url, "MLFLOW_TRACKING_URI": order.store}
    torch.set_num_threads(order.machine.threads)
    return order


class CohortWorker:
    """A worker's side: the runner of an order, made once, and the cohorts that it is handed."""

    def __init__(self, order: JobSpec, say: Callable[[str], None]) -> None:
        apply_job_environment(order)
        registry = Registry(order.extra)
        datasets = open_folds(order.experiment, registry, order.data)
        precision = order.machine.precision_name
        jobs = planned_runs(order.experiment, registry, datasets, order.weights, order.where, precision=precision, download=False)
        self._jobs = {job.fingerprint: job for job in jobs}
        self._machine = order.machine
        self._runner = Runner(
            experiment=order.experiment,
            registry=registry,
            datasets=datasets,
            machine=order.machine,
            weights=order.weights,
            tracker=Tracker(order.experiment.experiment, make=False),
            parent_id=order.parent_id,
            disk_bytes=order.disk_bytes,
            prefer_disk=order.prefer_disk,
            say=say,
        )

    def cohort(self, fingerprints: Sequence[str], title: str, halvings: int) -> Outcome:
        """Runs the cohort of these runs, with chunks halved so often. Raises CellbenchError where they are not the same runs here."""
        self._runner.machine = self._machine.smaller(halvings)
        out = Outcome()
        self._runner.cohort(self._mine(fingerprints, title), title, out)
        self._runner.tracker.settle()  # whoever gave the order reads there what became of it
        return out

    def passes(self, cohorts: Sequence[Sequence[str]]) -> list[list[FeaturePass]]:
        """Of each cohort what it will keep on disk. Raises CellbenchError."""
        out: list[list[FeaturePass]] = []
        for fingerprints in cohorts:
            runs = [job.run for job in self._mine(fingerprints, "a cohort")]
            reads = runs[0].backbone is not None
            out.append(self._runner.features(runs).passes(max(run.epochs for run in runs)) if reads else [])
        return out

    def fill(self, fingerprints: Sequence[str], more: Sequence[str], shards: Sequence[tuple[FeaturePass, int]]) -> int:
        """Computes these shards of a cohort's passes, with the levels that ``more`` runs read, but those that are there. Says how many were not."""
        runs, others = ([job.run for job in self._mine(some, "a cohort")] for some in (fingerprints, more))
        features = self._runner.features(runs, others)
        with WorkerPool(self._machine.lanes) as lanes:
            return sum(features.fill(one, shard, lanes) for one, shard in shards)

    def _mine(self, fingerprints: Sequence[str], title: str) -> list[PlannedRun]:
        if strange := [f for f in fingerprints if f not in self._jobs or self._jobs[f].unavailable]:
            reasons = Counter(self._jobs[f].unavailable for f in strange if f in self._jobs)
            why = next(iter(reasons), "its cellbench, cards, data or weights are not those of the process that started the grid")
            raise CellbenchError(f"{this_owner()} cannot run {title}: {why}. Give all machines the same version, paths and files.")
        return [self._jobs[f] for f in fingerprints]


def merge_outcomes(out: Outcome, more: Outcome) -> None:
    """Adds what one worker's cohort came to."""
    for field in fields(Outcome):
        mine, other = getattr(out, field.name), getattr(more, field.name)
        if isinstance(mine, dict):
            mine.update(other)
        elif isinstance(mine, list):
            mine.extend(other)
        else:
            setattr(out, field.name, mine + other)
