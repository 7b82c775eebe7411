"""Every way a folder may be laid out gives the same images, classes and cells; what leads out of it or is not there is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from labelled_folders import FOLDER, SIZE, cells, coco_folder, coco_tree, manifest, nuclei, pairs, picture
from PIL import Image
from skimage.draw import polygon2mask

from cellbench.cli.check import check_folder
from cellbench.config.base import checked
from cellbench.config.cards import DatasetCard
from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.annotations import rasterize
from cellbench.data.dataset import Dataset
from cellbench.data.layouts import scan_folder
from cellbench.data.loading import open_dataset
from cellbench.errors import CellbenchError
from cellbench.metrics.pixel import IGNORE


def opened(folder: Path, card: DatasetCard = FOLDER, **settings) -> Dataset:
    return open_dataset(card, folder, DataSpec(**settings))


def everything(data: Dataset):
    return sorted(data.train + data.val + data.test, key=lambda sample: sample.name)


def refusal(folder: Path, card: DatasetCard = FOLDER) -> str:
    with pytest.raises(CellbenchError) as caught:
        opened(folder, card)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def card_of(**facts) -> DatasetCard:
    return checked(DatasetCard, {"id": "mine", "title": "", "path": "", **facts}, "card")


WAYS = {
    "pairs": pairs,
    "nuclei": nuclei,
    "coco polygons": coco_folder,
    "coco rle": lambda folder: coco_folder(folder, kind="rle"),
    "coco compressed": lambda folder: coco_folder(folder, kind="compressed"),
    "csv": manifest,
    "toml": lambda folder: manifest(folder, "manifest.toml"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_layout_gives_the_same_images_classes_and_cells(tmp_path: Path, way: str) -> None:
    data = opened(WAYS[way](tmp_path / "own"))
    samples = everything(data)
    assert [sample.name for sample in samples] == [f"i{seed}.png" for seed in range(6)]
    for seed, sample in enumerate(samples):
        image, classes = data.read(sample)
        np.testing.assert_array_equal(image, np.array(picture(seed)))
        np.testing.assert_array_equal(classes, cells(seed) > 0)
        np.testing.assert_array_equal(data.read_instances(sample), cells(seed))
    assert opened(tmp_path / "own").digest == data.digest


# What laboratories' folders look like: where image k lies and where its mask lies


PLACES = {
    "masks with a suffix in their folder": ("images/i{k}.png", "masks/i{k}_mask.png"),
    "masks with a hyphen": ("images/i{k}.png", "masks/i{k}-seg.png"),
    "masks beside images": ("i{k}.png", "i{k}_mask.png"),
    "Cellpose": ("i{k}_img.png", "i{k}_masks.png"),
    "labels beside images": ("i{k}.png", "i{k}_label.png"),
}
GROUPED = {
    "patients on both sides": ("images/p{g}/i{k}.png", "masks/p{g}/i{k}.png"),
    "patients with folders of their own": ("p{g}/images/i{k}.png", "p{g}/masks/i{k}.png"),
    "patients with masks beside images": ("p{g}/i{k}.png", "p{g}/i{k}_mask.png"),
    "patients' numbers begin again": ("images/p{g}/i{r}.png", "masks/p{g}/i{r}.png"),
}
SPLIT = {
    "splits above": ("{s}/images/i{k}.png", "{s}/masks/i{k}.png"),
    "splits below": ("images/{s}/i{k}.png", "masks/{s}/i{k}_mask.png"),
    "splits with masks beside images": ("{s}/i{k}.png", "{s}/i{k}_seg.png"),
    "splits with capitals": ("{S}/images/i{k}.png", "{S}/masks/i{k}.png"),
}


def laid_out(folder: Path, place: tuple[str, str], split: str = "train train train train val test") -> Path:
    """Six images and their masks at these places; two in a row are of one patient."""
    for k, part in enumerate(split.split()):
        for text, content in zip(place, (picture(k), Image.fromarray(cells(k))), strict=True):
            path = folder / text.format(k=k, g=k // 2, r=k % 2, s=part, S=part.capitalize())
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)
    return folder


@pytest.mark.parametrize("way", [*PLACES, *GROUPED, *SPLIT])
def test_every_image_is_paired_with_its_own_mask(tmp_path: Path, way: str) -> None:
    listing = scan_folder(FOLDER, laid_out(tmp_path / "own", (PLACES | GROUPED | SPLIT)[way]))
    assert (listing.problems, listing.doubts) == ([], [])
    samples = [sample for part in ("train", "val", "test") for sample in listing.parts.get(part, ())]
    assert len({sample.name for sample in samples}) == 6
    seeds = {np.array(Image.open(sample.image)).tobytes(): np.array(Image.open(sample.mask)) for sample in samples}
    for k in range(6):
        np.testing.assert_array_equal(seeds[np.array(picture(k)).tobytes()], cells(k))


@pytest.mark.parametrize("way", GROUPED)
def test_subfolders_are_groups_that_splits_keep_together(tmp_path: Path, way: str) -> None:
    data = opened(laid_out(tmp_path / "own", GROUPED[way]))
    assert {sample.group for sample in everything(data)} == {"p0", "p1", "p2"}
    assert [len({sample.group for sample in data.samples(part)}) for part in ("train", "val", "test")] == [1, 1, 1]
    assert any("groups: the 3 subfolders, such as 'p0', are each kept together" in note for note in data.notes)


@pytest.mark.parametrize("way", SPLIT)
def test_folders_named_after_splits_are_splits(tmp_path: Path, way: str) -> None:
    parts = scan_folder(FOLDER, laid_out(tmp_path / "own", SPLIT[way])).parts
    assert [len(parts.get(part, ())) for part in ("train", "val", "test")] == [4, 1, 1]
    assert not any(sample.group for samples in parts.values() for sample in samples)


def test_an_image_with_two_masks_and_one_without_are_named(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "own", PLACES["masks beside images"])
    Image.fromarray(cells(0)).save(folder / "i0_label.png")
    (folder / "i1_mask.png").unlink()
    listing = scan_folder(FOLDER, folder)
    assert {(one.kind, one.name) for one in listing.problems} == {("several-masks", "i0.png"), ("missing-mask", "i1.png")}


def test_images_alone_are_refused_with_what_can_be_done(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "own", ("i{k}.png", "../elsewhere/i{k}.png"))
    line = refusal(folder)
    assert "holds 6 images and no masks" in line
    assert "`predict` and `explore` take plain folders" in line


def test_outlines_corrected_by_hand_are_never_silently_passed_over_for_a_coco_file(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "own")  # as of `predict --coco --geojson`, of which the GeoJSON was corrected
    (folder / "i2.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert "'i2.png' has outlines in annotations.json and in i2.geojson" in refusal(folder)
    (folder / "annotations.json").unlink()
    assert [one.name for one in scan_folder(FOLDER, folder).parts["train"]] == ["i2.png"]


def test_masks_that_win_over_outlines_are_named(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "own")
    assert not any("outlines" in note for note in opened(folder).notes)
    (folder / "images" / "i2.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert "1 images have a mask and a file of outlines, such as 'i2.geojson': the masks are used" in opened(folder).notes


def test_a_table_of_counts_beside_images_is_named_with_the_columns_it_needs(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "own", ("i{k}.png", "../elsewhere/i{k}.png"))
    (folder / "Zählung.csv").write_text("Bild;Anzahl\ni0;4\n", encoding="utf-8")
    assert (
        "`evaluate` and `score` compare counts with a table .csv whose columns are called image and count (Zählung.csv is there)"
        in refusal(folder)
    )


def test_a_card_applies_to_the_folders_that_it_names_and_to_no_other(tmp_path: Path) -> None:
    bccd = Registry().dataset("bccd")  # its masks are 0 and 255
    data = opened(pairs(tmp_path / "own"), bccd)
    assert data.masks == "cells"
    assert any("not laid out as 'bccd' is, so that card says nothing about it" in note for note in data.notes)
    (tmp_path / "own" / "dataset.toml").write_text('masks = "binary"')
    assert opened(tmp_path / "own", bccd).masks == "binary"


@pytest.mark.parametrize("way", ["nuclei", "coco polygons"])
def test_a_changed_truth_is_another_dataset(tmp_path: Path, way: str) -> None:
    before = opened(WAYS[way](tmp_path / "own")).digest
    if way == "nuclei":
        Image.fromarray(np.full(SIZE, 255, np.uint8)).save(tmp_path / "own" / "i0" / "masks" / "1.png")
    else:
        path = tmp_path / "own" / "annotations.json"
        tree = coco_tree()
        tree["annotations"][0]["segmentation"] = [[0, 0, 9, 0, 9, 9]]
        path.write_text(json.dumps(tree))
    assert opened(tmp_path / "own").digest != before


def test_a_manifest_gives_groups_labels_and_splits(tmp_path: Path) -> None:
    data = opened(manifest(tmp_path / "own"))
    assert {sample.group for sample in everything(data)} == {"patient 0", "patient 1", "patient 2"}
    assert not {sample.group for sample in data.train} & {sample.group for sample in data.val + data.test}
    rows = [f"images/i{k}.png;masks/i{k}.png;{('train', 'Train', 'valid', 'val', 'test', 'test')[k]}" for k in range(6)]
    (tmp_path / "own" / "manifest.csv").write_text("\ufeffImage;Mask;Split\r\n" + "\r\n".join(rows) + "\r\n", encoding="utf-8")
    data = opened(tmp_path / "own")
    assert [[sample.name for sample in data.samples(part)] for part in ("train", "val", "test")] == [
        ["i0.png", "i1.png"],
        ["i2.png", "i3.png"],
        ["i4.png", "i5.png"],
    ]


def test_a_manifest_or_coco_file_may_be_named_itself(tmp_path: Path) -> None:
    manifest(tmp_path / "own", "anything.csv")
    assert len(everything(opened(tmp_path / "own" / "anything.csv"))) == 6
    coco_folder(tmp_path / "two")
    assert len(everything(opened(tmp_path / "two" / "annotations.json"))) == 6


def test_images_of_one_name_in_two_folders_get_different_names(tmp_path: Path) -> None:
    rows = ["image,mask"]
    for folder in ("a", "b"):
        pairs(tmp_path / "own" / folder, 3)
        rows += [f"{folder}/images/i{k}.png,{folder}/masks/i{k}.png" for k in range(3)]
    (tmp_path / "own" / "manifest.csv").write_text("\n".join(rows))
    names = [sample.name for sample in everything(opened(tmp_path / "own"))]
    assert names == sorted(f"{folder}__images__i{k}.png" for folder in "ab" for k in range(3))


def test_coco_categories_are_classes_by_name_where_a_card_names_them(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "own")
    tree = coco_tree()
    tree["categories"] = [{"id": 7, "name": "red"}, {"id": 9, "name": "white"}]
    for number, annotation in enumerate(tree["annotations"]):
        annotation["category_id"] = 9 if number % 4 == 3 else 7
    (folder / "annotations.json").write_text(json.dumps(tree))
    data = opened(folder, card_of(classes=["background", "white", "red"]))
    expected = np.array([0, 2, 2, 2, 1])[cells(0)]
    np.testing.assert_array_equal(data.read_mask(everything(data)[0]), expected)
    assert "category 'white' is no class" in refusal(folder, card_of(classes=["background", "red", "platelet"]))


def test_roboflow_and_stage1_folders_are_known_by_their_splits(tmp_path: Path) -> None:
    for split, num in (("train", 4), ("valid", 2), ("test", 3)):
        home = tmp_path / "robo" / split
        home.mkdir(parents=True)
        for seed in range(num):
            picture(seed).save(home / f"i{seed}.png")
        (home / "_annotations.coco.json").write_text(json.dumps(coco_tree(num)))
    data = opened(tmp_path / "robo")
    assert [len(data.samples(part)) for part in ("train", "val", "test")] == [4, 2, 3]
    for split, num in (("stage1_train", 4), ("stage1_test", 2)):
        nuclei(tmp_path / "dsb" / split, num)
    data = opened(tmp_path / "dsb")
    assert [len(data.samples(part)) for part in ("train", "val", "test")] == [3, 1, 2]


def test_a_card_beside_the_data_names_classes_and_colours(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "own")
    palette = np.array([(255, 255, 255), (200, 0, 0), (0, 0, 200)], np.uint8)
    for seed in range(6):
        Image.fromarray(palette[cells(seed) % 3]).save(folder / "masks" / f"i{seed}.png")
    assert "colours such as" in refusal(folder)
    facts = 'classes = ["background", "red", "blue"]\ncolors = [[255, 255, 255], [200, 0, 0], [0, 0, 200]]\n'
    (folder / "dataset.toml").write_text(facts)
    data = opened(folder)
    assert data.classes == ("background", "red", "blue")
    np.testing.assert_array_equal(data.read_mask(everything(data)[0]), cells(0) % 3)
    (folder / "dataset.toml").write_text(facts + 'builder = "evil.py:run"\n')
    assert "'builder' is not allowed in a card beside the data" in refusal(folder)


def test_thresholds_separate_classes(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "own")
    noisy = (cells(0) * 50 + np.random.default_rng(0).integers(0, 12, SIZE)).astype(np.uint8)
    Image.fromarray(noisy).save(folder / "masks" / "i0.png")
    data = opened(folder, card_of(classes=["background", "a", "b"], thresholds=[30, 80]))
    np.testing.assert_array_equal(data.read_mask(everything(data)[0]), np.array([0, 1, 2, 2, 2])[cells(0)])


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"values": [0, 255], "thresholds": [128]}, "keep one"),
        ({"values": [0, 128, 255]}, "2 different ones"),
        ({"thresholds": [128, 60], "classes": ["a", "b", "c"]}, "rise"),
        ({"colors": [[0, 0, 0], [0, 0, 300]]}, r"0\.\.255"),
    ],
)
def test_contradictory_cards_are_refused(facts: dict, says: str) -> None:
    with pytest.raises(CellbenchError, match=says):
        card_of(**facts)


# Safety


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "images/../../secret.png", "..\\secret.png", "C:/secret.png", "images/\0.png", ""]
)
@pytest.mark.parametrize("column", ["image", "mask"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str, column: str) -> None:
    folder = pairs(tmp_path / "own")
    picture(0).save(tmp_path / "secret.png")
    row = {"image": "images/i0.png", "mask": "masks/i0.png", column: name}
    (folder / "manifest.csv").write_text(f"image,mask\nimages/i1.png,masks/i1.png\n{row['image']},{row['mask']}\n")
    assert "leads out of the folder" in refusal(folder)
    tree = coco_tree()
    tree["images"][0]["file_name"] = name
    os.remove(folder / "manifest.csv")
    (folder / "c.json").write_text(json.dumps(tree))
    os.rename(folder / "masks", folder / "no")
    if column == "image":
        assert "leads out of the folder" in refusal(folder)


def test_links_are_followed_inside_and_refused_outside_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pairs(tmp_path / "own")
    (folder / "images" / "linked.png").symlink_to(folder / "images" / "i0.png")
    (folder / "masks" / "linked.png").symlink_to("i0.png")
    assert len(everything(opened(folder))) == 7
    pairs(tmp_path / "other")
    (folder / "images" / "z.png").symlink_to(tmp_path / "other" / "images" / "i1.png")
    (folder / "masks" / "z.png").symlink_to(folder / "masks" / "i1.png")
    assert "'images/z.png' leads out of the folder" in refusal(folder)
    monkeypatch.setenv("CELLBENCH_FOLLOW_LINKS", "1")
    os.remove(folder / "splits.json")
    assert len(everything(opened(folder))) == 8


def test_a_name_of_255_characters_is_read_split_and_read_again(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "own")
    stem = "ä" * 120 + "x" * 11
    os.rename(folder / "images" / "i0.png", folder / "images" / f"{stem}.png")
    os.rename(folder / "masks" / "i0.png", folder / "masks" / f"{stem}.png")
    assert len(f"{stem}.png".encode()) == 255
    first = opened(folder)
    assert f"{stem}.png" in {sample.name for sample in everything(first)}
    assert opened(folder).digest == first.digest


def test_read_only_data_stays_as_it_is(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "own")
    folder.chmod(0o555)
    before = sorted(path.name for path in folder.rglob("*"))
    first = opened(folder)
    assert opened(folder).digest == first.digest
    assert sorted(path.name for path in folder.rglob("*")) == before
    folder.chmod(0o755)


@pytest.mark.slow
def test_many_files_are_listed_by_names_alone(tmp_path: Path) -> None:
    """Nothing is opened, and no file is looked at twice: 20,000 empty files would all be refused by a decoder."""
    for inner in ("images", "masks"):
        (tmp_path / "own" / inner).mkdir(parents=True)
        for number in range(10_000):
            (tmp_path / "own" / inner / f"{number}.png").touch()
    assert len(scan_folder(FOLDER, tmp_path / "own").parts["train"]) == 10_000


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("image,mask\nimages/i0.png,masks/nothing.png", "names the mask 'masks/nothing.png', which does not exist"),
        ("image,mask\nimages/none.png,masks/i0.png", "names the image 'images/none.png', which does not exist"),
        ("image,mask\nimages/i0.png,masks/i0.png\nimages/i0.png,masks/i0.png", "names 'images/i0.png' twice"),
        ("image,mask,split\nimages/i0.png,masks/i0.png,tset", "split = 'tset'"),
        ("image,mask,split\nimages/i0.png,masks/i0.png,test\nimages/i1.png,masks/i1.png,", "some rows name a split"),
        ("picture,mask\na,b", "must name the columns"),
        ("image,mask\na", "has 1 fields"),
        ('image,mask\n"a,b', "cannot be read as CSV"),
        ("", "must name the columns"),
        ("image,mask\n", "holds no row"),
    ],
)
def test_invalid_manifests_are_refused(tmp_path: Path, rows: str, says: str) -> None:
    folder = pairs(tmp_path / "own")
    (folder / "manifest.csv").write_text(rows)
    assert says in refusal(folder)


# COCO's outlines


@pytest.mark.parametrize("seed", range(5))
def test_polygons_cover_what_an_independent_rasteriser_covers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    points = np.stack([70 + rng.uniform(30, 45, 12) * np.cos(angles), 50 + rng.uniform(20, 40, 12) * np.sin(angles)], 1)
    points[:, 0] -= 40 * (seed % 2)  # some leave the image on the left
    ours = rasterize([points.ravel().tolist()], 100, 140)
    theirs = polygon2mask((100, 140), points[:, ::-1] - 0.5)
    assert ours.shape == (100, 140)
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {}, "abc", [[1, 2, 3, 4, 5, float("nan")]], [[0, 0, 1e12, 0, 5, 5]], [["a"] * 6], [[1, 2, 3, 4, 5, True]],
        {"size": [40, 60], "counts": [2400, 1]}, {"size": [40, 60], "counts": [-5, 2405]}, {"size": [60, 40], "counts": [2400]},
        {"size": [40, 60], "counts": "ooooooooooo"}, {"size": [40, 60], "counts": "\x00"}, {"size": [40, 60], "counts": [1.5]},
        {"size": [40, 60], "counts": None},
    ],
)  # fmt: skip
def test_outlines_that_do_not_fit_are_refused_before_they_are_drawn(tmp_path: Path, wrong: object) -> None:
    folder = coco_folder(tmp_path / "own")
    tree = coco_tree()
    tree["annotations"][0]["segmentation"] = wrong
    (folder / "annotations.json").write_text(json.dumps(tree))
    assert "annotation 1 of 'i0.png' has" in refusal(folder)


def test_a_coco_file_whose_image_has_another_size_is_refused(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "own")
    tree = coco_tree(kind="polygon")
    tree["images"][0]["width"] = 61
    (folder / "annotations.json").write_text(json.dumps(tree))
    assert "the mask is 61 x 40 px" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tree: tree["categories"].append({"id": 7, "name": "debris"}), "two categories have one id"),
        (lambda tree: tree["images"][0].update(width=-(10**400)), "Export it again"),
        (lambda tree: tree["annotations"][0].update(segmentation=[[0, 0, 10**400, 0, 9.5, 9]]), "extends far beyond its image"),
    ],
)
def test_numbers_beyond_all_floats_and_ids_given_twice_are_one_line(tmp_path: Path, change: Callable[[dict], object], says: str) -> None:
    message = refusal(coco_with(tmp_path / "own", change))
    assert says in message
    assert "\n" not in message


def coco_with(folder: Path, change: Callable[[dict], object], card: str = "") -> Path:
    """A folder of COCO outlines whose tree was changed; ``card``: a dataset.toml beside it."""
    folder = coco_folder(folder)
    tree = coco_tree()
    change(tree)
    (folder / "annotations.json").write_text(json.dumps(tree))
    if card:
        (folder / "dataset.toml").write_text(card)
    return folder


def categories(*names: str) -> Callable[[dict], None]:
    """Gives each image's four cells these categories."""

    def change(tree: dict) -> None:
        kinds = list(dict.fromkeys(names))
        tree["categories"] = [{"id": 5 + kinds.index(name), "name": name} for name in kinds]
        for number, annotation in enumerate(tree["annotations"]):
            annotation["category_id"] = 5 + kinds.index(names[number % 4])

    return change


def test_crowds_are_ignored_and_cells_outlined_within_them_are_cells(tmp_path: Path) -> None:
    def crowd(tree: dict) -> None:
        heap = [[0, 0, 60, 0, 60, 20, 0, 20]]  # over the first two cells
        tree["annotations"] += [{"id": 900 + k, "image_id": k, "category_id": 7, "iscrowd": 1, "segmentation": heap} for k in range(6)]
        tree["annotations"][2]["iscrowd"] = 1

    data = opened(coco_with(tmp_path / "own", crowd))
    first, second = everything(data)[:2]
    expected = np.where(cells(1) > 0, 1, 0)
    expected[:20][cells(1)[:20] == 0] = IGNORE
    np.testing.assert_array_equal(data.read_mask(second), expected)
    np.testing.assert_array_equal(np.unique(data.read_instances(second)), [0, 1, 2, 3, 4])
    assert (data.read_mask(first)[cells(0) == 3] == IGNORE).all()
    assert any("7 regions are crowds (iscrowd) and are ignored" in note for note in data.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "card", "classes", "labels"),
    [
        (("blob",) * 4, "", ("background", "cell"), [0, 1, 1, 1, 1]),
        (("red", "white", "red", "plate"), "", ("background", "plate", "red", "white"), [0, 2, 3, 2, 1]),
        (("cell", "cell", "cell", "Background"), "", ("background", "cell"), [0, 1, 1, 1, 0]),
        (("cell", "cell", "_ignore_", "dirt"), 'categories = { dirt = "" }', ("background", "cell"), [0, 1, 1, IGNORE, 0]),
        (
            ("red", "white", "red", "dirt"),
            'categories = { red = "blood", white = "blood", dirt = "ignore" }',
            ("background", "blood"),
            [0, 1, 1, 1, IGNORE],
        ),
        (("RED", "white", "RED", "white"), 'classes = ["background", "white", "red"]', ("background", "white", "red"), [0, 2, 1, 2, 1]),
        (("blob",) * 4, 'classes = ["background", "nucleus"]', ("background", "nucleus"), [0, 1, 1, 1, 1]),
    ],
)
def test_each_category_is_a_class_of_its_own_or_what_the_card_says(
    tmp_path: Path, names: tuple[str, ...], card: str, classes: tuple[str, ...], labels: list[int]
) -> None:
    data = opened(coco_with(tmp_path / "own", categories(*names), card))
    assert data.classes == classes
    for seed, sample in enumerate(everything(data)):
        np.testing.assert_array_equal(data.read_mask(sample), np.array(labels)[cells(seed)])
    note = next(note for note in data.notes if note.startswith("COCO categories"))
    for name in dict.fromkeys(names):
        label = labels[1 + names.index(name)]
        what = {0: "left out", IGNORE: "ignored"}.get(label, f"class '{classes[label % 255]}'")
        assert f"'{name}' {6 * names.count(name)} ({what})" in note


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ('classes = ["background", "red"]', "category 'white' is no class of the card"),
        ('categories = { red = "cell" }', "category 'white' is no class of the card"),
        ('classes = ["background", "red"]\ncategories = { white = "wihte" }', "'white' is to be 'wihte', which is no class"),
        ('categories = { blue = "" }', "holds no category 'blue'"),
    ],
)
def test_categories_missing_from_the_card_are_an_error_that_names_them(tmp_path: Path, card: str, says: str) -> None:
    assert says in refusal(coco_with(tmp_path / "own", categories("red", "white", "red", "red"), card))


@pytest.mark.slow
@pytest.mark.parametrize("empty", [None, [], [[]], [[1, 2, 3, 4]], [[1, 2, 5, 6, 9, 10]], {"size": [40, 60], "counts": [2400]}])
def test_an_annotation_without_an_outline_is_skipped_by_its_id(tmp_path: Path, empty: object) -> None:
    def change(tree: dict) -> None:
        tree["annotations"][1] |= {"segmentation": empty, "bbox": [1, 1, 4, 4]}

    data = opened(coco_with(tmp_path / "own", change))
    assert "annotations.json: 1 annotations have no outline and are skipped, 1 of them with a box only: id 2." in data.notes
    np.testing.assert_array_equal(data.read_mask(everything(data)[0]), (cells(0) > 0) & (cells(0) != 2))


def test_a_file_of_boxes_only_is_refused(tmp_path: Path) -> None:
    def change(tree: dict) -> None:
        for annotation in tree["annotations"]:
            annotation |= {"segmentation": [], "bbox": [1, 1, 4, 4]}

    assert "no annotation has an outline, 24 of them with a box only" in refusal(coco_with(tmp_path / "own", change))


def test_outlined_cells_that_others_cover_are_noted(tmp_path: Path) -> None:
    def change(tree: dict) -> None:
        tree["annotations"].append({**tree["annotations"][0], "id": 99})

    assert any("1 outlined cells have no pixel of their own" in note for note in opened(coco_with(tmp_path / "own", change)).notes)


def test_check_lists_the_categories(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = coco_with(tmp_path / "own", categories("cell", "cell", "cell", "artefact"))
    check_folder(folder, spec=DataSpec(group="none"), out=tmp_path / "out", say=lines.append)
    assert any("'cell' 18 (class 'cell'); 'artefact' 6 (class 'artefact')" in line for line in lines)
