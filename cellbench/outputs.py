"""What is kept of one image's prediction: files that grow band by band and appear whole, the mask last, as the mark that all is there.

- ``NAME.png``: 0 and 255 where there are two classes, else the class numbers. Says inside which run made it from which file.
- ``NAME.probability.png``: of not being background, 0..255. ``NAME.overlay.png``: the image with outlines. ``NAME.geojson``: outlines for
  QuPath. Outlines are those of single cells where these are numbered, else of connected pieces.
- ``NAME.instances.png``: 16 bit, one number a cell, touching ones parted. ``NAME.cells.csv``: a line for each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil

from cellbench.data.images import png_bytes
from cellbench.data.png_rows import PngRows, words_of
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, told
from cellbench.measure import cells
from cellbench.outlines import Shape, Shapes, colour, feature, shapes_of
from cellbench.segmenter import Band
from cellbench.separate import CONNECTED, Separation

PART = ".cellbench-part"
INSTANCES, CELLS = ".instances.png", ".cells.csv"
LEFT_OUT = "left_out"
"""In the words of ``INSTANCES``: how many regions are too small to be cells."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is written beside the mask."""

    probability: bool = False
    overlay: bool = False
    geojson: bool = False
    instances: bool = False
    um_per_px: float | None = None
    """The side of a pixel, for the cells' sizes."""
    separation: Separation = CONNECTED
    """How touching cells are parted, and how small they may be."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """An image and where its answer goes: ``stem`` is the path of the mask without ``.png``."""

    image: Path
    stem: Path
    words: str
    """Inside the mask: which run, which file, of which size and time."""
    um_per_px: float | None = None
    """The side of a pixel, for the cells' sizes; None: not known, and they are in pixels."""

    def files(self, wanted: Wanted) -> list[Path]:
        """What is written, the mask last."""
        kinds = [(wanted.probability, ".probability.png"), (wanted.overlay, ".overlay.png"), (wanted.geojson, ".geojson")]
        kinds += [(wanted.instances, INSTANCES), (wanted.instances, CELLS), (True, ".png")]
        return [self.stem.with_name(self.stem.name + ending) for asked, ending in kinds if asked]

    def done(self, wanted: Wanted) -> bool:
        """Whether all of it is there, of this run and this very file. Raises CellbenchError where the mask's place holds something else."""
        files = self.files(wanted)
        words = words_of(files[-1]) if files[-1].exists() else None
        if words is None and files[-1].exists():
            raise CellbenchError(f"{files[-1]}: is there already and is no prediction of cellbench. Name another --out, or move it away.")
        return words == self.words and all(file.exists() for file in files)


class TooManyCells(CellbenchError):
    """An image with more cells than a 16-bit label image can number."""


class Files:
    """The files of one image while they are written. Use in ``with``: leaving without :meth:`keep` leaves nothing."""

    def __init__(self, target: Target, wanted: Wanted, size_px: tuple[int, int], names: tuple[str, ...]) -> None:
        self._target, self._wanted, self._names = target, wanted, names
        self._all = target.files(wanted)
        self._full = 255 if len(names) == 2 else 1
        self._stack = contextlib.ExitStack()
        self._parts: list[Path] = []
        make_folder(target.stem.parent)
        with told(f"writing {self._all[-1]}"):
            files = {path: self._open(path) for path in self._all}
            mask, *rest = reversed(self._all)
            self._mask = PngRows(files[mask], size_px, 1, target.words)
            by_ending = {path.name.removeprefix(target.stem.name): files[path] for path in rest}
            self._cell = PngRows(by_ending[".probability.png"], size_px, 1, target.words) if wanted.probability else None
            self._overlay = PngRows(by_ending[".overlay.png"], size_px, 3, target.words) if wanted.overlay else None
            self._shapes = Shapes(len(names), wanted.separation.min_area_px) if wanted.geojson and not wanted.instances else None
            self._geojson = by_ending.get(".geojson")
            if self._geojson is not None:
                self._geojson.write(b'{"type": "FeatureCollection", "features": [')
        self._cells = (by_ending[INSTANCES], by_ending[CELLS]) if wanted.instances else None
        self._rows: list[tuple[np.ndarray | None, ...]] = []
        self._num_shapes, self._above = 0, None
        self._size_px = size_px

    def __enter__(self) -> Files:
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

    def add(self, band: Band) -> None:
        """The next rows."""
        with told(f"writing {self._all[-1]}"):
            self._mask.add(band.classes * np.uint8(self._full))
            if self._cell is not None:
                self._cell.add(band.probability if band.probability is not None else (band.classes > 0) * np.uint8(255))
            if self._overlay is not None and self._cells is None:
                picture = band.source.rows(band.top, band.top + len(band.classes))
                above = band.classes[:1] if self._above is None else self._above
                self._overlay.add(outlined(picture, band.classes, above, np.arange(len(self._names))))
                self._above = band.classes[-1:].copy()
            if self._shapes is not None:
                self._outline(band)
            if self._cells is not None:  # cells are parted by the whole mask
                self._rows.append((band.classes, band.source.rows(band.top, band.top + len(band.classes)), band.relief))

    def _outline(self, band: Band) -> None:
        assert self._shapes is not None
        self._tell(self._shapes.add(band.classes, band.last))

    def _tell(self, shapes: Iterable[Shape]) -> None:
        assert self._geojson is not None
        for shape in shapes:
            text = json.dumps(feature(shape, self._names), separators=(",", ":"))
            self._geojson.write((",\n" if self._num_shapes else "\n").encode() + text.encode())
            self._num_shapes += 1

    def keep(self) -> None:
        """All rows are in: the files appear, the mask last. Raises TooManyCells, and then leaves nothing."""
        with told(f"writing {self._all[-1]}"):
            if self._cells is not None:
                self._count(*self._cells)
            for rows in (self._mask, self._cell, self._overlay):
                if rows is not None:
                    rows.end()
            if self._geojson is not None:
                facts = {"file": self._target.image.name, "size_px": list(self._size_px)}
                self._geojson.write(b"\n],\n" + b'"cellbench": ' + json.dumps(facts).encode() + b"}\n")
            self._stack.close()
            for part, path in zip(self._parts, self._all, strict=True):
                os.replace(part, path)
            self._parts = []

    def _count(self, labels: BinaryIO, table: BinaryIO) -> None:
        classes, image, relief = (np.concatenate(parts) if parts[0] is not None else None for parts in zip(*self._rows, strict=True))
        found = self._wanted.separation.instances(classes, relief)
        if found.num > 65535:
            raise TooManyCells(f"{self._target.image}: {found.num} cells, where 16 bits number 65535. Cut the image into pieces.")
        if self._geojson is not None:  # single cells, as they are counted
            self._tell(shapes_of(found))
        if self._overlay is not None:
            self._overlay.add(outlined(image, found.ids, found.ids[:1], found.classes))
        facts = {LEFT_OUT: found.num_left_out, "min_cell_px": self._wanted.separation.min_area_px}
        labels.write(png_bytes(found.ids.astype(np.uint16), words=json.dumps(facts)))
        owners = self._wanted.separation.owners
        table.write(cells(found, image, self._names, self._wanted.um_per_px, classes, owners).text.encode("utf-8"))


def outlined(image: np.ndarray, numbers: np.ndarray, above: np.ndarray, classes: np.ndarray) -> np.ndarray:
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
    palette = np.array([(0, 0, 0), *(colour(k) for k in range(1, int(classes.max(initial=0)) + 1))], np.uint8)
    picture = image.copy()
    picture[edge] = palette[classes[number[edge]]]
    return picture


def swept(folder: Path) -> int:
    """Removes what a process that was killed left half-written below a folder; returns how many files."""
    # Each is named after its process. One of another machine may have the number of one that lives here: it stays until a later call.
    parts = [path for path in folder.rglob(f".*{PART}") if path.is_file() and not _lives(path.name[1:].partition("-")[0])]
    for part in parts:
        part.unlink(missing_ok=True)
    return len(parts)


def _lives(pid: str) -> bool:
    return pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid))
