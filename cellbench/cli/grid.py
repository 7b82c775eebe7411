"""``grid``: reads an experiment, plans its runs, executes them and reports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellbench import startup
from cellbench.config.experiment import Experiment
from cellbench.config.loading import read_experiment
from cellbench.config.options import GridOptions
from cellbench.console import say
from cellbench.data.audit import quick_check
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.loading import open_folds
from cellbench.execution import ray_cluster, ray_grid
from cellbench.execution.artifacts import pool_folds
from cellbench.execution.grid import Executor, InProcessExecutor, group_cohorts, run_all
from cellbench.execution.multiprocess import ProcessExecutor
from cellbench.execution.planning import ResolvedRun, resolve_runs
from cellbench.execution.resources import Resources
from cellbench.execution.runner import Outcome, Runner
from cellbench.execution.worker_job import job_spec
from cellbench.features.cache_admin import parse_cache
from cellbench.features.extractor import CachePolicy
from cellbench.reporting.collect import RunRequest
from cellbench.reporting.report import log_request, write_report
from cellbench.system_load import SystemLoad, describe_load
from cellbench.tracking import relocate
from cellbench.tracking.tracker import Run, Tracker
from cellbench.training.cost_estimate import estimate_cost, format_duration
from cellbench.training.memory_check import InsufficientMemoryError


@dataclass(frozen=True, kw_only=True)
class _Plan:
    experiment: Experiment
    text: str
    """The experiment file with the command's options applied."""
    resources: Resources
    datasets: list[Dataset]
    """One, or one per fold."""
    runs: list[ResolvedRun]


def grid(options: GridOptions) -> int:
    """Runs an experiment. Returns exit code 0, or 1 if a run failed."""
    startup.set_cache(parse_cache(options.cache)[0], options.cache_url)
    startup.configure_threads(options.device)
    plan = _prepare(options)
    if options.dry_run:
        _estimate(plan)
        return 0
    for line in relocate.fix_artifact_paths():
        say(line)
    tracker = Tracker(plan.experiment.experiment)
    startup.freeze_imports()  # MLflow's
    machine = plan.resources.machine
    with (
        ray_cluster.connect(options.on, machine) if options.on is not None else nullcontext() as ray,
        _parent_run(plan, tracker, options) as parent,
    ):
        request = log_request(parent, plan.text, plan.datasets[0], machine.name)
        outcome = _execute(plan, options, tracker, parent, ray)
        _report(plan, tracker, parent, outcome, request)
    return 1 if outcome.failed else 0


def _prepare(options: GridOptions) -> _Plan:
    resources = Resources.of(options, elsewhere=options.on is not None and not options.dry_run)
    registry, machine = resources.registry, resources.machine
    experiment, text = read_experiment(options.file, options.changes, options.data, options.limit, registry)
    datasets = open_folds(experiment, registry, options.data)
    for line in dict.fromkeys(line for dataset in datasets for line in dataset.notes):
        say(line)
    dataset = datasets[0]
    for line in quick_check.severe_findings(dataset):
        say(line)
    runs = resolve_runs(
        experiment,
        registry,
        datasets,
        resources.weights,
        options.file,
        precision=machine.precision_name,
        download=not options.dry_run,
    )
    sizes = f"{len(dataset.train)} training, {len(dataset.val)} validation and {len(dataset.test)} test images"
    folds = f" in each of {len(datasets)} folds, or one more or less" if len(datasets) > 1 else ""
    say(f"{experiment.experiment}: {len(runs)} runs on {dataset.name} ({sizes}{folds}), on {machine.name}.")
    return _Plan(experiment=experiment, text=text, resources=resources, datasets=datasets, runs=runs)


@contextmanager
def _parent_run(plan: _Plan, tracker: Tracker, options: GridOptions) -> Iterator[Run]:
    """Opens the parent run of the grid in MLflow: the same one each time the same grid is started."""
    precision, data = plan.resources.machine.precision_name, pool_folds(plan.datasets)
    facts = json.dumps([plan.experiment.model_dump(mode="json"), data, precision], sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    params = {f"grid.{name}": ", ".join(map(str, values)) for name, values in plan.experiment.grid.items()}
    params |= {"baselines": ", ".join(plan.experiment.baselines) or "none", "dataset": plan.datasets[0].name, "precision": precision}
    with tracker.parent_run(f"grid: {Path(options.file).stem}", key, params, data) as parent:
        parent.log({"grid/runs": len(plan.runs)})
        yield parent


def _execute(plan: _Plan, options: GridOptions, tracker: Tracker, parent: Run, ray: Any) -> Outcome:
    """Executes the unfinished runs in this process, in several local processes, or on Ray."""
    resources = plan.resources
    runner = Runner(
        experiment=plan.experiment,
        registry=resources.registry,
        datasets=plan.datasets,
        machine=resources.machine,
        weights=resources.weights,
        tracker=tracker,
        parent_id=parent.run_id,
        disk_bytes=resources.disk_bytes,
        prefer_disk=resources.prefer_disk,
        say=say,
    )
    job = job_spec(
        plan.experiment,
        parent.run_id,
        resources.machine,
        where=options.file,
        data=options.data,
        weights=resources.weights,
        extra=options.registry,
        disk_bytes=resources.disk_bytes,
        prefer_disk=resources.prefer_disk,
    )
    executor: Executor = InProcessExecutor()
    if options.workers is not None:
        executor = ProcessExecutor(options.workers, job)
    elif ray is not None:
        executor = ray_grid.RayExecutor(ray, job, options.gpu_share)
    with parent.system_metrics():
        return run_all(runner, plan.runs, executor)


def _report(plan: _Plan, tracker: Tracker, parent: Run, outcome: Outcome, request: RunRequest) -> None:
    ids = {run.run_id for run in outcome.finished.values()}
    splits = {
        f"fold {fold}: {split}" if len(plan.datasets) > 1 else split: [sample.name for sample in dataset.samples(split)]
        for fold, dataset in enumerate(plan.datasets)
        for split in SPLITS
    }
    write_report(tracker, parent, ids, request, splits, outcome.skipped, outcome.failed, say)
    parent.log({"grid/finished": len(ids), "grid/skipped": len(outcome.skipped), "grid/failed": len(outcome.failed)})
    if outcome.skipped or outcome.failed or outcome.busy:
        say(f"without a result: {len(outcome.skipped)} skipped, {len(outcome.failed)} failed, {len(outcome.busy)} in another process.")
    say(f"everything is in MLflow: `cellbench ui` or `mlflow ui` here, experiment '{tracker.name}'; its parent run has report.html.")
    if outcome.failed:
        parent.end("failed", f"{len(outcome.failed)} runs failed")


# --- dry run --------------------------------------------------------------------------------------------------------------------------


def _estimate(plan: _Plan) -> None:
    """Prints the runs, and the estimated tiles, time and memory of each cohort, from timing a few tiles."""
    for resolved in plan.runs:
        say(f"  {resolved.name}" + (f"  skipped: {resolved.unavailable}" if resolved.unavailable else ""))
    wall_s, memory_mib, disk_mib, load = 0.0, 0.0, 0.0, SystemLoad()
    for number, cohort in enumerate(group_cohorts(plan.runs), 1):
        run = cohort[0].run
        title = f"cohort {number}: {run.backbone or run.baseline}, {len(cohort)} run{'s' if len(cohort) > 1 else ''}"
        if cohort[0].unavailable:
            say(f"{title}: skipped")
            continue
        if not cohort[0].trained:
            say(f"{title}: nothing to train")
            continue
        resources = plan.resources
        policy = CachePolicy(
            memory_bytes=resources.machine.memory_bytes * 2 // 3,
            disk_bytes=resources.disk_bytes,
            prefer_disk=resources.prefer_disk,
            key="estimate",
        )
        try:
            cost = estimate_cost(
                [one.run for one in cohort], resources.registry, plan.datasets[run.fold], resources.machine, resources.weights, policy
            )
        except InsufficientMemoryError as error:
            say(f"{title}: would be skipped: {error}")
            continue
        speed = f", backbone {cost.backbone_tiles_per_s:.0f} tiles/s" if run.backbone else ""
        say(
            f"{title}: {cost.train_tiles} training tiles an epoch, {cost.val_tiles} validation and {cost.test_tiles} test tiles{speed}; "
            f"about {format_duration(cost.wall_s)}, {cost.memory_mib / 1024:.1f} GiB of memory; {cost.source}"
        )
        wall_s, memory_mib, disk_mib = wall_s + cost.wall_s, max(memory_mib, cost.memory_mib), disk_mib + cost.disk_mib
    load_text = describe_load(load.others_pct())
    say(
        f"in all about {format_duration(wall_s)}, up to {memory_mib / 1024:.1f} GiB of memory and {disk_mib:.0f} MiB of disk for results "
        f"(from a few tiles timed now{', ' if load_text else ''}{load_text})"
    )
