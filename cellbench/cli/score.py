"""``score``: the masks of another tool, scored on an experiment's own test images, as a row beside its models."""

from __future__ import annotations

import shlex

from cellbench.config.options import ScoreOptions
from cellbench.config.registry import Registry
from cellbench.console import say
from cellbench.execution.external import check_name, open_test_images, score_masks
from cellbench.inference.committee import open_experiment
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.verdict import describe_external


def score(options: ScoreOptions) -> int:
    """Scores the masks of another tool. Returns exit code 0."""
    tracker, registry = open_experiment(options.experiment), Registry(options.registry)
    name = check_name(options.name, tracker)
    tested = open_test_images(tracker, registry, options.data)
    num = sum(len(dataset.test) for dataset in tested.datasets)
    folds = f" of {tested.num_folds} folds" if tested.num_folds else ""
    say(f"{name}: {options.masks} on the {num} test images{folds} of '{tracker.name}' ({tested.datasets[0].root}).")
    ids = score_masks(name, options.masks, tested, tracker, registry, say)
    here = next(one for one in collect_runs([tracker]).sets if any(run.record.run_id in ids for model in one.models for run in model.runs))
    for line in describe_external(here, name):
        say(line)
    say(
        f"logged as '{name}' in the experiment '{tracker.name}'. `cellbench report {shlex.quote(tracker.name)}` shows it beside the models."
    )
    return 0
