"""Reads the regions of ImageJ and Fiji: a ``.roi`` file, or a ``.zip`` of them as its ROI manager saves it.

The format is that of ImageJ's ``RoiDecoder``: big-endian, a header of 64 bytes, then coordinates relative to the bounding box as 16-bit integers, and,
where the region has subpixel resolution, the same as absolute 32-bit floats. Coordinates are those of pixel corners: the rectangle 0, 0, 2, 2 covers
four pixels.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellbench.data.io.decode import printable_path
from cellbench.errors import CellbenchError, one_line, quote_name

POLYGON, RECT, OVAL, FREEHAND, TRACED = 0, 1, 2, 7, 8
NOT_AREAS = {3: "line", 4: "freehand line", 5: "polyline", 6: "empty region", 9: "angle", 10: "point"}
SUBPIXEL = 128
ELLIPSE = 3
"""The subtype of a freehand region that is a rotated ellipse."""
ARC_POINTS = 72
MOST_BYTES = 2**24
"""Of one region; more is damaged, or made to fill the memory."""
MOST_REGIONS = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Roi:
    """One region: rings (n, 2) of x and y in pixels; a point lies inside where an odd number of rings encloses it."""

    name: str
    rings: tuple[np.ndarray, ...]


def read_rois(path: Path) -> tuple[list[Roi], list[str]]:
    """The areas of a file, and what else it holds (lines, points), by kind. Raises CellbenchError."""
    shown = printable_path(path)
    try:
        if not zipfile.is_zipfile(path):
            return _sorted([(path.stem, path.read_bytes())])
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".roi")]
            if not entries and archive.namelist():
                raise CellbenchError(f"{shown}: holds no .roi file. Save it by ImageJ's ROI manager: More > Save.")
            if len(entries) > MOST_REGIONS:
                raise CellbenchError(f"{shown}: holds {len(entries):,} regions; {MOST_REGIONS:,} are the most.")
            if large := next((entry for entry in entries if entry.file_size > MOST_BYTES), None):
                raise CellbenchError(f"{shown}: {quote_name(large.filename)} has {large.file_size / 1e6:.0f} MB, too much for one region.")
            return _sorted([(entry.filename, archive.read(entry)) for entry in entries])
    except CellbenchError:
        raise
    except OSError as error:
        raise CellbenchError(f"{shown}: cannot be opened ({error.strerror or one_line(error)}). Check the name and the rights.") from None
    except (ValueError, IndexError, struct.error, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise CellbenchError(f"{shown}: cannot be read as ImageJ regions ({one_line(error)[:120]}). Save it again.") from None


def _sorted(files: list[tuple[str, bytes]]) -> tuple[list[Roi], list[str]]:
    areas, others = [], []
    for name, data in files:
        found = decode_roi(data, name)
        if isinstance(found, Roi):
            areas.append(found)
        else:
            others.append(found)
    return areas, others


def decode_roi(data: bytes, name: str = "") -> Roi | str:
    """The region of a ``.roi`` file's bytes, or what it is if it is no area. Raises ValueError, IndexError and struct.error for damaged bytes."""
    if data[:4] != b"Iout":
        raise ValueError(f"{quote_name(name)} is no region of ImageJ")
    kind, subtype, options = data[6], *struct.unpack_from(">hh", data, 48)
    top, left, bottom, right = struct.unpack_from(">hhhh", data, 8)
    (num,) = struct.unpack_from(">H", data, 16)
    (num_floats,) = struct.unpack_from(">i", data, 36)
    if num_floats > 0:
        return Roi(name=name, rings=_path_rings(struct.unpack_from(f">{num_floats}f", data, 64)))
    if kind in NOT_AREAS:
        return NOT_AREAS[kind]
    x, y, width, height = left, top, right - left, bottom - top
    exact = struct.unpack_from(">ffff", data, 18)
    if kind in (RECT, OVAL):
        if options & SUBPIXEL:
            x, y, width, height = exact
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float) if kind == RECT else unit_circle() / 2 + 0.5
        return Roi(name=name, rings=(corners * np.array([width, height]) + np.array([x, y]),))
    if kind == FREEHAND and subtype == ELLIPSE:
        return Roi(name=name, rings=(_ellipse(*exact, *struct.unpack_from(">f", data, 52)),))
    if kind not in (POLYGON, FREEHAND, TRACED):
        raise ValueError(f"{quote_name(name)} is of the unknown kind {kind}")
    if num == 0:  # more points than two bytes can count
        (num,) = struct.unpack_from(">i", data, 18)
    if options & SUBPIXEL:
        flat = np.frombuffer(data, ">f4", 2 * num, 64 + 4 * num)
        return Roi(name=name, rings=(flat.reshape(2, num).T.astype(float),))
    flat = np.frombuffer(data, ">i2", 2 * num, 64)
    return Roi(name=name, rings=(flat.reshape(2, num).T + np.array([left, top], float),))


def unit_circle() -> np.ndarray:
    """Points (N, 2) on the circle of radius 1 around 0."""
    angle = np.linspace(0, 2 * np.pi, ARC_POINTS, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _ellipse(x1: float, y1: float, x2: float, y2: float, ratio: float) -> np.ndarray:
    """An ellipse by the ends of its long axis, and the ratio of the short to the long one."""
    axis, centre = np.array([x2 - x1, y2 - y1]) / 2, np.array([x1 + x2, y1 + y2]) / 2
    across = np.array([-axis[1], axis[0]]) * ratio
    return unit_circle() @ np.stack([axis, across]) + centre


def _path_rings(numbers: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """The rings of a composite region: segments of a path, each a kind (move, line, quadratic, cubic, close) and its points."""
    rings: list[list[tuple[float, float]]] = []
    at, sizes = 0, {0: 2, 1: 2, 2: 4, 3: 6, 4: 0}
    while at < len(numbers):
        kind = int(numbers[at])
        if kind not in sizes or at + sizes[kind] >= len(numbers):
            raise ValueError("a composite region has a damaged path")
        points = [(numbers[k], numbers[k + 1]) for k in range(at + 1, at + 1 + sizes[kind], 2)]
        at += 1 + sizes[kind]
        if kind == 0:
            rings.append(points)
        elif kind == 1 and rings:
            rings[-1] += points
        elif points and rings:
            rings[-1] += _curve([rings[-1][-1], *points])
    return tuple(np.array(ring) for ring in rings if len(ring) > 2)


def _curve(controls: list[tuple[float, float]], steps: int = 12) -> list[tuple[float, float]]:
    """Points on a Bezier curve, without its first."""
    degree, out = len(controls) - 1, []
    for t in np.linspace(0, 1, steps + 1)[1:]:
        weights = [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)]
        out.append(tuple(float(sum(w * c[axis] for w, c in zip(weights, controls, strict=True))) for axis in (0, 1)))
    return [(x, y) for x, y in out]
