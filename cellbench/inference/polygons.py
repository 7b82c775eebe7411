"""Outlines of cells, as GeoJSON for QuPath and as COCO JSON. A cell is one valid geometry (OGC simple features).

A cell in one piece (8 neighbours) is a ``Polygon``, in several a ``MultiPolygon``. By the right-hand rule of RFC 7946, outer rings have a
positive area and holes a negative one, in the coordinates as written. Coordinates are pixels from the image's upper left corner, x to the
right, y down; the centre of the first pixel is (0.5, 0.5), as in QuPath.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import shapely
from scipy import ndimage
from shapely.geometry import mapping

from cellbench.metrics.instances import Instances

TOLERANCE_PX = 0.5
"""Largest distance of a simplified outline from that of the pixels."""


@dataclass(frozen=True, kw_only=True)
class CellOutline:
    """One cell."""

    cell: int
    """Its number in the image."""
    class_number: int
    area_px: int
    box_px: tuple[int, int, int, int]
    """x, y, width, height."""
    shape: shapely.Polygon | shapely.MultiPolygon


def cell_outlines(cells: Instances) -> Iterator[CellOutline]:
    """The outlines of all cells, however small, in the order of their numbers."""
    for cell, box in enumerate(ndimage.find_objects(cells.ids), 1):
        if box is None:
            continue
        inside = cells.ids[box] == cell
        y, x = box[0].start, box[1].start
        yield CellOutline(
            cell=cell,
            class_number=int(cells.classes[cell]),
            area_px=int(inside.sum()),
            box_px=(x, y, inside.shape[1], inside.shape[0]),
            shape=outline(inside, x, y),
        )


def outline(inside: np.ndarray, x_px: int = 0, y_px: int = 0) -> shapely.Polygon | shapely.MultiPolygon:
    """The outline of what is True in (h, w) bool, whose upper left corner lies at (``x_px``, ``y_px``); the largest piece comes first.

    It goes through the centres of pixel edges, each at most once, so that rings cannot touch; then it is simplified with its topology kept.
    """
    height, width = inside.shape
    # The mask at half pixels, by linear interpolation: a corner between pixels belongs to it where two of the four pixels around it do.
    fine = np.zeros((2 * height + 3, 2 * width + 3), np.uint8)
    fine[2:-1:2, 2:-1:2] = inside
    fine = (cv2.sepFilter2D(fine, -1, np.array([1.0, 2, 1]), np.array([1.0, 2, 1])) >= 2).astype(np.uint8)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [contour[:, 0] / 2 + (x_px - 0.5, y_px - 0.5) for contour in contours]
    holes: dict[int, list[np.ndarray]] = {k: [] for k, parent in enumerate(hierarchy[0, :, 3]) if parent < 0}
    for ring, parent in zip(rings, hierarchy[0, :, 3], strict=True):
        if parent >= 0:
            holes[parent].append(ring)
    pieces = sorted((shapely.Polygon(rings[k], inner) for k, inner in holes.items()), key=lambda piece: -piece.area)
    whole = pieces[0] if len(pieces) == 1 else shapely.MultiPolygon(pieces)
    return shapely.orient_polygons(shapely.simplify(whole, TOLERANCE_PX))


COLOURS = ((200, 30, 30), (30, 90, 200), (20, 140, 70), (180, 120, 0), (130, 50, 160), (0, 140, 150), (90, 90, 90))


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class's outlines: red, green, blue."""
    return COLOURS[(number - 1) % len(COLOURS)]


def to_geojson(cell: CellOutline, names: tuple[str, ...], known: Mapping[str, object] | None = None) -> dict[str, Any]:
    """A cell as QuPath reads it: a detection named by its number, with its class, colour and area. ``known``: of the prediction for its image."""
    return {
        "type": "Feature",
        "geometry": mapping(cell.shape),
        "properties": {
            "objectType": "detection",
            "name": str(cell.cell),
            "classification": {"name": names[cell.class_number], "color": list(class_colour(cell.class_number))},
            "measurements": {"Area px^2": cell.area_px},
            "cellbench": {"class": cell.class_number, "box_px": list(cell.box_px), **(known or {})},
        },
    }


def to_coco(images: Iterable[tuple[str, tuple[int, int], dict[str, Any]]], names: tuple[str, ...]) -> dict[str, Any]:
    """COCO's instances of images (file name, (H, W), GeoJSON): one polygon for each piece.

    Polygons of COCO cannot have holes: the outer ring is given, and the area without holes.
    """
    out: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": k, "name": name} for k, name in enumerate(names) if k]}
    for number, (file, (height, width), tree) in enumerate(images, 1):
        out["images"].append({"id": number, "file_name": file, "height": height, "width": width})
        for feature in tree["features"]:
            coordinates = feature["geometry"]["coordinates"]
            pieces = [coordinates] if feature["geometry"]["type"] == "Polygon" else coordinates
            facts = feature["properties"]["cellbench"]
            out["annotations"].append(
                {
                    "id": len(out["annotations"]) + 1,
                    "image_id": number,
                    "category_id": facts["class"],
                    "segmentation": [[value for point in rings[0][:-1] for value in point] for rings in pieces],
                    "area": feature["properties"]["measurements"]["Area px^2"],
                    "bbox": facts["box_px"],
                    "iscrowd": 0,
                }
            )
    return out
