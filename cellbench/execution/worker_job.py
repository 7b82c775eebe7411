"""The picklable job specification from which a worker process runs cohorts of a grid.

A worker opens data, cards and weights itself, at the same paths. If these or the code differ from the driver's, the fingerprints differ and the
worker refuses, so that one table never mixes two versions of an experiment.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cellbench import __version__, startup
from cellbench.config.experiment import Experiment
from cellbench.config.registry import Registry
from cellbench.data.loading import open_folds
from cellbench.errors import CellbenchError, first_names
from cellbench.execution.claims import Outcome
from cellbench.execution.planning import ResolvedRun, resolve_runs
from cellbench.execution.progress import Report, no_report
from cellbench.execution.resources import Resources
from cellbench.execution.runner import Runner
from cellbench.features.extractor import FeaturePass
from cellbench.features.remote_cache import shared_url
from cellbench.files import cache_dir
from cellbench.hardware import Hardware
from cellbench.liveness import describe_owner, this_owner
from cellbench.parallel import WorkerPool
from cellbench.tracking.store_address import absolute, store_uri
from cellbench.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One grid for its workers. Paths are absolute. ``store`` and ``cache_url`` may contain credentials and are never printed."""

    experiment: Experiment
    parent_id: str
    machine: Hardware
    """The driver's machine, or a worker's share of it."""
    where: str = ""
    """The experiment file's name, for messages."""
    data: Path | None = None
    weights: Path | None = None
    extra: Path | None = None
    """Folder of the user's own cards (``--registry``)."""
    disk_bytes: int = 0
    prefer_disk: bool = False
    cache: Path
    store: str
    cache_url: str = ""
    """URL of the shared cache. With it, each machine may have its own cache folder."""

    def resources(self) -> Resources:
        """What its runs are computed with, in this process."""
        return Resources(
            registry=Registry(self.extra),
            weights=self.weights,
            machine=self.machine,
            disk_bytes=self.disk_bytes,
            prefer_disk=self.prefer_disk,
        )

    def __repr__(self) -> str:
        return f"JobSpec({self.experiment.experiment!r})"


def job_spec(experiment: Experiment, parent_id: str, resources: Resources, *, where: str, data: Path | None) -> JobSpec:
    """Creates the job of a grid that is started on this machine, for other processes with its resources."""
    weights, extra = resources.weights, resources.registry.extra
    folders = tuple(str(Path(folder).absolute()) for folder in experiment.data.test_folders)
    return JobSpec(
        experiment=experiment.model_copy(update={"data": experiment.data.model_copy(update={"tests": folders})}),
        parent_id=parent_id,
        machine=resources.machine,
        where=where,
        data=data.absolute() if data else None,
        weights=weights.absolute() if weights else None,
        extra=extra.absolute() if extra else None,
        disk_bytes=resources.disk_bytes,
        prefer_disk=resources.prefer_disk,
        cache=cache_dir(),
        store=absolute(store_uri()),
        cache_url=shared_url(),
    )


@functools.cache
def code_version() -> str:
    """Versions of this package and of the libraries it computes with. Includes a hash of the code, since two checkouts may have the same version."""
    folder = Path(__file__).parents[1]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py"))))
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "numpy"))
    return f"cellbench {__version__} ({code.hexdigest()[:8]}), {libraries}"


def check_same_version(theirs: str) -> None:
    """Raises CellbenchError if the process that started the grid has another version."""
    if code_version() != theirs:
        raise CellbenchError(
            f"{describe_owner(this_owner())} has {code_version()}; the grid was started with {theirs}. Install the same on all machines."
        )


def apply_job_environment(job: JobSpec) -> JobSpec:
    """Applies the job's cache folder, store and threads to this process. Returns the job for this process."""
    startup.set_environment()  # another machine inherits no environment
    os.environ |= {"CELLBENCH_CACHE": str(job.cache), "CELLBENCH_CACHE_URL": job.cache_url, "MLFLOW_TRACKING_URI": job.store}
    torch.set_num_threads(job.machine.threads)
    return job


class CohortWorker:
    """Runs cohorts of a job in a worker process. Runs are given by fingerprint."""

    def __init__(self, job: JobSpec, say: Callable[[str], None], report: Report = no_report) -> None:
        apply_job_environment(job)
        resources, precision = job.resources(), job.machine.precision_name
        datasets = open_folds(job.experiment, resources.registry, job.data)
        runs = resolve_runs(job.experiment, resources.registry, datasets, job.weights, job.where, precision=precision, download=False)
        self._runs = {one.fingerprint: one for one in runs}
        self._machine = job.machine
        self._runner = Runner(
            experiment=job.experiment,
            resources=resources,
            datasets=datasets,
            tracker=Tracker(job.experiment.experiment, make=False),
            parent_id=job.parent_id,
            say=say,
            report=report,
        )

    def cohort(self, fingerprints: Sequence[str], title: str, halvings: int) -> Outcome:
        """Runs a cohort, with the chunk size halved ``halvings`` times. Raises CellbenchError if the fingerprints differ here."""
        self._runner.machine = self._machine.smaller(halvings)
        out = Outcome()
        self._runner.cohort(self._resolved(fingerprints, title), title, out)
        self._runner.settle()
        self._runner.tracker.flush()  # the driver reads the results from the store
        return out

    def passes(self, cohorts: Sequence[Sequence[str]]) -> list[list[FeaturePass]]:
        """The passes that each cohort will cache on disk; none of a cohort that will fail. Raises CellbenchError."""
        out: list[list[FeaturePass]] = []
        for fingerprints in cohorts:
            cohort, passes = self._resolved(fingerprints, "a cohort"), []
            epochs = max(one.run.epochs for one in cohort)
            with contextlib.suppress(Exception):  # the cohort meets the same error, and its runs fail with it
                passes = self._runner.features(cohort).passes(epochs) if cohort[0].backbone else []
            out.append(passes)
        return out

    def fill(self, fingerprints: Sequence[str], readers: Sequence[str], shards: Sequence[tuple[FeaturePass, int]]) -> int:
        """Computes the missing shards of a cohort's passes, with the levels that ``readers`` need. Returns their number."""
        cohort, others = (self._resolved(some, "a cohort") for some in (fingerprints, readers))
        features = self._runner.features(cohort, others)
        with WorkerPool(self._machine.lanes) as pool:
            return sum(features.fill(one, shard, pool) for one, shard in shards)

    def _resolved(self, fingerprints: Sequence[str], title: str) -> list[ResolvedRun]:
        # A run without its weights has another fingerprint here than there.
        lacks = first_names(sorted({one.unavailable for one in self._runs.values() if one.unavailable}), 3)
        unknown = "its cellbench, cards, data or weights differ from those of the process that started the grid"
        for one in fingerprints:
            if reason := self._runs[one].unavailable if one in self._runs else f"{unknown}{lacks and f' ({lacks})'}":
                raise CellbenchError(
                    f"{describe_owner(this_owner())} cannot run {title}: {reason}. Give all machines the same version, paths and files."
                )
        return [self._runs[one] for one in fingerprints]
