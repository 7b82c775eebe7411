"""Runs are logged in the background: what is evaluated is kept after Ctrl-C in the next cohort, and a failed drawing fails its run."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image
from small_data import QUESTION, write_set

from cellbench.execution import artifacts
from cellbench.execution.runner import Runner
from cellbench.run import main
from cellbench.tracking.tracker import Tracker

GRID = ["grid", "small.toml", "--data", "smears", "--device", "cpu"]


@pytest.fixture
def question(tmp_path: Path) -> None:
    write_set(tmp_path, ["a.png", "b.png", "c.png"], ["t.png"])
    Path("small.toml").write_text(QUESTION.replace("epochs  = 2", "epochs  = 1"))


def test_every_run_has_its_pictures_and_the_grid_its_report_with_figures(question: None, pictures: None) -> None:
    assert main(GRID) == 0
    tracker = Tracker("small", make=False)
    runs = {run.name: run for run in tracker.stored()}
    asked = {
        "vit-tiny-random · detail · seed 0": ("curves", "scores", "worst"),
        "otsu · seed 0": ("scores", "worst"),
        "grid: small": ("leaderboard", "images"),
    }
    for name, figures in asked.items():
        for figure in figures:
            drawn = Image.open(io.BytesIO(tracker.artifact(runs[name], f"figures/{figure}.png")))
            assert min(drawn.size) > 100 < len(drawn.convert("RGB").getcolors(2**24)), (name, figure)
    assert (tracker.artifact(runs["grid: small"], "report.html") or b"").count(b"data:image/svg+xml") > 1


def states() -> dict[str, str]:
    return {run.name: run.status for run in Tracker("small", make=False).known().values()}


def test_what_is_evaluated_is_kept_after_ctrl_c_in_the_next_cohort(question: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_apply", interrupted)
    assert main(GRID) == 130
    found = states()
    assert found.pop("vit-tiny-random · detail · seed 0") == "finished"
    assert set(found.values()) == {"interrupted"}
    assert len(list(Path("mlruns").rglob("figures/scores.png"))) == 1


def test_a_picture_that_cannot_be_drawn_fails_its_run(question: None, pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "draw_plot", math.sqrt)
    assert main(GRID) == 1
    assert "finished" not in states().values()
    assert "running" not in states().values()
    assert json.dumps(states()).count("failed") >= 2  # the run and the grid
