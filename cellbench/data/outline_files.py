"""Masks as other tools write them, one file an image: GeoJSON of QuPath and StarDist, LabelMe, ImageJ regions, Cellpose's ``_seg.npy``, plain ``.npy``.

Each gives the cells of one image: outlines with the name of their class, or an array of cell numbers. ``score`` reads them as predictions,
:mod:`layouts` as annotations to learn from. Coordinates are pixels from the upper left corner of the image; the centre of the first pixel is
(0.5, 0.5), as in QuPath and ImageJ.
"""

from __future__ import annotations

import base64
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellbench.data.annotations import rasterize, read_json
from cellbench.data.io import images
from cellbench.data.io.decode import printable_path
from cellbench.data.io.imagej_roi import read_rois, unit_circle
from cellbench.data.io.inert_pickle import as_array, read_npy
from cellbench.errors import CellbenchError, one_line
from cellbench.files import compute_sha256, file_stamp
from cellbench.metrics.pixel import IGNORE

SUFFIXES = (".geojson", ".json", ".roi", ".zip", ".npy")
"""Of files that are read here, in lower case."""
REGION_LABELS = ("region*", "roi", "region of interest")
"""Lower-case names of classes that mark a region to work in, not a cell. ``Region*`` is QuPath's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outline:
    """One cell: rings (n, 2) of x and y in px, or its pixels. A point is inside where an odd number of rings encloses it: holes and parts are rings."""

    rings: tuple[np.ndarray, ...] = ()
    pixels: np.ndarray | None = None
    """(h, w) bool, instead of rings; its upper left corner is at ``corner_px`` (x, y)."""
    corner_px: tuple[int, int] = (0, 0)
    label: str = ""
    """The class by the tool; empty: none is given."""
    name: str = ""
    """Of this one outline, such as ``slide 3, spot 2``; empty: none is given."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ToolMask:
    """The cells of one image, as outlines or as cell numbers (H, W)."""

    outlines: tuple[Outline, ...] = ()
    ids: np.ndarray | None = None
    size_px: tuple[int, int] | None = None
    """Height and width of the image by the file; None if it states none."""
    regions: tuple[Outline, ...] = ()
    """Regions of interest that the file marks."""
    left_out: Mapping[str, int] | None = None
    """What else the file holds, by kind, such as points."""
    points: tuple[tuple[float, float, str], ...] = ()
    """Of GeoJSON: x, y and class of each point. They are no cells with an area, but can be counted."""

    def check_size(self, size_px: tuple[int, int], shown: str) -> None:
        """Raises CellbenchError that begins with ``shown``, the file's name, where the file states another size of its image."""
        stated = self.size_px if self.ids is None else self.ids.shape
        if stated is not None and tuple(stated) != tuple(size_px):
            raise CellbenchError(
                f"{shown}: is of an image of {stated[1]} x {stated[0]} px, its image has {size_px[1]} x {size_px[0]}. Export it at full size."
            )

    def paint(self, size_px: tuple[int, int], class_of: Mapping[str, int | None], shown: str) -> tuple[np.ndarray, np.ndarray]:
        """Classes (H, W) uint8 and cell numbers (H, W) int32. ``class_of``: the class number of each label, ``IGNORE``, or None to leave it out.

        Where two cells overlap, the later one owns the pixel. Raises CellbenchError that begins with ``shown``, the file's name.
        """
        self.check_size(size_px, shown)
        if self.ids is not None:
            return (self.ids > 0).astype(np.uint8), self.ids
        classes, ids = np.zeros(size_px, np.uint8), np.zeros(size_px, np.int32)
        order = [(k, one, class_of[one.label]) for k, one in enumerate(self.outlines, 1)]
        for number, one, label in sorted(order, key=lambda entry: entry[2] != IGNORE):  # ignored first, so that a cell inside counts
            if label is None:
                continue
            try:
                box, inside = fill(one, size_px)
            except ValueError as error:
                raise CellbenchError(f"{shown}: outline {number} {error}. Correct it, or take it out.") from None
            ids[box][inside], classes[box][inside] = number if label != IGNORE else 0, label
        return classes, ids


def fill(one: Outline, size_px: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of the image that an outline's box covers, and the pixels inside it, bool. Raises ValueError where it cannot be of this image."""
    height, width = size_px
    if one.pixels is not None:
        (x, y), inside = one.corner_px, one.pixels
    else:
        low, high = np.min([ring.min(0) for ring in one.rings], 0), np.max([ring.max(0) for ring in one.rings], 0)
        if not np.isfinite([low, high]).all():
            raise ValueError("has coordinates that are no numbers")
        far = max(height, width)
        if (low < -far).any() or (high > 2 * far).any():
            raise ValueError(f"extends far beyond its image of {width} x {height} px")
        x, y = (math.floor(v) for v in low)
        box_width, box_height = (math.ceil(v) - start + 1 for v, start in zip(high, (x, y), strict=True))
        inside = np.zeros((box_height, box_width), bool)
        for ring in one.rings:
            inside ^= rasterize([(ring - (x, y)).ravel().tolist()], box_height, box_width)
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + inside.shape[0], height), min(x + inside.shape[1], width)
    if bottom <= top or right <= left:
        raise ValueError(f"lies outside its image of {width} x {height} px")
    return (slice(top, bottom), slice(left, right)), inside[top - y : bottom - y, left - x : right - x]


def fill_regions(regions: Iterable[Outline], size_px: tuple[int, int], shown: str) -> Iterator[np.ndarray]:
    """The pixels of each region in an image (H, W), bool. Raises CellbenchError that begins with ``shown``, the file's name."""
    for one in regions:
        out = np.zeros(size_px, bool)
        try:
            box, inside = fill(one, size_px)
        except ValueError as error:
            raise CellbenchError(f"{shown}: a region {error}. Correct it, or take it out.") from None
        out[box] = inside
        yield out


# --- reading ----------------------------------------------------------------------------------------------------------------------------


def read_tool_mask(path: Path) -> ToolMask:
    """The cells of a file, by its ending and content. Raises CellbenchError that names it."""
    return _read(path, file_stamp(path))


@functools.lru_cache(maxsize=4)
def _read(path: Path, stamp: tuple[int, int]) -> ToolMask:
    ending, shown = path.suffix.lower(), printable_path(path)
    if ending == ".npy":
        return ToolMask(ids=_numbered(path))
    if ending in (".zip", ".roi"):
        areas, others = read_rois(path)
        found = ToolMask(
            outlines=tuple(Outline(rings=one.rings, name=one.name.removesuffix(".roi")) for one in areas), left_out=Counter(others)
        )
    else:
        tree = read_json(path)
        try:
            found = _labelme(tree, shown) if isinstance(tree, dict) and "shapes" in tree else _geojson(tree, shown)
        except RecursionError:
            raise CellbenchError(f"{shown}: is nested too deeply. Export it again.") from None
    regions = tuple(one for one in found.outlines if one.label.casefold() in REGION_LABELS)
    kept = tuple(one for one in found.outlines if one.label.casefold() not in REGION_LABELS)
    return replace(found, outlines=kept, regions=(*found.regions, *regions))


def _numbered(path: Path) -> np.ndarray:
    """The cell numbers (H, W) int32 of an array, or of the ``masks`` in Cellpose's ``_seg.npy``."""
    shown, found = printable_path(path), read_npy(path, 8 * images.pixel_limit())
    if not isinstance(found, np.ndarray):
        try:
            found = as_array(found.get("masks")) if isinstance(found, dict) else None
        except (ValueError, TypeError) as error:
            raise CellbenchError(f"{shown}: its masks are damaged ({one_line(error)[:120]}). Save it again.") from None
        if found is None:
            raise CellbenchError(
                f"{shown}: holds Python objects without an array 'masks', and no pickle is executed. Save the masks as PNG or TIFF."
            )
    if found.ndim == 3 and 1 in found.shape:
        found = found.squeeze()
    if found.ndim != 2 or not found.size:
        raise CellbenchError(f"{shown}: is an array of shape {found.shape}; one image's cell numbers (height, width) are expected.")
    if found.dtype.kind == "f" and not (np.isfinite(found).all() and (found == np.floor(found)).all()):
        raise CellbenchError(
            f"{shown}: holds values that are no whole numbers, such as probabilities. Save a mask: 0, and a number for each cell."
        )
    if found.dtype.kind != "b" and (found.min() < 0 or found.max() >= 2**31):
        raise CellbenchError(f"{shown}: holds values outside of 0 to 2147483647. Save a mask: 0, and a number for each cell.")
    return found.astype(np.int32)


def _geojson(tree: Any, shown: str) -> ToolMask:
    """A FeatureCollection, a list of features, or one feature or geometry. Detections and cells are the cells; without any, annotations are."""
    if isinstance(tree, dict) and tree.get("type") == "FeatureCollection":
        tree = tree.get("features")
    features = tree if isinstance(tree, list) else [tree]
    if not all(isinstance(one, dict) and isinstance(one.get("type"), str) for one in features):
        raise CellbenchError(f"{shown}: is neither GeoJSON (a FeatureCollection or a list of features) nor LabelMe. Export it again.")
    found: dict[str, list[Outline]] = {"cell": [], "annotation": []}
    left_out: Counter[str] = Counter()
    points: list[tuple[float, float, str]] = []
    for number, feature in enumerate(features, 1):
        geometry = feature.get("geometry") if feature["type"] == "Feature" else feature
        properties = feature.get("properties") or {}
        kind = str(properties.get("objectType") or feature.get("id") or "").lower() if isinstance(properties, dict) else ""
        rings = _rings(geometry, f"{shown}: feature {number}")
        if not rings:
            shape = geometry.get("type") if isinstance(geometry, dict) else None
            left_out[str(shape or "feature without a shape").lower()] += 1
            points += [(x, y, _classification(properties)) for x, y in _points(geometry, f"{shown}: feature {number}")]
            continue
        which = "annotation" if "annotation" in kind else "cell"
        given = properties.get("name") if isinstance(properties, dict) else None
        found[which].append(Outline(rings=rings, label=_classification(properties), name=given if isinstance(given, str) else ""))
    if not found["cell"]:
        return ToolMask(outlines=tuple(found["annotation"]), left_out=left_out, points=tuple(points))
    # Beside cells, annotations are what they were detected in.
    return ToolMask(outlines=tuple(found["cell"]), regions=tuple(found["annotation"]), left_out=left_out, points=tuple(points))


def _classification(properties: Any) -> str:
    about = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(about, dict):
        names = about.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(about.get("name") or "")
    return about if isinstance(about, str) else ""


def _points(geometry: Any, shown: str) -> list[tuple[float, float]]:
    """The points of a Point or MultiPoint; none for others. Raises CellbenchError."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Point", "MultiPoint"):
        return []
    try:
        given: Any = [geometry["coordinates"]] if kind == "Point" else geometry["coordinates"]
        return [(float(one[0]), float(one[1])) for one in given]
    except (TypeError, ValueError, OverflowError, IndexError, KeyError):
        raise CellbenchError(f"{shown} has no readable coordinates. Export it again.") from None


def _rings(geometry: Any, shown: str) -> tuple[np.ndarray, ...]:
    """The rings of a polygon, or of the polygons in a collection; none for points and lines. Raises CellbenchError."""
    if not isinstance(geometry, dict):
        return ()
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    parts: Any
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        return tuple(ring for one in (parts if isinstance(parts, list) else ()) for ring in _rings(one, shown))
    if kind not in ("Polygon", "MultiPolygon"):
        return ()
    try:
        parts = [coordinates] if kind == "Polygon" else coordinates
        rings = [np.array([point[:2] for point in ring], float) for part in parts for ring in part]
    except (TypeError, ValueError, OverflowError, IndexError, KeyError):
        raise CellbenchError(f"{shown} has no readable coordinates. Export it again.") from None
    if any(ring.ndim != 2 or ring.shape[1] != 2 for ring in rings):
        raise CellbenchError(f"{shown} has no readable coordinates. Export it again.")
    return tuple(ring for ring in rings if len(ring) > 2)


def _labelme(tree: Mapping[str, Any], shown: str) -> ToolMask:
    """LabelMe: polygons, rectangles, circles and masks. Shapes of one label with one ``group_id`` are one cell."""
    found: dict[Any, Outline] = {}
    left_out: Counter[str] = Counter()
    try:
        for number, shape in enumerate(tree["shapes"], 1):
            kind, label = shape.get("shape_type") or "polygon", str(shape["label"])
            points = np.array(shape["points"], float).reshape(-1, 2)
            if kind not in ("polygon", "rectangle", "circle", "mask"):
                left_out[kind] += 1
            elif kind == "mask":
                pixels = images.decode_png(base64.b64decode(shape["mask"])) > 0
                found[number] = Outline(pixels=pixels, corner_px=(round(points[0, 0]), round(points[0, 1])), label=label)
            elif len(ring := _labelme_ring(kind, points)) > 2:
                group = shape.get("group_id")
                key = number if group is None else (label, group)
                found[key] = Outline(rings=(*(found[key].rings if key in found else ()), ring), label=label)
            else:
                left_out[f"{kind} of {len(points)} points"] += 1
        size: tuple[Any, Any] = tree.get("imageHeight"), tree.get("imageWidth")
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, IndexError, OSError) as error:
        raise CellbenchError(f"{shown}: cannot be read as LabelMe ({one_line(error)[:120]}). Save it again.") from None
    whole = isinstance(size[0], int) and isinstance(size[1], int)
    return ToolMask(outlines=tuple(found.values()), size_px=(int(size[0]), int(size[1])) if whole else None, left_out=left_out)


def _labelme_ring(kind: str, points: np.ndarray) -> np.ndarray:
    if kind == "polygon" or len(points) != 2:
        return points
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return points[0] + np.hypot(*(points[1] - points[0])) * unit_circle()


# --- as an annotation -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ToolAnnotation:
    """A file of a tool as the annotation of an image (:class:`~cellbench.data.annotations.Annotation`)."""

    path: Path
    image: Path
    labels: tuple[tuple[str, int | None], ...]
    """The class number of each label, ``IGNORE``, or None to leave it out."""

    def digest(self) -> str:
        return f"{compute_sha256(self.path)} {self.labels}"

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def num_outlined(self) -> int:
        found, class_of = read_tool_mask(self.path), dict(self.labels)
        if found.ids is not None:
            return len(np.unique(found.ids[found.ids > 0]))
        return sum(class_of[one.label] not in (None, IGNORE) for one in found.outlines)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        mask, size_px, shown = read_tool_mask(self.path), images.image_size(self.image), printable_path(self.path)
        classes, ids = mask.paint(size_px, dict(self.labels), shown)
        if not mask.regions:
            return classes, ids
        outside = np.ones(size_px, bool)  # nobody looked there
        for inside in fill_regions(mask.regions, size_px, shown):
            outside &= ~inside
        return np.where(outside, np.uint8(IGNORE), classes), np.where(outside, 0, ids)


def describe_left_out(counts: Mapping[str, int] | None) -> str:
    """``3 point, 1 linestring``; empty for nothing."""
    return ", ".join(f"{num} {kind}" for kind, num in (counts or {}).items() if num)
