"""What the bytes of a PNG, JPEG, JPEG 2000 or BMP file say beside its pixels, and the damage that decoders do not detect."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

_PNG_CHECKED = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")  # a damaged text chunk does not affect pixels


class FileError(Exception):
    """A fault of the open file and its remedy, without the file's name, which `open_image` adds."""


def png_chunks(fp: BinaryIO, num_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, length) of each chunk's data up to IEND."""
    at, name = 8, b""
    while name != b"IEND":
        fp.seek(at)
        head = fp.read(8)
        length, name = struct.unpack(">I4s", head) if len(head) == 8 else (num_bytes, b"")
        if at + 12 + length > num_bytes:
            raise FileError("is truncated: it ends within its pixels. Copy it again")
        yield name, at + 8, length
        at += 12 + length


def check_png(fp: BinaryIO, num_bytes: int) -> None:
    """Checks the checksums, because Pillow ignores those of the pixels. 1 GB/s: 3 ms for a smear of 3 MB."""
    for name, offset, length in png_chunks(fp, num_bytes):
        if name in _PNG_CHECKED:
            fp.seek(offset - 4)
            if zlib.crc32(fp.read(length + 4)) != int.from_bytes(fp.read(4), "big"):
                raise FileError(f"is damaged: the checksum of its {name.decode()} part is wrong. Copy it again")


def check_png_stream(fp: BinaryIO, num_bytes: int) -> None:
    """The stream must inflate to every row of the image. libpng checks that too, but inflates an endless stream to its end."""
    fp.seek(16)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", fp.read(13))
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = adam7 if interlaced else [(0, 0, 1, 1)]
    sizes = [(-(-max(width - x, 0) // dx), -(-max(height - y, 0) // dy)) for x, y, dx, dy in passes]
    missing = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns)
    inflate = zlib.decompressobj()
    for name, offset, length in png_chunks(fp, num_bytes):
        if name == b"IDAT":
            fp.seek(offset)
            data = fp.read(length)
            while data and missing > 0:
                missing -= len(inflate.decompress(data, 2**20))
                data = inflate.unconsumed_tail
    if missing > 0 and missing > len(inflate.flush()):  # where rows were found, the rest may be endless
        raise FileError("is truncated: its data end before its last row. Copy it again")


def png_bits(fp: BinaryIO, num_bytes: int) -> int:
    """The significant bits of each value by a PNG's sBIT; 0 without one."""
    for name, offset, length in png_chunks(fp, num_bytes):
        if name == b"sBIT" and 0 < length <= 4:
            fp.seek(offset)
            return max(fp.read(min(length, 3)))
        if name == b"IDAT":
            break
    return 0


def bmp_alpha(fp: BinaryIO) -> np.ndarray | None:
    """The fourth bytes (H, W) of a BMP with 32 bits per pixel, which Pillow drops; None if there are none, or all are equal and so unused."""
    fp.seek(0)
    head = fp.read(34)
    (start,), (width, height) = struct.unpack_from("<I", head, 10), struct.unpack_from("<ii", head, 18)
    if struct.unpack_from("<I", head, 14)[0] < 40 or struct.unpack_from("<HI", head, 28) != (32, 0):
        return None
    fp.seek(start)
    data = fp.read(4 * width * abs(height))
    if len(data) < 4 * width * abs(height):
        return None  # decoding the colours raises the error
    fourth = np.frombuffer(data, np.uint8).reshape(abs(height), width, 4)[..., 3]
    return np.ascontiguousarray(fourth[::-1] if height > 0 else fourth) if fourth.min() < fourth.max() else None


def _jpeg2000_size(fp: BinaryIO, num_bytes: int) -> tuple[int, list[int]]:
    """The start of a JPEG 2000 codestream, and the bits of each component (negative: signed), by its SIZ marker."""
    fp.seek(0)
    head = fp.read(min(num_bytes, 2**20))
    start = head.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(head) < start + 42:
        raise FileError("has no JPEG 2000 data at its beginning. Save it again")
    (num,) = struct.unpack_from(">H", head, start + 40)
    depths = head[start + 42 : start + 42 + 3 * num : 3]
    return start, [(depth & 127) + 1 if depth < 128 else -(depth & 127) - 1 for depth in depths]


def jpeg2000_bits(fp: BinaryIO, num_bytes: int) -> int:
    """The bits of each value. Raises FileError for those that Pillow cuts: colours of more than 8 bits, less than 8, signed."""
    bits = _jpeg2000_size(fp, num_bytes)[1]
    if len(set(bits)) != 1 or not (8 <= bits[0] <= 16) or (len(bits) > 1 and bits[0] != 8):
        raise FileError(
            f"is a JPEG 2000 of {', '.join(map(str, bits[:6]))} bits a channel. Supported are 8, and up to 16 in grey. Save it as PNG or TIFF"
        )
    return bits[0]


def check_jpeg2000(fp: BinaryIO, num_bytes: int, any_channels: bool) -> None:
    """The codestream must have its end marker, which occurs nowhere else in it; a 2nd or 4th channel must be marked as alpha."""
    start, bits = _jpeg2000_size(fp, num_bytes)
    fp.seek(start)
    if fp.read().rfind(b"\xff\xd9") < 0:
        raise FileError("is truncated: its JPEG 2000 data have no end marker. Copy it again")
    if any_channels or len(bits) not in (2, 4):
        return
    fp.seek(0)
    head = fp.read(start)
    at = head.find(b"cdef")
    rows = struct.unpack_from(f">{3 * len(bits)}H", head, at + 6) if 0 <= at <= len(head) - 6 - 6 * len(bits) else ()
    if (len(bits) - 1, 1) not in zip(rows[::3], rows[1::3], strict=True):
        raise FileError(f"has {len(bits)} channels, of which the last has no stated meaning. Save it as grey or RGB")


def check_jpeg(data: bytes) -> tuple[int, int]:
    """(height, width) by the frame header.

    The scans must have an end marker (a file padded with zeros has none), and not be so many that decoding takes minutes.
    """
    at, frame = 2, (0, 0)
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1]) != 0xDA:
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = struct.unpack_from(">HH", data, at + 5)
        at += 1 if marker == 0xFF else 2 if marker == 1 or 0xD0 <= marker <= 0xD8 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    end = data.find(b"\xff\xd9", at)
    if end < 0:
        raise FileError("is truncated: its JPEG data have no end marker. Copy it again")
    if data.count(b"\xff\xda", at, end) > 200:  # usual are 1 to 12; each is a pass over the whole picture
        raise FileError("has more than 200 JPEG scans. Save it again")
    return frame
