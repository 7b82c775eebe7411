"""``report``: what an experiment found, in one HTML file, and its tables as Markdown, CSV and LaTeX.

Everything is read back from MLflow: a report can be made again at any time, from any process. What is not recorded is not invented, so
runs of older versions have shorter reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellbench.config.loading import CHANGED
from cellbench.data.dataset import Dataset
from cellbench.errors import CellbenchError, one_line
from cellbench.escaping import to_csv
from cellbench.files import file_name, make_folder, os_errors_as
from cellbench.reporting import leaderboard
from cellbench.reporting.collect import ExperimentResults, collect_runs
from cellbench.reporting.model_groups import TestSet
from cellbench.tracking import model_registry, ui_view
from cellbench.tracking.client import command_line
from cellbench.tracking.schema import NOTE, RunRecord, to_record
from cellbench.tracking.tracker import Run, Tracker

if TYPE_CHECKING:
    from cellbench.reporting.sections import Report

MOST_NOTED = 15
"""Models in the table of an experiment's description; the report has all."""
BOARD = "leaderboard.json"
CONCLUDED = "cellbench.concluded"
"""The parent run's tag: of which runs its report is."""
ABOUT = "about.json"
"""On the parent run: what was asked, of which data, by which command, with which versions."""
ASKED = "experiment.toml"
"""On the parent run: the experiment as it ran, with the changes of the call."""
"""Begins the comment in it that names them."""


def log_request(top: Run, text: str, dataset: Dataset, machine: str) -> dict[str, Any]:
    """Logs to a parent run, before anything is trained, what it asks; returns that, as :func:`report_metadata`, for :func:`write_report`."""
    known = report_metadata(text, dataset, machine)
    with tempfile.TemporaryDirectory(prefix="cellbench-") as name:
        (Path(name) / ASKED).write_text(text, encoding="utf-8")
        (Path(name) / ABOUT).write_text(json.dumps(known, indent=1), encoding="utf-8")
        top.artifacts(Path(name))
    return known


def report_metadata(text: str, dataset: Dataset, machine: str) -> dict[str, Any]:
    """What the grid knows and no run does. ``text``: the experiment as it runs, whose first comment line is the question."""
    lines = [line for line in text.lstrip().splitlines() if line.startswith("#") and not line.startswith(CHANGED)]
    comments = [line.lstrip("# ").rstrip() for line in lines]
    names = ("cellbench", "torch", "torchvision", "timm", "segmentation-models-pytorch", "mlflow", "numpy", "scipy", "scikit-image")
    return {
        "question": comments[0] if comments else "",
        "comments": comments[1:],
        "experiment": text,
        "command": command_line(),
        "machine": machine,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "dataset": {
            "name": dataset.name,
            "digest": dataset.digest,
            "root": str(dataset.root),
            "classes": list(dataset.classes),
            "images": {split: len(dataset.samples(split)) for split in ("train", "val", "test")},
            "notes": list(dataset.notes),
        },
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_files(report: Report, folder: Path) -> Path:
    """Everything into a folder, made if need be; returns the page's path. Raises CellbenchError where that is not permitted."""
    make_folder(folder / "figures")
    with os_errors_as(f"writing the report to {folder}"):
        for name, (headings, lines) in report.tables.items():
            (folder / f"{name}.csv").write_text(to_csv(headings, lines), encoding="utf-8")
            (folder / f"{name}.md").write_text(leaderboard.to_markdown(headings, lines) + "\n", encoding="utf-8")
            (folder / f"{name}.tex").write_text(to_latex(headings, lines), encoding="utf-8")
        for name, data in report.pictures.items():
            (folder / "figures" / f"{name}.png").write_bytes(data)
        (folder / "report.html").write_text(report.html, encoding="utf-8")
    return folder / "report.html"


def _known(evidence: ExperimentResults, trackers: Sequence[Tracker]) -> tuple[dict[str, Any], RunRecord | None]:
    """What the grid recorded that was last started on the first test set's data, and its run; nothing of grids on other data."""
    mine = {run.told["dataset"] for model in evidence.sets[0].models for run in model.runs}
    for parent in evidence.parents:
        for tracker in trackers:
            data = tracker.artifact(parent, ABOUT)
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if data is not None and (known := json.loads(data))["dataset"]["digest"] in mine:
                    return known, parent
    return {}, None


def to_latex(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a paper; needs ``\\usepackage{booktabs}``."""
    marks = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "·": r"$\cdot$",
        "≈": r"$\approx$",
        "×": r"$\times$",
    }
    marks |= {one: f"\\{one}" for one in "&%$#_{}"}

    def row(cells: Sequence[str]) -> str:
        return " & ".join("".join(marks.get(c, c) for c in cell) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(headings) - 1)
    inner = "\n".join(row(line) for line in lines)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{row(headings)}\n\\midrule\n{inner}\n\\bottomrule\n\\end{{tabular}}\n"


def report_dir(name: str) -> Path:
    """Where a report goes when nobody says: ``reports/<experiment>``, for names with slashes or emoji too."""
    return Path("reports") / file_name(name)




def write_report(
    tracker: Tracker,
    top: Run,
    only: Collection[str],
    known: dict[str, Any],
    splits: Mapping[str, Sequence[str]],
    skipped: Mapping[str, str],
    failed: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """The end of a grid or search: the leaderboard in the terminal, and the report on the parent run ``top``. ``only``: ids of its runs;
    ``splits``: the names of the images of each split."""
    if not only:
        say("no run is finished, so there is nothing to compare.")
        return
    key = _key(only, known, skipped, failed)
    if (record := _concluded(tracker, top, key)) is None:
        from cellbench.reporting.sections import build_report  # matplotlib with it, which nothing before needs

        evidence = collect_runs([tracker], only=only)
        here = evidence.sets[0]
        with tempfile.TemporaryDirectory(prefix="cellbench-") as name:
            folder = Path(name)
            made = build_report(evidence, [tracker], known)
            write_files(made, folder)
            record = {
                "leaderboard": leaderboard.to_json(leaderboard.leaderboard_rows(here)),
                "verdict": made.verdict,
                "data": here.data,
                "digest": here.digest,
            }
            record |= {"skipped": dict(skipped), "failed": dict(failed)}
            (folder / BOARD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            (folder / "splits.json").write_text(json.dumps(splits, indent=1), encoding="utf-8")
            top.artifacts(folder)
    table = [leaderboard.LeaderboardRow(**row) for row in record["leaderboard"]]
    note = partial(_note, known, record["data"], record["verdict"], table, skipped)
    # The experiment's models and description are of the set that `report` and `best` take, with the models of earlier calls.
    first = collect_runs([tracker]).sets[0]
    _enter(tracker, first, say)
    _tell(table, record["verdict"], say)
    if first.digest == record["digest"]:
        tracker.describe(note(), "" if first.limit else ui_view.WHOLE)
    else:
        say(f"`best` and `report` take the newest whole test set of '{tracker.name}', {first.data}; this call's was {record['data']}.")
    top.log({}, tags={NOTE: note(top.address("figures/leaderboard.png")), CONCLUDED: key})


def _tell(table: Sequence[leaderboard.LeaderboardRow], verdict: Sequence[str], say: Callable[[str], None]) -> None:
    say("")
    say(leaderboard.format_table(table))
    say("")
    for sentence in verdict:
        say(sentence)


def _key(only: Collection[str], known: Mapping[str, Any], skipped: Mapping[str, str], failed: Mapping[str, str]) -> str:
    """What a conclusion hangs on: its runs, and what is said of them, but for the words of the call and of reading the data: the first call
    writes a split that the next one reads."""
    said = {**known, "command": "", "dataset": {**known["dataset"], "notes": []}}
    facts = [sorted(only), said, skipped, failed]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _concluded(tracker: Tracker, top: Run, key: str) -> dict[str, Any] | None:
    """The conclusion of the same runs that lies on the parent run already: drawing it again takes seconds."""
    stored = to_record(tracker.client.get_run(top.run_id))
    data = tracker.artifact(stored, BOARD) if stored.tags.get(CONCLUDED) == key else None
    return json.loads(data) if data is not None else None


NOTE_COLUMNS = ("model", "seeds", "Dice", "Dice/image", "95 %", "AP50", "train s")


def _note(
    known: Mapping[str, Any],
    data: str,
    verdict: Sequence[str],
    table: Sequence[leaderboard.LeaderboardRow],
    skipped: Mapping[str, str],
    picture: str = "",
) -> str:
    """The answer in Markdown for MLflow, the verdict first: of a run's notes the UI shows five lines before a person asks for more."""
    cells = [dict(zip(leaderboard.HEADINGS, leaderboard.format_row(row), strict=True)) for row in table[:MOST_NOTED]]
    board = ui_view.padded_table(NOTE_COLUMNS, [[line[name] for name in NOTE_COLUMNS] for line in cells])
    mind = [sentence for sentence in verdict if sentence.startswith("Mind")]
    said = [sentence for sentence in verdict if sentence not in mind]
    parts = [f"**{known.get('question', '')}**" if known.get("question") else "", " ".join(said[:2]), f"*Data*: {data}"]
    parts += ["\n".join(f"- {sentence}" for sentence in said[2:]), board]
    parts += [f"{len(table) - MOST_NOTED} more in `report.html`."] if len(table) > MOST_NOTED else []
    parts += [f"![leaderboard]({picture})"] if picture else []
    parts += ["*" + " ".join(mind) + "*"] if mind else []
    parts += ["\n".join(f"- skipped: {name}: {reason}" for name, reason in skipped.items())] if skipped else []
    parts.append("All of it is in `report.html`, an artifact of the parent run.")
    return "\n\n".join(part for part in parts if part)[:7900]


def _enter(tracker: Tracker, here: TestSet, say: Callable[[str], None]) -> None:
    """Winners go into MLflow's list of models; entries of earlier calls that are none any more say so."""
    best, entered = here.best, []
    for model in leaderboard.tied_winners(here):
        verdict = "the best" if model is best else f"not significantly different from {best.name}"
        seeds = f" Of its {len(model.runs)} runs this one has the best validation Dice." if len(model.runs) > 1 else ""
        rule = f" {_capital(leaderboard.describe_ranking_rule(here))}." if model is best and len(here.models) > 1 else ""
        try:
            entered.append(model_registry.register(tracker, model.chosen.stored, verdict, f"{rule}{seeds} Data: {here.data}."))
        except CellbenchError as error:  # the answers are there; only the entry is not
            say(f"no model entry for {model.name}: {one_line(error)}")
    if entered:
        try:
            model_registry.mark_superseded(tracker, entered)
        except CellbenchError as error:
            say(f"entries of earlier winners are not marked: {one_line(error)}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
