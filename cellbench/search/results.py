"""What a search logs to its parent run: curves and figures, the table of its trials, and its best setting as an experiment file."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from cellbench.config.search_space import Space
from cellbench.search.study import CompletedTrial, Study
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.open_run import Run
from cellbench.tracking.schema import STATE, STATUS, STUDY
from cellbench.tracking.tracker import Tracker


def sync_study(study: Study, tracker: Tracker) -> list[str]:
    """Marks trials and runs that exist in only one of the two stores. Removes nothing. Returns sentences to print."""
    trials = {t.number: t for t in study.trials()}
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
    """Logs the state of the study to its parent run: curves, plots, the table of trials, and the best setting as a file for ``grid``."""
    from cellbench.search.plots import write_trials  # imports matplotlib

    trials, best = study.trials(), study.best()
    sign, record = (1 if space.directions[0] == "maximize" else -1), None
    for t in trials:
        is_candidate = t.state == "complete" and space.settings.within_bounds(t.metrics)
        if is_candidate and (record is None or sign * t.values[0] > sign * record):
            record = t.values[0]
            run.buffer(t.number, {"search/best": record})
    run.log({f"search/{state}": sum(t.state == state for t in trials) for state in ("complete", "pruned", "failed")})
    with TemporaryFolder() as name:
        folder = Path(name)
        if best:
            (folder / "best.toml").write_text(best_experiment(space, best[0]), encoding="utf-8")
        write_trials(folder, study, space)
        run.log_artifacts(folder)


def best_experiment(space: Space, best: CompletedTrial) -> str:
    """The best setting as an experiment file, for ``grid``."""
    found = ", ".join(f"{name} {value:.6g}" for name, value in zip(space.settings.objectives, best.values, strict=True))
    head = f"# The best setting of the search '{space.experiment}': trial {best.number}, {found}"
    return f"{head}\n#   cellbench grid best.toml\n{tomli_w.dumps(space.best_tree(best.point))}"
