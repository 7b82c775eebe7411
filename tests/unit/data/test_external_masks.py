"""Masks of other tools are matched to test images by name; what does not fit is one line, never a smaller comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from cellbench.data.dataset import Dataset, Sample
from cellbench.data.external_masks import find_masks
from cellbench.errors import CellbenchError
from cellbench.files import compute_sha256

SIZE = (40, 50)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Two test images and a training image."""
    (tmp_path / "data").mkdir()
    samples = []
    for k, name in enumerate(("a.png", "b_img.jpg", "c.tif")):
        path = tmp_path / "data" / name
        Image.fromarray(np.full((*SIZE, 3), 50 * k, np.uint8)).save(path)
        samples.append(Sample(name=name, image=path, mask=path, size_px=SIZE, digest=compute_sha256(path)))
    test, train = tuple(samples[:2]), tuple(samples[2:])
    return Dataset(name="d", classes=("background", "cell"), values=(0, 255), train=train, val=(), test=test, root=tmp_path / "data")


def cells() -> np.ndarray:
    out = np.zeros(SIZE, np.uint16)
    out[5:15, 5:15], out[5:15, 15:30] = 300, 2
    return out


def write(folder: Path, *names: str, mask: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(cells() if mask is None else mask).save(folder / name)
    return folder


def fault(where: Path, data: Dataset) -> str:
    def read() -> None:
        found = find_masks(where, data, data.test)
        for sample in data.test:
            found.read(sample)

    with pytest.raises(CellbenchError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ("a.png", "b_img.png"),
        ("a_cp_masks.tif", "b_img_cp_masks.tif"),
        ("a.png.tif", "b_img.jpg - labels.png"),
        ("mask_a.png", "b_img.instances.png"),
        ("a.png", "b_mask.png"),
    ],
)
def test_names_that_tools_give_are_matched(tmp_path: Path, data: Dataset, names: tuple[str, ...]) -> None:
    found = find_masks(write(tmp_path / "m", *names), data, data.test)
    classes, numbers = found.read(data.test[1])
    assert (found.kind, classes.sum(), np.unique(numbers).tolist()) == ("cells", 250, [0, 2, 300])


def test_masks_of_one_value_are_connected_regions(tmp_path: Path, data: Dataset) -> None:
    found = find_masks(write(tmp_path / "m", "a.png", "b_img.png", mask=np.where(cells() > 0, 255, 0).astype(np.uint8)), data, data.test)
    assert found.kind == "binary"
    assert found.read(data.test[0])[1] is None


def test_copies_of_the_images_beside_masks_are_no_masks(tmp_path: Path, data: Dataset) -> None:
    folder = write(tmp_path / "m", "a_masks.png", "b_img_masks.png")
    for sample in (*data.test, *data.train):
        (folder / sample.name).write_bytes(sample.image.read_bytes())
    found = find_masks(folder, data, data.test)
    assert found.files["a.png"].name == "a_masks.png"
    assert not [line for line in found.notes if "not used" in line]


def test_what_is_missing_extra_or_double_is_named(tmp_path: Path, data: Dataset) -> None:
    assert "1 of 2 test images have no mask: 'b_img.jpg'" in fault(write(tmp_path / "m", "a.png"), data)
    assert "'a.png' has 2 masks: 'a.png', 'a_masks.png'" in fault(write(tmp_path / "m", "a_masks.png", "b_img.png"), data)
    notes = find_masks(write(tmp_path / "n", "a.png", "b_img.png", "c.png", "z.png"), data, data.test).notes
    assert [line for line in notes if line.startswith("not used")] == [
        "not used: 1 masks of images that are not test images: 'c.png'.",
        "not used: 1 files that belong to no image of the data: 'z.png'.",
    ]
    assert find_masks(tmp_path / "n" / "*[ag].png", data, data.test).files["a.png"].name == "a.png"


def test_other_sizes_classes_and_values_are_refused(tmp_path: Path, data: Dataset) -> None:
    assert "is 25 x 40 px, the image a.png 50 x 40" in fault(write(tmp_path / "m", "a.png", "b_img.png", mask=cells()[:, :25]), data)
    probability = (255 * gaussian_filter((cells() > 0).astype(float), 4)).astype(np.uint8)
    assert "as probabilities do" in fault(write(tmp_path / "p", "a.png", "b_img.png", mask=probability), data)
    three = Dataset(**{**vars(data), "classes": ("background", "cytoplasm", "nucleus"), "values": (0, 128, 255)})
    fifty = write(tmp_path / "q", "a.png", "b_img.png", mask=np.where(cells() > 0, 50, 0).astype(np.uint8))
    assert "holds the value 50, which is no class. Known: 0 background, 128 cytoplasm" in fault(fifty, three)
    outline = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[1, 1], [9, 1], [9, 9]]]}, "properties": {}}
    (tmp_path / "g").mkdir()
    for name in ("a", "b_img"):
        (tmp_path / "g" / f"{name}.geojson").write_text(json.dumps([outline | {"properties": {"classification": {"name": "Platelet"}}}]))
    assert find_masks(tmp_path / "g", data, data.test).read(data.test[0])[0].any()
    assert "has the class 'Platelet'; the data has cytoplasm, nucleus" in fault(tmp_path / "g", three)


def test_with_several_classes_maps_hold_class_numbers_or_the_values_of_the_data(tmp_path: Path, data: Dataset) -> None:
    three = Dataset(**{**vars(data), "classes": ("background", "cytoplasm", "nucleus"), "values": (0, 128, 255)})
    for folder, values in (("numbers", (1, 2)), ("values", (128, 255))):
        mask = np.where(cells() == 2, values[0], np.where(cells() == 300, values[1], 0)).astype(np.uint8)
        classes, numbers = find_masks(write(tmp_path / folder, "a.png", "b_img.png", mask=mask), three, three.test).read(three.test[0])
        assert (np.bincount(classes.ravel()).tolist(), numbers) == ([1750, 150, 100], None)


def test_a_coco_file_is_matched_by_file_name(tmp_path: Path, data: Dataset) -> None:
    tree = {
        "images": [
            {"id": k, "file_name": f"images/{name}", "height": 40, "width": 50} for k, name in enumerate(("a.png", "b_img.png", "z.png"))
        ],
        "categories": [{"id": 1, "name": "wbc"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]}],
    }
    path = tmp_path / "out.json"
    path.write_text(json.dumps(tree))
    found = find_masks(path, data, data.test)
    assert [int(found.read(sample)[0].sum()) for sample in data.test] == [0, 100]
    assert "not used: 1 images of the file that are not test images: 'images/z.png'." in found.notes
    path.write_text(json.dumps({**tree, "images": tree["images"][1:]}))
    assert "1 of 2 test images are not in it: 'a.png'" in fault(path, data)


def test_folders_and_patterns_are_searched_with_their_subfolders(tmp_path: Path, data: Dataset) -> None:
    out = tmp_path / "out"
    for folder, name in (("x", "a"), ("x/y", "b_img")):
        for ending in (".png", ".instances.png"):
            write(out / folder, name + ending)
    for pattern in ("*.instances.png", "**/*.instances.png", "x*/**/*.instances.png"):
        found = find_masks(out / pattern, data, data.test).files
        assert {name: path.relative_to(out).as_posix() for name, path in found.items()} == {
            "a.png": "x/a.instances.png",
            "b_img.jpg": "x/y/b_img.instances.png",
        }
    assert f"2 masks: 'x/a.instances.png', 'x/a.png'. Name one kind, as in '{out}/*.instances.png'" in fault(out, data)
    (out / "x" / "a.regions.geojson").write_text("[]")  # kept by `predict --regions`; no mask
    assert "a.png' has 2 masks" in fault(out, data)
    write(out / "z", "a.instances.png", "b_img.instances.png")
    assert "2 masks: 'x/a.instances.png', 'z/a.instances.png'. Name one folder of them" in fault(out / "*.instances.png", data)
    assert find_masks(out / "z*", data, data.test).files["a.png"] == out / "z" / "a.instances.png"
    assert "holds no masks" in fault(out / "*.tif", data)


def test_images_of_one_name_in_two_folders_keep_their_masks_with_a_pattern(tmp_path: Path, data: Dataset) -> None:
    a, b = data.test
    pair = tuple(
        Sample(name=f"{folder}__a.png", image=one.image.parent / folder / "a.png", mask=one.image, size_px=SIZE, digest=one.digest)
        for folder, one in (("p", a), ("q", b))
    )
    for folder in "pq":
        write(tmp_path / folder, "a.instances.png")
    found = find_masks(tmp_path / "*.instances.png", Dataset(**{**vars(data), "test": pair}), pair).files
    assert found == {f"{folder}__a.png": tmp_path / folder / "a.instances.png" for folder in "pq"}


def test_masks_behind_links_that_leave_the_folder_are_refused(tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", "a.png")
    (folder / "b_img.png").symlink_to(write(tmp_path / "n", "b_img.png") / "b_img.png")
    assert "'b_img.png' lead out of the folder. Only files inside it are read" in fault(folder, data)
    monkeypatch.setenv("CELLBENCH_FOLLOW_LINKS", "1")
    assert len(find_masks(folder, data, data.test).files) == 2
