"""``score``: another tool's masks stand beside the models, in the leaderboard, the tests and the report, and are no model to predict with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import enter, finish_grid, write_set

from cellbench.reporting.collect import collect_runs
from cellbench.run import main
from cellbench.tracking.tracker import Tracker

QUESTION = """experiment = "rivals"
dataset = "folder"
baselines = ["otsu"]
[grid]
backbone = ["filter-bank"]
head = ["bilinear"]
[run]
tile_px = 64
epochs = 1
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished grid of a baseline and a model."""
    folder = tmp_path_factory.mktemp("compared")
    write_set(folder, [f"t{k}.png" for k in range(4)], ["t0.png", "t1.png"])
    return finish_grid(folder, "rivals.toml", QUESTION, "--device", "cpu")


@pytest.fixture
def here(compared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(compared, monkeypatch)
    return compared


@pytest.fixture
def masks(here: Path, tmp_path: Path) -> Path:
    """The true masks of both test images, one of them shifted by two pixels."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name, shift in (("t0", 0), ("t1", 2)):
        truth = np.array(Image.open(here / "smears" / "test" / "mask" / f"{name}.png"))[..., 0]
        Image.fromarray(np.roll(truth, shift, axis=1)).save(folder / f"{name}_mask.png")
    return folder


def test_the_masks_are_a_row_with_tests_and_no_model(here: Path, masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "rival", str(masks), "--data", "smears"]) == 0
    shown = capsys.readouterr().out
    assert "Masks of rival: Dice 0.9" in shown
    found = collect_runs([Tracker("rivals")]).sets[0]
    (rival,) = [model for model in found.models if model.external]
    dice = dict(zip(rival.images, rival.scores().per_image, strict=True))
    truth = np.array(Image.open(here / "smears" / "test" / "mask" / "t1.png"))[..., 0] > 0
    moved = np.roll(truth, 2, axis=1)
    assert dice["t0.png"] == 1
    assert dice["t1.png"] == pytest.approx(2 * (truth & moved).sum() / (truth.sum() + moved.sum()), abs=1e-6)
    assert {d.num_tests for d in found.differences()} == {3}

    assert main(["report", "rivals", "--out", str(tmp_path / "report")]) == 0
    capsys.readouterr()
    table = (tmp_path / "report" / "leaderboard.csv").read_text()
    assert "rival (external)" in table
    for call in (["predict", "rival", "smears/test/original", "--out", "out"], ["export", "rival", "--out", "out"], ["evaluate", "rival"]):
        assert main(call) == 2
        assert "masks of another tool, so there is no model" in capsys.readouterr().err
    assert main(["predict", "best", "smears/test/original/t0.png", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0


def test_scored_again_it_is_one_row_of_the_newer_masks(here: Path, masks: Path) -> None:
    for call in (["score", "twice", str(masks)], ["score", "twice", str(masks)]):
        assert main(call) == 0
    Image.fromarray(np.zeros((120, 160), np.uint8)).save(masks / "t0_mask.png")
    assert main(["score", "twice", str(masks), "--experiment", "rivals"]) == 0
    found = collect_runs([Tracker("rivals")])
    (model,) = [model for model in found.sets[0].models if model.name == "twice"]
    assert model.scores().per_image.tolist()[0] == 0
    assert len([run for run in Tracker("rivals").stored() if run.name == "twice"]) == 2


def test_faults_are_one_line_and_log_nothing(here: Path, masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(Tracker("rivals").stored())
    (masks / "t1_mask.png").rename(tmp_path / "away.png")
    for call, words in (
        (["score", "rival2", str(masks)], "1 of 2 test images have no mask: 't1.png'"),
        (["score", "otsu", str(masks)], "'otsu' is a model of 'rivals' already"),
        (["score", "best", str(masks)], "cannot be the name"),
        (["score", "x", str(masks), "--experiment", "rivls"], "Did you mean 'rivals'"),
        (["score", "x", str(tmp_path / "none")], "there is no such folder"),
        (["score", "x", str(masks), "--data", str(masks)], "--data"),
    ):
        assert main(call) == 2, call
        error = capsys.readouterr().err.strip()
        assert words in error
        assert "\n" not in error
    assert len(Tracker("rivals").stored()) == before


def test_a_later_grid_shows_the_row_too(here: Path, masks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "rival", str(masks)]) == 0
    capsys.readouterr()
    assert main(["grid", "rivals.toml", "--data", "smears", "--device", "cpu"]) == 0
    assert "rival (external)" in capsys.readouterr().out


def test_single_cells_of_a_prediction_with_subfolders_are_scored_by_a_pattern(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("slide1", "t0.png"), ("slide2", "t1.png")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / name).write_bytes((here / "smears" / "test" / "original" / name).read_bytes())
    out = tmp_path / "out"
    assert main(["predict", "best", str(tmp_path / "in" / "t*.png"), "--out", str(out), "--instances", "--device", "cpu"]) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.instances.png")) == [
        "slide1/t0.instances.png",
        "slide2/t1.instances.png",
    ]
    assert main(["score", "itself", str(out)]) == 2
    assert f"Name one kind, as in '{out}/*.instances.png' with quotes" in capsys.readouterr().err
    assert main(["score", "itself", str(out / "*.instances.png")]) == 0
    found = collect_runs([Tracker("rivals")]).sets[0]
    (row,) = [model for model in found.models if model.name == "itself"]
    assert row.scores().mean == pytest.approx(found.best_own.scores().mean, abs=0.02)  # but for cells below the smallest size
