"""The verbs behind the command line: from arguments to printed answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from cellbench.config.experiment import cohorts
from cellbench.config.loading import read_request
from cellbench.config.registry import Registry
from cellbench.console import say
from cellbench.data.audit import quick_check
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.errors import CellbenchError
from cellbench.execution import multiprocess as processes
from cellbench.execution import ray_cluster, ray_grid
from cellbench.execution.artifacts import pool_folds
from cellbench.execution.grid import Executor, InProcessExecutor, parent_run, run_all
from cellbench.execution.planning import ResolvedRun, open_folds, resolve_runs
from cellbench.execution.runner import Runner
from cellbench.execution.worker_job import job_spec
from cellbench.features.cache_admin import cache_budget
from cellbench.features.extractor import CachePolicy
from cellbench.hardware import Hardware, detect_hardware
from cellbench.models.backbones.weights import weights_folder
from cellbench.reporting.report import log_request, write_report
from cellbench.system_load import SystemLoad
from cellbench.system_load import describe_load as load_words
from cellbench.tracking import relocate
from cellbench.tracking.system_metrics import log_system_metrics
from cellbench.tracking.tracker import Tracker
from cellbench.training.cost_estimate import estimate_cost, format_duration
from cellbench.training.memory_check import InsufficientMemoryError


def grid(
    file: str,
    *,
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
    dry_run: bool = False,
    workers: int | None = None,
    on: str | None = None,
    gpu_share: float = 1.0,
) -> int:
    """``cellbench grid``: runs an experiment and prints its leaderboard. Exit code 0, or 1 where a run failed."""
    disk, prefer_disk = cache_budget(cache, cache_url)
    registry = Registry(extra)
    experiment, text = read_request(file, changes, data, limit, registry)
    weights = weights_folder(weights)
    if workers is not None and on is not None:
        raise CellbenchError("--workers and --on: either processes of this machine or a cluster. Give one of them.")
    if on is not None:
        ray_cluster.check_address(on, gpu_share)
    here = detect_hardware(device, precision, memory, elsewhere=on is not None and not dry_run)
    if workers is not None:
        processes.check_num_workers(workers, here)
    datasets = open_folds(experiment, registry, data)
    for line in dict.fromkeys(line for dataset in datasets for line in dataset.notes):
        say(line)
    for line in quick_check.severe_findings(registry.dataset(experiment.dataset), datasets[0]):
        say(line)
    jobs = resolve_runs(experiment, registry, datasets, weights, file, precision=here.precision_name, download=not dry_run)
    dataset = datasets[0]
    sizes = f"{len(dataset.train)} training, {len(dataset.val)} validation and {len(dataset.test)} test images"
    folds = f" in each of {len(datasets)} folds, or one more or less" if len(datasets) > 1 else ""
    say(f"{experiment.experiment}: {len(jobs)} runs on {dataset.name} ({sizes}{folds}), on {here.name}.")
    if dry_run:
        keeping = CachePolicy(memory_bytes=here.memory_bytes * 2 // 3, disk_bytes=disk, prefer_disk=prefer_disk, key="estimate")
        return _dry(jobs, registry, datasets, here, weights, keeping)
    for line in relocate.fix_artifact_paths():
        say(line)
    tracker = Tracker(experiment.experiment)
    key = hashlib.sha256(
        json.dumps([experiment.model_dump(mode="json"), pool_folds(datasets), here.precision_name], sort_keys=True).encode()
    ).hexdigest()[:16]
    asked = {f"grid.{name}": ", ".join(map(str, values)) for name, values in experiment.grid.items()}
    asked |= {"baselines": ", ".join(experiment.baselines) or "none", "dataset": dataset.name, "precision": here.precision_name}
    with (
        ray_cluster.connect(on, here) if on is not None else nullcontext() as ray,
        parent_run(tracker, f"grid: {Path(file).stem}", key, asked, pool_folds(datasets)) as top,
    ):
        runner = Runner(
            experiment=experiment,
            registry=registry,
            datasets=datasets,
            machine=here,
            weights=weights,
            tracker=tracker,
            parent_id=top.run_id,
            disk_bytes=disk,
            prefer_disk=prefer_disk,
            say=say,
        )
        top.log({"grid/runs": len(jobs)})
        request = log_request(top, text, dataset, here.name)
        with log_system_metrics(tracker, [top.run_id]):
            told = job_spec(
                experiment,
                top.run_id,
                here,
                where=file,
                data=data,
                weights=weights,
                extra=extra,
                disk_bytes=disk,
                prefer_disk=prefer_disk,
            )
            crew: Executor = InProcessExecutor()
            if workers is not None:
                crew = processes.ProcessExecutor(workers, told)
            elif ray is not None:
                crew = ray_grid.RayExecutor(ray, told, gpu_share)
            outcome = run_all(runner, jobs, crew)
        ids = {logged.run_id for logged in outcome.finished.values()}
        splits = {
            f"fold {fold}: {split}" if len(datasets) > 1 else split: [sample.name for sample in one.samples(split)]
            for fold, one in enumerate(datasets)
            for split in SPLITS
        }
        write_report(tracker, top, ids, request, splits, outcome.skipped, outcome.failed, say)
        top.log({f"grid/{name}": len(runs) for name, runs in (("finished", ids), ("skipped", outcome.skipped), ("failed", outcome.failed))})
        if outcome.skipped or outcome.failed or outcome.busy:
            say(
                f"without a result: {len(outcome.skipped)} skipped, {len(outcome.failed)} failed, {len(outcome.busy)} with another process."
            )
        say(
            f"everything is in MLflow: `cellbench ui` or `mlflow ui` here, experiment '{experiment.experiment}'; its parent run has report.html."
        )
        if outcome.failed:
            top.end("failed", f"{len(outcome.failed)} runs failed")
    return 1 if outcome.failed else 0


def _dry(
    jobs: list[ResolvedRun], registry: Registry, datasets: Sequence[Dataset], here: Hardware, weights: Path | None, keeping: CachePolicy
) -> int:
    for job in jobs:
        say(f"  {job.name}" + (f"  skipped: {job.unavailable}" if job.unavailable else ""))
    wall, memory, disk, busy = 0.0, 0.0, 0.0, SystemLoad()
    known = {id(job.run): job for job in jobs}
    for number, group in enumerate(cohorts(job.run for job in jobs), 1):
        first = group[0]
        title = f"cohort {number}: {first.backbone or first.baseline}, {len(group)} run{'s' if len(group) > 1 else ''}"
        if known[id(first)].unavailable:
            say(f"{title}: skipped")
            continue
        if first.baseline and not registry.baseline(first.baseline).trained:
            say(f"{title}: nothing to train")
            continue
        try:
            one = estimate_cost(group, registry, datasets[first.fold], here, weights, keeping)
        except InsufficientMemoryError as error:
            say(f"{title}: would be skipped: {error}")
            continue
        speed = f", backbone {one.trunk_tiles_per_s:.0f} tiles/s" if first.backbone else ""
        say(
            f"{title}: {one.train_tiles} training tiles an epoch, {one.val_tiles} validation and {one.test_tiles} test tiles{speed}; "
            f"about {format_duration(one.wall_s)}, {one.memory_mib / 1024:.1f} GiB of memory; {one.source}"
        )
        wall, memory, disk = wall + one.wall_s, max(memory, one.memory_mib), disk + one.disk_mib
    busy_words = load_words(busy.others_pct())
    say(
        f"in all about {format_duration(wall)}, up to {memory / 1024:.1f} GiB of memory and {disk:.0f} MiB of disk for results "
        f"(from a few tiles timed now{', ' if busy_words else ''}{busy_words})"
    )
    return 0


