"""``predict`` on a small synthetic folder: masks equal those of the test, nothing is computed twice or left half-written."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import MODEL, discs

from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError
from cellbench.inference import writers
from cellbench.inference.segmenter import Segmenter
from cellbench.metrics.pixel import confusion_matrix
from cellbench.run import main


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("run", [MODEL, "otsu · seed 0"])
def test_the_masks_are_those_of_the_test(there: Path, tmp_path: Path, run: str) -> None:
    assert predict(run, "smears/test/original", "--out", tmp_path / "out") == 0
    records = [
        json.loads(path.read_text())
        for path in there.glob("mlruns/small/*/artifacts/per_image.json")
        if ("otsu" in path.with_name("config.toml").read_text().split("[", 1)[1][:40]) == run.startswith("otsu")
    ]
    record = next(record for record in records if record["images"] == ["t0.png", "t1.jpg"])  # others evaluate it on other images
    for name, counts in zip(record["images"], record["confusion"], strict=True):
        found = np.array(Image.open(tmp_path / "out" / f"{Path(name).stem}.png"))
        truth = np.array(Image.open(f"smears/test/mask/{Path(name).stem}.png"))[..., 0]
        assert set(np.unique(found)) <= {0, 255}
        assert (confusion_matrix((truth > 0).astype(np.uint8), (found > 0).astype(np.uint8), 2) == counts).all()


def test_all_requested_files_are_written_and_agree(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict("best", "smears/test/original/t0.png", "--out", out, "--probability", "--overlay", "--geojson", "--coco") == 0
    assert {path.name for path in out.iterdir()} == {"t0.png", "t0.probability.png", "t0.overlay.png", "t0.geojson", "coco.json"}
    found = Segmenter.load("best", device="cpu").predict("smears/test/original/t0.png")
    assert (np.array(Image.open(out / "t0.png")) == found.mask * 255).all()
    width, height = Image.open(out / "t0.overlay.png").size
    assert (width % 160, height % 120) == (0, 0)  # a small image is drawn larger
    shapes = json.loads((out / "t0.geojson").read_text())["features"]
    coco = json.loads((out / "coco.json").read_text())
    assert coco["images"] == [{"id": 1, "file_name": "t0.png", "height": 120, "width": 160}]
    assert [one["area"] for one in coco["annotations"]] == [one["properties"]["measurements"]["Area px^2"] for one in shapes]
    if found.probability is not None:
        assert (np.array(Image.open(out / "t0.probability.png")) == found.probability).all()


def test_a_second_call_processes_only_new_images(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("smears/test/original", tmp_path / "in")
    assert predict(MODEL, tmp_path / "in", "--out", tmp_path / "out") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    Image.fromarray(discs(7)[0]).save(tmp_path / "in" / "t0.png")
    Image.fromarray(discs(8)[0]).save(tmp_path / "in" / "new.png")
    assert predict(MODEL, tmp_path / "in", "--out", tmp_path / "out") == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"t0.png", "new.png"}
    assert "2 images on" in capsys.readouterr().out


def test_an_unreadable_image_is_reported_and_skipped(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("smears/test/original", tmp_path / "in")
    (tmp_path / "in" / "aa.png").write_bytes(Path("smears/test/original/t0.png").read_bytes()[:3000])
    Image.fromarray(discs(3, 50, 333)[0][..., 0]).save(tmp_path / "in" / "grey.tif")
    assert predict(MODEL, tmp_path / "in", "--out", tmp_path / "out") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"t0.png", "t1.png", "grey.png"}
    assert "aa.png" in capsys.readouterr().err
    assert Image.open(tmp_path / "out" / "grey.png").size == (333, 50)


def test_every_file_of_a_folder_is_used_or_named_and_counted(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    for place in (folder / "slide1", store / "slide2", folder / ".hidden"):
        place.mkdir(parents=True)
    picture = Image.fromarray(discs(3, 64, 64)[0])
    used = ("a.PNG", "b.gif", "c.jp2", "d.j2k", "e.jfif", "slide1/f.webp", "../store/slide2/g.bmp")
    for name in used:
        picture.save(folder / name)
    lost = {"x.dcm": ".dcm", "slide1/y.svs": ".svs", "z": "without an ending", ".h.png": "hidden", "notes.txt": ".txt"}
    for name in lost:
        (folder / name).write_bytes(b"something")
    Path(os.fsdecode(os.fsencode(folder) + b"/no-utf8-\xff.dcm")).write_bytes(b"something")
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    picture.save(folder / ".hidden" / "k.png")
    for name in ("Thumbs.db", ".DS_Store", "._a.PNG"):  # what systems leave
        (folder / name).write_bytes(b"something")
    (folder / "slide2").symlink_to(store / "slide2")
    (folder / "again").symlink_to(store / "slide2")  # the same folder twice, and a circle
    (store / "slide2" / "up").symlink_to(folder)
    assert predict(MODEL, folder, "--out", tmp_path / "out") == 1
    output = capsys.readouterr()
    masks = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert masks == {"a.png", "b.png", "c.png", "d.png", "e.png", "slide1/f.png", "again/g.png"}
    for name, reason in (lost | {"lost.png": "link that leads nowhere", ".hidden": "hidden folder"}).items():
        assert any(f"ignored, {reason}:" in line and str(folder / name) in line for line in output.err.splitlines()), name
    assert "._a" not in output.err
    last = output.out.splitlines()[-1]
    assert "7 masks" in last
    assert "8 files" in last
    assert "2 .dcm" in last


def test_a_folder_below_a_link_is_no_place_for_masks(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "in").mkdir()
    Image.fromarray(discs(3, 64, 64)[0]).save(tmp_path / "store" / "a.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "store")
    assert predict(MODEL, tmp_path / "in", "--out", tmp_path / "store" / "masks") == 2
    assert "lies in" in capsys.readouterr().err


def sized(path: Path, um: float | tuple[float, float] | None) -> None:
    across, down = um if isinstance(um, tuple) else (um, um)
    Image.fromarray(discs(100)[0]).save(path, **({"dpi": (25400 / across, 25400 / down)} if um else {}))


def counts_of(out: Path) -> dict[str, dict[str, str]]:
    return {row["image"]: row for row in csv.DictReader((out / "counts.csv").open())}


def areas_of(out: Path, name: str) -> list[float]:
    rows = list(csv.DictReader((out / f"{name}.cells.csv").open()))
    return [float(row.get("area_um2") or row["area_px"]) for row in rows]


def test_areas_and_densities_are_by_the_pixel_size_of_each_file(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, um in (("quarter", 0.25), ("half", 0.5), ("oblong", (0.25, 0.5)), ("none", None)):
        sized(folder / f"{name}.png", um)
    assert predict(MODEL, folder, "--out", out, "--instances") == 0
    output = capsys.readouterr().out
    counts, plain = counts_of(out), areas_of(out, "none")
    num = len(plain)
    assert num > 0
    for name, area in (("quarter", 0.0625), ("half", 0.25), ("oblong", 0.125)):
        assert areas_of(out, name) == pytest.approx([one * area for one in plain], rel=1e-4)
        assert float(counts[name]["cells_per_mm2"]) == pytest.approx(num / (120 * 160 * area * 1e-6), rel=1e-4)
        assert float(counts[name]["um_per_px"]) == pytest.approx(area**0.5, rel=1e-4)
    assert (counts["none"]["cells_per_mm2"], counts["none"]["um_per_px"]) == ("", "")
    assert float(counts["none"]["cells_per_megapixel"]) == pytest.approx(num / 0.0192, abs=1e-3)
    assert "0.25 um (1), 0.3536 um (1), 0.5 um (1), not stated (1)" in output
    assert "not square" in output
    assert "oblong.png" in output
    assert "1 of 4 images state no pixel size" in output


def test_a_given_pixel_size_overrides_the_files_and_names_those_it_contradicts(there: Path, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, um in (("quarter", 0.25), ("half", 0.5), ("none", None)):
        sized(folder / f"{name}.png", um)
    assert predict(MODEL, folder, "--out", out, "--instances", "--um-per-px", 0.5) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--um-per-px"))
    assert "quarter.png (0.25 um)" in line
    assert "half" not in line
    assert {row["um_per_px"] for row in counts_of(out).values()} == {"0.5"}
    assert areas_of(out, "quarter") == areas_of(out, "half") == areas_of(out, "none")


def test_names_that_differ_in_their_ending_alone_keep_it(there: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "a.jpg", "sub/a.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(discs(seed, 64, 64)[0]).save(tmp_path / "in" / name)
    assert predict(MODEL, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")} == {
        "a.png.png",
        "a.jpg.png",
        "sub/a.png",
    }


def test_invalid_options_are_one_line_errors(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = "smears/test/original"

    def refused(*arguments: object) -> str:
        assert predict(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "lies in" in refused(MODEL, images, "--out", f"{images}/masks")
    assert "is the folder of" in refused(MODEL, f"{images}/t0.png", "--out", images)
    assert "no such file" in refused(MODEL, "nowhere", "--out", tmp_path / "out")
    assert "Did you mean" in refused(MODEL.replace("detail", "detial"), images, "--out", tmp_path / "out")
    assert "no model or run called" in refused("0" * 32, images, "--out", tmp_path / "out")
    assert "no experiment called" in refused("best:nothing", images, "--out", tmp_path / "out")
    assert "the parent of other runs" in refused(_parent(there), images, "--out", tmp_path / "out")
    Image.fromarray(discs(1)[1]).save(tmp_path / "t0.png")
    assert "no prediction of cellbench" in refused(MODEL, images, "--out", tmp_path)
    both = [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"]
    for path in both:
        path.parent.mkdir()
        Image.fromarray(discs(1)[0]).save(path)
    assert "would both become" in refused(MODEL, *both, "--out", tmp_path / "out")


def _parent(folder: Path) -> str:
    return next(path.parents[1].name for path in folder.glob("mlruns/small/*/artifacts/leaderboard.json"))


def test_a_run_without_its_head_is_refused(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = next(there.glob("mlruns/small/*/artifacts/head.safetensors"))
    whole = head.read_bytes()
    try:
        for data, words in ((None, "head.safetensors is missing"), (whole[: len(whole) // 2], "is damaged")):
            head.unlink() if data is None else head.write_bytes(data)
            assert predict(MODEL, "smears/test/original", "--out", tmp_path / "out") == 2
            assert words in capsys.readouterr().err
    finally:
        head.write_bytes(whole)


def test_a_stop_in_the_middle_leaves_nothing_half_written(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = writers.PredictionWriter.add, []

    def stop(self: writers.PredictionWriter, band: object) -> None:
        calls.append(add(self, band))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(writers.PredictionWriter, "add", stop)
    assert predict(MODEL, "smears/test/original", "--out", tmp_path / "out", "--overlay") == 130
    assert list((tmp_path / "out").rglob("*")) == []


def test_arrays_of_a_wrong_shape_or_type_are_refused(there: Path) -> None:
    segmenter = Segmenter.load(MODEL, device="cpu")
    grey = discs(1, 90, 70)[0][..., 0]
    assert segmenter.predict(grey).classes.shape == (90, 70)
    for wrong in (grey.astype(np.float32) / 255, np.zeros((5, 5, 4), np.uint8), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(CellbenchError, match="an image here is"):
            segmenter.predict(wrong)


def test_single_cells_are_numbered_measured_and_counted(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask = (MODEL, "smears/test/original", "--out", out, "--instances", "--um-per-px", 0.5)
    assert predict(*ask) == 0
    counts = list(csv.DictReader((out / "counts.csv").open()))
    assert [row["image"] for row in counts] == ["t0", "t1"]
    for row in counts:
        ids = np.array(Image.open(out / f"{row['image']}.instances.png"))
        mask = np.array(Image.open(out / f"{row['image']}.png"))
        table = list(csv.DictReader((out / f"{row['image']}.cells.csv").open()))
        assert ids.dtype == np.uint16
        assert set(np.unique(ids)) - {0} == set(range(1, len(table) + 1))
        assert not ids[mask == 0].any()
        assert int(row["cells"]) == len(table) > 0
        assert float(row["cells_per_mm2"]) == pytest.approx(len(table) / (ids.size * 0.25e-6), abs=1e-3)
        for cell in table:
            mine = ids == int(cell["cell"])
            assert float(cell["area_um2"]) == mine.sum() * 0.25
            assert (float(cell["y_px"]), float(cell["x_px"])) == pytest.approx([x.mean() for x in np.nonzero(mine)], abs=0.01)
    before = (out / "t0.cells.csv").stat().st_mtime_ns
    assert predict(*ask) == 0
    assert (out / "t0.cells.csv").stat().st_mtime_ns == before
    assert predict(*ask[:-1], 0.25) == 0  # another scale is another table
    assert "area_um2" in (out / "t0.cells.csv").read_text()
    assert (out / "t0.cells.csv").stat().st_mtime_ns != before


def test_a_scale_without_cells_and_an_image_too_large_for_them_are_refused(there: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert predict(MODEL, "smears/test/original", "--out", tmp_path / "out", "--um-per-px", 0.5) == 2
    assert "--instances" in capsys.readouterr().err
    monkeypatch.setattr("cellbench.inference.prediction.MOST_PX", 10)
    assert predict(MODEL, "smears/test/original", "--out", tmp_path / "out", "--instances") == 1
    assert "skipped" in capsys.readouterr().err


def test_outlines_are_of_the_cells_that_are_counted(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(MODEL, "smears/test/original/t0.png", "--out", out, "--instances", "--geojson", "--coco", "--overlay") == 0
    table = {int(row["cell"]): float(row["area_px"]) for row in csv.DictReader((out / "t0.cells.csv").open())}
    tree = json.loads((out / "t0.geojson").read_text())
    cells = [one["properties"] for one in tree["features"]]
    assert {one["cellbench"]["distance"] for one in cells} == {tree["cellbench"]["distance"]}
    assert {one["cellbench"]["looks"] for one in cells} == {tree["cellbench"]["looks"]}
    shapes = {int(one["name"]): one["measurements"]["Area px^2"] for one in cells}
    assert shapes == table
    assert len(json.loads((out / "coco.json").read_text())["annotations"]) == len(shapes)
    ids = np.array(Image.open(out / "t0.instances.png")).astype(int)
    picture, image = np.array(Image.open(out / "t0.overlay.png")), np.array(Image.open("smears/test/original/t0.png"))
    zoom = len(picture) // len(image)  # small images are drawn larger
    small = picture[zoom // 2 :: zoom, zoom // 2 :: zoom].astype(int)
    assert np.abs(small - image)[ids > 0].mean() > 3 * np.abs(small - image)[ids == 0].mean()


def test_partial_files_of_a_live_process_stay_also_of_another_machine(tmp_path: Path) -> None:
    code = "from cellbench.liveness import this_owner; print(this_owner(), flush=True); input()"
    others = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    live, dead = (other.stdout.readline().strip() for other in others)
    others[1].communicate("\n")
    elsewhere, silent = "host-b:1:77.abc.4", "host-b:2:78.abc.4"
    files = {owner: tmp_path / f".{owner.replace(':', '@')}~a.png{writers.PART}" for owner in (live, dead, elsewhere, silent)}
    for file in files.values():
        file.write_bytes(b"half")
    os.utime(files[silent], (0, 0))
    assert writers.remove_partial_files(tmp_path) == 2
    assert set(tmp_path.iterdir()) == {files[live], files[elsewhere]}
    others[0].communicate("\n")


def test_other_weights_under_the_same_name_are_refused(there: Path, tmp_path: Path) -> None:
    of_run = Segmenter.load(MODEL, device="cpu")
    assert of_run.trained.backbone_digest
    other = replace(of_run.trained, backbone_digest="none:0000")
    with pytest.raises(CellbenchError, match="not those that it was trained on"):
        Segmenter(other, Registry(), of_run.machine)


def test_regions_below_the_minimum_area_are_counted_in_the_table_and_the_last_line(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = np.full((80, 100, 3), 220, np.uint8)
    for y, x, side in ((5, 5, 20), (40, 10, 20), (10, 60, 4), (60, 80, 3)):
        picture[y : y + side, x : x + side] = (120, 40, 90)
    Image.fromarray(picture).save(tmp_path / "plain.png")
    for limit, cells, small in ((5, 4, 0), (10, 3, 1), (50, 2, 2)):
        out = tmp_path / str(limit)
        assert predict("otsu · seed 0", tmp_path / "plain.png", "--out", out, "--instances", "--min-cell-px", limit) == 0
        row = next(csv.DictReader((out / "counts.csv").open()))
        assert (row["cells"], row["left_out"]) == (str(cells), str(small))
        last = capsys.readouterr().out.splitlines()[-1]
        assert (f"{small} regions below {limit} px are not counted as cells" in last) == (small > 0)
    assert predict("otsu · seed 0", tmp_path / "plain.png", "--out", tmp_path / "no", "--min-cell-px", 0) == 2


# --- one folder, several calls


def _days(folder: Path) -> None:
    for seed, name in enumerate(("monday/m1.png", "monday/m2.png", "tuesday/t1.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(discs(seed)[0]).save(folder / name)


def _tabulated(out: Path) -> tuple[list[str], list[str]]:
    """The images of counts.csv and of coco.json."""
    with (out / "counts.csv").open(newline="") as file:
        counted = [row["image"] for row in csv.DictReader(file)]
    return counted, [one["file_name"] for one in json.loads((out / "coco.json").read_text())["images"]]


def test_the_tables_hold_all_masks_of_the_run_in_the_folder(there: Path, tmp_path: Path, capsys) -> None:
    _days(tmp_path)
    out = tmp_path / "out"
    assert predict(MODEL, tmp_path / "monday", "--out", out, "--instances", "--coco") == 0
    first = (out / "counts.csv").read_text().splitlines()
    assert predict(MODEL, tmp_path / "tuesday", "--out", out, "--instances", "--coco") == 0
    assert _tabulated(out) == (["m1", "m2", "t1"], ["m1.png", "m2.png", "t1.png"])
    assert (out / "counts.csv").read_text().splitlines()[:3] == first
    coco = json.loads((out / "coco.json").read_text())
    ids = [one["id"] for one in coco["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    with (out / "counts.csv").open(newline="") as file:
        cells = {row["image"]: int(row["cells"]) for row in csv.DictReader(file)}
    names = {one["id"]: one["file_name"].removesuffix(".png") for one in coco["images"]}
    assert {name: sum(one["image_id"] == k for one in coco["annotations"]) for k, name in names.items()} == cells
    capsys.readouterr()
    (tmp_path / "monday" / "m3.png").write_bytes((tmp_path / "monday" / "m1.png").read_bytes())
    assert predict(MODEL, tmp_path / "monday", "--out", out) == 0  # plain: the tables that are there say who is not in them
    assert "1 other masks there have none" in capsys.readouterr().out
    assert _tabulated(out)[0] == ["m1", "m2", "t1"]


def test_each_image_keeps_its_unit(there: Path, tmp_path: Path) -> None:
    _days(tmp_path)
    out = tmp_path / "out"
    assert predict(MODEL, tmp_path / "monday", "--out", out, "--instances", "--um-per-px", 0.5) == 0
    assert predict(MODEL, tmp_path / "tuesday", "--out", out, "--instances") == 0
    with (out / "counts.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert float(rows["m1"]["cells_per_mm2"]) == pytest.approx(int(rows["m1"]["cells"]) / (120 * 160 * 0.25e-6), abs=1e-3)
    assert rows["m1"]["cells_per_megapixel"] == ""
    assert float(rows["t1"]["cells_per_megapixel"]) == pytest.approx(int(rows["t1"]["cells"]) / 0.0192, abs=1e-3)


def test_a_folder_holds_masks_of_one_run_and_a_name_belongs_to_one_image(there: Path, tmp_path: Path, capsys) -> None:
    _days(tmp_path)
    out = tmp_path / "out"
    assert predict(MODEL, tmp_path / "monday", "--out", out, "--instances") == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "wednesday").mkdir()
    Image.fromarray(discs(9)[0]).save(tmp_path / "wednesday" / "m1.png")
    assert predict(MODEL, tmp_path / "wednesday", "--out", out, "--instances") == 2
    assert "is the mask of another image of this name" in capsys.readouterr().err
    assert predict("otsu · seed 0", tmp_path / "tuesday", "--out", out, "--instances") == 2
    assert "that another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_empty_ground_passes_the_network_once_for_all_and_the_cells_are_the_same(there: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pixels, _ = discs(9)
    slide = np.full((pixels.shape[0], 20 * pixels.shape[1], 3), 235, np.uint8)
    slide[:, : pixels.shape[1]] = pixels
    Image.fromarray(slide).save(tmp_path / "slide.png")
    seen: list[int] = []
    segmented = Segmenter._tiles

    def counting(self, tiles):
        seen.append(len(tiles))
        return segmented(self, tiles)

    monkeypatch.setattr(Segmenter, "_tiles", counting)
    masks, passed = [], []
    for name, more in (("all", ()), ("skipped", ("--skip-empty",))):
        assert predict(MODEL, tmp_path / "slide.png", "--out", tmp_path / name, *more) == 0
        masks.append(np.array(Image.open(tmp_path / name / "slide.png")))
        passed.append(sum(seen))
        seen.clear()
    assert passed[1] < passed[0] / 3
    assert (masks[0] == masks[1]).mean() > 0.999
    assert predict(MODEL, tmp_path / "slide.png", "--out", tmp_path / "all", "--skip-empty") == 2
    assert "--skip-empty" in capsys.readouterr().err


def test_a_changed_image_leaves_no_table_of_the_old_one(there: Path, tmp_path: Path) -> None:
    _days(tmp_path)
    out = tmp_path / "out"
    assert predict(MODEL, tmp_path / "monday", "--out", out, "--instances", "--geojson", "--probability") == 0
    Image.fromarray(discs(12)[0]).save(tmp_path / "monday" / "m1.png")
    assert predict(MODEL, tmp_path / "monday", "--out", out) == 0
    assert {path.name for path in out.glob("m1*")} == {"m1.png"}
    assert len(list(out.glob("m2*"))) == 5
    assert [row["image"] for row in csv.DictReader((out / "counts.csv").open())] == ["m2"]


def test_outlines_are_of_single_cells_without_their_numbers_too(there: Path, tmp_path: Path) -> None:
    for out, more in (("plain", ()), ("numbered", ("--instances",))):
        assert predict(MODEL, "smears/test/original/t0.png", "--out", tmp_path / out, "--geojson", "--coco", *more) == 0
    assert (tmp_path / "plain" / "t0.geojson").read_bytes() == (tmp_path / "numbered" / "t0.geojson").read_bytes()
    assert (tmp_path / "plain" / "coco.json").read_bytes() == (tmp_path / "numbered" / "coco.json").read_bytes()


TWINS = [
    "a.png",
    "A.png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "b.tif",
    "b.png",
    "c.png",
    "c.probability.png",
    "c.overlay.png",
    f"{'x' * 245}.png",
]


def test_images_whose_names_differ_share_no_file_on_any_file_system(there: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(TWINS):
        Image.fromarray(discs(seed, 64, 64)[0]).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    assert predict(MODEL, tmp_path / "in", "--out", out, "--instances", "--probability", "--overlay") == 0
    names = [path.name for path in out.iterdir()]
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(names) == 5 * len(TWINS) + 1
    with (out / "counts.csv").open(newline="") as file:
        assert len({row["image"] for row in csv.DictReader(file)}) == len(TWINS)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "counts.csv"}
    assert predict(MODEL, tmp_path / "in", "--out", out, "--instances", "--probability", "--overlay") == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "counts.csv"} == before
