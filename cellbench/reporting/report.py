"""Reports a grid or search: prints the leaderboard, logs the report to the parent run in MLflow, and registers the best models.

All input is read from MLflow, so a report can be created again at any time, by any process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellbench.background import BackgroundCalls
from cellbench.config.base import read_json
from cellbench.config.loading import CHANGED
from cellbench.errors import CellbenchError, one_line
from cellbench.files import facts_digest, file_name
from cellbench.metrics import catalog
from cellbench.metrics.catalog import Metric
from cellbench.reporting.collect import REQUEST_FILE, ExperimentResults, collect_report, collect_runs
from cellbench.reporting.leaderboard import LeaderboardRow, terminal_table, to_json
from cellbench.reporting.model_groups import TestSet
from cellbench.reporting.stored_records import RunRequest
from cellbench.reporting.verdict import describe_ranking_rule
from cellbench.temporary import TemporaryFolder
from cellbench.tracking import model_registry, ui_view
from cellbench.tracking.client import command_line
from cellbench.tracking.open_run import Run
from cellbench.tracking.schema import NOTE, to_record
from cellbench.tracking.tracker import Tracker

if TYPE_CHECKING:
    from cellbench.data.dataset import Dataset

SUMMARY_FILE = "leaderboard.json"
REPORTED_RUNS = "cellbench.concluded"
"""Tag of the parent run: the number of runs in its report, and a digest of them."""
EXPERIMENT_FILE = "experiment.toml"
"""Artifact of the parent run: the experiment file with the command's options applied."""
VERSIONS = ("cellbench", "torch", "torchvision", "timm", "segmentation-models-pytorch", "mlflow", "numpy", "scipy", "scikit-image")


def log_request(top: Run, text: str, dataset: Dataset, machine: str, command: str = "") -> RunRequest:
    """Logs the request of a grid or search to its parent run, before training.

    ``text``: the experiment file with the options applied; ``command``: the call, by default the command line.
    """
    request = _request(text, dataset, machine, command or command_line())
    with TemporaryFolder() as name:
        (Path(name) / EXPERIMENT_FILE).write_text(text, encoding="utf-8")
        (Path(name) / REQUEST_FILE).write_text(json.dumps(request.model_dump(), indent=1), encoding="utf-8")
        top.log_artifacts(Path(name))
    return request


def _request(text: str, dataset: Dataset, machine: str, command: str) -> RunRequest:
    """Creates the request. The first comment line of the experiment is its question."""
    comments = (line for line in text.lstrip().splitlines() if line.startswith("#") and not line.startswith(CHANGED))
    facts = {
        "question": next(comments, "").lstrip("# ").rstrip(),
        "experiment": text,
        "command": command,
        "machine": machine,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
        "dataset": {
            "name": dataset.name,
            "digest": dataset.digest,
            "root": str(dataset.root),
            "classes": dataset.classes,
            "images": {split: len(dataset.samples(split)) for split in ("train", "val", "test")},
            "notes": dataset.notes,
        },
    }
    return read_json(RunRequest, json.dumps(facts).encode(), REQUEST_FILE)  # names of files need not be UTF-8


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report_dir(name: str) -> Path:
    """The default folder of a report: ``reports/<experiment>``, for names with slashes or emoji too."""
    return Path("reports") / file_name(name)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``leaderboard.json`` of the parent run: the report in short."""

    leaderboard: Sequence[Mapping[str, Any]]
    verdict: Sequence[str]
    data: str
    """The test set and its size."""
    digest: str
    skipped: Mapping[str, str]
    failed: Mapping[str, str]
    own_metrics: Sequence[Mapping[str, Any]] = ()
    """Declarations of the metrics of users among the leaderboard's scores."""

    @property
    def rows(self) -> list[LeaderboardRow]:
        return [LeaderboardRow(**row) for row in self.leaderboard]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return catalog.from_record(self.own_metrics)


def write_report(
    tracker: Tracker,
    top: Run,
    only: Collection[str],
    request: RunRequest,
    splits: Mapping[str, Sequence[str]],
    skipped: Mapping[str, str],
    failed: Mapping[str, str],
    say: Callable[[str], None],
    wide: bool = False,
    drawing: BackgroundCalls | None = None,
) -> None:
    """Prints the leaderboard and logs the report to the parent run ``top``.

    ``only``: ids of its runs; ``splits``: image names by split; ``wide``: prints all columns; ``drawing``: processes that draw the
    figures.
    """
    if not only:
        say("no run is finished, so there is nothing to compare.")
        return
    external = [run.run_id for run in tracker.stored() if run.is_external and run.status == "finished"]  # these stand beside them
    runs = [*only, *external]
    key = _key(runs, request, skipped, failed)
    earlier = tracker.client.get_run(top.run_id).data.tags.get(REPORTED_RUNS, "").partition("-")
    if earlier[1] and earlier[0].isdecimal() and int(earlier[0][:9]) > len(runs):
        say(
            f"the parent run has a report over {earlier[0]} runs, which is kept; this call has {len(runs)}. "
            f"`cellbench report {shlex.quote(tracker.name)}` writes one over all runs that are there now."
        )
        return
    if (summary := _stored_summary(tracker, top, key)) is None:
        results = replace(collect_report([tracker], only=only, request=request), skipped=skipped, failed=failed)
        summary = _draw_report(top, results, splits, drawing)
    for line in ("", terminal_table(summary.rows, summary.metrics, wide=wide), "", *summary.verdict):
        say(line)
    # Model entries and the experiment's description refer to the test set that `report` and `best` use, including runs of earlier calls.
    first = collect_runs([tracker]).sets[0]
    _register_winners(tracker, first, say)
    note = partial(_note, request, summary)
    if first.digest == summary.digest:
        tracker.describe(note(), catalog.view_columns(first.own_metrics), "" if first.limit else ui_view.WHOLE)
    else:
        say(f"`best` and `report` take the newest whole test set of '{tracker.name}', {first.description}; this call's was {summary.data}.")
    top.log({}, tags={NOTE: note(top.address("figures/leaderboard.png")), REPORTED_RUNS: key})


def _draw_report(top: Run, results: ExperimentResults, splits: Mapping[str, Sequence[str]], drawing: BackgroundCalls | None) -> Summary:
    from cellbench.reporting.render import write_report_files
    from cellbench.reporting.sections import build_report

    first, report = results.sets[0], build_report(results)
    summary = Summary(
        leaderboard=to_json(report.leaderboard),
        verdict=report.verdict,
        data=first.description,
        digest=first.digest,
        skipped=dict(results.skipped),
        failed=dict(results.failed),
        own_metrics=catalog.to_record(first.own_metrics),
    )
    with TemporaryFolder() as name:
        folder = Path(name)
        write_report_files(report, folder, drawing)
        (folder / SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")
        (folder / "splits.json").write_text(json.dumps(splits, indent=1), encoding="utf-8")
        top.log_artifacts(folder)
    return summary


def _key(only: Collection[str], request: RunRequest, skipped: Mapping[str, str], failed: Mapping[str, str]) -> str:
    """The number of runs of a report and a digest of its inputs.

    Excludes the command and the notes on reading the data, which differ between the first call (writes a split) and the next (reads it).
    """
    asked = request.model_dump(exclude={"command": True, "dataset": {"notes"}})
    layout = [field.name for field in fields(LeaderboardRow)]  # a summary of an older version cannot be read
    return f"{len(only)}-{facts_digest([sorted(only), asked, skipped, failed, layout])}"


def _stored_summary(tracker: Tracker, top: Run, key: str) -> Summary | None:
    """The stored summary of the same runs, if any, because drawing the report again takes seconds."""
    record = to_record(tracker.client.get_run(top.run_id))
    data = tracker.artifact(record, SUMMARY_FILE) if record.tags.get(REPORTED_RUNS) == key else None
    with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged: it is drawn again
        if data is not None:
            summary = Summary(**json.loads(data))
            return summary if summary.rows and summary.metrics is not None else None
    return None


def _note(request: RunRequest, summary: Summary, picture: str = "") -> str:
    from cellbench.reporting.render import to_note

    return to_note(
        question=request.question,
        data=summary.data,
        verdict=summary.verdict,
        rows=summary.rows,
        skipped=summary.skipped,
        picture=picture,
    )


def _register_winners(tracker: Tracker, here: TestSet, say: Callable[[str], None]) -> None:
    """Registers the best models in MLflow, and marks earlier entries that are no longer among the best."""
    entries = []
    best = here.best_own
    for model in [model for model in here.tied_winners() if model.can_predict] or [best]:
        verdict = "the best" if model is best else f"not significantly different from {best.name}"
        rule = describe_ranking_rule(here) if model is best else ""
        sentences = [f"{rule[:1].upper()}{rule[1:]}."] if rule else []
        if len(model.runs) > 1:
            sentences.append(f"Of its {len(model.runs)} runs this one has the best validation Dice.")
        try:
            more = "".join(f" {sentence}" for sentence in (*sentences, f"Data: {here.description}."))
            entries.append(model_registry.register(tracker, model.chosen.record, verdict, more))
        except CellbenchError as error:  # the results are complete without the entry
            say(f"no model entry for {model.name}: {one_line(error)}")
    if entries:
        try:
            model_registry.mark_superseded(tracker, entries)
        except CellbenchError as error:
            say(f"entries of earlier winners are not marked: {one_line(error)}")
