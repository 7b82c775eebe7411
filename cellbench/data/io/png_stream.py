"""Writes a PNG row by row, for images that do not fit into memory, with a text chunk. Pillow and OpenCV write whole images only."""

from __future__ import annotations

import os
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import PngImagePlugin

_COLOUR = {1: 0, 3: 2}  # channels: PNG's colour type
TEXT_KEY = "cellbench"
"""The key of the text in the file."""


class PngWriter:
    """Writes rows of (H, W) or (H, W, 3) uint8 into an open file. Call ``end`` after the last."""

    def __init__(self, file: BinaryIO, size_px: tuple[int, int], channels: int, text: str) -> None:
        self._file, self._left, self._channels = file, size_px[0], channels
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size_px[1], size_px[0], 8, _COLOUR[channels], 0, 0, 0))
        self._chunk(b"iTXt", TEXT_KEY.encode() + b"\0\0\0\0\0" + text.encode("utf-8"))
        self._packer = zlib.compressobj(1)

    def add(self, rows: np.ndarray) -> None:
        """The next rows."""
        flat = rows.reshape(len(rows), -1)
        # Each row begins with its filter: 1, the difference to the left pixel, compresses masks and images well.
        packed = np.empty((len(flat), flat.shape[1] + 1), np.uint8)
        packed[:, 0] = 1
        packed[:, 1 : 1 + self._channels] = flat[:, : self._channels]
        np.subtract(flat[:, self._channels :], flat[:, : -self._channels], out=packed[:, 1 + self._channels :])
        self._left -= len(rows)
        self._data(self._packer.compress(packed.tobytes()))

    def end(self) -> None:
        """Finishes the file."""
        assert self._left == 0, self._left
        self._data(self._packer.flush())
        self._chunk(b"IEND", b"")

    def _data(self, data: bytes) -> None:
        if data:
            self._chunk(b"IDAT", data)

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def read_png_text(path: str | os.PathLike[str]) -> str | None:
    """The text chunk of a PNG that was written here; None for any other file."""
    try:
        with open(path, "rb") as file:
            return PngImagePlugin.PngImageFile(file).info.get(TEXT_KEY)
    except (OSError, SyntaxError, ValueError, struct.error):
        return None
