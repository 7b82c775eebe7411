"""Folders of images and masks: what is paired, what is refused in one line, and a split that is written once and then obeyed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import write_pair

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.dataset import Dataset
from cellbench.data.loading import open_dataset
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir

BCCD, FOLDER = Registry().dataset("bccd"), Registry().dataset("folder")


def opened(folder: Path, card=FOLDER, **settings) -> Dataset:
    return open_dataset(card, folder, DataSpec(**settings))


def refusal(folder: Path | None, card=FOLDER, **settings) -> str:
    with pytest.raises(CellbenchError) as caught:
        opened(folder, card, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(dataset: Dataset, split: str) -> list[str]:
    return [sample.name for sample in dataset.samples(split)]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# What is read


@pytest.mark.slow
@pytest.mark.parametrize("card", [BCCD, FOLDER], ids=lambda card: card.id)
def test_the_kaggle_layout_is_read_with_mixed_originals_and_rgb_masks(small_folder: Path, card) -> None:
    data = opened(small_folder, card)
    assert sorted(names(data, "train") + names(data, "val")) == sorted(os.listdir(small_folder / "train" / "original"))
    assert names(data, "test") == ["t0.png", "t1.jpg"]
    for split in ("train", "val", "test"):
        for sample in data.samples(split):
            image, classes = data.read(sample)
            assert (image.shape, image.dtype) == ((120, 160, 3), np.uint8)
            assert (classes.shape, classes.dtype, set(np.unique(classes))) == ((120, 160), np.uint8, {0, 1})
            assert sample.size_px == (120, 160)
            assert image[classes == 1, 1].mean() < image[classes == 0, 1].mean() - 50  # its own mask: cells are dark


@pytest.mark.slow
def test_kaggles_extra_folder_is_skipped(small_folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "download"
    outer.mkdir()
    small_folder.rename(outer / "BCCD Dataset with mask")
    data = opened(outer, BCCD)
    assert len(names(data, "test")) == 2
    assert (outer / "BCCD Dataset with mask" / "splits.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("images", "masks"), [("original", "mask"), ("images", "masks")])
def test_a_folder_without_train_and_test_is_split_in_three(tmp_path: Path, images: str, masks: str) -> None:
    for seed in range(10):
        write_pair(tmp_path / "own", f"s{seed}.png", seed, images, masks)
    data = opened(tmp_path / "own")
    parts = [set(names(data, split)) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [6, 2, 2]  # a fifth for the test, a fifth of the rest for validation
    assert len(set.union(*parts)) == 10


@pytest.mark.slow
@pytest.mark.parametrize(("images", "masks"), [("original", "mask"), ("images", "masks")])
def test_train_and_test_folders_go_by_either_pair_of_names(tmp_path: Path, images: str, masks: str) -> None:
    for split, num in (("train", 5), ("test", 1)):
        for seed in range(num):
            write_pair(tmp_path / "own" / split, f"s{seed}.png", seed, images, masks)
    data = opened(tmp_path / "own")
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [4, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["with space.png", "Zelle-ä 細胞.png", "a.b.c.png", "UPPER.PNG", "x.JPeG", "-dash.png", "100%.png", "'quoted'.png"]
)
def test_names_are_taken_as_they_are(small_folder: Path, name: str) -> None:
    write_pair(small_folder / "train", name, 50)
    first = opened(small_folder)
    again = opened(small_folder)  # now from splits.json
    assert name in names(first, "train") + names(first, "val")
    assert first.digest == again.digest


@pytest.mark.slow
def test_a_name_that_is_the_stem_of_another_is_not_confused_with_it(small_folder: Path) -> None:
    write_pair(small_folder / "train", "x.png", 50)
    write_pair(small_folder / "train", "x.png.png", 51)
    first = opened(small_folder)
    assert opened(small_folder).digest == first.digest


@pytest.mark.slow
def test_files_that_are_no_images_are_skipped(small_folder: Path) -> None:
    before = opened(small_folder).digest
    for place in ("train/original", "train/mask"):
        for name in ("Thumbs.db", ".hidden.png", "notes.txt", "._a0.png"):
            (small_folder / place / name).write_bytes(b"nothing to see")
        (small_folder / place / "folder.png").mkdir()
    assert opened(small_folder).digest == before


def test_an_image_of_a_format_that_is_not_read_is_refused_where_it_has_a_mask(small_folder: Path) -> None:
    for name in ("x.dcm", "y.dcm"):
        (small_folder / "train" / "original" / name).write_bytes(b"DICM")
        shutil.copy(small_folder / "train" / "mask" / "a0.png", small_folder / "train" / "mask" / f"{name[0]}.png")
    line = refusal(small_folder)
    assert "'x.dcm' has a mask" in line
    assert "1 more like it" in line


@pytest.mark.slow
def test_what_lies_in_a_data_folder_and_is_in_no_sample_is_named(small_folder: Path) -> None:
    before = opened(small_folder)
    assert not any("not used" in note for note in before.notes)
    for name in (
        "train/original/x.dcm",
        "train/mask/notes.txt",
        "val/original/v.png",
        "train/original/deeper/d.png",
        "train/original/.h.png",
    ):
        (small_folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(small_folder / name, format="PNG")
    (small_folder / "extra").mkdir()
    (small_folder / "table.csv").write_text("a,b")
    (small_folder / "Thumbs.db").write_bytes(b"")
    data = opened(small_folder)
    assert data.digest == before.digest
    (line,) = [note for note in data.notes if note.startswith("left out: ")]
    for counted in ("2 image of no sample", "1 .dcm", "1 .txt", "1 hidden"):
        assert counted in line
    for name in ("train/original/x.dcm", "val/original/v.png", "train/original/deeper/d.png"):
        assert name in line
    (line,) = [note for note in data.notes if note.startswith("not used in")]
    assert "extra/" in line
    assert "table.csv" in line
    assert "Thumbs" not in " ".join(data.notes)


@pytest.mark.slow
def test_a_file_is_not_hidden_by_another_of_its_name(small_folder: Path) -> None:
    for place in ("train/mask", "val/original"):  # a mask without an image, and an image in a folder that is not used
        (small_folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(small_folder / "train" / "mask" / "a0.png", small_folder / place / "x.png")
    notes = opened(small_folder).notes
    assert any(note.startswith("no image: ") and "x.png" in note for note in notes)
    assert any(note.startswith("left out: ") and "val/original/x.png" in note and "1 image of no sample" in note for note in notes)


@pytest.mark.slow
def test_different_pixel_sizes_are_named(small_folder: Path) -> None:
    for name, um in (("a0.png", 0.25), ("b 2.png", 0.25), ("zelle-ä.png", 0.5)):
        path = small_folder / "train" / "original" / name
        Image.open(path).save(path, dpi=(25400 / um, 25400 / um))
    (line,) = [note for note in opened(small_folder).notes if note.startswith("pixel size: ")]
    assert "0.25 um (2), 0.5 um (1), not stated (5)" in line
    assert "zelle-ä.png" in line
    assert "a0.png" not in line


@pytest.mark.slow
def test_masks_without_an_image_are_noted_and_not_used(small_folder: Path) -> None:
    for name in ("spare1.png", "spare2.png"):
        shutil.copy(small_folder / "train" / "mask" / "a0.png", small_folder / "train" / "mask" / name)
    data = opened(small_folder)
    (note,) = [note for note in data.notes if "no image" in note]
    assert "2 masks" in note
    assert "spare1.png" in note
    assert len(names(data, "train") + names(data, "val")) == 6


def test_masks_may_hold_instance_numbers(small_folder: Path) -> None:
    numbers = np.zeros((120, 160), np.uint16)
    numbers[10:20, 10:20], numbers[40:60, 40:60] = 1, 3000
    Image.fromarray(numbers).save(small_folder / "train" / "mask" / "a0.png")
    data = opened(small_folder)
    (sample,) = [sample for sample in data.train + data.val if sample.name == "a0.png"]
    np.testing.assert_array_equal(data.read(sample)[1], numbers > 0)


@pytest.mark.slow
def test_limit_takes_the_first_of_each_split_and_leaves_the_split_whole(small_folder: Path) -> None:
    few = opened(small_folder, limit=1)
    everything = opened(small_folder)
    assert [len(few.samples(split)) for split in ("train", "val", "test")] == [1, 1, 1]
    for split in ("train", "val", "test"):
        assert few.samples(split) == everything.samples(split)[:1]
    assert len(everything.train) == 5
    assert few.digest != everything.digest


def test_drawn_smears_are_drawn_once_and_read_like_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = {"num_train": 3, "num_test": 1, "width_px": 96, "height_px": 80, "cells_per_image": 5.0, "diameter_px": 20.0}
    data = opened(None, Registry().dataset("smears"), draw=draw)
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [2, 1, 1]
    assert cache_dir() in data.root.parents
    monkeypatch.setattr("cellbench.data.loading.load", lambda card: pytest.fail("drawn again"))
    assert opened(None, Registry().dataset("smears"), draw=draw).digest == data.digest


# What is refused


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'missing'}: there is no such folder" in refusal(tmp_path / "missing")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    assert "is a file. Expected a folder, a manifest" in refusal(tmp_path / "data.zip")


def test_no_folder_named_says_how_to_get_one() -> None:
    line = refusal(None, BCCD)
    assert "--data DIR" in line
    assert "jeetblahiri/bccd-dataset-with-mask" in line


def test_drawing_settings_for_a_folder_are_refused(small_folder: Path) -> None:
    assert "[data.draw]" in refusal(small_folder, draw={"num_train": 3})


def test_another_layout_says_what_is_expected_and_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "own" / "pictures").mkdir(parents=True)
    (tmp_path / "own" / "labels").mkdir()
    line = refusal(tmp_path / "own")
    assert "original/ with mask/" in line
    assert "labels/, pictures/" in line
    assert "train|test/original/ with train|test/mask/" in refusal(tmp_path / "own", BCCD)


def test_an_empty_folder_of_images_is_refused(small_folder: Path) -> None:
    shutil.rmtree(small_folder / "test" / "original")
    (small_folder / "test" / "original").mkdir()
    line = refusal(small_folder)
    assert f"{small_folder / 'test' / 'original'}: holds no image" in line
    assert ".bmp, .gif, .j2k, .jfif, .jp2, .jpe, .jpeg, .jpg, .png" in line


def test_an_image_without_mask_is_named_with_the_file_that_is_missing(small_folder: Path) -> None:
    (small_folder / "train" / "mask" / "a1.png").unlink()
    line = refusal(small_folder)
    assert "'a1.jpg' has no mask" in line
    assert "train/mask/a1.png" in line
    assert "more like it" not in line
    (small_folder / "train" / "mask" / "c5.png").unlink()
    assert "1 more like it" in refusal(small_folder)


def test_two_images_of_one_stem_are_refused(small_folder: Path) -> None:
    shutil.copy(small_folder / "train" / "original" / "a0.png", small_folder / "train" / "original" / "a0.bmp")
    assert "'a0.bmp' and 'a0.png' share a stem" in refusal(small_folder)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_mask_of_another_size_is_named_with_both_sizes(small_folder: Path, split: str) -> None:
    name = "a0.png" if split == "train" else "t0.png"
    Image.new("L", (160, 119)).save(small_folder / split / "mask" / name)
    line = refusal(small_folder)
    assert f"{split}/mask/{name}: the mask is 160 x 119 px, its image {name} 160 x 120" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["train/original/a0.png", "train/original/a1.jpg", "train/mask/a0.png", "test/original/t1.jpg", "test/mask/t0.png"]
)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_an_empty_or_truncated_file_is_named_before_anything_is_written(small_folder: Path, place: str, keep: float) -> None:
    path = small_folder / place
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    before = files(small_folder)
    assert Path(place).name in refusal(small_folder)
    assert files(small_folder) == before


@pytest.mark.slow
def test_after_a_damaged_pair_is_moved_out_the_rest_is_used(small_folder: Path) -> None:
    """A split.json that already named the pair would be in the way."""
    (small_folder / "train" / "original" / "a0.png").write_bytes(b"")
    refusal(small_folder)
    for place in ("original", "mask"):
        (small_folder / "train" / place / "a0.png").unlink()
    assert len(names(opened(small_folder), "train")) == 4


def test_a_text_file_called_png_is_refused(small_folder: Path) -> None:
    (small_folder / "train" / "original" / "a0.png").write_text("<html>log in</html>")
    assert "a0.png" in refusal(small_folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read_is_named(small_folder: Path) -> None:
    (small_folder / "train" / "original" / "a0.png").chmod(0)
    assert "a0.png" in refusal(small_folder)


def test_too_few_images_to_split_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "own", "only.png", 0)
    assert "too few to split" in refusal(tmp_path / "own")


# The split


def test_the_split_is_written_once_and_obeyed_after(small_folder: Path) -> None:
    first = opened(small_folder)
    path = small_folder / "splits.json"
    assert f"split written to {path}" in first.notes
    record = json.loads(path.read_text())
    assert (record["train"], record["val"]) == (names(first, "train"), names(first, "val"))
    assert record["seed"] == 2026
    assert "test" not in record  # the test folder is not training's to give away
    changed = json.dumps({"train": record["val"], "val": record["train"]})
    path.write_text(changed)
    second = opened(small_folder)
    assert names(second, "train") == names(first, "val")
    assert names(second, "val") == names(first, "train")
    assert f"split read from {path}" in second.notes
    assert path.read_text() == changed


def test_the_split_is_seeded_and_a_fifth_validates(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        for seed in range(11):
            write_pair(tmp_path / copy / "train", f"s{seed:02}.png", seed, height_px=20, width_px=20)
        write_pair(tmp_path / copy / "test", "t.png", 99, height_px=20, width_px=20)
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert names(one, "val") == names(two, "val")
    assert len(one.val) == 2
    other = opened(tmp_path / "two", split_seed=1)
    assert names(other, "val") != names(one, "val")


def test_another_seed_or_share_has_a_file_of_its_own_and_leaves_the_first(small_folder: Path) -> None:
    first = opened(small_folder)
    before = (small_folder / "splits.json").read_bytes()
    half = opened(small_folder, val_fraction=0.5)
    assert (len(half.train), len(half.val)) == (3, 3)
    assert (small_folder / "splits.json").read_bytes() == before
    assert opened(small_folder).digest == first.digest
    assert opened(small_folder, val_fraction=0.5).digest == half.digest


def test_the_share_of_the_test_does_not_matter_where_the_data_has_a_test_folder(small_folder: Path) -> None:
    (small_folder / "splits.json").write_text(json.dumps({"train": ["a0", "a1", "b 2", "b3"], "val": ["zelle-ä", "c5"]}))
    assert names(opened(small_folder, test_fraction=0.4), "val") == ["zelle-ä.png", "c5.JPG"]


def test_names_in_the_split_may_lack_extensions_or_have_folders(small_folder: Path) -> None:
    record = {"train": ["a0", "train/original/a1.jpg", "b 2", "b3.jpeg"], "val": ["zelle-ä", "c5"]}
    (small_folder / "splits.json").write_text(json.dumps(record))
    data = opened(small_folder)
    assert names(data, "train") == ["a0.png", "a1.jpg", "b 2.png", "b3.jpeg"]
    assert names(data, "val") == ["zelle-ä.png", "c5.JPG"]


@pytest.mark.slow
def test_the_test_folder_is_never_trained_on(small_folder: Path) -> None:
    data = opened(small_folder)
    assert all(sample.image.is_relative_to(small_folder / "test") for sample in data.test)
    assert not any(sample.image.is_relative_to(small_folder / "test") for sample in data.train + data.val)
    record = json.loads((small_folder / "splits.json").read_text())
    (small_folder / "splits.json").write_text(json.dumps({**record, "train": [*record["train"], "t0.png"]}))
    assert "names 't0.png' in 'train'" in refusal(small_folder)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"train": ["a0", "a1", "b 2", "b3", "stranger"], "val": ["zelle-ä", "c5"]}, "names 'stranger' in 'train'"),
        ({"train": ["a0", "a1", "b 2", "b3", "c5"], "val": ["zelle-ä", "c5"]}, "'c5.JPG' occurs in two splits or twice"),
        ({"train": ["a0", "a1", "b 2", "b3"], "val": ["c5"]}, "does not name 1 images"),
        ({"train": ["a0", "a1", "b 2", "b3", "zelle-ä", "c5"]}, "'val' is empty"),
        (["a0"], "cannot be read as a split"),
        ("{", "cannot be read as a split"),
        ({"train": 3, "val": []}, "cannot be read as a split"),
    ],
)
def test_an_invalid_split_is_refused_and_left_as_it_is(small_folder: Path, record: object, says: str) -> None:
    path = small_folder / "splits.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    before = path.read_bytes()
    line = refusal(small_folder)
    assert str(path) in line
    assert says in line
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_read_only_folder_is_never_written_to_and_its_split_is_kept_elsewhere(small_folder: Path) -> None:
    before = files(small_folder)
    small_folder.chmod(0o555)
    try:
        first, again = opened(small_folder), opened(small_folder)
    finally:
        small_folder.chmod(0o755)
    assert files(small_folder) == before
    assert str(cache_dir()) in first.notes[-1]
    assert "split written to" in first.notes[-1]
    assert "split read from" in again.notes[-1]
    assert again.digest == first.digest


@pytest.mark.slow
def test_the_split_file_may_be_read_by_others(small_folder: Path) -> None:
    before = os.umask(0o022)
    try:
        opened(small_folder)
    finally:
        os.umask(before)
    assert (small_folder / "splits.json").stat().st_mode & 0o777 == 0o644


# The digest


@pytest.mark.slow
def test_the_digest_stays_when_the_folder_moves(small_folder: Path, tmp_path: Path) -> None:
    before = opened(small_folder)
    moved = opened(small_folder.rename(tmp_path / "elsewhere"))
    assert moved.digest == before.digest
    assert len(before.digest) == 16


@pytest.mark.slow
def test_a_single_pixel_of_an_image_or_mask_changes_the_digest(small_folder: Path) -> None:
    seen = {opened(small_folder).digest}
    for place in ("train/original/a0.png", "train/mask/a1.png", "test/original/t0.png", "test/mask/t1.png"):
        pixels = np.array(Image.open(small_folder / place))
        pixels[0, 0] ^= 255
        Image.fromarray(pixels).save(small_folder / place)
        seen.add(opened(small_folder).digest)
    assert len(seen) == 5


def test_another_split_name_or_meaning_of_the_masks_changes_the_digest(small_folder: Path) -> None:
    seen = {opened(small_folder).digest, opened(small_folder, BCCD).digest}
    record = json.loads((small_folder / "splits.json").read_text())
    train, val = record["train"], record["val"]
    (small_folder / "splits.json").write_text(json.dumps({"train": [*train[1:], *val], "val": train[:1]}))
    seen.add(opened(small_folder).digest)
    for place in ("original", "mask"):
        (small_folder / "test" / place / "t0.png").rename(small_folder / "test" / place / "t9.png")
    seen.add(opened(small_folder).digest)
    assert len(seen) == 4


def test_files_are_decoded_once_and_again_only_when_they_change(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(small_folder)
    monkeypatch.setattr("cellbench.data.dataset.compute_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert opened(small_folder).digest == first.digest


@pytest.mark.slow
def test_the_real_smears_are_read(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "bccd").mkdir()
    for split in ("train", "test"):
        shutil.copytree(shared / "bccd" / split, tmp_path / "bccd" / split)
    data = opened(tmp_path / "bccd", BCCD)
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [9, 2, 3]
    assert {sample.size_px for sample in data.train} == {(1200, 1600)}


def test_a_users_own_split_applies_whatever_the_settings(small_folder):
    names = sorted(path.name for path in (small_folder / "train" / "original").iterdir())
    (small_folder / "splits.json").write_text(json.dumps({"train": names[:2], "val": names[2:]}))
    dataset = open_dataset(Registry().dataset("folder"), small_folder, DataSpec(val_fraction=0.5))
    assert [sample.name for sample in dataset.train] == names[:2]


BUILDER = """
from cellbench.data.dataset import Sample
from cellbench.data.scan import Listing

def flat(folder, card):
    out = Listing(root=folder, layout="a.png beside a_mask.png")
    images = sorted(path for path in folder.glob("*.png") if not path.stem.endswith("_mask"))
    out.parts["train"] = tuple(Sample(name=path.name, image=path, mask=folder / f"{path.stem}_mask.png") for path in images)
    return out

def nothing(folder, card):
    return None
"""


def test_a_card_may_name_a_builder_that_lists_the_folder(small_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "registry" / "datasets"
    home.mkdir(parents=True)
    (home / "lab.py").write_text(BUILDER)
    for name in ("flat", "nothing"):
        (home / f"{name}.toml").write_text(f'# A lab\'s own layout\nbuilder = "lab.py:{name}"\n')
    (tmp_path / "flat").mkdir()
    for path in (small_folder / "train" / "original").glob("*.png"):
        shutil.copy(path, tmp_path / "flat" / path.name)
        shutil.copy(small_folder / "train" / "mask" / path.name, tmp_path / "flat" / f"{path.stem}_mask.png")
    registry = Registry(tmp_path / "registry")
    data = open_dataset(registry.dataset("flat"), tmp_path / "flat", DataSpec())
    assert len(list((tmp_path / "flat").glob("*_mask.png"))) == sum(len(data.samples(split)) for split in ("train", "val", "test")) > 2
    assert all(sample.mask.stem == f"{sample.image.stem}_mask" for sample in data.train)
    with pytest.raises(CellbenchError, match=r"returned a NoneType\. Return a cellbench\.data\.scan\.Listing"):
        open_dataset(registry.dataset("nothing"), tmp_path / "flat", DataSpec())
