"""Small pictures and masks, and the files they are drawn into, for the tests of the picture door."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.data.io.images import read_image
from cellbench.errors import CellbenchError

RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (30, 41, 3), dtype=np.uint8)
GREY = RGB[..., 0].copy()
IDS = RNG.integers(0, 40_000, (30, 41), dtype=np.uint16)
WIDE = RNG.integers(0, 65_536, (30, 41, 3), dtype=np.uint16)


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path: Path, array: np.ndarray, colour_type: int, *, rows: int | None = None, before: bytes = b"", after: bytes = b"") -> Path:
    """A PNG written by hand from the specification: 8 or 16 bits, no filter; ``rows`` fewer than there should be on request."""
    height, width = array.shape[:2]
    lines = b"".join(b"\0" + line.astype(f">u{array.itemsize}").tobytes() for line in array[:rows])
    head = struct.pack(">IIBBBBB", width, height, 8 * array.itemsize, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", zlib.compress(lines)) + after + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def refused(path, read=read_image, **options) -> str:
    with pytest.raises(CellbenchError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert Path(path).name[:40] in text
    return text
