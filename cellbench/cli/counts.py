"""Logs counts beside true ones that come without masks, for ``evaluate`` and ``score``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cellbench.console import say, say_lines
from cellbench.data.count_truth import CountTruth
from cellbench.escaping import escape_markdown
from cellbench.execution import artifacts
from cellbench.files import facts_digest
from cellbench.metrics.counting import CountRow
from cellbench.reporting.counts import MEANING, count_metrics, describe_counts
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.schema import COUNTED, EVALUATION, NOTE
from cellbench.tracking.tracker import Tracker


def log_counts(
    name: str,
    rows: Sequence[CountRow],
    truth: CountTruth,
    facts: Sequence[str],
    tracker: Tracker,
    tags: Mapping[str, str],
    *,
    parent: str = "",
    warning: str = "",
) -> None:
    """Logs an evaluation of counts as a run: counts.csv, the figure of agreement, metrics; and prints its sentences. ``facts``: identify what counted."""
    key = facts_digest([EVALUATION, "counts", *facts, truth.digest])
    known = tracker.known(key).get(key)
    lines = describe_counts(rows)
    folder = truth.root.absolute().name
    note = "\n\n".join([*([f"**Warning:** {escape_markdown(warning)}"] if warning else []), *map(escape_markdown, lines), MEANING])
    all_tags = {"cellbench.kind": EVALUATION, COUNTED: f"{folder} {truth.digest}", "dataset": folder, **tags, NOTE: note}
    with (
        tracker.run(name, key, parent=parent, known=known, tags=all_tags) as run,
        TemporaryFolder() as temporary,
    ):
        if known is None:
            run.log({}, params={"evaluated": name, "dataset": folder, "images": len(truth.samples), "truth": truth.what})
            run.log_input(folder, truth.digest, str(truth.root), "testing")
        artifacts.write_counts(Path(temporary), rows)
        run.log_artifacts(Path(temporary))
        run.log(count_metrics(rows))
    say_lines(lines)
    say(f"logged as '{name}' in the experiment '{tracker.name}': {artifacts.COUNTS_TABLE}, figures/counts.png and metrics.")
