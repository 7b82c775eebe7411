"""What is kept of one image's prediction: files that grow band by band and appear whole, the mask last, as the mark that all is there.

- ``NAME.png``: 0 and 255 where there are two classes, else the class numbers. Says inside which run made it from which file.
- ``NAME.probability.png``: of not being background, 0..255. ``NAME.overlay.png``: the image with outlines. ``NAME.geojson``: outlines for
  QuPath, of single cells. Outlines in the overlay are of single cells too where these are asked for, else of what is not background.
- ``NAME.instances.png``: 16 bit, one number a cell, touching ones parted. ``NAME.cells.csv``: a line for each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil

from cellbench.data.io.images import png_bytes
from cellbench.data.io.png_stream import PngWriter, read_png_text
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, os_errors_as
from cellbench.inference.polygons import cell_outlines, class_colour, to_geojson
from cellbench.inference.segmenter import MaskStrip
from cellbench.metrics.instances import Instances
from cellbench.metrics.measurements import measure_cells
from cellbench.metrics.separation import CONNECTED, SeparationParams

PART = ".cellbench-part"
PROBABILITY, OVERLAY, GEOJSON, INSTANCES, CELLS = ".probability.png", ".overlay.png", ".geojson", ".instances.png", ".cells.csv"
LEFT_OUT = "left_out"
"""In the words of ``INSTANCES``: how many regions are too small to be cells."""
ENDINGS = (PROBABILITY, OVERLAY, GEOJSON, INSTANCES, CELLS)
"""Of what may lie beside a mask ``NAME.png``, behind ``NAME``."""


@dataclass(frozen=True, kw_only=True)
class OutputFormats:
    """What is written beside the mask."""

    probability: bool = False
    overlay: bool = False
    geojson: bool = False
    instances: bool = False
    um_per_px: float | None = None
    """The side of a pixel, for the cells' sizes."""
    separation: SeparationParams = CONNECTED
    """How touching cells are parted, and how small they may be."""

    @property
    def cells(self) -> bool:
        """Whether single cells are told apart, which takes the whole mask."""
        return self.instances or self.geojson

    @property
    def how(self) -> dict[str, object]:
        """How cells are told apart and measured, as it is written into the mask."""
        return {"saddle_ratio": self.separation.saddle_ratio, "min_area_px": self.separation.min_area_px, "um_per_px": self.um_per_px}

    def agrees(self, how: Mapping[str, object] | None) -> bool:
        """Whether cells told apart as ``how`` says are those that are wanted."""
        return how is not None and all(how.get(key) == value for key, value in self.how.items() if key != "um_per_px" or self.instances)


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """An image and where its answer goes: ``stem`` is the path of the mask without ``.png``."""

    image: Path
    stem: Path
    facts: Mapping[str, object] = field(hash=False)
    """Written into the mask: which run, which file, of which size and time, and from where."""
    um_per_px: float | None = None
    """The side of a pixel, for the cells' sizes; None: not known, and they are in pixels."""

    def files(self, wanted: OutputFormats) -> list[Path]:
        """What is written, the mask last."""
        asked = (wanted.probability, wanted.overlay, wanted.geojson, wanted.instances, wanted.instances)
        return [output_path(self.stem, ending) for ending, is_asked in zip(ENDINGS, asked, strict=True) if is_asked] + [
            output_path(self.stem, ".png")
        ]

    @property
    def before(self) -> dict[str, Any] | None:
        """What the mask that is there already says; None where there is none. Raises CellbenchError where its place holds something else."""
        mask = output_path(self.stem, ".png")
        if not mask.exists():
            return None
        if (facts := read_mask_metadata(mask)) is None:
            raise CellbenchError(f"{mask}: is there already and is no prediction of cellbench. Name another --out, or move it away.")
        return facts

    def is_of(self, before: Mapping[str, object] | None) -> bool:
        """Whether what a mask says is of this run and this very file, which may have been moved."""
        return before is not None and all(before.get(key) == value for key, value in self.facts.items() if key != "place")

    def done(self, wanted: OutputFormats) -> bool:
        """Whether all that is wanted is there, of this run and this very file. Raises CellbenchError as ``before`` does."""
        before = self.before
        if before is None or not self.is_of(before) or (wanted.cells and not wanted.agrees(before.get("cells"))):
            return False
        return all(file.exists() for file in self.files(wanted))

    def renewed(self, wanted: OutputFormats) -> tuple[dict[str, object], list[Path]]:
        """What a new mask says, and the files beside the old one that would no longer belong to it."""
        before = self.before if self.is_of(self.before) else None
        old = before.get("cells") if before is not None else None
        cells, stale = old, () if before is not None else ENDINGS
        if wanted.cells:
            cells = wanted.how
            if not wanted.agrees(old):
                stale = stale or (GEOJSON, INSTANCES, CELLS)
            elif not wanted.instances:  # the tables that are there stay as they are
                cells = old
        files = self.files(wanted)
        return {**self.facts, **({"cells": cells} if cells else {})}, [
            path for ending in stale if (path := output_path(self.stem, ending)) not in files
        ]


def output_path(stem: Path, ending: str) -> Path:
    """``NAME`` with an ending, whatever dots are in the name."""
    return stem.with_name(stem.name + ending)


def read_mask_metadata(mask: Path) -> dict[str, Any] | None:
    """What a mask of ours says of itself; None for any other file, and for what lies beside a mask."""
    try:
        facts = json.loads(read_png_text(mask) or "")
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "run" in facts and "what" not in facts else None


def find_masks(out: Path) -> dict[Path, dict[str, Any]]:
    """The masks below a folder and what they say of themselves, by their paths without ``.png``, sorted."""
    shown = [path for path in sorted(out.rglob("*.png")) if not any(part.startswith(".") for part in path.relative_to(out).parts)]
    return {path.with_name(path.name.removesuffix(".png")): facts for path in shown if (facts := read_mask_metadata(path)) is not None}


class TooManyCellsError(CellbenchError):
    """An image with more cells than a 16-bit label image can number."""


class PredictionWriter:
    """The files of one image while they are written. Use in ``with``: leaving without :meth:`keep` leaves nothing."""

    def __init__(self, target: OutputPaths, wanted: OutputFormats, size_px: tuple[int, int], names: tuple[str, ...]) -> None:
        self._target, self._wanted, self._names = target, wanted, names
        self._all = target.files(wanted)
        self._full = 255 if len(names) == 2 else 1
        self._stack = contextlib.ExitStack()
        self._parts: list[Path] = []
        make_folder(target.stem.parent)
        facts, self._stale = target.renewed(wanted)
        with os_errors_as(f"writing {self._all[-1]}"):
            files = {path: self._open(path) for path in self._all}
            mask, *rest = reversed(self._all)
            self._mask = PngWriter(files[mask], size_px, 1, json.dumps(facts, sort_keys=True))
            by_ending = {path.name.removeprefix(target.stem.name): files[path] for path in rest}
            words = {what: json.dumps({**facts, "what": what}, sort_keys=True) for what in ("probability", "overlay")}
            self._cell = PngWriter(by_ending[PROBABILITY], size_px, 1, words["probability"]) if wanted.probability else None
            self._overlay = PngWriter(by_ending[OVERLAY], size_px, 3, words["overlay"]) if wanted.overlay else None
            self._geojson, self._labels, self._table = by_ending.get(GEOJSON), by_ending.get(INSTANCES), by_ending.get(CELLS)
        self._rows: list[tuple[np.ndarray | None, ...]] = []
        self._above: np.ndarray | None = None
        self._size_px = size_px

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for part in self._parts:
            part.unlink(missing_ok=True)

    def _open(self, path: Path) -> BinaryIO:
        part = path.with_name(f".{os.getpid()}-{path.name[-80:]}{PART}")
        file = self._stack.enter_context(part.open("wb"))
        self._parts.append(part)
        return file

    def add(self, band: MaskStrip) -> None:
        """The next rows."""
        with os_errors_as(f"writing {self._all[-1]}"):
            self._mask.add(band.classes * np.uint8(self._full))
            if self._cell is not None:
                self._cell.add(band.probability if band.probability is not None else (band.classes > 0) * np.uint8(255))
            if self._overlay is not None and not self._wanted.cells:
                picture = band.source.rows(band.top, band.top + len(band.classes))
                above = band.classes[:1] if self._above is None else self._above
                self._overlay.add(draw_outlines(picture, band.classes, above, np.arange(len(self._names))))
                self._above = band.classes[-1:].copy()
            if self._wanted.cells:  # they are parted by the whole mask
                self._rows.append((band.classes, band.source.rows(band.top, band.top + len(band.classes)), band.relief))

    def keep(self) -> None:
        """All rows are in: the files appear, the mask last. Raises TooManyCells, and then leaves nothing."""
        with os_errors_as(f"writing {self._all[-1]}"):
            if self._wanted.cells:
                self._count()
            for rows in (self._mask, self._cell, self._overlay):
                if rows is not None:
                    rows.end()
            self._stack.close()
            for path in self._stale:
                path.unlink(missing_ok=True)
            for part, path in zip(self._parts, self._all, strict=True):
                os.replace(part, path)
            self._parts = []

    def _count(self) -> None:
        classes, image, relief = (np.concatenate(parts) if parts[0] is not None else None for parts in zip(*self._rows, strict=True))
        found = self._wanted.separation.instances(classes, relief)
        if self._labels is not None and found.num > 65535:
            raise TooManyCellsError(f"{self._target.image}: {found.num} cells, where 16 bits number 65535. Cut the image into pieces.")
        if self._geojson is not None:  # single cells, as they are counted
            self._geojson.write(self._collection(found))
        if self._overlay is not None:
            self._overlay.add(draw_outlines(image, found.ids, found.ids[:1], found.classes))
        if self._labels is not None:
            facts = {LEFT_OUT: found.num_left_out, "min_cell_px": self._wanted.separation.min_area_px}
            self._labels.write(png_bytes(found.ids.astype(np.uint16), words=json.dumps(facts)))
        if self._table is not None:
            owners = self._wanted.separation.owners
            self._table.write(measure_cells(found, image, self._names, self._wanted.um_per_px, classes, owners).text.encode("utf-8"))

    def _collection(self, found: Instances) -> bytes:
        """GeoJSON of the cells, one on a line."""
        features = ",\n".join(json.dumps(to_geojson(shape, self._names), separators=(",", ":")) for shape in cell_outlines(found))
        facts = {"file": self._target.image.name, "size_px": list(self._size_px)}
        return f'{{"type": "FeatureCollection", "features": [\n{features}\n],\n"cellbench": {json.dumps(facts)}}}\n'.encode()


def draw_outlines(image: np.ndarray, numbers: np.ndarray, above: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Rows of an image (h, W, 3) uint8 with the edges of what is numbered in them drawn over, two pixels wide.

    ``numbers`` (h, W), 0 the background; ``above`` (1, W): the row before; ``classes``: of each number, for its colour.
    """
    before = np.concatenate([above, numbers[:-1]])
    edge = before != numbers
    edge[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    edge[:, :-1] |= edge[:, 1:]
    number = np.maximum(numbers, before)
    number[:, 1:] = np.maximum(number[:, 1:], numbers[:, :-1])
    number[:, :-1] = np.maximum(number[:, :-1], number[:, 1:])
    palette = np.array([(0, 0, 0), *(class_colour(k) for k in range(1, int(classes.max(initial=0)) + 1))], np.uint8)
    picture = image.copy()
    picture[edge] = palette[classes[number[edge]]]
    return picture


def remove_partial_files(folder: Path) -> int:
    """Removes what a process that was killed left half-written below a folder; returns how many files."""
    # Each is named after its process. One of another machine may have the number of one that lives here: it stays until a later call.
    parts = [path for path in folder.rglob(f".*{PART}") if path.is_file() and not _pid_exists(path.name[1:].partition("-")[0])]
    for part in parts:
        part.unlink(missing_ok=True)
    return len(parts)


def _pid_exists(pid: str) -> bool:
    return pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid))
