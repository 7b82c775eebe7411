"""Annotations other than a mask file: a folder with one mask per nucleus, or outlines in a COCO file. All give an id map.

Ids (H, W) int32: 0 is background, 1..n the cells in file order. If two overlap, the later one owns the pixel. pycocotools rasterises polygons, but
run lengths are decoded here: pycocotools 2.0.11 returns uninitialised memory where they are too short for the image.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cellbench.data.io import images
from cellbench.data.io.decode import printable_path
from cellbench.errors import CellbenchError, one_line, quote_name
from cellbench.files import compute_sha256, facts_digest, file_stamp, text_digest
from cellbench.metrics.pixel import IGNORE


class Annotation(Protocol):
    """The annotation of one image, instead of a mask file."""

    def digest(self) -> str:
        """Hash of everything that the annotation depends on."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Classes (H, W) uint8, ``IGNORE`` where pixels do not count, and ids (H, W) int32. Raises CellbenchError."""

    @property
    def num_outlined(self) -> int:
        """Number of outlined cells; ``read`` gives fewer if some are covered by others or smaller than a pixel."""


@dataclass(frozen=True, kw_only=True)
class NoMask:
    """Of an image without a mask: nothing is marked."""

    image: Path

    def digest(self) -> str:
        return ""

    @property
    def num_outlined(self) -> int:
        return 0

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        size = images.image_size(self.image)
        return np.zeros(size, np.uint8), np.zeros(size, np.int32)


@dataclass(frozen=True, kw_only=True)
class MaskFiles:
    """One mask file for each cell (Data Science Bowl 2018): all values but 0 are the cell. All have class 1."""

    paths: tuple[Path, ...]

    def digest(self) -> str:
        return text_digest("".join(map(compute_sha256, self.paths)), 64)

    @property
    def num_outlined(self) -> int:
        return len(self.paths)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        ids: np.ndarray | None = None
        for number, path in enumerate(self.paths, 1):
            mask = images.read_labels(path)
            if ids is None:
                ids = np.zeros(mask.shape, np.int32)
            if mask.shape != ids.shape:
                raise CellbenchError(
                    f"{path}: is {mask.shape[1]} x {mask.shape[0]} px, the masks before it {ids.shape[1]} x {ids.shape[0]}. Replace it."
                )
            ids[mask > 0] = number
        assert ids is not None  # every sample has masks
        return (ids > 0).astype(np.uint8), ids


@dataclass(frozen=True, kw_only=True)
class Region:
    """One annotation of a COCO file: polygons or run lengths as JSON, and its class number, or ``IGNORE``."""

    segmentation: str
    label: int
    id: str
    """For messages."""


@dataclass(frozen=True, kw_only=True)
class CocoRegions:
    """The outlines of one image of a COCO file."""

    file: Path
    name: str
    """For messages."""
    size_px: tuple[int, int]
    regions: tuple[Region, ...]

    @property
    def num_outlined(self) -> int:
        return sum(region.label != IGNORE for region in self.regions)

    def digest(self) -> str:
        return facts_digest([self.size_px, [(r.segmentation, r.label) for r in self.regions]], 64)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.size_px
        classes, ids = np.zeros(width * height, np.uint8), np.zeros(width * height, np.int32)  # down columns
        # Ignored regions first, so that a cell within a crowd counts.
        for number, region in sorted(enumerate(self.regions, 1), key=lambda pair: pair[1].label != IGNORE):
            try:
                inside = _pixels(json.loads(region.segmentation), height, width)
            except ValueError as error:
                raise CellbenchError(
                    f"{self.file}: annotation {region.id} of {quote_name(self.name)} {error}. Correct it, or take it out."
                ) from None
            ids[inside], classes[inside] = number if region.label != IGNORE else 0, region.label
        return np.ascontiguousarray(classes.reshape(width, height).T), np.ascontiguousarray(ids.reshape(width, height).T)


def rasterize(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels (H, W) bool of COCO's polygons (lists of x, y, x, y, …) or run lengths (counts down columns, compressed or not).

    Raises ValueError for invalid input and for regions that do not fit the image. Its message is a clause that follows the annotation's name.
    """
    out = np.zeros(width * height, bool)
    out[_pixels(segmentation, height, width)] = True
    return out.reshape(width, height).T


def _pixels(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The same as the positions of the pixels, counted down columns: a file may hold a hundred thousand small cells."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"has run lengths for {segmentation.get('size')!r:.60}, its image has {[height, width]} (height, width)")
        runs: Any = _uncompressed(counts) if isinstance(counts, str) else counts
        whole = isinstance(runs, list) and all(type(n) is int and 0 <= n <= height * width for n in runs)
        if not whole or sum(runs) != height * width:
            raise ValueError("has run lengths that do not add up to its image")
        return _positions(runs)
    if not (isinstance(segmentation, list) and segmentation and all(isinstance(polygon, list) for polygon in segmentation)):
        raise ValueError("has neither polygons nor run lengths")
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"has a polygon of {len(polygon)} numbers; x and y of three points or more are expected")
        if not all(type(n) is int or (type(n) is float and math.isfinite(n)) for n in polygon):
            raise ValueError("has a polygon with coordinates that are no numbers")
        far = max(height, width)
        if not all(-far <= n <= 2 * far for n in polygon):
            raise ValueError(f"has a polygon that extends far beyond its image of {width} x {height} px")
    from pycocotools import mask as coco

    # Its rasteriser counts columns outside the image as inside: draw in a larger image, then crop.
    outer = [math.floor(min(0, *(n for polygon in segmentation for n in polygon)))] * 2
    reach = math.ceil(max(height, width, *(n for polygon in segmentation for n in polygon))) + 1
    inside = min(outer) == 0 and reach <= max(height, width) + 1
    if inside:
        return _positions(_uncompressed(coco.merge(coco.frPyObjects(segmentation, height, width))["counts"].decode()))
    dx = -outer[0]
    moved = [[n + dx for n in polygon] for polygon in segmentation]
    whole = coco.decode(coco.merge(coco.frPyObjects(moved, reach + dx, reach + dx))).astype(bool)
    return np.flatnonzero(whole[dx : dx + height, dx : dx + width].T)


def _positions(runs: list[int]) -> np.ndarray:
    """What lies in every second run, the first being outside."""
    ends = np.cumsum(runs)
    lengths = np.array(runs)[1::2]
    return np.repeat(ends[1::2] - np.cumsum(lengths), lengths) + np.arange(lengths.sum())


def _uncompressed(text: str) -> list[int]:
    """COCO's compressed run lengths: five bits a character from '0' on; from the fourth run on the difference to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("utf-8", "replace"):
        code = character - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError("has compressed run lengths that cannot be read")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("has compressed run lengths that end in the middle")
    return runs


def read_json(path: Path) -> Any:
    """The content of a JSON file that another tool wrote. Raises CellbenchError."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CellbenchError(f"{printable_path(path)}: cannot be read as JSON ({one_line(error)[:160]}). Export it again.") from None


def load_coco_json(path: Path) -> dict[str, Any]:
    """The tree of a COCO file with checked structure. Raises CellbenchError."""
    return _load_coco_json(path, file_stamp(path))


@functools.lru_cache(maxsize=4)
def _load_coco_json(path: Path, stamp: tuple[int, int]) -> dict[str, Any]:
    tree = read_json(path)
    tables = {"images": ("id", "file_name", "height", "width"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}
    for table, keys in tables.items():
        rows = tree.get(table) if isinstance(tree, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and all(key in row for key in keys) for row in rows):
            raise CellbenchError(f"{path}: is no COCO file: '{table}' must be a list of tables with {', '.join(keys)}.")
        for row in rows:
            for key in keys:
                number = key not in ("file_name", "name")
                if type(row[key]) is not (int if number else str) and not (key == "id" or key.endswith("_id")):
                    raise CellbenchError(
                        f"{path}: '{table}' holds {key} = {row[key]!r:.60}; a {'whole number' if number else 'string'} is expected."
                    )
                if not isinstance(row[key], int | str):
                    raise CellbenchError(f"{path}: '{table}' holds {key} = {row[key]!r:.60}; a number or a string is expected.")
    ids = [row["id"] for row in tree["categories"]]
    if len(set(ids)) < len(ids):
        raise CellbenchError(f"{path}: two categories have one id. Give each its own.")
    return tree


def drop_empty_polygons(segmentation: Any, height: int, width: int) -> Any:
    """A segmentation without polygons of zero area; None if nothing is left. Malformed ones are kept and refused when drawn."""
    if isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation):
        return [polygon for polygon in segmentation if _encloses(polygon)] or None
    if isinstance(segmentation, dict) and segmentation.get("size") == [height, width]:
        try:
            runs = _uncompressed(segmentation["counts"]) if isinstance(segmentation.get("counts"), str) else segmentation.get("counts")
        except ValueError:
            return segmentation
        if isinstance(runs, list) and all(type(n) is int for n in runs) and sum(runs) == height * width and not any(runs[1::2]):
            return None
    return segmentation


def _encloses(polygon: list[Any]) -> bool:
    """Whether a polygon (x, y, x, y, …) has three points that are not on one line; True for a malformed one."""
    if len(polygon) < 6:
        return False
    if len(polygon) % 2 or not all(type(n) in (int, float) for n in polygon):
        return True
    x0, y0 = polygon[:2]
    try:
        sides = [(x - x0, y - y0) for x, y in zip(polygon[2::2], polygon[3::2], strict=True)]
        dx, dy = next((side for side in sides if any(side)), (0, 0))
        return any(dx * y - dy * x != 0 for x, y in sides)
    except OverflowError:  # an int beyond all floats
        return True


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """The images of a COCO file, and the parts that were not used."""

    images: tuple[CocoRegions, ...]
    num_crowds: int = 0
    """Regions with ``iscrowd``, ignored as in COCO's evaluation."""
    empty: tuple[str, ...] = ()
    """Ids of annotations without an outline, which are skipped."""
    num_boxes: int = 0
    """Number of these with a box."""


def count_coco_categories(path: Path) -> dict[str, int]:
    """The number of annotations of each category, by name, without crowds. Raises CellbenchError that names the file."""
    tree = load_coco_json(path)
    names = {row["id"]: str(row["name"]) for row in tree["categories"]}
    counts = dict.fromkeys(names.values(), 0)
    for row in tree["annotations"]:
        if row["category_id"] in names and not is_crowd(row):
            counts[names[row["category_id"]]] += 1
    return counts


def is_crowd(row: dict[str, Any]) -> bool:
    """Whether an annotation of a COCO file marks a crowd of cells."""
    return row.get("iscrowd") in (1, "1")  # True is 1


def read_coco(path: Path, labels: Mapping[str, int | None]) -> CocoFile:
    """The images of a COCO file with their outlines. ``labels``: the class number of each category by name, ``IGNORE``, or None to leave it out.

    Raises CellbenchError that names the file.
    """
    tree = load_coco_json(path)
    label: dict[int | str, int | None] = {row["id"]: labels[str(row["name"])] for row in tree["categories"]}
    limit = images.pixel_limit()
    found: dict[int | str, list[Region]] = {}
    sizes: dict[int | str, tuple[int, int]] = {}
    for row in tree["images"]:
        if row["id"] in found:
            raise CellbenchError(f"{path}: two images have the id {row['id']!r:.40}. Give each its own.")
        if row["height"] < 1 or row["width"] < 1:
            raise CellbenchError(
                f"{path}: {quote_name(row['file_name'])} is {row['width']!s:.20} x {row['height']!s:.20} px there. Export it again."
            )
        if row["height"] * row["width"] > limit:
            raise CellbenchError(
                f"{path}: {quote_name(row['file_name'])} has more than {limit / 1e6:g} megapixels there. Export it again, or raise CELLBENCH_MAX_PIXELS."
            )
        found[row["id"]], sizes[row["id"]] = [], (row["height"], row["width"])
    num_crowds, num_boxes, empty = 0, 0, []
    for number, row in enumerate(tree["annotations"], 1):
        if row["image_id"] not in found or row["category_id"] not in label:
            lost = f"image {row['image_id']!r:.40}" if row["image_id"] not in found else f"category {row['category_id']!r:.40}"
            raise CellbenchError(f"{path}: an annotation is of {lost}, which the file does not hold. Export it again.")
        mark, name = label[row["category_id"]], f"{row.get('id', f'number {number}')!s:.40}"
        outline = drop_empty_polygons(row.get("segmentation"), *sizes[row["image_id"]])
        if outline is None:
            empty.append(name)
            num_boxes += bool(row.get("bbox"))
            continue
        if is_crowd(row):
            num_crowds, mark = num_crowds + 1, IGNORE
        if mark is not None:
            found[row["image_id"]].append(Region(segmentation=json.dumps(outline), label=mark, id=name))
    entries = tuple(
        CocoRegions(file=path, name=row["file_name"], size_px=(row["height"], row["width"]), regions=tuple(found[row["id"]]))
        for row in tree["images"]
    )
    return CocoFile(images=entries, num_crowds=num_crowds, empty=tuple(empty), num_boxes=num_boxes)
