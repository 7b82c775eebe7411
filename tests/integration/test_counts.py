"""Counts: of a run and of another tool's masks, beside boxes without masks, by image and by region; `predict` by region."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from small_data import enter, finish_grid, write_set

from cellbench.run import main
from cellbench.tracking.schema import COUNTED
from cellbench.tracking.tracker import Tracker

QUESTION = 'experiment = "counts"\ndataset = "folder"\nbaselines = ["otsu"]\n'
WIDTH, HEIGHT = 160, 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    write_set(folder, [f"t{k}.png" for k in range(4)], ["t0.png", "t1.png"])
    return finish_grid(folder, "counts.toml", QUESTION, "--device", "cpu")


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(trained, monkeypatch)
    return trained


def squares(places: list[tuple[int, int, str]]) -> tuple[np.ndarray, np.ndarray]:
    """An image of dark squares of 20 px, and the numbers of their pixels."""
    image, ids = np.full((HEIGHT, WIDTH, 3), 225, np.uint8), np.zeros((HEIGHT, WIDTH), np.uint16)
    for number, (x, y, _) in enumerate(places, 1):
        image[y : y + 20, x : x + 20], ids[y : y + 20, x : x + 20] = (120, 60, 90), number
    return image, ids


PLACES = {
    "s0": [(10, 10, "RBC"), (60, 10, "RBC"), (120, 60, "WBC")],
    "s1": [(10, 60, "RBC"), (100, 10, "WBC")],
    "s2": [(20, 30, "RBC"), (58, 80, "RBC"), (130, 20, "RBC"), (130, 70, "RBC")],
    "s3": [(5, 5, "WBC")],
}


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Images with VOC files; the last has a box where nothing is."""
    folder = tmp_path / "boxes"
    folder.mkdir()
    for name, places in PLACES.items():
        Image.fromarray(squares(places)[0]).save(folder / f"{name}.png")
        more = [*places, (80, 90, "RBC")] if name == "s3" else places
        objects = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 20}</xmax><ymax>{y + 20}</ymax></bndbox></object>"
            for x, y, kind in more
        )
        (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{objects}</annotation>")
    return folder


def add_regions(folder: Path, names: list[str]) -> None:
    """The left 80 px and the rest."""
    folder.mkdir()
    for name in names:
        halves = [
            {
                "type": "Feature",
                "properties": {"objectType": "annotation", "name": side},
                "geometry": {"type": "Polygon", "coordinates": [[[x, 0], [x + 80, 0], [x + 80, HEIGHT], [x, HEIGHT], [x, 0]]]},
            }
            for side, x in (("left", 0), ("right", 80))
        ]
        (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": halves}))


def counts_of(where: str) -> list[dict[str, str]]:
    """The last logged counts.csv of an evaluation."""
    tracker = Tracker("counts")
    run = max((run for run in tracker.stored() if run.name == where), key=lambda run: run.start_s)
    data = tracker.artifact(run, "counts.csv")
    assert data is not None
    assert (tracker.artifact(run, "figures/counts.png") or b"")[:4] == b"\x89PNG"
    return list(csv.DictReader(data.decode().splitlines()))


def test_a_run_is_compared_with_boxes(here: Path, boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "otsu", "--data", str(boxes), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "'RBC' 8, 'WBC' 3 count together, as cells" in shown
    assert "cell: 10 counted, 11 there, in 4 images; bias -0.25" in shown
    rows = counts_of("evaluate: otsu · seed 0 on boxes")
    assert [(row["image"], row["true"], row["predicted"]) for row in rows] == [
        ("s0.png", "3", "3"), ("s1.png", "2", "2"), ("s2.png", "4", "4"), ("s3.png", "2", "1"),
    ]  # fmt: skip
    (run,) = [run for run in Tracker("counts").stored() if COUNTED in run.tags and run.name.startswith("evaluate")]
    assert run.metrics["count/bias"] == -0.25
    assert main(["evaluate", "otsu", "--data", str(boxes), "--device", "cpu"]) == 0
    assert len([run for run in Tracker("counts").stored() if COUNTED in run.tags and run.name.startswith("evaluate")]) == 1


def test_the_report_has_the_counts_of_every_model_and_of_every_evaluation(here: Path, boxes: Path, tmp_path: Path) -> None:
    assert main(["evaluate", "otsu", "--data", str(boxes), "--device", "cpu"]) == 0
    assert main(["report", "counts", "--out", str(tmp_path / "report")]) == 0
    (row,) = csv.DictReader((tmp_path / "report" / "counts.csv").read_text().splitlines())
    record = json.loads(
        Tracker("counts").artifact(next(run for run in Tracker("counts").stored() if run.name == "otsu · seed 0"), "per_image.json")
    )
    off = np.subtract(record["num_predicted"], record["num_true"])
    assert (row["model"], row["bias"]) == ("otsu", f"{off.mean():+.2f}")
    page = (tmp_path / "report" / "report.html").read_text()
    section = page[page.index("Counts on images without masks") :]
    assert "boxes" in section[:3000]
    assert "-0.25" in section[:3000]


def test_masks_of_another_tool_are_compared_by_class_and_region(
    here: Path, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "named").mkdir()
    (tmp_path / "numbers").mkdir()
    for name, places in PLACES.items():
        Image.fromarray(squares(places)[1]).save(tmp_path / "numbers" / f"{name}_cp_masks.png")
        shapes = [
            {"shape_type": "rectangle", "label": "RBC", "points": [[x, y], [x + 20, y + 20]]} for x, y, _ in places
        ]  # every cell is called a red one
        (tmp_path / "named" / f"{name}.json").write_text(json.dumps({"shapes": shapes, "imageHeight": HEIGHT, "imageWidth": WIDTH}))
    assert main(["score", "tool", str(tmp_path / "numbers"), "--data", str(boxes), "--experiment", "counts"]) == 0
    assert "cell: 10 counted, 11 there, in 4 images" in capsys.readouterr().out
    (boxes / "dataset.toml").write_text('categories = { WBC = "" }\n')
    add_regions(boxes / "regions", list(PLACES))
    assert main(["score", "tool", str(tmp_path / "named"), "--data", str(boxes), "--experiment", "counts"]) == 0
    assert "RBC: 10 counted, 8 there, in 8 regions; bias +0.25" in capsys.readouterr().out
    rows = counts_of("score: tool on boxes")
    assert [(row["image"], row["region"], row["true"], row["predicted"]) for row in rows[:4]] == [
        ("s0.png", "left", "2", "2"), ("s0.png", "right", "0", "1"), ("s1.png", "left", "1", "1"), ("s1.png", "right", "0", "1"),
    ]  # fmt: skip


def test_masks_as_truth_give_counts_by_region_too(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "other"
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True)
    for name, places in PLACES.items():
        image, ids = squares(places)
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        Image.fromarray(((ids > 0) * 255).astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    add_regions(folder / "regions", ["s0", "s2"])
    assert main(["evaluate", "otsu", "--data", str(folder), "--device", "cpu"]) == 0
    assert "cell: 10 counted, 10 there, in 6 regions" in capsys.readouterr().out
    rows = counts_of("evaluate: otsu · seed 0 on other")
    assert [(row["image"], row["region"], row["true"]) for row in rows] == [
        ("s0.png", "left", "2"), ("s0.png", "right", "1"), ("s1.png", "", "2"), ("s2.png", "left", "2"), ("s2.png", "right", "2"), ("s3.png", "", "1"),
    ]  # fmt: skip


def test_predict_writes_a_row_for_each_region(here: Path, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_regions(tmp_path / "regions", ["s0", "s1", "s2"])
    call = [
        "predict",
        "otsu",
        *(str(boxes / f"{name}.png") for name in PLACES),
        "--out",
        str(tmp_path / "out"),
        "--instances",
        "--device",
        "cpu",
    ]
    assert main([*call, "--regions", str(tmp_path / "regions")]) == 0
    assert "of 3 of 4 images; the others are counted whole: s3.png" in capsys.readouterr().out
    first = (tmp_path / "out" / "counts.csv").read_text()
    rows = {(row["image"], row["region"]): row for row in csv.DictReader(first.splitlines())}
    for name, places in PLACES.items():
        ids = squares(places)[1]
        centres = ndimage.center_of_mass(ids > 0, ids, range(1, len(places) + 1))
        num = sum(x < 80 for _, x in centres)
        if name == "s3":
            assert int(rows[name, ""]["cells"]) == len(places)
        else:
            assert int(rows[name, "left"]["cells"]) == num
            assert int(rows[name, "right"]["cells"]) == len(places) - num
            assert int(rows[name, "left"]["region_px"]) == 80 * HEIGHT
    assert main(call) == 0  # the regions are kept beside the masks
    assert (tmp_path / "out" / "counts.csv").read_text() == first
    capsys.readouterr()
    for wrong, words in ((str(tmp_path / "none"), "no such file or folder"), (str(boxes), "holds no regions of these images")):
        assert main([*call, "--regions", wrong]) == 2
        assert words in capsys.readouterr().err
