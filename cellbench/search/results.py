"""What a search leaves: its curves and pictures, the table of its trials, its best setting as an experiment file, and that setting's test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tomli_w

from cellbench.config.experiment import Experiment
from cellbench.config.search_space import Space
from cellbench.console import say
from cellbench.data.dataset import SPLITS
from cellbench.execution.grid import Executor, run_all
from cellbench.execution.planning import resolve_runs
from cellbench.execution.runner import Runner
from cellbench.reporting.collect import RunRequest
from cellbench.reporting.report import write_report
from cellbench.search.plots import plot_study, trials_table
from cellbench.search.study import CompletedTrial, Study
from cellbench.tracking.schema import STATE, STATUS, STUDY
from cellbench.tracking.tracker import Run, Tracker


def sync_study(study: Study, tracker: Tracker) -> list[str]:
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


def log_progress(space: Space, study: Study, run: Run) -> None:
    """The study so far onto its parent run: curves, pictures, the table, and the best setting as a file that ``grid`` runs."""
    told, best = study.told(), study.best()
    sign, record = (1 if space.directions[0] == "maximize" else -1), None
    for t in told:
        if (
            t.state == "complete"
            and all(over <= 0 for over in space.settings.excess(t.metrics).values())
            and (record is None or sign * t.values[0] > sign * record)
        ):
            record = t.values[0]
            run.buffer(t.number, {"search/best": record})
    run.log({f"search/{state}": sum(t.state == state for t in told) for state in ("complete", "pruned", "failed")})
    with tempfile.TemporaryDirectory(prefix="cellbench-") as name:
        folder = Path(name)
        (folder / "trials.csv").write_text(trials_table(told, space), encoding="utf-8")
        if best:
            (folder / "best.toml").write_text(best_experiment(space, best[0]), encoding="utf-8")
        (folder / "figures").mkdir()
        for title, data in plot_study(study, space):
            (folder / "figures" / f"{title}.png").write_bytes(data)
        run.log_artifacts(folder)


def best_experiment(space: Space, best: CompletedTrial) -> str:
    """The best setting as an experiment file, for ``grid``."""
    seed = int(space.run.get("seed", 0))
    tree = space.tree(best.point, seeds=range(seed, seed + space.settings.repeat_best))
    found = ", ".join(f"{name} {value:.6g}" for name, value in zip(space.settings.objectives, best.values, strict=True))
    head = f"# The best setting of the search '{space.experiment}': trial {best.number}, {found}"
    return f"{head}\n#   python -m cellbench.run grid best.toml\n{tomli_w.dumps(tree)}"


def test_best(
    space: Space, study: Study, runner: Runner, run: Run, request: RunRequest, crew_of: Callable[[Experiment], Executor]
) -> int:
    """The best trial's setting, and no other, is tested: as a grid, with its seeds.."""
    best = study.best()
    if not best:
        say("no trial was told that keeps the bounds, so there is no best one to test.")
        return 0
    seed = int(space.run.get("seed", 0))
    experiment = Experiment.of(space.tree(best[0].point, seeds=range(seed, seed + space.settings.repeat_best)), "best.toml")
    runner = replace(runner, experiment=experiment)
    jobs = resolve_runs(
        experiment, runner.registry, runner.datasets, runner.weights, "best.toml", precision=runner.machine.precision_name
    )  # fmt: skip
    found = ", ".join(f"{name} {value:.4f}" for name, value in zip(space.settings.objectives, best[0].values, strict=True))
    setting = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in best[0].point.items())
    say(f"best is trial {best[0].number}: {found} ({setting}). It is now trained with {len(jobs)} seeds and tested.")
    if len(space.settings.objectives) > 1:
        say(f"{len(best)} trials are on the front of {' and '.join(space.settings.objectives)}: figures/pareto.png, trials.csv.")
    outcome = run_all(runner, jobs, crew_of(experiment))
    ids = {logged.run_id for logged in outcome.finished.values()}
    splits = {split: [sample.name for sample in runner.datasets[space.fold].samples(split)] for split in SPLITS}
    write_report(runner.tracker, run, ids, request, splits, outcome.skipped, outcome.failed, say)
    tests = [logged.metrics["test/dice"] for logged in outcome.finished.values() if "test/dice" in logged.metrics]
    if tests:
        run.log({"search/test_dice": sum(tests) / len(tests)})
    say(f"best.toml, trials.csv and pictures are artifacts of the parent run: `cellbench ui`, experiment '{space.experiment}'.")
    return 1 if outcome.failed else 0
