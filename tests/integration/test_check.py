"""The audit finds every planted fault by name, and reports nothing severe for valid data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import discs, write_pair

from cellbench.cli.check import check_folder
from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.audit.keypoint_matching import find_shared_regions as shared_parts
from cellbench.data.audit.keypoint_matching import keypoints
from cellbench.data.audit.perceptual_hash import find_near_pairs, mean_pool, to_grey
from cellbench.data.loading import open_dataset
from cellbench.errors import CellbenchError
from cellbench.run import main

SEVERE = {
    "unreadable",
    "mis-sized",
    "missing-mask",
    "values",
    "lost",
    "noisy",
    "full",
    "empty",
    "inverted",
    "same mask",
    "leak: same",
    "leak: near",
    "leak: crop",
    "leak: group",
    "format",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images to train and three to test, all well."""
    for seed in range(10):
        write_pair(tmp_path / "own" / "train", f"a{seed}.png", seed)
    for seed in range(3):
        write_pair(tmp_path / "own" / "test", f"t{seed}.png", 100 + seed)
    return tmp_path / "own"


def audit(folder: Path, card: str = "folder", **settings) -> tuple[int, dict[str, list[str]], dict]:
    """Exit code, the images of each finding, and all of check.json."""
    out = folder.parent / "audit"
    code = check_folder(folder, card=card, spec=DataSpec(**settings), out=out, say=lambda line: None)
    record = json.loads((out / "check.json").read_text())
    return code, {finding["kind"]: finding["images"] for finding in record["findings"]}, record


def labels(folder: Path, name: str = "a1") -> Path:
    return folder / "train" / "mask" / f"{name}.png"


def change(path: Path, how: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(how(np.array(Image.open(path)))).save(path)


def test_valid_data_is_fit_and_is_not_written_to(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    code, found, record = audit(folder)
    assert (code, set(found) & SEVERE) == (0, set())
    assert "fit to train on; 13 images" in record["verdict"]
    assert sorted(folder.rglob("*")) == before
    assert record["statistics"]["images"] == "8 train, 2 val, 3 test"
    page = (folder.parent / "audit" / "check.html").read_text()
    assert "Is own fit to train on?" in page
    assert "http" not in page.replace("http-equiv", "")


def turned(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(array, 3)[:, ::-1])


FAULTS: dict[str, Callable[[Path], object]] = {
    "unreadable": lambda f: labels(f).write_bytes(labels(f).read_bytes()[:200]),
    "missing-mask": lambda f: labels(f).unlink(),
    "mis-sized": lambda f: change(labels(f), lambda m: m[:-1]),
    "full": lambda f: change(labels(f), np.ones_like),
    "empty": lambda f: change(labels(f), np.zeros_like),
    "inverted": lambda f: change(labels(f), lambda m: 255 - m),
    "same mask": lambda f: shutil.copy(labels(f, "a2"), labels(f)),
    "values": lambda f: change(labels(f), lambda m: np.where(m, m, np.random.default_rng(0).integers(0, 60, m.shape[:2])[..., None]).astype(np.uint8)),
    "leak: same": lambda f: [shutil.copy(f / "test" / k / "t1.png", f / "train" / k / "a1.png") for k in ("original", "mask")],
    "leak: near": lambda f: [
        Image.fromarray(turned(np.array(Image.open(f / "test" / k / "t1.png")))).save(f / "train" / k / "a1.png") for k in ("original", "mask")
    ],
    "leak: crop": lambda f: [
        Image.open(f / "test" / k / "t1.png").crop((20, 10, 140, 110)).transpose(4).save(f / "train" / k / "a1.png") for k in ("original", "mask")
    ],
    "astray": lambda f: change(labels(f), lambda m: np.roll(m, (60, 80), (0, 1))),
    "same": lambda f: [shutil.copy(f / "test" / k / "t1.png", f / "test" / k / "t9.png") for k in ("original", "mask")],
    "stain": lambda f: change(f / "train" / "original" / "a1.png", lambda p: p // np.array([1, 1, 3], np.uint8)),
    "size": lambda f: write_pair(f / "train", "a1.png", 77, height_px=90, width_px=90),
    "left out": lambda f: (f / "train" / "original" / "xa1.dcm").write_bytes(b"DICM"),
    "format": lambda f: (f / "train" / "original" / "a1.png").rename(f / "train" / "original" / "a1.dcm"),
    "no image": lambda f: (f / "train" / "original" / "a1.png").unlink(),
    "pixel size": lambda f: [
        Image.open(path).save(path, dpi=(dpi, dpi)) for k, dpi in ((1, 25400), (2, 50800), (3, 50800)) for path in [f / "train" / "original" / f"a{k}.png"]
    ],
    "transparent": lambda f: change(f / "train" / "original" / "a1.png", lambda p: np.dstack([p, np.full(p.shape[:2], 200, np.uint8)])),
    "specks": lambda f: change(labels(f), lambda m: np.where((np.indices(m.shape)[:2] % 12 < 2).all(0), 255, m).astype(np.uint8)),
}  # fmt: skip


WITHOUT_PICTURE = {"unreadable", "missing-mask", "left out", "format", "no image", "pixel size", "transparent"}
"""Faults of files, not of what an image or a mask shows."""


def _section(folder: Path, kind: str) -> str:
    """The part of the page about one kind of finding."""
    page = (folder.parent / "audit" / "check.html").read_text()
    return page.partition(f"<h3>{kind} ·")[2].partition("<h3>")[0].partition("</section>")[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_found_where_it_lies(folder: Path, fault: str) -> None:
    FAULTS[fault](folder)
    code, found, _ = audit(folder)
    assert fault in found
    assert any("a1" in name or (fault == "same" and "t1" in name) for name in found[fault])
    assert code == (fault in SEVERE)
    others = set(found) & SEVERE - {fault}
    assert not others, f"{fault} was also taken for {others}"
    shown = _section(folder, fault).count("<img")
    assert shown == (0 if fault in WITHOUT_PICTURE else 2 if fault == "same mask" else 1)


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("values", lambda m: np.where(np.indices(m.shape)[0] < 20, 100, m).astype(np.uint8)),
        ("lost", lambda m: m // 255),
        (
            "smoothed",
            lambda m: np.where(np.pad(np.abs(np.diff(m.astype(int), axis=1)), ((0, 0), (0, 1), (0, 0))) > 0, 90, m).astype(np.uint8),
        ),
    ],
)
def test_values_that_the_card_does_not_know_are_found(folder: Path, fault: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    change(labels(folder), how)
    code, found, _ = audit(folder, "bccd")
    assert found[fault] == ["a1.png"]
    assert code == (fault != "smoothed")


def test_a_cell_at_the_border_that_is_not_marked_is_suspected(folder: Path) -> None:
    image, mask = np.full((120, 160, 3), 220, np.uint8), np.zeros((120, 160), np.uint8)
    for y, x, marked in ((60, 40, True), (60, 110, True), (4, 80, False)):
        disc = (np.indices(mask.shape)[0] - y) ** 2 + (np.indices(mask.shape)[1] - x) ** 2 < 15**2
        image[disc], mask[disc] = (170, 90, 130), 255 * marked
    Image.fromarray(image).save(folder / "train" / "original" / "a1.png")
    Image.fromarray(mask).save(labels(folder))
    code, found, _ = audit(folder)
    assert "a1.png" in found["border"]
    assert code == 0


def test_a_patient_in_two_splits_is_found(folder: Path) -> None:
    def manifest(split_of) -> None:
        rows = [f"train/original/a{k}.png,train/mask/a{k}.png,{split_of(k)},patient {k // 3}" for k in range(9)]
        (folder / "manifest.csv").write_text("image,mask,split,group\n" + "\n".join(rows))

    manifest(lambda k: ("train", "val", "test")[k // 3])
    assert audit(folder)[0] == 0
    manifest(lambda k: ("train", "val", "test")[k // 3] if k != 4 else "test")
    code, found, record = audit(folder)
    assert (code, list(found)) == (1, ["split"])
    assert "group 'patient 1' lies in 'val' and in 'test'" in record["findings"][0]["said"]
    manifest(lambda k: "")  # no split of its own: what is drawn tears nobody apart
    assert audit(folder)[0] == 0


def pictures_of_six(folder: Path) -> Path:
    """Twelve images of six pictures, each once more turned and mirrored."""
    for seed in range(12):
        write_pair(folder, f"i{seed}.png", seed // 2)
        if seed % 2:
            for kind in ("original", "mask"):
                change(folder / kind / f"i{seed}.png", turned)
    return folder


def test_near_duplicates_are_kept_together_by_a_split(tmp_path: Path) -> None:
    own = pictures_of_six(tmp_path / "own")
    assert audit(own, group="none")[0] == 1
    for settings in ({}, {"folds": 3, "fold": 2}, {"group": "near-duplicates"}, {"group": "near-duplicates", "folds": 3, "fold": 2}):
        code, found, _ = audit(own, **settings)
        assert code == 0
        assert len(found["near"]) == 6


def test_a_split_that_kept_near_duplicates_together_names_them_ever_after(tmp_path: Path) -> None:
    own = pictures_of_six(tmp_path / "own")
    card = Registry().dataset("folder")
    first = open_dataset(card, own, DataSpec())
    again = open_dataset(card, own, DataSpec())  # from the file
    for part in ("train", "val", "test"):
        assert [(s.name, s.group) for s in first.samples(part)] == [(s.name, s.group) for s in again.samples(part)]
    assert {s.group for part in ("train", "val", "test") for s in again.samples(part)} == {f"like i{2 * k}.png" for k in range(6)}


def test_without_near_duplicates_the_split_is_the_published_one(folder: Path) -> None:
    names = {
        group: [s.name for s in open_dataset(Registry().dataset("folder"), folder, DataSpec(group=group)).val] for group in ("none", "auto")
    }
    assert names["auto"] == names["none"]
    assert "together" not in (folder / "splits.json").read_text()


def test_near_duplicates_that_prevent_a_split_are_an_error(tmp_path: Path) -> None:
    for k in range(6):
        write_pair(tmp_path / "own", f"i{k}.png", 0)
    with pytest.raises(CellbenchError, match=r"6 of the images show the same as others.*data.group=none"):
        open_dataset(Registry().dataset("folder"), tmp_path / "own", DataSpec())
    assert open_dataset(Registry().dataset("folder"), tmp_path / "own", DataSpec(group="none")).train


@pytest.mark.parametrize("way", range(8))
def test_a_picture_is_known_again_turned_resized_and_compressed(tmp_path: Path, way: int) -> None:
    image = Image.fromarray(discs(3)[0])
    again = image.resize((112, 84)).transpose(way - 1) if way else image.resize((112, 84))
    again.point(lambda v: int(v * 0.9) + 10).save(tmp_path / "again.jpg", quality=60)
    pictures = [image, Image.open(tmp_path / "again.jpg"), *(Image.fromarray(discs(seed)[0]) for seed in range(10, 30))]
    pairs = find_near_pairs([mean_pool(to_grey(np.array(picture))) for picture in pictures])
    assert [(i, j) for i, j, _ in pairs] == [(0, 1)]


def crowd(seed: int) -> np.ndarray:
    """An image (240, 480, 3) uint8 of many discs."""
    rows = [np.concatenate([discs(10 * seed + 3 * row + column)[0] for column in range(3)], 1) for row in range(2)]
    return np.concatenate(rows, 0)


@pytest.mark.parametrize("way", range(8))
def test_a_part_of_a_picture_is_known_again_turned_enlarged_and_compressed(tmp_path: Path, way: int) -> None:
    images = [Image.fromarray(crowd(seed)) for seed in range(8)]
    part = images[5].crop((60, 30, 360, 200)).resize((450, 255))
    (part.transpose(way - 1) if way else part).point(lambda v: int(v * 0.9) + 10).save(tmp_path / "part.jpg", quality=75)
    found = shared_parts([keypoints(to_grey(np.array(image))) for image in (*images, Image.open(tmp_path / "part.jpg"))])
    assert [(pair.first, pair.second) for pair in found] == [(5, 8)]
    assert found[0].share > 0.9


def test_fields_that_overlap_are_known_and_a_label_in_every_image_is_not_taken_for_one() -> None:
    wide = crowd(0)
    images = [wide[:, :320].copy(), wide[:, 160:].copy(), *(crowd(seed)[:, :320] for seed in range(1, 6))]
    for image in images:
        for k in range(9):
            image[210:234, 10 + 16 * k : 10 + 16 * k + 3 + k] = 0
            image[210 : 214 + 2 * k, 12 + 16 * k : 22 + 16 * k] = 0
    found = shared_parts([keypoints(to_grey(image)) for image in images])
    assert [(pair.first, pair.second) for pair in found] == [(0, 1)]


def test_the_exit_code_is_0_fit_1_not_fit_2_unreadable(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder)]) == 0
    assert "own" in str(next(Path("reports").iterdir()))
    FAULTS["inverted"](folder)
    assert main(["check", str(folder)]) == 1
    assert "NOT FIT. inverted (1)" in capsys.readouterr().out
    assert main(["check", str(folder / "nowhere")]) == 2
    assert main(["check", str(folder), "--set", "grid.x=1"]) == 2
    for inner in ("train", "test"):
        shutil.rmtree(folder / inner / "mask")
        (folder / inner / "mask").mkdir()
    with pytest.raises(CellbenchError, match="holds no image with a mask"):
        check_folder(folder, out=folder.parent / "o")


# The real images


@pytest.mark.parametrize("name", ["bccd", "wbc", "dsb2018"])
def test_the_real_sets_raise_no_severe_false_alarm(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name != "dsb2018":  # whose page is drawn: that of BCCD takes twelve seconds
        monkeypatch.setattr("cellbench.cli.check._page", lambda *_: "")
    code = check_folder(shared / name, card=name, out=tmp_path, say=lambda line: None)
    found = json.loads((tmp_path / "check.json").read_text())["findings"]
    severe = [finding for finding in found if finding["severity"] == "severe"]
    assert (code, severe) == (0, [])
    twins = {
        kind: images for kind, images in ((finding["kind"], finding["images"]) for finding in found) if kind in ("same", "near", "crop")
    }
    # The published WBC set shows fourteen cells twice: one file, one picture, twelve crops a little larger or smaller (looked at, one by one).
    assert {kind: len(images) for kind, images in twins.items()} == ({"same": 1, "near": 1, "crop": 12} if name == "wbc" else {})
    if name == "wbc":
        few, named = tmp_path / "few", {Path(one).stem for images in twins.values() for pair in images for one in pair.split(" = ")}
        for folder in ("original", "mask"):
            (few / folder).mkdir(parents=True)
            for path in (shared / name / folder).iterdir():
                if path.stem in named:
                    shutil.copy(path, few / folder)
        assert len(list((few / "mask").iterdir())) >= 20
        assert check_folder(few, card=name, spec=DataSpec(group="none"), out=tmp_path / "o", say=lambda line: None) == 1
