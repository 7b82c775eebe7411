"""Outlines of single cells, as GeoJSON that QuPath opens and as COCO's JSON. A cell is one valid geometry (OGC simple features).

A cell in one piece (8 neighbours) is a ``Polygon``, in several a ``MultiPolygon``; a ring after the first is a hole inside it. Rings are closed,
do not cross or touch themselves or each other, and wind by the right-hand rule of RFC 7946: outer edges have a positive area, holes a
negative one, in the coordinates as they are written. Coordinates are pixels from the image's upper left corner, x to the right, y down; the
middle of the first pixel is (0.5, 0.5), as in QuPath.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours, points_in_poly

from cellbench.metrics.instances import Instances

TOLERANCE_PX = 0.5
"""How far an outline may lie from the pixels' own."""
MOST_EDGES, MOST_RINGS = 2000, 64
"""Of a cell whose simplified outline is checked, each with each other. What is more frayed than that is not simplified."""

Ring = list[list[float]]


@dataclass(frozen=True, kw_only=True)
class CellOutline:
    """One cell."""

    number: int
    """Of its class."""
    area_px: int
    box_px: tuple[int, int, int, int]
    """x, y, width, height."""
    pieces: tuple[tuple[Ring, ...], ...]
    """Of each piece the rings, closed, of (x, y): the outer edge first, then its holes. The largest piece comes first."""
    cell: int
    """Its number among the cells of the image."""


def cell_outlines(cells: Instances) -> Iterator[CellOutline]:
    """The outlines of single cells, touching ones parted, in the order of their numbers: one for each cell, however small."""
    for cell, box in enumerate(ndimage.find_objects(cells.ids), 1):
        if box is None:
            continue
        inside = cells.ids[box] == cell
        y, x = box[0].start, box[1].start
        corner = np.array([x, y])
        yield CellOutline(
            number=int(cells.classes[cell]),
            area_px=int(inside.sum()),
            box_px=(x, y, inside.shape[1], inside.shape[0]),
            pieces=tuple(tuple((ring + corner).round(2).tolist() for ring in rings) for rings in outline_pieces(inside)),
            cell=cell,
        )


def outline_pieces(inside: np.ndarray) -> list[list[np.ndarray]]:
    """The outlines of what is True in (h, w) bool, by piece, the largest first: rings (n, 2) of (x, y) as the module says.

    Raw outlines go through the middles of the edges between pixels, each at most once, so that they cannot cross. Simplified ones
    (Douglas and Peucker 1973) can, and are taken only where they do not.
    """
    raw = _raw(inside)
    found = raw
    if sum(map(len, raw)) <= MOST_RINGS:
        simple = [[_simplified(ring) for ring in rings] for rings in raw]
        found = simple if _sound(simple, raw) else raw
    # Outer edges turn one way, holes the other.
    return [[ring if (_area(ring) > 0) == (k == 0) else ring[::-1] for k, ring in enumerate(rings)] for rings in found]


def _raw(inside: np.ndarray) -> list[list[np.ndarray]]:
    labels, _ = ndimage.label(inside, np.ones((3, 3), bool))
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        corner = np.array([box[1].start, box[0].start])
        # A rim of one pixel closes every ring; -0.5 brings the coordinates of pixels' middles to their corners' frame.
        rings = find_contours(np.pad(labels[box] == label, 1), 0.5, fully_connected="high")
        rings = [ring[:, ::-1] + (corner - 0.5) for ring in rings]
        found.append(sorted(rings, key=lambda ring: -abs(_area(ring))))  # a hole has less than what lies around it
    return sorted(found, key=lambda rings: -abs(_area(rings[0])))


def _simplified(ring: np.ndarray) -> np.ndarray:
    simple = approximate_polygon(ring, TOLERANCE_PX)
    return simple if len(simple) >= 4 and abs(_area(simple)) > 1e-9 else ring


def _area(ring: np.ndarray) -> float:
    """Of a closed ring (n, 2) of (x, y); its sign is that of the turn from x to y."""
    x, y = ring[:, 0], ring[:, 1]
    return float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2


def _sound(pieces: list[list[np.ndarray]], raw: list[list[np.ndarray]]) -> bool:
    """Whether simplified rings lie within each other as the raw ones do, and no edge crosses, touches or lies on another, but for the corner
    that it shares with the next."""
    rings, before = [ring for piece in pieces for ring in piece], [ring for piece in raw for ring in piece]
    if sum(len(ring) - 1 for ring in rings) > MOST_EDGES or _nesting(rings) != _nesting(before):
        return False
    start, end = np.concatenate([ring[:-1] for ring in rings]), np.concatenate([ring[1:] for ring in rings])
    number = np.arange(len(start))
    after = np.concatenate([np.roll(part, -1) for part in np.split(number, np.cumsum([len(ring) - 1 for ring in rings])[:-1])])
    step = end - start
    # An edge that turns straight back lies on the one before it.
    if ((_cross(step, step[after]) == 0) & ((step * step[after]).sum(1) <= 0)).any():
        return False
    low, high = np.minimum(start, end), np.maximum(start, end)
    for k in number.tolist():
        near = ((low <= high[k]) & (high >= low[k])).all(1) & (number > k) & (number != after[k]) & (after != k)
        others = np.flatnonzero(near)
        if not len(others):
            continue
        sides = _cross(step[k], start[others] - start[k]), _cross(step[k], end[others] - start[k])
        across = _cross(step[others], start[k] - start[others]), _cross(step[others], end[k] - start[others])
        if ((sides[0] * sides[1] <= 0) & (across[0] * across[1] <= 0)).any():
            return False
    return True


def _nesting(rings: list[np.ndarray]) -> list[set[int]]:
    """For each ring, which others lie around it; right where they do not touch."""
    boxes = [(*ring.min(0), *ring.max(0)) for ring in rings]
    return [
        {
            k
            for k, (left, top, right, bottom) in enumerate(boxes)
            if left < ring[0, 0] < right and top < ring[0, 1] < bottom and rings[k] is not ring and points_in_poly(ring[:1], rings[k])[0]
        }
        for ring in rings
    ]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


COLOURS = ((200, 30, 30), (30, 90, 200), (20, 140, 70), (180, 120, 0), (130, 50, 160), (0, 140, 150), (90, 90, 90))


def class_colour(number: int) -> tuple[int, int, int]:
    """Of a class's outlines, red, green, blue."""
    return COLOURS[(number - 1) % len(COLOURS)]


def to_geojson(shape: CellOutline, names: tuple[str, ...]) -> dict[str, Any]:
    """A shape as QuPath reads it: a detection with its class, its colour and its area as a measurement; its name is its cell's number."""
    told = [list(rings) for rings in shape.pieces]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": told[0]} if len(told) == 1 else {"type": "MultiPolygon", "coordinates": told},
        "properties": {
            "objectType": "detection",
            "name": str(shape.cell),
            "classification": {"name": names[shape.number], "color": list(class_colour(shape.number))},
            "measurements": {"Area px^2": shape.area_px},
            "cellbench": {"class": shape.number, "box_px": list(shape.box_px)},
        },
    }


def to_coco(images: Iterable[tuple[str, tuple[int, int], dict[str, Any]]], names: tuple[str, ...]) -> dict[str, Any]:
    """COCO's instances of images (file name, (H, W), GeoJSON): one polygon a piece, its corners named once. A polygon there cannot have holes:
    the outer edge is given, the area is without them."""
    out: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": k, "name": name} for k, name in enumerate(names) if k]}
    for number, (file, (height, width), tree) in enumerate(images, 1):
        out["images"].append({"id": number, "file_name": file, "height": height, "width": width})
        for one in tree["features"]:
            told = one["geometry"]["coordinates"]
            parts = [told] if one["geometry"]["type"] == "Polygon" else told
            facts = one["properties"]["cellbench"]
            out["annotations"].append(
                {
                    "id": len(out["annotations"]) + 1,
                    "image_id": number,
                    "category_id": facts["class"],
                    "segmentation": [[value for point in rings[0][:-1] for value in point] for rings in parts],
                    "area": one["properties"]["measurements"]["Area px^2"],
                    "bbox": facts["box_px"],
                    "iscrowd": 0,
                }
            )
    return out
