"""``check --with`` and ``next``: models of a finished grid judge masks and images that they were not trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from small_data import discs, enter, finish_grid, write_pair

from cellbench.run import main

QUESTION = """experiment = "judges"
dataset = "folder"
[data]
folds = 2
[grid]
backbone = ["filter-bank"]
head = ["bilinear"]
seed = [0, 1]
[run]
tile_px = 64
epochs = 2
crops_per_image = 6
batch_size = 4
lr = 1e-2
"""


def largest_cell(mask: np.ndarray) -> np.ndarray:
    ids, _ = ndimage.label(mask > 0)
    found: np.ndarray = ids == np.bincount(ids.ravel())[1:].argmax() + 1
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid by folds on eight images, of which one mask lacks its largest cell and one has a square of background; and six images without masks."""
    folder = tmp_path_factory.mktemp("judges")
    for seed in range(8):
        write_pair(folder / "smears", f"a{seed}.png", seed)
    for name in ("a2", "a5"):
        path = folder / "smears" / "mask" / f"{name}.png"
        mask = np.array(Image.open(path))
        if name == "a2":
            mask[largest_cell(mask[..., 0])] = 0
        else:
            away = ndimage.distance_transform_cdt(np.pad(mask[..., 0] == 0, 1))[1:-1, 1:-1]
            y, x = np.unravel_index(away.argmax(), away.shape)
            mask[y - 12 : y + 12, x - 12 : x + 12] = 255
        Image.fromarray(mask).save(path)
    (folder / "new").mkdir()
    for seed in range(5):
        Image.fromarray(discs(50 + seed)[0]).save(folder / "new" / f"n{seed}.png")
    Image.fromarray(255 - discs(99)[0]).save(folder / "new" / "strange.png")
    return finish_grid(folder, "judges.toml", QUESTION, "--device", "cpu")


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(finished, monkeypatch)
    return finished


def test_wrong_masks_are_found_out_of_fold_ranked_and_pictured(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "smears", "--with", "judges", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "8 of 8 images compared with" in shown
    faults = list(csv.DictReader((tmp_path / "faults.csv").open()))
    assert {("a2.png", "missing"), ("a5.png", "false")} <= {(one["image"], one["kind"]) for one in faults}
    assert [float(one["score"]) for one in faults] == sorted((float(one["score"]) for one in faults), reverse=True)
    (one,) = [one for one in faults if one["image"] == "a2.png" and one["kind"] == "missing"]
    y, x = np.argwhere(largest_cell(discs(2)[1])).mean(0)
    assert np.hypot(float(one["x_px"]) - x, float(one["y_px"]) - y) < 5
    record = json.loads((tmp_path / "check.json").read_text())
    assert {"a2.png", "a5.png"} <= {name for finding in record["findings"] if finding["kind"] == "labels" for name in finding["images"]}
    page = (tmp_path / "check.html").read_text()
    assert "a2.png: cell without a mark" in page
    assert "a5.png: mark without a cell" in page


def test_new_images_are_ranked_by_spread_and_distance(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["next", "new", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "next.csv").open()))
    assert {row["image"] for row in rows} == {*(f"n{k}.png" for k in range(5)), "strange.png"}
    assert rows[0]["image"] == "strange.png"
    assert "1  strange.png" in shown
    assert [float(row["score"]) for row in rows] == sorted((float(row["score"]) for row in rows), reverse=True)
    usual = np.median([float(row["spread"]) for row in rows])
    for row in rows:
        spread, distance = float(row["spread"]), float(row["distance"])
        assert float(row["score"]) == pytest.approx(1 - usual / (spread + usual) / (distance + 1), abs=5e-3)


def test_names_of_images_in_the_tables_are_no_formulas_and_need_not_be_utf_8(here: Path, tmp_path: Path) -> None:
    names = ["=1+1.png", "pr\udcfcfung.png"]
    for name, seed in zip(names, (60, 61), strict=True):
        (tmp_path / "new").mkdir(exist_ok=True)
        Image.fromarray(discs(seed)[0]).save(tmp_path / "new" / name)
    assert main(["next", str(tmp_path / "new"), "--experiment", "judges", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert {row["image"] for row in csv.DictReader((tmp_path / "next.csv").open())} == {"'=1+1.png", "pr\\xfcfung.png"}


def test_what_was_trained_on_is_neither_judged_nor_ranked(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("a1.png", "a3.png"):
        (mixed / name).write_bytes((here / "smears" / "original" / name).read_bytes())
    (mixed / "n0.png").write_bytes((here / "new" / "n0.png").read_bytes())
    (mixed / "broken.png").write_bytes((here / "new" / "n1.png").read_bytes()[:500])
    assert main(["next", str(mixed), "--experiment", "judges", "--device", "cpu", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "2 of 4 images are training images" in shown.out
    assert "broken.png" in shown.err
    assert [row["image"] for row in csv.DictReader((tmp_path / "next.csv").open())] == ["n0.png"]
    assert main(["next", "smears", "--device", "cpu"]) == 2
    assert "each of its 8 images has a mask" in capsys.readouterr().err


def test_an_experiment_that_does_not_exist_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (["check", "smears", "--with", "judge"], ["next", "new", "--experiment", "judge"]):
        assert main(call) == 2
        assert "judges" in capsys.readouterr().err
