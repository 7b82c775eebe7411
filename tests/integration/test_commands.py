"""Claims about a call: what it asks is read once and logged when it starts; files that change later change nothing."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from cellbench.config.loading import read_experiment
from cellbench.execution import experiment_run
from cellbench.execution.progress import GridProgress, Progress
from cellbench.reporting.collect import collect_runs
from cellbench.run import main
from cellbench.search import best_setting
from cellbench.search.worker import SearchProgress
from cellbench.tracking.tracker import Tracker

QUESTION = """# Is a threshold enough?
# It costs nothing.
experiment = "asked"
dataset    = "folder"
baselines  = ["otsu"]
"""
SEARCH = """# Which rate?
experiment = "sought"
dataset    = "folder"
[search]
trials = 40
[space]
backbone = ["filter-bank"]
head     = ["bilinear"]
lr       = {low = 1e-4, high = 1e-1, log = true}
[run]
tile_px = 64
epochs  = 1
crops_per_image = 1
"""
TRAINED = """experiment = "trained"
dataset    = "folder"
[grid]
backbone = ["filter-bank"]
head     = ["bilinear"]
[run]
tile_px = 64
epochs  = 2
crops_per_image = 1
"""


def logged(name: str) -> tuple[str, dict, str]:
    """Of an experiment's parent run: the experiment as it ran, what was recorded of it, and the page."""
    tracker = Tracker(name, make=False)
    (parent,) = collect_runs([tracker]).parents
    text, about, page = (tracker.artifact(parent, name) for name in ("experiment.toml", "about.json", "report.html"))
    return text.decode(), json.loads(about), page.decode()


def damage(monkeypatch, file: Path, change) -> None:
    """The file is changed when what it asks was logged and the runs begin to train."""

    def before(original):
        def during(runs, *more):
            parent = next(run for run in runs.tracker.stored() if run.run_id == runs.parent_id)
            assert runs.tracker.artifact(parent, "experiment.toml")
            assert runs.tracker.artifact(parent, "about.json")
            change(file)
            return original(runs, *more)

        return during

    monkeypatch.setattr(experiment_run, "find_unfinished", before(experiment_run.find_unfinished))
    monkeypatch.setattr(best_setting, "run_all", before(best_setting.run_all))


def test_an_experiment_that_is_edited_while_it_runs_is_reported_as_it_ran(small_folder, monkeypatch):
    Path("asked.toml").write_text(QUESTION)
    damage(monkeypatch, Path("asked.toml"), lambda file: file.write_text("# Another question\n" + file.read_text()))
    assert main(["grid", "asked.toml", "--data", str(small_folder), "--set", "run.overlap=0.25", "--limit", "1"]) == 0
    text, about, page = logged("asked")
    assert about["question"] == "Is a threshold enough?"
    assert about["experiment"] == text
    assert "Another question" not in page
    assert "Is a threshold enough?" in page
    assert "# Changed by the call: --set run.overlap=0.25 --limit 1" in text
    tree = tomllib.loads(text)
    assert (tree["run"]["overlap"], tree["data"]["limit"]) == (0.25, 1)


def test_a_search_whose_file_is_deleted_while_it_runs_is_reported_with_its_changes(small_folder, monkeypatch):
    Path("sought.toml").write_text(SEARCH)
    damage(monkeypatch, Path("sought.toml"), Path.unlink)
    call = ["search", "sought.toml", "--data", str(small_folder), "--trials", "1", "--set", "search.repeat_best=1"]
    assert main(call) == 0
    text, about, page = logged("sought")
    assert about["question"] == "Which rate?"
    assert tomllib.loads(text)["search"] == {"trials": 1, "repeat_best": 1}
    assert "repeat_best = 1" in page


@pytest.mark.parametrize(
    ("command", "bar", "phases"),
    [
        ("grid", GridProgress, ("training", "validating", "testing")),
        ("search", SearchProgress, ("training", "validating")),
    ],
)
def test_the_bar_moves_in_every_phase_and_is_not_shown_in_a_pipe(small_folder, monkeypatch, capsys, command, bar, phases):
    moves = []

    def move(self, now, doing="", original=Progress.move):
        original(self, now, doing)
        if type(self) is bar:
            moves.append((self._now / self.total, doing.rpartition(", ")[2]))

    monkeypatch.setattr(Progress, "move", move)
    Path("own.toml").write_text(SEARCH if command == "search" else TRAINED)
    changes = ["--trials", "2", "--set", "search.repeat_best=1", "--set", "run.epochs=2"] if command == "search" else []
    assert main([command, "own.toml", "--data", str(small_folder), *changes]) == 0
    assert capsys.readouterr().err == ""
    shares = [share for share, _ in moves]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for phase in phases:
        seen = {share for share, doing in moves if doing == phase}
        assert len(seen) > 1, phase
        assert 0 < min(seen) < 1


@pytest.mark.parametrize("changes", [[], ["run.epochs=3"], ["experiment='a # b'", "grid.seed=[0, 1]"]])
def test_the_experiment_as_it_ran_asks_the_same_without_any_change(tmp_path, changes):
    file = tmp_path / "drawn.toml"
    file.write_text('# Why?\nexperiment = "drawn"\ndataset = "smears"\nbaselines = ["otsu"]\n[data.draw]\nnum_train = 8\n')
    for data, limit in ((None, None), (Path("mine"), None), (None, 3)):
        experiment, text = read_experiment(str(file), changes, data, limit)
        (tmp_path / "resolved.toml").write_text(text)
        assert read_experiment(str(tmp_path / "resolved.toml"), data=data)[0] == experiment
        assert text.startswith("# Why?\n")
        assert ("# Changed" in text) == bool(changes or data or limit)
