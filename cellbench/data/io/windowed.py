"""Images as sources of rows: whole in memory, or a large TIFF read in windows, so that a slide takes the memory of a few rows of tiles.

Letters: H x W image.
"""

from __future__ import annotations

import io
import logging
import threading
from collections import OrderedDict
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cellbench.data.io.images import read_image_with_notes
from cellbench.data.io.intensity import IntensityScaling, Note
from cellbench.data.io.tiff_checks import check_channels
from cellbench.errors import CellbenchError, one_line

LARGE_PX = 50_000_000
"""A TIFF of at least this number of pixels is read in windows; smaller ones are decoded at once, with all checks of `decode`."""
MOST_PART_PX = 20_000_000
"""Pixels of the largest tile or strip that is read in windows."""
_ROWS_KEPT = 3
_PLAIN, _DEFLATE, _JPEG = (1, 32773), (8, 32946), 7


class ImageSource(Protocol):
    """An image that is read row by row."""

    size_px: tuple[int, int]
    """Height, width."""
    notes: tuple[Note, ...]
    """Notes on how the file's values are read."""

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows ``top`` up to ``bottom`` (h, W, 3), uint8 RGB. Raises CellbenchError where they are damaged. Thread-safe."""
        ...

    def close(self) -> None: ...


class ArraySource:
    """An image (H, W, 3) uint8 in memory."""

    def __init__(self, image: np.ndarray, notes: tuple[Note, ...] = ()) -> None:
        self._image, self.notes = image, notes
        self.size_px = (image.shape[0], image.shape[1])

    def rows(self, top: int, bottom: int) -> np.ndarray:
        return self._image[top:bottom]

    def close(self) -> None:
        """Nothing is open."""


class WindowedTiff:
    """A TIFF of 8-bit grey or RGB whose tiles or strips are decoded on demand."""

    notes: tuple[Note, ...] = ()

    def __init__(self, path: Path, tif: Any) -> None:
        self._path, self._tif, self._page = path, tif, tif.pages[0]
        page = self._page
        self.size_px = (int(page.imagelength), int(page.imagewidth))
        self._part_px = (int(page.tilelength), int(page.tilewidth)) if page.is_tiled else (int(page.rowsperstrip), int(page.imagewidth))
        self._across = -(-self.size_px[1] // self._part_px[1])
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, top: int, bottom: int) -> np.ndarray:
        tall, bottom = self._part_px[0], min(bottom, self.size_px[0])
        with self._lock:
            parts = [self._row(number) for number in range(top // tall, -(-bottom // tall))]
            first = top // tall * tall
            return (parts[0] if len(parts) == 1 else np.concatenate(parts))[top - first : bottom - first]

    def close(self) -> None:
        with self._lock:
            self._tif.close()

    def _row(self, number: int) -> np.ndarray:
        if number not in self._kept:
            self._kept[number] = self._decoded(number)
            while len(self._kept) > max(_ROWS_KEPT, 1024 // self._part_px[0]):
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _decoded(self, number: int) -> np.ndarray:
        tall, wide = self._part_px
        top = number * tall
        row = np.zeros((min(tall, self.size_px[0] - top), self.size_px[1], 3), np.uint8)
        for column in range(self._across):
            part = self._part(number * self._across + column)[: row.shape[0], : self.size_px[1] - column * wide]
            place = row[:, column * wide : (column + 1) * wide]
            if part.shape[:2] != place.shape[:2]:
                raise CellbenchError(f"{self._path}: is damaged: a tile in row {number} is smaller than its place. Copy it again.")
            place[:] = part
        return row

    def _part(self, index: int) -> np.ndarray:
        page, file = self._page, self._tif.filehandle
        try:
            start, count = page.dataoffsets[index], page.databytecounts[index]
            file.seek(start)
            data = file.read(count) if count else b""
            if not count or len(data) < count:
                raise CellbenchError(f"{self._path}: is truncated: its table points at pixels that are not in the file. Copy it again.")
            if page.compression == _JPEG:
                tables = page.jpegtables
                whole = tables[:-2] + data[2:] if tables else data  # without the tables' end mark and the image's start mark
                if page.samplesperpixel == 3:  # Adobe's mark: RGB, or luma and two chromas
                    whole = whole[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([page.photometric == 6]) + whole[2:]
                return np.asarray(Image.open(io.BytesIO(whole), formats=["JPEG"]).convert("RGB"))
            part = page.decode(data, index)[0]
        except CellbenchError:
            raise
        except Exception as error:  # decoders raise a dozen types on damaged files
            raise CellbenchError(f"{self._path}: tile {index} cannot be decoded ({one_line(error)[:120]}). Copy the file again.") from error
        part = part.reshape(part.shape[-3:])
        return 255 - part if page.photometric == 0 else part


def open_source(path: str | PathLike[str], reading: IntensityScaling | None = None) -> ImageSource:
    """Opens an image file; reads it in windows if it is a suitable TIFF of ``LARGE_PX`` or more. Raises CellbenchError that names the file."""
    path, reading = Path(path), reading or IntensityScaling()
    # Windows are for plain 8-bit images, which are never scaled.
    if path.suffix.lower() in (".tif", ".tiff") and path.is_file() and not reading.channels:
        found = _windowed(path)
        if found is not None:
            return found
    return ArraySource(*read_image_with_notes(path, reading))


def _windowed(path: Path) -> WindowedTiff | None:
    """The TIFF in windows; None if it is small, damaged, or of a kind that only `read_image` reads."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    try:
        tif = tifffile.TiffFile(path)
    except Exception:  # `read_image` raises its error
        return None
    try:
        fits = _fits(tif)
    except Exception:  # as above
        fits = False
    if not fits:
        tif.close()
        return None
    return WindowedTiff(path, tif)


def _fits(tif: Any) -> bool:
    page = tif.pages[0]
    check_channels(page)  # raises as `read_image` does
    if page.imagelength * page.imagewidth < LARGE_PX or len([p for p in tif.pages[:17] if not (p.is_reduced or p.is_mask)]) > 1:
        return False
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    plain = page.compression in (*_PLAIN, *_DEFLATE) and page.photometric in (0, 1, 2) and page.predictor in (1, 2)
    jpeg = page.compression == _JPEG and page.photometric in (1, 2, 6)
    return (
        (plain or jpeg)
        and page.dtype == np.uint8
        and page.bitspersample == 8
        and page.planarconfig == 1
        and page.samplesperpixel in (1, 3)
        and page.imagedepth == 1
        and page.tags.valueof(274, 1) == 1
        and not tif.is_imagej
        and tall * wide <= MOST_PART_PX
    )
