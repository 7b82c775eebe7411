"""Evaluates the best setting of a search on the test set."""

from __future__ import annotations

from dataclasses import replace

from cellbench.config.search_space import Space
from cellbench.console import say
from cellbench.data.dataset import SPLITS
from cellbench.errors import quantity
from cellbench.execution.grid import Executor, run_all
from cellbench.execution.planning import resolve_tree
from cellbench.execution.runner import Runner
from cellbench.hardware import Hardware
from cellbench.reporting.report import write_report
from cellbench.reporting.stored_records import RunRequest
from cellbench.search.study import Study
from cellbench.tracking.open_run import Run


def test_best(space: Space, study: Study, runner: Runner, machine: Hardware, run: Run, request: RunRequest, executor: Executor) -> int:
    """Evaluates the setting of the best trial as a grid with ``repeat_best`` seeds on ``machine``. No other setting reads the test set.

    ``runner``: the runner of the trials. Returns exit code 0, or 1 if a run failed.
    """
    best = study.best()
    if not best:
        say("no completed trial satisfies the bounds, so there is no best setting to test.")
        return 0
    resources = replace(runner.resources, machine=machine)
    experiment, runs = resolve_tree(space.best_tree(best[0].point), resources, runner.datasets, "best.toml")
    runner = replace(runner, experiment=experiment, resources=resources, watch=None)
    single = {one.name for one in runs if one.run.ensemble == "none"}
    found = ", ".join(f"{name} {value:.4f}" for name, value in zip(space.settings.objectives, best[0].values, strict=True))
    setting = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in best[0].point.items())
    say(f"best is trial {best[0].number}: {found} ({setting}). It is now trained with {quantity(len(single), 'seed')} and tested.")
    if len(space.settings.objectives) > 1:
        say(f"{len(best)} trials are on the front of {' and '.join(space.settings.objectives)}: figures/pareto.png, trials.csv.")
    outcome = run_all(runner, runs, executor)
    ids = {state.run_id for state in outcome.finished.values()}
    splits = {split: [sample.name for sample in runner.datasets[space.fold].samples(split)] for split in SPLITS}
    write_report(runner.tracker, run, ids, request, splits, outcome.skipped, outcome.failed, say)
    tests = [state.metrics["test/dice"] for name, state in outcome.finished.items() if name in single and "test/dice" in state.metrics]
    if tests:
        run.log({"search/test_dice": sum(tests) / len(tests)})
    say(f"best.toml, trials.csv and pictures are artifacts of the parent run; {runner.tracker.where_to_look()}")
    return 1 if outcome.failed or outcome.missing else 0
