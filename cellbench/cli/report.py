"""``report``: writes the report of one experiment, or of several together."""

from __future__ import annotations

from dataclasses import replace

from cellbench.config.options import ReportOptions
from cellbench.console import say, say_lines
from cellbench.errors import CellbenchError
from cellbench.reporting.collect import collect_report
from cellbench.reporting.leaderboard import terminal_table
from cellbench.reporting.render import write_report_files
from cellbench.reporting.report import report_dir
from cellbench.reporting.sections import build_report
from cellbench.tracking import relocate, store_address
from cellbench.tracking.tracker import open_experiments


def report(options: ReportOptions) -> int:
    """Writes the report of one experiment, or of several together; by default of the newest. Returns exit code 0."""
    if not 0 < options.margin < 1:
        raise CellbenchError(f"--margin {options.margin:g}: expected a difference in Dice between 0 and 1, like 0.005.")
    store_address.require_store()
    say_lines(relocate.fix_artifact_paths())
    trackers = open_experiments(options.experiments)
    results = collect_report(trackers)
    results = replace(results, sets=tuple(replace(here, margin=options.margin) for here in results.sets))
    made = build_report(results)
    path = write_report_files(made, options.out or report_dir(results.experiment))
    say(f"{terminal_table(made.leaderboard, results.sets[0].own_metrics, wide=options.wide)}\n")
    say_lines((*made.verdict, *results.left_out))
    if len(trackers) == 1 and results.parent is not None:
        try:
            trackers[0].attach(results.parent, path.parent)
        except CellbenchError as error:  # a store that one may only read
            say(f"the report is not kept in MLflow: {error}")
    say(f"{path}: {results.num_runs} runs; tables and figures beside it.")
    return 0
