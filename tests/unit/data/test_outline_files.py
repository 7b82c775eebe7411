"""Masks of other tools: every format gives the pixels that its own tool means, and a pickle is never executed."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.draw import polygon2mask

from cellbench.config.registry import Registry
from cellbench.data.io.imagej_roi import decode_roi
from cellbench.data.io.inert_pickle import as_array, read_pickle
from cellbench.data.layouts import scan_folder
from cellbench.data.outline_files import Outline, ToolAnnotation, fill, read_tool_mask
from cellbench.data.scan import find_unused
from cellbench.errors import CellbenchError

SIZE = (60, 80)
SQUARE = [[10, 20], [30, 20], [30, 40], [10, 40]]


def ids() -> np.ndarray:
    out = np.zeros(SIZE, np.int32)
    out[5:20, 5:25], out[30:50, 40:70] = 1, 7
    return out


def painted(path: Path, labels: dict[str, int | None] | None = None) -> tuple[np.ndarray, np.ndarray]:
    mask = read_tool_mask(path)
    return mask.paint(SIZE, labels or {one.label: 1 for one in mask.outlines}, path.name)


# --- Cellpose and NumPy -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "u2", "<u4", ">u2", "i8", "f4"])
def test_the_masks_of_a_seg_npy_are_read(tmp_path: Path, dtype: str) -> None:
    """The dictionary that ``cellpose.io.masks_flows_to_seg`` saves."""
    about = {
        "outlines": ids() > 0,
        "masks": ids().astype(dtype),
        "chan_choose": [0, 0],
        "filename": Path("a.png"),
        "diameter": np.float32(30),
    }
    np.save(tmp_path / "a_seg.npy", {**about, "flows": [np.zeros((2, 3), np.float32), None], "ismanual": np.zeros(2, bool)})
    np.testing.assert_array_equal(painted(tmp_path / "a_seg.npy")[1], ids())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_and_order_are_those_of_pickle(protocol: int) -> None:
    rows, columns = np.arange(12, dtype=np.uint16).reshape(3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3))
    tree = read_pickle(io.BytesIO(pickle.dumps({"a": rows, "b": columns}, protocol)))
    np.testing.assert_array_equal(as_array(tree["a"]), rows)
    np.testing.assert_array_equal(as_array(tree["b"]), columns)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    np.save(tmp_path / "a_seg.npy", {"masks": ids(), "evil": Evil(tmp_path / "made")})
    np.testing.assert_array_equal(painted(tmp_path / "a_seg.npy")[1], ids())
    np.save(tmp_path / "b_seg.npy", {"masks": Evil(tmp_path / "made")})
    with pytest.raises(CellbenchError, match="no pickle is executed"):
        read_tool_mask(tmp_path / "b_seg.npy")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.random.default_rng(0).random((4, 4)), "no whole numbers"),
        (np.full((4, 4), -1), "outside of 0"),
        (np.zeros((3, 4, 4), np.uint8), "shape (3, 4, 4)"),
        (np.zeros(0), "shape (0,)"),
    ],
)
def test_arrays_that_are_no_masks_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CellbenchError) as error:
        read_tool_mask(tmp_path / "a.npy")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def damaged_zip() -> bytes:
    """A zip file whose one entry cannot be decompressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.roi", b"Iout" * 50)
    data = bytearray(buffer.getvalue())
    data[35:45] = b"\xff" * 10
    return bytes(data)


@pytest.mark.parametrize("ending", [".npy", ".zip", ".roi", ".geojson", ".json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Iout",
        damaged_zip(),
        b"\x93NUMPY\x01\x00",
        b"Iout" + bytes(10),
        b"PK\x03\x04" + bytes(30),
        b"[1, 2]",
        b'{"shapes": [{}]}',
        b"\xff" * 99,
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with pytest.raises(CellbenchError) as error:
        read_tool_mask(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "Polygon", "coordinates": [[[0, 0], [10**400, 0], [9, 9]]]},
        {"type": "Polygon", "coordinates": [3]},
        {"type": "Point", "coordinates": [10**400, 0]},
        functools.reduce(lambda inner, _: {"type": "GeometryCollection", "geometries": [inner]}, range(400), {}),
    ],
)
def test_shapes_that_no_tool_writes_are_one_line_or_none(tmp_path: Path, geometry: object) -> None:
    path = write_json(tmp_path / "a.geojson", {"type": "Feature", "geometry": geometry})
    try:
        assert not read_tool_mask(path).outlines
    except CellbenchError as error:
        assert "\n" not in str(error)  # noqa: PT017  either is well


def test_features_without_a_readable_shape_are_counted(tmp_path: Path) -> None:
    found = read_tool_mask(
        write_json(
            tmp_path / "a.geojson",
            [{"type": "Feature", "geometry": [1]}, feature([1, 2], "Point"), {"type": "GeometryCollection", "geometries": 3}],
        )
    )
    assert found.left_out == {"feature without a shape": 1, "point": 1, "geometrycollection": 1}


# --- outlines -----------------------------------------------------------------------------------------------------------------------------


def feature(coordinates: object, kind: str = "Polygon", **properties: object) -> dict[str, object]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def write_json(path: Path, tree: object) -> Path:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_a_hole_and_a_second_part_belong_to_one_cell(tmp_path: Path) -> None:
    parts = [[SQUARE, [[15, 25], [20, 25], [20, 30], [15, 30]]], [[[50, 2], [54, 2], [54, 6], [50, 6]]]]
    classes, numbers = painted(
        write_json(tmp_path / "a.geojson", {"type": "FeatureCollection", "features": [feature(parts, "MultiPolygon")]})
    )
    expected = np.zeros(SIZE, bool)
    expected[20:40, 10:30], expected[25:30, 15:20], expected[2:6, 50:54] = True, False, True
    np.testing.assert_array_equal(classes > 0, expected)
    assert numbers.max() == 1


def test_polygons_cover_the_pixels_whose_centres_they_enclose() -> None:
    rng = np.random.default_rng(1)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
    ring = np.stack([40.3 + 18 * np.cos(angle), 30.7 + 15 * np.sin(angle)], axis=1)
    box, inside = fill(Outline(rings=(ring,)), SIZE)
    found = np.zeros(SIZE, bool)
    found[box] = inside
    expected = polygon2mask(SIZE, ring[:, ::-1] - 0.5)
    assert (found ^ expected).sum() <= 0.05 * len(np.flatnonzero(expected))


def test_an_outline_beyond_the_border_is_cut_and_one_outside_is_refused(tmp_path: Path) -> None:
    over = [[-5, -5], [5, -5], [5, 5], [-5, 5]]
    classes, _ = painted(write_json(tmp_path / "a.geojson", [feature([over])]))
    assert classes.sum() == 25
    with pytest.raises(CellbenchError, match="outline 1 lies outside its image of 80 x 60 px"):
        painted(write_json(tmp_path / "b.geojson", [feature([[[90, 5], [99, 5], [99, 9]]])]))


def test_annotations_beside_detections_are_regions_and_alone_they_are_cells(tmp_path: Path) -> None:
    cell = feature([SQUARE], objectType="detection", classification={"name": "RBC"})
    drawn = feature([[[0, 0], [80, 0], [80, 60], [0, 60]]], objectType="annotation")
    both = read_tool_mask(write_json(tmp_path / "a.geojson", [drawn, cell, feature([1, 2], "Point")]))
    assert ([one.label for one in both.outlines], len(both.regions), both.left_out) == (["RBC"], 1, {"point": 1})
    alone = read_tool_mask(write_json(tmp_path / "b.geojson", [drawn]))
    assert (len(alone.outlines), len(alone.regions)) == (1, 0)


def test_labelme_shapes_of_one_group_are_one_cell(tmp_path: Path) -> None:
    bits = io.BytesIO()
    Image.fromarray(np.ones((4, 6), bool)).save(bits, "PNG")
    shapes = [
        {"label": "cell", "points": SQUARE, "group_id": 3, "shape_type": "polygon"},
        {"label": "cell", "points": [[50, 2], [54, 6]], "group_id": 3, "shape_type": "rectangle"},
        {
            "label": "cell",
            "points": [[70, 10], [75, 13]],
            "group_id": None,
            "shape_type": "mask",
            "mask": base64.b64encode(bits.getvalue()).decode(),
        },
        {"label": "cell", "points": [[1, 1]], "shape_type": "point"},
    ]
    path = write_json(tmp_path / "a.json", {"shapes": shapes, "imageHeight": 60, "imageWidth": 80})
    _, numbers = painted(path)
    assert np.bincount(numbers.ravel())[1:].tolist() == [416, 24] or np.unique(numbers).size == 3
    assert (numbers[2:6, 50:54] == numbers[30, 20]).all()
    assert (numbers[10:14, 70:76] > 0).all()
    with pytest.raises(CellbenchError, match="of an image of 80 x 60 px, its image has 40 x 30"):
        read_tool_mask(path).paint((30, 40), {"cell": 1}, "a.json")


def test_rois_of_stardist_are_the_cells_that_it_renders(tmp_path: Path) -> None:
    pytest.importorskip("stardist")
    from stardist.geometry import dist_to_coord, polygons_to_label, star_dist
    from stardist.utils import export_imagej_rois

    labels = np.zeros(SIZE, np.int32)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    centres = np.array([[18, 20], [40, 55]])
    for number, (y, x) in enumerate(centres, 1):
        labels[(rows - y) ** 2 + (columns - x) ** 2 < 150] = number
    distances = star_dist(labels, 32)[centres[:, 0], centres[:, 1]]
    rendered = polygons_to_label(distances, centres, SIZE)
    export_imagej_rois(str(tmp_path / "a.zip"), dist_to_coord(distances, centres))
    found = painted(tmp_path / "a.zip")[1]
    for number in (1, 2):
        own, read = rendered == number, found == number
        assert (own & read).sum() / (own | read).sum() > 0.97


# --- ImageJ -------------------------------------------------------------------------------------------------------------------------------


def roi(kind: int, box: tuple[int, int, int, int], points: np.ndarray | None = None) -> bytes:
    """A region as ImageJ's ``RoiEncoder`` writes it: top, left, bottom, right, and points (n, 2) of x and y."""
    points = np.zeros((0, 2), int) if points is None else points
    head = struct.pack(">4shbbhhhhH", b"Iout", 227, kind, 0, *box, len(points))
    offsets = (points - np.array([box[1], box[0]])).T.astype(">i2").tobytes()
    return head + bytes(64 - len(head)) + offsets


def test_regions_of_imagej_cover_their_pixels(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a_rois.zip", "w") as archive:
        archive.writestr("0001.roi", roi(0, (20, 10, 40, 30), np.array(SQUARE)))
        archive.writestr("0002.roi", roi(1, (2, 50, 6, 54)))
        archive.writestr("0003.roi", roi(10, (2, 50, 6, 54), np.array([[3, 3]])))
    _, numbers = painted(tmp_path / "a_rois.zip")
    expected = np.zeros(SIZE, int)
    expected[20:40, 10:30], expected[2:6, 50:54] = 1, 2
    np.testing.assert_array_equal(numbers, expected)
    assert read_tool_mask(tmp_path / "a_rois.zip").left_out == {"point": 1}
    (tmp_path / "b.roi").write_bytes(roi(2, (10, 10, 30, 30)))
    assert abs(painted(tmp_path / "b.roi")[0].sum() - np.pi * 100) < 8


def test_regions_are_those_of_roifile() -> None:
    roifile = pytest.importorskip("roifile")
    ring = np.array(SQUARE) + 0.25
    for points in (np.array(SQUARE), ring):
        data = roifile.ImagejRoi.frompoints(points, name="x").tobytes()
        np.testing.assert_allclose(decode_roi(data).rings[0], roifile.ImagejRoi.frombytes(data).coordinates())  # type: ignore[union-attr]


# --- to learn from ------------------------------------------------------------------------------------------------------------------------


def test_as_an_annotation_a_file_has_classes_and_ignored_parts(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "a.png")
    shapes = [
        feature([SQUARE], classification={"name": "WBC"}),
        feature([[[0, 0], [40, 0], [40, 60], [0, 60]]], classification={"name": "Ignore*"}),
        feature([[[50, 2], [54, 2], [54, 6], [50, 6]]], classification={"name": "artefact"}),
    ]
    write_json(tmp_path / "a.geojson", shapes)
    one = ToolAnnotation(path=tmp_path / "a.geojson", image=tmp_path / "a.png", labels=(("WBC", 2), ("Ignore*", 255), ("artefact", None)))
    classes, numbers = one.read()
    assert (classes[30, 20], classes[5, 5], classes[4, 52], numbers.max(), one.num_outlined) == (2, 255, 0, 1, 1)


@pytest.mark.parametrize(("folder", "name"), [("images", "{}.geojson"), ("outlines", "{}.png.geojson"), ("masks", "{}.geojson")])
def test_a_folder_of_images_with_outlines_is_data(tmp_path: Path, folder: str, name: str) -> None:
    for k in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(np.full((*SIZE, 3), 80 * k, np.uint8)).save(tmp_path / "images" / f"s{k}.png")
        write_json(
            tmp_path / folder / name.format(f"s{k}"),
            [feature([SQUARE], classification={"name": "WBC"}), feature([[[50, 2], [54, 2], [54, 6]]])],
        )
    listing = scan_folder(Registry().dataset("folder"), tmp_path)
    assert not listing.problems
    assert listing.classes == ("background", "WBC", "unclassified") or listing.classes == ("background", "unclassified", "WBC")
    samples = listing.parts["train"]
    assert [sample.name for sample in samples] == ["s0.png", "s1.png", "s2.png"]
    classes, ids = samples[0].truth.read()  # type: ignore[union-attr]
    assert (len(np.unique(classes)), ids.max()) == (3, 2)
    assert not find_unused(listing, ())[0]
    (tmp_path / folder / name.format("s1")).unlink()
    assert [problem.message for problem in scan_folder(Registry().dataset("folder"), tmp_path).problems] == [
        f"{tmp_path.name}: 'images/s1.png' has no annotation"
    ]


def test_what_lies_outside_of_the_regions_does_not_count(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "a.png")
    region = feature([[[0, 0], [40, 0], [40, 60], [0, 60]]], objectType="annotation")
    cells = [feature([SQUARE], objectType="cell"), feature([[[50, 2], [54, 2], [54, 6], [50, 6]]], objectType="cell")]
    write_json(tmp_path / "a.geojson", [region, *cells])
    classes, ids = ToolAnnotation(path=tmp_path / "a.geojson", image=tmp_path / "a.png", labels=(("", 1),)).read()
    assert (classes[:, 40:] == 255).all()
    assert (classes[:, :40] != 255).all()
    assert np.unique(ids).tolist() == [0, 1]


def test_a_region_outside_of_the_image_is_one_line(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "a.png")
    region = feature([[[90, 70], [99, 70], [99, 79], [90, 79]]], objectType="annotation")
    write_json(tmp_path / "a.geojson", [region, feature([SQUARE], objectType="cell")])
    with pytest.raises(CellbenchError, match=r"a.geojson: a region lies outside its image of 80 x 60 px"):
        ToolAnnotation(path=tmp_path / "a.geojson", image=tmp_path / "a.png", labels=(("", 1),)).read()
