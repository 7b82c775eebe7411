"""Claims about the Python API beside the command line: the same runs and numbers, a process left as it was, images in any form."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import os
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_data import MODEL, QUESTION, enter

import cellbench
from cellbench.api.searches import search
from cellbench.config.options import CheckOptions, GridOptions, ScoreOptions, SearchOptions
from cellbench.run import main
from cellbench.training.trainer import HeadTrainer

IMAGE = "smears/test/original/t1.jpg"


@pytest.fixture
def apart(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store and a cache of its own, beside the data of the finished grid."""
    enter(tmp_path, monkeypatch)
    (tmp_path / "smears").symlink_to(trained / "smears")
    return tmp_path


def state() -> tuple[dict[str, str], int]:
    """Of the process: its environment, but the telemetry of libraries and what OpenCV sets, and torch's threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HF_", "RAY_", "LD_"))}
    return kept, torch.get_num_threads()


def test_a_grid_from_python_has_the_commands_numbers_and_the_command_finds_its_runs(there, apart, monkeypatch, capsys):
    enter(there, monkeypatch)
    expected = cellbench.results("small").per_image()
    enter(apart, monkeypatch)
    torch.set_num_threads(2)
    before = state()
    try:
        results = cellbench.grid(tomllib.loads(QUESTION), data="smears", device="cpu", cache=apart / "kept", progress=False)
        assert state() == before
    finally:
        torch.set_num_threads(1)
    pd.testing.assert_frame_equal(results.per_image().drop(columns="run_id"), expected.drop(columns="run_id"))
    assert capsys.readouterr() == ("", "")
    Path("small.toml").write_text(QUESTION)
    assert main(["grid", "small.toml", "--data", "smears", "--device", "cpu"]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    assert set(cellbench.results("small").runs()["run_id"]) == set(results.runs()["run_id"])


def test_a_finished_grid_is_returned_and_messages_are_shown_if_asked_for(there, capsys):
    results = cellbench.grid("small.toml", data="smears", device="cpu")
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    assert set(results.runs()["run_id"]) == set(cellbench.results().runs()["run_id"])
    assert (results.skipped, results.failed) == ({}, {})


def test_every_option_of_the_command_is_an_argument(there):
    names = {one.name for one in dataclasses.fields(GridOptions)} - {"file", "changes", "dry_run", "wide"} | {"experiment", "set"}
    given = set(inspect.signature(cellbench.grid).parameters)
    assert given - {"progress"} == names


@pytest.mark.parametrize(
    ("options", "function", "others"),
    [
        (SearchOptions, search, {"changes", "workers", "helper"}),
        (ScoreOptions, cellbench.score, set()),
        (CheckOptions, cellbench.check, {"changes", "experiment", "out"}),
    ],
)
def test_so_are_those_of_other_commands_that_apply(options, function, others):
    given = set(inspect.signature(function).parameters) - {"progress", "set"}
    fields = {one.name for one in dataclasses.fields(options)}
    assert given <= fields
    assert fields - given <= others | {"weights", "device", "precision"}


def test_check_score_and_search_are_those_of_the_commands(there, tmp_path, capsys):
    checked = cellbench.check("smears", progress=False)
    assert checked.fit
    assert repr(checked).startswith("smears: fit to train on; 6 images read")
    shutil.copytree("smears", tmp_path / "torn", symlinks=False)
    next((tmp_path / "torn" / "train" / "mask").iterdir()).unlink()
    torn = cellbench.check(tmp_path / "torn", progress=False)
    assert not torn.fit
    assert torn.findings[["kind", "severity"]].values.tolist()[0] == ["missing-mask", "severe"]
    (tmp_path / "masks").mkdir()
    truth = {path.stem: np.array(Image.open(path)) for path in Path("smears/test/mask").iterdir()}
    for name, mask in truth.items():
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}_mask.png")
    results = cellbench.score("perfect", tmp_path / "masks", experiment="small", progress=False)
    assert results.per_image().query("model == 'perfect'")["dice"].tolist() == [1.0] * len(truth)
    with pytest.raises(cellbench.CellbenchError, match="there is no such folder"):
        cellbench.score("other", tmp_path / "none", experiment="small", progress=False)
    Path("tiny.toml").write_text(TINY)
    found = cellbench.search("tiny.toml", data="smears", trials=2, device="cpu", progress=False)
    assert found.finished
    assert found.trials["state"].tolist() == ["complete", "complete"]
    assert found.trials["lr"].between(1e-4, 1e-1).all()
    best = found.trials["val/dice"].idxmax()
    assert tomllib.loads(found.best)["run"]["lr"] == pytest.approx(found.trials["lr"][best])
    assert cellbench.results(found.name).models == ("filter-bank · bilinear",)
    assert capsys.readouterr().out == ""
    again = cellbench.search("tiny.toml", data="smears", trials=2, device="cpu", progress=False)
    pd.testing.assert_frame_equal(again.trials, found.trials)  # nothing is run again


TINY = """experiment = "tiny"
dataset    = "folder"
[search]
batch   = 2
startup = 2
[space]
backbone = ["filter-bank"]
head     = ["bilinear"]
lr       = {low = 1e-4, high = 1e-1, log = true}
[run]
tile_px = 64
epochs  = 1
crops_per_image = 2
"""


def test_settings_are_changed_and_limits_apply(apart):
    changes = {"grid.head": ["bilinear"], "run.epochs": 1, "run.normalise": "none", "baselines": []}
    results = cellbench.grid(tomllib.loads(QUESTION), data="smears", set=changes, limit=1, device="cpu", progress=False)
    assert results.models == ("vit-tiny-random · bilinear",)
    (run,) = results.runs().to_dict("records")
    assert (run["epochs"], run["normalise"], len(results.per_image())) == ("1", "none", 1)


def test_ctrl_c_is_raised_and_what_is_finished_is_kept(apart, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    before = state()
    with monkeypatch.context() as patch:
        patch.setattr(HeadTrainer, "start_epoch", interrupted)
        experiment = tomllib.loads(QUESTION)
        with pytest.raises(KeyboardInterrupt):
            cellbench.grid(experiment | {"baselines": []}, data="smears", device="cpu", progress=False)
        assert state() == before
        with pytest.raises(cellbench.CellbenchError, match="1 run is not finished"):
            cellbench.results("small")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiment": "smal"}, "no experiment file called 'smal'"),
        ({"experiment": {"dataset": "folder"}}, "the experiment: 'experiment' is missing"),
        ({"experiment": {"experiment": None}}, "the experiment: cannot be read"),
        ({"set": {"run.epochs": {"low": 1}}}, "set: run.epochs is {'low': 1}. Expected a number"),
        ({"data": "nowhere"}, "--data nowhere: there is no such folder"),
    ],
)
def test_wrong_input_is_an_error_of_one_line(apart, arguments, message):
    with pytest.raises(cellbench.CellbenchError) as raised:
        cellbench.grid(**arguments, device="cpu", progress=False)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_grid_without_any_result_says_why(apart):
    experiment = tomllib.loads(QUESTION) | {"baselines": [], "grid": {"backbone": ["uni"], "head": ["detail"]}}
    with pytest.raises(cellbench.CellbenchError, match=r"no run has a result\. 1 skipped, first uni · detail · seed 0: uni: "):
        cellbench.grid(experiment, data="smears", device="cpu", progress=False)


def test_a_file_an_array_and_a_pillow_image_give_the_same(there):
    segmenter = cellbench.Segmenter.load(MODEL, device="cpu")
    torch.set_num_threads(2)
    try:
        files = [IMAGE, Path(IMAGE), Image.open(IMAGE), np.array(Image.open(IMAGE))]
        of_file, *others = segmenter.predict_all(files)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for other in others:
        assert (other.classes == of_file.classes).all()
        assert (other.probability == of_file.probability).all()
        assert (other.image == of_file.image).all()
        pd.testing.assert_frame_equal(other.table(), of_file.table())


def test_a_prediction_is_what_predict_writes(there, tmp_path):
    out = tmp_path / "out"
    assert main(["predict", MODEL, IMAGE, "--out", str(out), "--instances", "--overlay", "--device", "cpu"]) == 0
    found = cellbench.results("small").segmenter("vit-tiny-random detail", device="cpu").predict(IMAGE)
    with (out / "t1.cells.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = found.table()
    assert list(table) == list(rows[0])
    assert [f"{x:g}" for x in table["area_px"]] == [f"{float(row['area_px']):g}" for row in rows]
    assert table["cell"].tolist() == list(range(1, found.num_cells + 1))
    assert (np.array(Image.open(out / "t1.instances.png")) == found.instances).all()
    assert (np.array(Image.open(out / "t1.overlay.png")) == found.overlay()).all()
    assert (found.mask == (found.classes > 0)).all()
    assert list(found.table(um_per_px=0.5)["area_um2"]) == pytest.approx(list(table["area_px"] / 4), abs=1e-3)


def test_a_prediction_without_cells_has_an_empty_table(there):
    found = cellbench.Segmenter.load("otsu · seed 0").predict(np.full((40, 50, 3), 230, np.uint8))
    assert (found.num_cells, len(found.table()), "area_px" in found.table()) == (0, 0, True)
    assert found.overlay().shape[2] == 3


@pytest.mark.parametrize("wrong", ["nowhere.png", 3, Image.new("F", (4, 4)), np.zeros((4, 4), np.float32)])
def test_what_is_no_image_is_refused(there, wrong):
    with pytest.raises(cellbench.CellbenchError):
        cellbench.Segmenter.load("otsu · seed 0").predict(wrong)


def test_transparent_and_turned_pillow_images_are_read_as_files_are(there, tmp_path):
    picture = Image.open(IMAGE).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "clear.png", exif=exif)
    segmenter = cellbench.Segmenter.load("otsu · seed 0")
    of_file, of_picture = segmenter.predict_all([tmp_path / "clear.png", Image.open(tmp_path / "clear.png")])
    assert of_file.classes.shape == (160, 120)
    assert (of_file.image == of_picture.image).all()
