"""Tables of all masks in an output folder: ``counts.csv``, a line an image or region, and ``coco.json``, the outlines of all cells."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellbench.data.io import images
from cellbench.data.io.png_stream import read_png_text
from cellbench.data.regions import region_masks
from cellbench.escaping import to_csv
from cellbench.files import write_atomic
from cellbench.inference.writers import CELLS, GEOJSON, LEFT_OUT, TRUST, OutputFormats, find_masks, instances_file, output_path, region_file
from cellbench.metrics.measurements import count_by_class, density

COCO, COUNTS = "coco.json", "counts.csv"


@dataclass(frozen=True, kw_only=True)
class ExistingMask:
    """A mask in the folder, of this call or an earlier one, and what it says of itself."""

    stem: Path
    name: str
    """Its path below the folder, without ``.png``."""
    facts: Mapping[str, Any]

    @property
    def outlined(self) -> bool:
        return "cells" in self.facts and output_path(self.stem, GEOJSON).exists()

    @property
    def counted(self) -> bool:
        return "cells" in self.facts and instances_file(self.stem).exists() and output_path(self.stem, CELLS).exists()


def existing_masks(out: Path, without: Collection[Path] = ()) -> list[ExistingMask]:
    """All masks in a folder, sorted by name, but those whose stems are in ``without``."""
    return [
        ExistingMask(stem=stem, name=stem.relative_to(out).as_posix(), facts=facts)
        for stem, facts in find_masks(out).items()
        if stem not in without
    ]


def write_tables(
    out: Path, skipped: Collection[Path], wanted: OutputFormats, coco: bool, names: tuple[str, ...], say: Callable[[str], None]
) -> int:
    """Writes the tables that are asked for, and updates those of earlier calls. ``skipped``: stems of images that could not be segmented now.

    Returns how many regions are too small to be cells, in all images whose cells are counted.
    """
    masks = existing_masks(out, skipped)
    outlined, counted = [one for one in masks if one.outlined], [one for one in masks if one.counted]

    def say_written(path: Path, what: str, num: int) -> None:
        more = f"; {len(masks) - num} other masks there have none" if num < len(masks) else ""
        say(f"{path}: {what} of all {num} images in the folder, separated by {wanted.separation.description}{more}.")

    if (coco and outlined) or (out / COCO).exists():
        say_written(write_coco(outlined, out, names), "the outlines", len(outlined))
    if (wanted.instances and counted) or (out / COUNTS).exists():
        say_written(write_counts(counted, out, names, wanted.separation.owners), "the cells", len(counted))
    return sum(map(num_below_min_area, counted)) if wanted.instances else 0


def write_coco(masks: Sequence[ExistingMask], out: Path, names: tuple[str, ...]) -> Path:
    """One file for all images with outlines. Images are named with their folders below the one given."""
    from cellbench.inference.polygons import to_coco  # imports shapely

    def outlines() -> Iterator[tuple[str, tuple[int, int], dict[str, Any]]]:
        for mask in masks:
            tree = json.loads(output_path(mask.stem, GEOJSON).read_bytes())
            name = (Path(mask.name).parent / mask.facts["image"]).as_posix()
            height, width = tree["cellbench"]["size_px"]
            yield name, (height, width), tree

    write_atomic(out / COCO, json.dumps(to_coco(outlines(), names)))
    return out / COCO


def write_counts(masks: Sequence[ExistingMask], out: Path, names: Sequence[str] = (), owners: Sequence[int] = ()) -> Path:
    """One line an image whose cells are counted, or one for each of its regions; columns that only some have are empty for the others."""
    rows = [row for mask in masks for row in count_rows(mask, names, owners)]
    columns = list(dict.fromkeys(column for row in rows for column in row)) or ["image"]
    write_atomic(out / COUNTS, to_csv(columns, [[row.get(column, "") for column in columns] for row in rows]))
    return out / COUNTS


def count_rows(mask: ExistingMask, names: Sequence[str] = (), owners: Sequence[int] = ()) -> list[dict[str, object]]:
    """The rows of an image in the table, by column: one, or one for each region of interest beside its mask.

    Size, number of cells, density, pixel size where it is known, number of parts of the mask below the minimum area, distance from the training
    images, and with several classes the number of each. A part of a cell (``owners``) is counted in the cells that hold it. A cell is in a region
    if its centre is.
    """
    with output_path(mask.stem, CELLS).open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    height, width = images.image_size(instances_file(mask.stem))
    side = mask.facts["cells"]["um_per_px"]

    def row(cells: Sequence[Mapping[str, str]], area_px: int, about: dict[str, object]) -> dict[str, object]:
        dense = round(density(len(cells), area_px, side), 3)
        out: dict[str, object] = {
            "image": mask.name,
            **about,
            "width_px": width,
            "height_px": height,
            "cells": len(cells),
            **({"cells_per_megapixel": dense} if side is None else {"cells_per_mm2": dense, "um_per_px": float(f"{side:.6g}")}),
            **({} if about else {LEFT_OUT: num_below_min_area(mask)}),
            **_instance_facts(mask).get(TRUST, {}),
        }
        each = count_by_class(cells, names, owners, side)
        return out | {f"{name} (class)" if name in out else name: num for name, num in each.items()}

    if (regions := region_file(mask.stem)) is None:
        return [row(cells, width * height, {})]
    places = np.array([(float(cell["x_px"]) + 0.5, float(cell["y_px"]) + 0.5) for cell in cells]).reshape(-1, 2)
    return [
        row(
            [cell for cell, inside in zip(cells, region.holds(places), strict=True) if inside],
            area,
            {"region": region.name, "region_px": area},
        )
        for region, pixels in region_masks(regions, (height, width))
        for area in [int(pixels.sum())]
    ]


def num_below_min_area(mask: ExistingMask) -> int:
    """How many regions of an image's mask are too small to be cells; recorded in the file of the numbered cells."""
    return int(_instance_facts(mask).get(LEFT_OUT, 0))


def _instance_facts(mask: ExistingMask) -> dict[str, Any]:
    file = instances_file(mask.stem)
    text = read_png_text(file) if file.suffix == ".png" else images.read_tiff_text(file)
    return json.loads(text) if text else {}
