"""Files of boxes, points or counts of cells: Pascal VOC, COCO without outlines, GeoJSON points, tables."""

from __future__ import annotations

import csv
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellbench.data.annotations import is_crowd, load_coco_json
from cellbench.data.io.decode import printable_path
from cellbench.data.mask_names import ADDED
from cellbench.data.outline_files import read_tool_mask
from cellbench.errors import CellbenchError, one_line
from cellbench.files import read_text

COLUMNS = {
    "image": ("image", "filename", "file_name", "file", "image_name", "image_id", "name"),
    "class": ("class", "label", "cell_type", "category", "type", "cell"),
    "x": ("x", "x_px", "center_x", "cx"),
    "y": ("y", "y_px", "center_y", "cy"),
    "xmin": ("xmin", "x_min", "x1", "left"),
    "ymin": ("ymin", "y_min", "y1", "top"),
    "xmax": ("xmax", "x_max", "x2", "right"),
    "ymax": ("ymax", "y_max", "y2", "bottom"),
    "count": ("count", "num", "number", "n", "cells"),
}
"""Names of columns, in lower case."""
UNNAMED = "cell"
"""The class of cells for which none is given."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Some cells of one image: one at a place, or ``num`` whose places are unknown."""

    label: str
    xy: tuple[float, float] | None
    num: int = 1


@dataclass(frozen=True, kw_only=True)
class CountRecord:
    """What a file says of an image: a mark, or None for an image without cells."""

    file: Path
    image: str
    mark: Mark | None
    size_px: tuple[int, int] | None = None


def read_voc(path: Path) -> Iterator[CountRecord]:
    """The boxes of a Pascal VOC file; none for other XML."""
    data = path.read_bytes()
    if b"<annotation" not in data:
        return
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise CellbenchError(f"{printable_path(path)}: defines entities, which no VOC file needs. It is not read.")
    try:
        root = ElementTree.fromstring(data)  # noqa: S314  without entities
        image = (root.findtext("filename") or path.stem).strip()
        size = (int(float(root.findtext("size/height") or 0)), int(float(root.findtext("size/width") or 0)))
        yield CountRecord(file=path, image=image, mark=None, size_px=size)
        for one in root.iter("object"):
            x0, y0, x1, y1 = (float(one.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax"))
            label = (one.findtext("name") or "").strip() or UNNAMED
            yield CountRecord(file=path, image=image, mark=Mark(label=label, xy=((x0 + x1) / 2, (y0 + y1) / 2)), size_px=size)
    except (ElementTree.ParseError, LookupError, ValueError, OverflowError) as error:  # LookupError: of an unknown encoding
        raise CellbenchError(f"{printable_path(path)}: cannot be read as a VOC file ({one_line(error)[:120]}). Export it again.") from None


def read_coco_boxes(path: Path) -> Iterator[CountRecord]:
    """The boxes of a COCO file without outlines; none for other JSON."""
    if b'"annotations"' not in path.read_bytes() or b'"categories"' not in path.read_bytes():
        return
    tree = load_coco_json(path)
    if any(row.get("segmentation") for row in tree["annotations"]):
        return
    names = {row["id"]: str(row["name"]) for row in tree["categories"]}
    pictures = {row["id"]: row for row in tree["images"]}
    for row in tree["images"]:
        yield CountRecord(file=path, image=row["file_name"], mark=None, size_px=(row["height"], row["width"]))
    for row in tree["annotations"]:
        image, box = pictures.get(row["image_id"]), row.get("bbox")
        if image is None or row["category_id"] not in names:
            raise CellbenchError(
                f"{printable_path(path)}: annotation {row.get('id')!s:.40} is of an image or a category that the file lacks. Export it again."
            )
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise CellbenchError(
                f"{printable_path(path)}: annotation {row.get('id')!s:.40} has no box [x, y, width, height]. Export it again."
            )
        if is_crowd(row):
            raise CellbenchError(
                f"{printable_path(path)}: annotation {row.get('id')!s:.40} is a crowd, whose cells are not counted. Take it out."
            )
        mark = Mark(label=names[row["category_id"]], xy=(box[0] + box[2] / 2, box[1] + box[3] / 2))
        yield CountRecord(file=path, image=image["file_name"], mark=mark)


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number; an int beyond all floats is none."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def read_points(path: Path) -> Iterator[CountRecord]:
    """The points of a GeoJSON file, as QuPath exports annotations of an image."""
    image = ADDED.sub("", path.stem)
    yield CountRecord(file=path, image=image, mark=None)
    for x, y, label in read_tool_mask(path).points:
        yield CountRecord(file=path, image=image, mark=Mark(label=label or UNNAMED, xy=(x, y)))


def read_count_table(path: Path) -> Iterator[CountRecord]:
    """A line a cell (a point or a box), or a line a count; none for other tables."""
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    column = {
        key: name
        for name in reader.fieldnames or ()
        for key, known in COLUMNS.items()
        if re.sub(r"[ .]", "_", name.strip().lower()) in known
    }
    boxes, points = ({"xmin", "ymin", "xmax", "ymax"} <= set(column), {"x", "y"} <= set(column))
    if "image" not in column or not (boxes or points or "count" in column):
        return
    if points and not boxes and {"width", "height", "w", "h"} & {name.strip().lower() for name in reader.fieldnames or ()}:
        raise CellbenchError(
            f"{printable_path(path)}: has x, y and a width: is x, y a corner or a centre? Name xmin, ymin, xmax, ymax, or x, y alone."
        )
    keys = ("xmin", "ymin", "xmax", "ymax") if boxes else ("x", "y") if points else ("count",)
    for number, row in enumerate(reader, 2):
        image, label = (row.get(column["image"]) or "").strip(), (row.get(column.get("class", "")) or "").strip() or UNNAMED
        texts = [(row.get(column[key]) or "").strip().replace(",", ".") for key in keys]
        if not image and not any(texts):
            continue
        if not any(texts):  # an image without cells
            yield CountRecord(file=path, image=image, mark=None)
            continue
        try:
            values = [float(value) for value in texts]
            if not all(map(math.isfinite, values)) or not image:
                raise ValueError("an image and finite numbers are expected")
            if keys == ("count",) and (values[0] < 0 or values[0] % 1):
                raise ValueError(f"{values[0]:g} is no count")
        except ValueError as error:
            raise CellbenchError(f"{printable_path(path)}: line {number}: {one_line(error)}. Correct it, or take it out.") from None
        if keys == ("count",):
            yield CountRecord(file=path, image=image, mark=Mark(label=label, xy=None, num=int(values[0])))
        else:
            xy = ((values[0] + values[2]) / 2, (values[1] + values[3]) / 2) if boxes else (values[0], values[1])
            yield CountRecord(file=path, image=image, mark=Mark(label=label, xy=xy))
