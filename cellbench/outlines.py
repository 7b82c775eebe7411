"""Outlines of what was found, as GeoJSON that QuPath opens and as COCO's JSON; made band by band, so that memory holds open shapes only.

A shape is a connected piece (8 neighbours) of one class. Coordinates are pixels from the image's upper left corner, x to the right, y down;
the middle of the first pixel is (0.5, 0.5), as in QuPath.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours

from cellbench.shapes import Instances

MIN_AREA_PX = 16
"""Smaller pieces are specks, not cells, and get no outline; the mask keeps them."""
TOLERANCE_PX = 0.5
"""How far an outline may lie from the pixels' own."""

Ring = list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One connected piece."""

    number: int
    """Of its class."""
    area_px: int
    box_px: tuple[int, int, int, int]
    """x, y, width, height."""
    rings: tuple[Ring, ...]
    """Closed, of (x, y): the outer edge first, then its holes."""
    cell: int = 0
    """Its number among the cells of the image, where they were told apart."""


class Shapes:
    """Rows in, shapes out as soon as no later row can touch them."""

    def __init__(self, num_classes: int, min_area_px: int = MIN_AREA_PX) -> None:
        self._num, self._min_area_px = num_classes, min_area_px
        self._top = 0
        self._open: np.ndarray | None = None

    def add(self, rows: np.ndarray, last: bool = False) -> Iterator[Shape]:
        """The next rows (h, W) uint8 of class numbers; with ``last`` everything that is left comes."""
        held = rows if self._open is None else np.concatenate([self._open, rows])
        keep_from = len(held)
        for number in range(1, self._num):
            labels, num = ndimage.label(held == number, np.ones((3, 3), bool))
            if not num:
                continue
            touching = set() if last else set(np.unique(labels[-1]).tolist()) - {0}
            for label, box in enumerate(ndimage.find_objects(labels), 1):
                if label in touching:
                    keep_from = min(keep_from, box[0].start)
                elif (shape := _shape(number, labels[box] == label, box, self._top, self._min_area_px)) is not None:
                    yield shape
            # Shapes that were told must not come again when the rows that they share with open ones are looked at once more.
            held = np.where((labels > 0) & ~np.isin(labels, list(touching)), 0, held)
        self._top += keep_from
        self._open = held[keep_from:].copy()


def shapes_of(cells: Instances) -> Iterator[Shape]:
    """The outlines of single cells, touching ones parted, in the order of their numbers."""
    for number, box in enumerate(ndimage.find_objects(cells.ids), 1):
        shape = _shape(int(cells.classes[number]), cells.ids[box] == number, box, 0, 1)  # cells, so none is a speck
        if shape is not None:
            yield replace(shape, cell=number)


def _shape(number: int, piece: np.ndarray, box: tuple[slice, slice], top: int, min_area_px: int) -> Shape | None:
    area = int(piece.sum())
    if area < min_area_px:
        return None
    y, x = box[0].start + top, box[1].start
    # A rim of one pixel closes every ring; -0.5 brings the coordinates of pixels' middles to their corners' frame.
    found = find_contours(np.pad(piece, 1), 0.5, fully_connected="high")
    rings = [approximate_polygon(ring, TOLERANCE_PX) + np.array([y - 0.5, x - 0.5]) for ring in found]
    rings = [ring for ring in rings if len(ring) >= 4]
    if not rings:
        return None
    rings.sort(key=lambda ring: -abs(_area(ring)))
    told = tuple([[round(float(b), 2), round(float(a), 2)] for a, b in ring] for ring in rings)
    size = (piece.shape[1], piece.shape[0])
    return Shape(number=number, area_px=area, box_px=(x, y, *size), rings=told)


def _area(ring: np.ndarray) -> float:
    y, x = ring[:, 0], ring[:, 1]
    return float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2


COLOURS = ((200, 30, 30), (30, 90, 200), (20, 140, 70), (180, 120, 0), (130, 50, 160), (0, 140, 150), (90, 90, 90))


def colour(number: int) -> tuple[int, int, int]:
    """Of a class's outlines, red, green, blue."""
    return COLOURS[(number - 1) % len(COLOURS)]


def feature(shape: Shape, names: tuple[str, ...]) -> dict[str, Any]:
    """A shape as QuPath reads it: a detection with its class, its colour and its area as a measurement; its name is its cell's number."""
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": list(shape.rings)},
        "properties": {
            "objectType": "detection",
            **({"name": str(shape.cell)} if shape.cell else {}),
            "classification": {"name": names[shape.number], "color": list(colour(shape.number))},
            "measurements": {"Area px^2": shape.area_px},
            "cellbench": {"class": shape.number, "box_px": list(shape.box_px)},
        },
    }


def coco(images: Iterable[tuple[str, tuple[int, int], dict[str, Any]]], names: tuple[str, ...]) -> dict[str, Any]:
    """COCO's instances of images (file name, (H, W), GeoJSON). A polygon there cannot have holes: the outer edge is told, the area is without."""
    out: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": k, "name": name} for k, name in enumerate(names) if k]}
    for number, (file, (height, width), tree) in enumerate(images, 1):
        out["images"].append({"id": number, "file_name": file, "height": height, "width": width})
        for one in tree["features"]:
            outer = one["geometry"]["coordinates"][0]
            facts = one["properties"]["cellbench"]
            out["annotations"].append(
                {
                    "id": len(out["annotations"]) + 1,
                    "image_id": number,
                    "category_id": facts["class"],
                    "segmentation": [[value for point in outer for value in point]],
                    "area": one["properties"]["measurements"]["Area px^2"],
                    "bbox": facts["box_px"],
                    "iscrowd": 0,
                }
            )
    return out
