"""``score``: the masks of another tool, scored on an experiment's own test images, as a row beside its models."""

from __future__ import annotations

import shlex

from cellbench.cli.counts import log_counts
from cellbench.config.options import ScoreOptions
from cellbench.config.registry import Registry
from cellbench.console import say, say_lines
from cellbench.data.count_truth import CountTruth
from cellbench.data.loading import open_count_truth
from cellbench.execution.external import check_name, count_masks, open_test_images, score_masks
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.counts import describe_counts
from cellbench.reporting.verdict import describe_external
from cellbench.tracking.store import newest_experiment
from cellbench.tracking.tracker import Tracker, open_experiment


def score(options: ScoreOptions) -> int:
    """Scores the masks of another tool. Returns exit code 0."""
    registry = Registry(options.registry)
    if options.data is not None and (truth := open_count_truth(options.data, registry)) is not None:
        return _score_counts(options, truth)
    tracker = open_experiment(options.experiment)
    name = check_name(options.name, tracker)
    tested = open_test_images(tracker, registry, options.data)
    num = sum(len(dataset.test) for dataset in tested.datasets)
    folds = f" of {tested.num_folds} folds" if tested.num_folds else ""
    say(f"{name}: {options.masks} on the {num} test images{folds} of '{tracker.name}' ({tested.datasets[0].root}).")
    ids, rows = score_masks(name, options.masks, tested, tracker, registry, say)
    here = next(one for one in collect_runs([tracker]).sets if any(run.record.run_id in ids for model in one.models for run in model.runs))
    say_lines(describe_external(here, name))
    say_lines(describe_counts(rows))
    say(
        f"logged as '{name}' in the experiment '{tracker.name}'. `cellbench report {shlex.quote(tracker.name)}` shows it beside the models."
    )
    return 0


def _score_counts(options: ScoreOptions, truth: CountTruth) -> int:
    """Compares the numbers of cells in the masks with true counts that come without masks."""
    name = check_name(options.name)
    say(f"{name}: counts of {options.masks} on {len(truth.samples)} images of {truth.root}.")
    say_lines(truth.notes)
    rows, notes, digest = count_masks(name, options.masks, truth)
    say_lines(notes)
    tracker = Tracker(options.experiment or newest_experiment(whole=True) or "evaluations")
    log_counts(f"score: {name} on {truth.root.absolute().name}", rows, truth, [name, digest], tracker, {"model": name})
    return 0
