"""Runs an experiment: reads it, plans its runs, executes those that are not finished, and reports.

The command ``grid`` and the Python function ``cellbench.grid`` both call this, so that they give the same runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellbench import startup
from cellbench.background import BackgroundCalls
from cellbench.config.experiment import Experiment
from cellbench.config.loading import changed_experiment, read_experiment
from cellbench.config.options import GridOptions
from cellbench.config.registry import Registry
from cellbench.config.trust import describe_code
from cellbench.data.audit import quick_check
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.loading import open_folds, pool_folds, settings_for_data
from cellbench.errors import first_names, quantity
from cellbench.execution.claims import Outcome, RunClaims
from cellbench.execution.grid import Executor, InProcessExecutor, execute, find_unfinished
from cellbench.execution.planning import ResolvedRun, resolve_runs
from cellbench.execution.resources import Resources, check_options, prepare_cache
from cellbench.execution.wanted_tests import describe_tests
from cellbench.files import facts_digest
from cellbench.hardware import Hardware
from cellbench.reporting.report import log_request, write_report
from cellbench.reporting.stored_records import RunRequest
from cellbench.tracking.open_run import Run
from cellbench.tracking.tracker import Tracker

Say = Callable[[str], None]
"""Takes a message of one line."""


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan:
    """An experiment with its data, its runs and what they run on."""

    experiment: Experiment
    text: str
    """The experiment file with the options applied."""
    options: GridOptions
    resources: Resources
    datasets: list[Dataset]
    """One, or one per fold."""
    runs: list[ResolvedRun]


def plan_experiment(options: GridOptions, say: Say, tree: Mapping[str, Any] | None = None) -> ExperimentPlan:
    """Reads the experiment and its data, and resolves its runs; with ``dry_run`` downloads no weights. Raises CellbenchError.

    ``say`` receives notes on the data. ``tree``: the experiment as a mapping, instead of the file ``options.file``, which then is its name in
    messages.
    """
    options = replace(options, file=options.file or ("quickstart" if options.data is None else "own"))
    elsewhere = options.on is not None and not options.dry_run
    check_options(options, elsewhere=elsewhere)
    if not options.dry_run:
        prepare_cache()
    registry = Registry(options.registry)
    for line in describe_code(registry, options.registry):
        say(line)
    experiment, text = read_experiment(options.file if tree is None else tree, options.all_changes, options.data, options.limit, registry)
    if chosen := settings_for_data(experiment, registry, options.data):
        for _, why in chosen:
            say(why)
        experiment, text = changed_experiment(text, [change for change, _ in chosen], options.file)
    datasets = open_folds(experiment, registry, options.data)
    for line in dict.fromkeys(line for dataset in datasets for line in dataset.notes):
        say(line)
    dataset = datasets[0]
    quick_check.require_fit(dataset, options.unfit, say)
    resources = Resources.of(options, elsewhere=elsewhere)  # not earlier: it may measure the machine, and keeps what it measured
    machine = resources.machine
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
    say(f"{experiment.experiment}: {quantity(len(runs), 'run')} on {dataset.name} ({sizes}{folds}), on {machine.name}.")
    if more := describe_tests(experiment.data, dataset):
        say(f"Each finished run is also tested on {more}.")
    return ExperimentPlan(experiment=experiment, text=text, options=options, resources=resources, datasets=datasets, runs=runs)


def run_experiment(plan: ExperimentPlan, tracker: Tracker, say: Say, say_result: Say | None = None, *, command: str = "") -> Outcome:
    """Executes the runs that are not finished, and logs the report to the parent run in MLflow. Raises CellbenchError.

    ``say`` receives messages while it runs, ``say_result`` (default: ``say``) the leaderboard and the verdict. ``command``: the call, for the
    report; by default the command line.
    """
    options, machine = plan.options, plan.resources.machine
    with (
        _cluster(options.on, machine) if options.on is not None else nullcontext() as ray,
        _parent_run(plan, tracker) as parent,
        closing(BackgroundCalls()) as drawing,
    ):
        request = log_request(parent, plan.text, plan.datasets[0], machine.name, command)
        outcome = _execute(plan, tracker, parent, ray, drawing, say)
        _report(plan, tracker, parent, outcome, request, drawing, say_result or say)
    return outcome


@contextmanager
def _parent_run(plan: ExperimentPlan, tracker: Tracker) -> Iterator[Run]:
    """Opens the parent run of the grid in MLflow: the same one each time the same grid is started."""
    precision, data = plan.resources.machine.precision_name, pool_folds(plan.datasets)
    unset = {name for name in ("ensemble_seeds", "pair") if not getattr(plan.experiment, name)}
    tree = plan.experiment.model_dump(mode="json", exclude=unset)
    for name in ("tests", "perturb"):  # a grid of an older version, or with more tests than before, keeps its parent run
        del tree["data"][name]
    del tree["ensemble_best"]
    key = facts_digest([tree, data, precision])
    params = {f"grid.{name}": ", ".join(map(str, values)) for name, values in plan.experiment.grid.items()}
    params |= {"pairs": ", ".join(f"{pair['backbone']} · {pair['head']}" for pair in plan.experiment.pair)} if plan.experiment.pair else {}
    params |= {"baselines": ", ".join(plan.experiment.baselines) or "none", "dataset": plan.datasets[0].name, "precision": precision}
    with tracker.parent_run(f"grid: {Path(plan.options.file).stem}", key, params, data) as parent:
        parent.log({"grid/runs": len(plan.runs)})
        yield parent


def _cluster(on: str, machine: Hardware) -> AbstractContextManager[Any]:
    from cellbench.execution import ray_cluster

    return ray_cluster.connect(on, machine)


def _execute(plan: ExperimentPlan, tracker: Tracker, parent: Run, ray: Any, drawing: BackgroundCalls, say: Say) -> Outcome:
    """Executes the unfinished runs in this process, in several local processes, or on Ray. If there are none, torch is not even imported."""
    data, datasets = plan.experiment.data, plan.datasets
    claims = RunClaims(tracker=tracker, parent_id=parent.run_id, datasets=datasets, limit=data.limit, say=say)
    todo, outcome = find_unfinished(claims, plan.runs, data)
    if todo or plan.experiment.ensemble_best:
        _compute(plan, tracker, parent, ray, drawing, say, todo, outcome)
    outcome.note_missing(plan.runs)
    return outcome


def _compute(
    plan: ExperimentPlan,
    tracker: Tracker,
    parent: Run,
    ray: Any,
    drawing: BackgroundCalls,
    say: Say,
    todo: Sequence[ResolvedRun],
    outcome: Outcome,
) -> None:
    """Executes the runs ``todo``, then the ensemble of the best models."""
    from cellbench.execution.best_ensembles import evaluate_best_models
    from cellbench.execution.multiprocess import ProcessExecutor
    from cellbench.execution.ray_grid import RayExecutor
    from cellbench.execution.runner import Runner
    from cellbench.execution.worker_job import job_spec

    options = plan.options
    startup.freeze_imports()  # torch's
    runner = Runner(
        experiment=plan.experiment,
        resources=plan.resources,
        datasets=plan.datasets,
        tracker=tracker,
        parent_id=parent.run_id,
        drawing=drawing,
        say=say,
    )
    job = job_spec(plan.experiment, parent.run_id, plan.resources, where=options.file, data=options.data)
    executor: Executor = InProcessExecutor()
    if options.workers is not None:
        executor = ProcessExecutor(options.workers, job)
    elif ray is not None:
        executor = RayExecutor(ray, job, options.gpu_share)
    with startup.threads_for(options.device), parent.system_metrics():
        execute(runner, todo, outcome, executor)
        if plan.experiment.ensemble_best:
            evaluate_best_models(runner, plan.runs, outcome)


def _report(
    plan: ExperimentPlan, tracker: Tracker, parent: Run, outcome: Outcome, request: RunRequest, drawing: BackgroundCalls, say: Say
) -> None:
    ids = {run.run_id for run in outcome.finished.values()}
    splits = {
        f"fold {fold}: {split}" if len(plan.datasets) > 1 else split: [sample.name for sample in dataset.samples(split)]
        for fold, dataset in enumerate(plan.datasets)
        for split in SPLITS
    }
    write_report(tracker, parent, ids, request, splits, outcome.skipped, outcome.failed, say, plan.options.wide, drawing)
    parent.log({"grid/finished": len(ids), "grid/skipped": len(outcome.skipped), "grid/failed": len(outcome.failed)})
    if outcome.skipped or outcome.failed or outcome.missing:
        say(f"without a result: {len(outcome.skipped)} skipped, {len(outcome.failed)} failed, {len(outcome.missing)} missing.")
    if outcome.missing:
        say(f"missing: {first_names(outcome.missing, 3)}. The same command runs what is missing.")
    if outcome.untested:
        say(f"{len(outcome.untested)} finished runs could not be tested on further images. The same command tries again.")
    say(f"everything is in MLflow, report.html at the parent run; {tracker.where_to_look()}")
    if ids:
        say(f"\nNext: `cellbench report {shlex.quote(tracker.name)}` writes the report, and")
        say(f"      `cellbench predict {shlex.quote(f'best:{tracker.name}')} IMAGES --out masks` segments images with the best model.")
    if outcome.failed or outcome.missing or outcome.untested:
        untested = f", {len(outcome.untested)} not tested on further images" if outcome.untested else ""
        parent.end("failed", f"{len(outcome.failed)} runs failed, {len(outcome.missing)} missing{untested}")
