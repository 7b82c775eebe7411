"""Outlines of cells are one valid geometry each: checked corner by corner in integers, and by shapely."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image, ImageDraw
from scipy import ndimage

from cellbench.inference.polygons import cell_outlines, to_coco, to_geojson
from cellbench.metrics.instances import Instances

YY, XX = np.mgrid[:60, :70]


def disc(y: float, x: float, radius: float) -> np.ndarray:
    return (YY - y) ** 2 + (XX - x) ** 2 < radius**2


def cells_of(*masks: np.ndarray) -> Instances:
    ids = np.zeros(masks[0].shape, np.int32)
    for number, mask in enumerate(masks, 1):
        ids[mask] = number
    return Instances(
        ids=ids, areas_px=np.bincount(ids.ravel(), minlength=len(masks) + 1), classes=np.array([0] + [1] * len(masks), np.uint8)
    )


def _noise(seed: int, smooth: float) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(40, 50)), smooth) > 0


def _block(*spans: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((60, 70), bool)
    for top, bottom, left, right in spans:
        mask[top:bottom, left:right] = True
    return mask


PUZZLE = _block((5, 45, 5, 55))
PUZZLE[10:15, 10:15] = PUZZLE[15:20, 15:20] = PUZZLE[5:8, 30:33] = PUZZLE[30, 30] = (
    False  # holes that meet at corners, a notch, a hole of 1 px
)
CELLS = {
    "a disc": disc(30, 30, 14),
    "a ring": disc(30, 30, 20) & ~disc(30, 30, 8),
    "a piece in the hole of another": disc(30, 30, 25) & ~disc(30, 30, 18) | disc(30, 30, 9),
    "two pieces": disc(20, 20, 9) | disc(40, 50, 9),
    "two squares that meet at a corner": _block((10, 20, 10, 20), (20, 30, 20, 30)),
    "one pixel": _block((3, 4, 5, 6)),
    "a line": _block((3, 4, 5, 25)),
    "a cell and its crumbs": disc(30, 30, 14) | _block((2, 3, 2, 3), (55, 56, 60, 62)),
    "holes that meet": PUZZLE,
    "the whole image": np.ones((60, 70), bool),
    "a comb": _block((10, 12, 5, 60), *((10, 40, x, x + 1) for x in range(5, 60, 2))),
    **{f"noise {seed}, {smooth}": _noise(seed, smooth) for seed in (0, 1) for smooth in (0.7, 1.5, 3)},
}


def _rings(geometry: dict[str, Any]) -> list[list[list[list[float]]]]:
    return [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]


def _whole(ring: list[list[float]]) -> list[tuple[int, int]]:
    return [(round(x * 100), round(y * 100)) for x, y in ring]


def _turn(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _meet(a: tuple, b: tuple, c: tuple, d: tuple) -> bool:
    if (
        max(a[0], b[0]) < min(c[0], d[0])
        or max(c[0], d[0]) < min(a[0], b[0])
        or max(a[1], b[1]) < min(c[1], d[1])
        or max(c[1], d[1]) < min(a[1], b[1])
    ):
        return False
    return _turn(a, b, c) * _turn(a, b, d) <= 0 and _turn(c, d, a) * _turn(c, d, b) <= 0


def _around(point: tuple[int, int], ring: list[tuple[int, int]]) -> bool:
    inside = False
    for (x1, y1), (x2, y2) in pairwise(ring):
        if (y1 > point[1]) != (y2 > point[1]) and (point[0] - x1) * (y2 - y1) * (1 if y2 > y1 else -1) < (x2 - x1) * (point[1] - y1) * (
            1 if y2 > y1 else -1
        ):
            inside = not inside
    return inside


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_one_valid_geometry(name: str) -> None:
    (shape,) = cell_outlines(cells_of(CELLS[name]))
    geometry = json.loads(json.dumps(to_geojson(shape, ("background", "cell"))))["geometry"]
    polygons = [[_whole(ring) for ring in rings] for rings in _rings(geometry)]
    assert geometry["type"] == ("Polygon" if len(polygons) == 1 else "MultiPolygon")
    assert len(polygons) == ndimage.label(CELLS[name], np.ones((3, 3)))[1]  # no piece is lost
    edges = []
    for rings in polygons:
        for k, ring in enumerate(rings):
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            area = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairwise(ring))
            assert area > 0 if k == 0 else area < 0  # RFC 7946: outer rings counterclockwise, holes clockwise
            assert k == 0 or _around(ring[0], rings[0])
            edges += [(id(ring), n, len(ring) - 1, ring[n], ring[n + 1]) for n in range(len(ring) - 1)]
    for one, other in combinations(edges, 2):
        beside = one[0] == other[0] and (other[1] - one[1]) % one[2] in (1, one[2] - 1)
        assert beside or not _meet(*one[3:], *other[3:])


@pytest.mark.parametrize("name", CELLS)
def test_shapely_finds_each_geometry_valid(name: str) -> None:
    (shape,) = cell_outlines(cells_of(CELLS[name]))
    found = shapely.geometry.shape(json.loads(json.dumps(to_geojson(shape, ("background", "cell"))))["geometry"])
    assert found.is_valid
    assert found.area == pytest.approx(shape.area_px, rel=0.1, abs=0.6 * found.length)


def test_each_cell_has_its_outline_however_small() -> None:
    masks = [disc(20, 20, 9), disc(20, 36, 9) & ~disc(20, 20, 9), _block((50, 52, 10, 12))]
    found = list(cell_outlines(cells_of(*masks)))
    assert [shape.cell for shape in found] == [1, 2, 3]
    assert [shape.area_px for shape in found] == [int(mask.sum()) for mask in masks]
    assert found[2].box_px == (10, 50, 2, 2)


def test_an_outline_filled_again_is_the_cell() -> None:
    ring = disc(30, 32, 26) & ~disc(30, 32, 12)
    (shape,) = cell_outlines(cells_of(ring))
    outer, (hole,) = shape.shape.exterior.coords, (ring.coords for ring in shape.shape.interiors)
    assert shape.box_px == (7, 5, 51, 51)
    drawn = Image.new("1", (700, 600))  # ten times as fine, so that a corner is a corner
    draw = ImageDraw.Draw(drawn)
    for ink, points in ((1, outer), (0, hole)):
        draw.polygon([(x * 10, y * 10) for x, y in points], fill=ink)
    filled = np.array(drawn).reshape(60, 10, 70, 10).mean((1, 3)) > 0.5
    assert (filled ^ ring).sum() < 0.02 * ring.sum()


def test_coco_has_a_polygon_for_each_piece_and_the_cells_area_and_box() -> None:
    mask = CELLS["two pieces"]
    features = [to_geojson(shape, ("background", "cell")) for shape in cell_outlines(cells_of(mask))]
    tree = json.loads(json.dumps({"features": features}))
    (annotation,) = to_coco([("a.png", mask.shape, tree)], ("background", "cell"))["annotations"]
    rows, columns = np.nonzero(mask)
    assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert annotation["area"] == mask.sum()
    assert len(annotation["segmentation"]) == 2
    from pycocotools import mask as tools

    parts = [tools.decode(tools.frPyObjects([part], *mask.shape))[..., 0] for part in annotation["segmentation"]]
    assert (np.any(parts, axis=0) ^ mask).sum() < 0.1 * mask.sum()
