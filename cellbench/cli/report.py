"""cellbench report: the report of one experiment, or of several taken together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellbench.errors import CellbenchError
from cellbench.reporting.collect import collect_runs
from cellbench.tracking import relocate, sqlite_store
from cellbench.tracking.tracker import Tracker, newest_experiment

if TYPE_CHECKING:
    pass
from cellbench.reporting.report import _known, report_dir, write_files


def report(names: Sequence[str], out: Path | None, say: Callable[[str], None] = print) -> int:
    """``cellbench report``: the report of one experiment, or of several taken together; of the newest where none is named."""
    sqlite_store.require_store()
    for line in relocate.fix_artifact_paths():
        say(line)
    if not names:
        latest = newest_experiment()
        if latest is None:
            raise CellbenchError("no experiment of MLflow's store here has a finished run. `cellbench grid` makes some.")
        names = [latest]
    from cellbench.reporting.sections import build_report

    trackers = [Tracker(name, make=False) for name in dict.fromkeys(names)]
    evidence = collect_runs(trackers)
    known, parent = _known(evidence, trackers)
    made = build_report(evidence, trackers, known)
    path = write_files(made, out or report_dir(evidence.experiment))
    for sentence in (*made.verdict, *evidence.left_out):
        say(sentence)
    if len(trackers) == 1 and evidence.parents:
        trackers[0].attach(parent or evidence.parents[0], path.parent)
    say(f"{path}: {evidence.num_runs} runs; tables and pictures beside it.")
    return 0
