"""Writes the files of one image's prediction. They grow strip by strip and appear complete; the mask comes last, as the mark of completeness.

- ``NAME.png``: 0 and 255 for two classes, else the class numbers. Its metadata say which run made it from which file.
- ``NAME.probability.png``: probability of not being background, as 0..255.
- ``NAME.overlay.png``: the image with the outlines of everything but background. Where cell files are written too: each cell in its own colour,
  with its number; a small image is drawn larger, so that the numbers can be read.
- ``NAME.geojson``: outlines of single cells, for QuPath.
- ``NAME.regions.geojson``: the regions of interest in which cells are counted, as they were given.
- ``NAME.instances.png``: 16 bit, the number of each pixel's cell, touching cells separated; ``NAME.instances.tif``, 32 bit, where more than 65,535
  cells are found. ``NAME.cells.csv``: one line a cell.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cellbench.data.io import overlay
from cellbench.data.io.images import png_bytes, tiff_bytes
from cellbench.data.io.png_stream import PngWriter, read_png_text
from cellbench.data.regions import REGION_SUFFIXES
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, os_errors_as, write_atomic
from cellbench.inference.pipeline import MaskStrip, join_strips
from cellbench.liveness import is_alive, owner_as_file_name, owner_of_file_name, this_owner
from cellbench.metrics.instances import Instances
from cellbench.metrics.measurements import measure_cells
from cellbench.metrics.separation import CONNECTED, SeparationParams

PART = ".cellbench-part"
MASK = ".png"
PROBABILITY, OVERLAY, GEOJSON, INSTANCES, CELLS = ".probability.png", ".overlay.png", ".geojson", ".instances.png", ".cells.csv"
WIDE_INSTANCES = ".instances.tif"
"""In place of ``INSTANCES`` for more cells than 16 bits can number."""
LARGE_PX = 800
"""Longer side of an image from which outlines are two pixels wide, since it is seen smaller."""
LEFT_OUT = "left_out"
"""In the metadata of ``INSTANCES``: the number of regions too small to be cells."""
TRUST = "trust"
"""Likewise: what is known of the prediction, :class:`~cellbench.metrics.training_features.Trust`."""
REGIONS = ".regions"
"""Of the file with the regions in which cells are counted, before the ending of its format."""
ENDINGS = (PROBABILITY, OVERLAY, GEOJSON, INSTANCES, CELLS, WIDE_INSTANCES)
"""Of the files that may accompany a mask."""


@dataclass(frozen=True, kw_only=True)
class OutputFormats:
    """The files that are written beside the mask."""

    probability: bool = False
    overlay: bool = False
    geojson: bool = False
    instances: bool = False
    um_per_px: float | None = None
    """Side of a pixel, for the cells' sizes."""
    separation: SeparationParams = CONNECTED
    """How touching cells are separated, and the smallest cell."""

    @property
    def cells(self) -> bool:
        """Whether single cells are separated, which needs the whole mask."""
        return self.instances or self.geojson

    @property
    def how(self) -> dict[str, object]:
        """How cells are separated and measured, for the mask's metadata."""
        return {**self.separation.setting, "min_area_px": self.separation.min_area_px, "um_per_px": self.um_per_px}

    def agrees(self, how: Mapping[str, object] | None) -> bool:
        """Whether cells separated by ``how`` are the wanted ones."""
        return how is not None and all(how.get(key) == value for key, value in self.how.items() if key != "um_per_px" or self.instances)


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """An image and the place of its files: ``stem`` is the path of the mask without ``.png``."""

    image: Path
    stem: Path
    facts: Mapping[str, object] = field(hash=False)
    """The mask's metadata: the run, and the image file with its size, time and place."""
    um_per_px: float | None = None
    """Side of a pixel, for the cells' sizes; None: unknown, and sizes are in pixels."""

    def files(self, wanted: OutputFormats) -> list[Path]:
        """The files to write, the mask last."""
        chosen = {
            PROBABILITY: wanted.probability,
            OVERLAY: wanted.overlay,
            GEOJSON: wanted.geojson,
            INSTANCES: wanted.instances,
            CELLS: wanted.instances,
            MASK: True,
        }
        return [output_path(self.stem, ending) for ending, is_chosen in chosen.items() if is_chosen]

    @property
    def before(self) -> dict[str, Any] | None:
        """The metadata of an existing mask; None where there is none. Raises CellbenchError where another file has its name."""
        mask = output_path(self.stem, MASK)
        if not mask.exists():
            return None
        if (facts := read_mask_metadata(mask)) is None:
            raise CellbenchError(f"{mask}: exists and is no prediction of cellbench. Choose another --out, or move it away.")
        return facts

    def is_of(self, before: Mapping[str, object] | None) -> bool:
        """Whether a mask's metadata are of this run and this file, which may have been moved."""
        return before is not None and all(before.get(key) == value for key, value in self.facts.items() if key != "place")

    def done(self, wanted: OutputFormats) -> bool:
        """Whether all wanted files exist, of this run and this image file. Raises CellbenchError as ``before`` does."""
        before = self.before
        if before is None or not self.is_of(before) or (wanted.cells and not wanted.agrees(before.get("cells"))):
            return False
        return all(file.exists() or (file.name.endswith(INSTANCES) and instances_file(self.stem).exists()) for file in self.files(wanted))

    def renewed(self, wanted: OutputFormats) -> tuple[dict[str, object], list[Path]]:
        """The metadata of a new mask, and the files beside the old one that no longer belong to it."""
        before = self.before
        kept = before is not None and self.is_of(before)
        old = before.get("cells") if before is not None and kept else None
        # Cell tables that exist and agree stay, with their pixel size, unless they are written again.
        cells = old if not wanted.cells or (wanted.agrees(old) and not wanted.instances) else wanted.how
        stale: Sequence[str] = () if kept else ENDINGS
        if kept and wanted.cells and not wanted.agrees(old):
            stale = (GEOJSON, INSTANCES, CELLS, WIDE_INSTANCES)
        files = self.files(wanted)
        facts = {**self.facts, **({"cells": cells} if cells else {})}
        return facts, [path for ending in stale if (path := output_path(self.stem, ending)) not in files]


def output_path(stem: Path, ending: str) -> Path:
    """``NAME`` with an ending; ``NAME`` may contain dots."""
    return stem.with_name(stem.name + ending)


def instances_file(stem: Path) -> Path:
    """The file with the numbers of an image's cells."""
    wide = output_path(stem, WIDE_INSTANCES)
    return wide if wide.exists() else output_path(stem, INSTANCES)


def region_file(stem: Path) -> Path | None:
    """The file of regions of interest beside a mask, ``NAME.regions.geojson``; None if there is none."""
    return next((path for suffix in REGION_SUFFIXES if (path := output_path(stem, f"{REGIONS}{suffix}")).is_file()), None)


def keep_regions(stem: Path, file: Path) -> None:
    """Copies the regions of an image beside its mask, in place of others: so that the tables of the folder follow from what is in it."""
    if (old := region_file(stem)) is not None:
        old.unlink()
    make_folder(stem.parent)
    write_atomic(output_path(stem, f"{REGIONS}{file.suffix.lower()}"), file.read_bytes())


def read_mask_metadata(mask: Path) -> dict[str, Any] | None:
    """The metadata of a mask; None for any other file, the files beside a mask included."""
    try:
        facts = json.loads(read_png_text(mask) or "")
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "run" in facts and "what" not in facts else None


def find_masks(out: Path) -> dict[Path, dict[str, Any]]:
    """The metadata of the masks below a folder, by their paths without ``.png``, sorted."""
    shown = [path for path in sorted(out.rglob("*.png")) if not any(part.startswith(".") for part in path.relative_to(out).parts)]
    return {path.with_name(path.name.removesuffix(".png")): facts for path in shown if (facts := read_mask_metadata(path)) is not None}


class PredictionWriter:
    """Writes the files of one image. Use in ``with``: leaving without :meth:`keep` leaves no file."""

    def __init__(self, target: OutputPaths, wanted: OutputFormats, size_px: tuple[int, int], names: tuple[str, ...]) -> None:
        self._target, self._wanted, self._names, self._size_px = target, wanted, names, size_px
        self._all = target.files(wanted)
        self._stack = contextlib.ExitStack()
        self._parts: list[Path] = []
        self._strips: list[MaskStrip] = []
        self._images: list[np.ndarray] = []
        make_folder(target.stem.parent)
        facts, self._stale = target.renewed(wanted)
        with os_errors_as(f"writing {self._all[-1]}"):
            self._files = {path.name.removeprefix(target.stem.name): self._open(path) for path in self._all}
            self._mask = PngWriter(self._files[MASK], size_px, 1, json.dumps(facts, sort_keys=True))
            self._probability = self._png(PROBABILITY, 1, {**facts, "what": "probability"})
            self._overlay_facts = {**facts, "what": "overlay"}
            self._outlines = None
            if not wanted.cells and (png := self._png(OVERLAY, 3, self._overlay_facts)) is not None:
                self._outlines = _OutlineStrips(png, 1 + (max(size_px) > LARGE_PX), len(names))

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # A full disk takes no more of files that the next lines remove; the error to report is the first one.
        with contextlib.suppress(OSError):
            self._stack.close()
        for part in self._parts:
            part.unlink(missing_ok=True)

    def _open(self, path: Path) -> BinaryIO:
        part = path.with_name(f".{owner_as_file_name(this_owner())}~{path.name[-80:]}{PART}")
        file = self._stack.enter_context(part.open("wb"))
        self._parts.append(part)
        return file

    def _png(self, ending: str, channels: int, facts: Mapping[str, object]) -> PngWriter | None:
        file = self._files.get(ending)
        return PngWriter(file, self._size_px, channels, json.dumps(facts, sort_keys=True)) if file is not None else None

    def add(self, strip: MaskStrip) -> None:
        """Writes the next rows."""
        with os_errors_as(f"writing {self._all[-1]}"):
            self._mask.add(strip.classes * np.uint8(255 if len(self._names) == 2 else 1))
            if self._probability is not None:
                self._probability.add(strip.probability if strip.probability is not None else (strip.classes > 0) * np.uint8(255))
            if self._wanted.cells:  # cells are separated in the whole mask
                self._strips.append(strip)
                self._images.append(strip.source.rows(strip.top, strip.top + len(strip.classes)))
            elif self._outlines is not None:
                self._outlines.add(strip.source.rows(strip.top, strip.top + len(strip.classes)), strip.classes, last=strip.last)

    def keep(self) -> None:
        """Completes the files, the mask last."""
        with os_errors_as(f"writing {self._all[-1]}"):
            if self._wanted.cells:
                self._write_cells()
            for png in (self._mask, self._probability, self._outlines.png if self._outlines is not None else None):
                if png is not None:
                    png.end()
            self._stack.close()
            for path in self._stale:
                path.unlink(missing_ok=True)
            for part, path in zip(self._parts, self._all, strict=True):
                os.replace(part, path)
            self._parts = []

    def _write_cells(self) -> None:
        separation = self._wanted.separation
        (classes, probability, fields), image = join_strips(self._strips), np.concatenate(self._images)
        cells = separation.instances(classes, fields, probability)
        if OVERLAY in self._files:
            picture = overlay.draw_instances(image, cells.ids, cells.num)
            self._files[OVERLAY].write(png_bytes(picture, text=json.dumps(self._overlay_facts, sort_keys=True)))
        if self._wanted.geojson:
            self._files[GEOJSON].write(self._collection(cells))
        if self._wanted.instances:
            facts = {LEFT_OUT: cells.num_left_out, "min_cell_px": separation.min_area_px, TRUST: self._strips[-1].trust.facts}
            narrow, wide = (output_path(self._target.stem, ending) for ending in (INSTANCES, WIDE_INSTANCES))
            if cells.num <= np.iinfo(np.uint16).max:
                self._files[INSTANCES].write(png_bytes(cells.ids.astype(np.uint16), text=json.dumps(facts)))
                self._stale.append(wide)
            else:
                self._files[INSTANCES].write(tiff_bytes(cells.ids.astype(np.uint32), text=json.dumps(facts)))
                self._all[self._all.index(narrow)] = wide
                self._stale.append(narrow)
            table = measure_cells(cells, image, self._names, self._wanted.um_per_px, classes, separation.owners)
            self._files[CELLS].write(table.text.encode("utf-8"))

    def _collection(self, cells: Instances) -> bytes:
        """GeoJSON of the cells, one on a line."""
        from cellbench.inference.polygons import cell_outlines, to_geojson  # imports shapely

        trust = self._strips[-1].trust
        known = trust.facts | ({"looks": trust.word} if trust.word else {})
        features = ",\n".join(json.dumps(to_geojson(cell, self._names, known), separators=(",", ":")) for cell in cell_outlines(cells))
        facts = {"file": self._target.image.name, "size_px": list(self._size_px), **known}
        return f'{{"type": "FeatureCollection", "features": [\n{features}\n],\n"cellbench": {json.dumps(facts)}}}\n'.encode()


class _OutlineStrips:
    """Draws the outlines of classes strip by strip. The last rows of a strip wait for the next one, since lines cross from one to the other."""

    def __init__(self, png: PngWriter, width_px: int, num_classes: int) -> None:
        self.png, self._width_px, self._colours = png, width_px, overlay.class_colours(num_classes)
        self._margin = width_px + 2  # the rows around a pixel that decide on its colour: line, rim and gap
        self._image, self._classes = np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8)
        self._num_written = 0
        """Of the rows that are kept."""

    def add(self, image: np.ndarray, classes: np.ndarray, *, last: bool) -> None:
        """The next rows: (h, W, 3) and (h, W) uint8."""
        if len(self._image):
            image, classes = np.concatenate([self._image, image]), np.concatenate([self._classes, classes])
        end = max(self._num_written, len(image) - (0 if last else self._margin))
        if end > self._num_written:
            drawn = overlay.draw_outlines(image, classes, self._colours, width_px=self._width_px)
            self.png.add(drawn[self._num_written : end])
        start = max(0, end - self._margin)
        self._image, self._classes, self._num_written = image[start:], classes[start:], end - start


def remove_partial_files(folder: Path) -> int:
    """Removes the unfinished files of killed processes below a folder; returns their number."""
    parts = [path for path in folder.rglob(f".*{PART}") if path.is_file() and not _is_being_written(path)]
    for part in parts:
        part.unlink(missing_ok=True)
    return len(parts)


def _is_being_written(part: Path) -> bool:
    """Whether the process that a file is named by lives, on this machine or, as long as it writes, on another one."""
    owner = owner_of_file_name(part.name[1:].partition("~")[0])
    return is_alive(owner, part.stat().st_mtime)
