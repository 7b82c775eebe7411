"""Scales the values of image files to 8-bit RGB with one black and white level for a whole dataset, never per image.

The range is a property of the camera. Scaled by its own maximum, an image whose exposure rises by a few per cent across a power of two would
become sixteen times darker. Images of 8 bits are always read unscaled, 0..255.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellbench.data.io.file_checks import FileError
from cellbench.errors import first_names

Range = tuple[float, float]
"""The values that become black and white."""

WHITES = (255, 4095, 16383, 65535)
"""White of 8, 12, 14 and 16 bits, the depths of cameras. A range that no file states ends at the first of these that no image exceeds."""
_DARK = 16
"""An image whose largest value is below white / 16 most likely has another depth: 12 bits read as 16 are 16 times too dark."""
_HOT_SHARE = 0.001
"""Share of pixels beyond twice the range: fewer are hot pixels or dust, more mean another depth."""
RANGE = "Give range = [BLACK, WHITE] on the dataset's card (`predict`: --range BLACK,WHITE)"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A note for the user on how an image was read; all images that it applies to have the same ``message``."""

    message: str
    detail: str = ""
    """The part that differs from image to image, such as its largest value."""


def format_notes(notes: Iterable[tuple[str, Note]]) -> list[str]:
    """Notes on many files as one line for each message, with the names of its files."""
    found: dict[str, list[str]] = {}
    for name, note in notes:
        found.setdefault(note.message, []).append(f"{name} ({note.detail})" if note.detail else name)
    return [f"{message}: {first_names(names)}." for message, names in found.items()]


@dataclass(frozen=True, kw_only=True)
class IntensityScaling:
    """How all images of a dataset are read. A trained run stores it, so that later images are read like its training images."""

    int_range: Range | None = None
    """For integers of more than 8 bits. None: no image had any; then the range that a file states applies, else 0..65535."""
    float_range: Range | None = None
    """For floats. None: the range that a file states, else 0..1, and images outside are refused."""
    channels: tuple[int, ...] = ()
    """Channels to read, counted from 0: one as grey or three as RGB. Empty: files must be grey or RGB, optionally with alpha."""

    def range_of(self, dtype: np.dtype, high: float, stated: Range | None) -> tuple[Range, bool]:
        """Black and white for an image of more than 8 bits whose largest value is ``high``, and whether they are assumed."""
        given = self.float_range if dtype.kind == "f" else self.int_range
        if given is not None:
            return given, False
        if dtype.kind == "f":
            return stated or (0.0, 1.0), False
        # Values beyond the stated range show that it means something else, such as a PNG's bits before they were spread to 16.
        return (stated, False) if stated is not None and high <= stated[1] else ((0.0, 65535.0), True)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`of` reads it back."""
        return {"int_range": self.int_range, "float_range": self.float_range, "channels": self.channels}

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None) -> IntensityScaling:
        """The inverse of :meth:`to_dict`; the default for None."""
        values: dict[str, Any] = {key: tuple(value) if value is not None else None for key, value in (facts or {}).items()}
        return cls(**values)


def white_for(high: float) -> float:
    """The white of the smallest depth that holds ``high``; 65535 beyond that.

    >>> white_for(200), white_for(3950), white_for(4108)
    (255, 4095, 16383)
    """
    return next((white for white in WHITES if high <= white), WHITES[-1])


def is_dark(low_high: tuple[float, float], black_white: Range) -> bool:
    """Whether an image uses so little of its range that another depth is likely. A constant black image does not count."""
    return low_high[0] < low_high[1] and (low_high[1] - black_white[0]) * _DARK < black_white[1] - black_white[0]


def format_range(black_white: Range) -> str:
    """A range as text.

    >>> format_range((0.0, 4095.0))
    '0..4095'
    """
    return f"{black_white[0]:.6g}..{black_white[1]:.6g}"


def scale_to_uint8(pixels: np.ndarray, reading: IntensityScaling, stated: Range | None = None) -> tuple[np.ndarray, list[Note]]:
    """(H, W, C) values of more than 8 bits as uint8, and notes; values beyond the range are clipped.

    Raises FileError for values whose black and white are unknown, and for an image far beyond the range, which has another depth.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind == "f" and not (np.isfinite(low) and np.isfinite(high)):
        raise FileError("holds values that are not finite, so it is no image of 0..1. Replace them")
    (black, white), assumed = reading.range_of(pixels.dtype, high, stated)
    if pixels.dtype.kind == "f" and (reading.float_range or stated) is None and (low < 0 or high > 1):
        raise FileError(f"holds floats outside 0..1, whose black and white are unknown. {RANGE}, or scale them to 0..1")
    if assumed and (low < 0 or high > 65535):
        raise FileError(f"holds values outside 0..65535, whose black and white are unknown. {RANGE}, or save it as 16-bit")
    notes: list[Note] = []
    span, shown = white - black, format_range((black, white))
    if low < black or high > white:
        far = np.count_nonzero((pixels > white + span) | (pixels < black - span)) / pixels.size
        if far > _HOT_SHARE:
            raise FileError(
                f"holds values from {low:.6g} to {high:.6g}, but images are read as {shown}: it has another depth. {RANGE}, or convert it"
            )
        share = max(float(np.count_nonzero((pixels > white) | (pixels < black)) / pixels.size), 0.0001)
        notes.append(Note(message=f"beyond the range {shown}, clipped", detail=f"{low:.6g} to {high:.6g}, {share:.2%} of it"))
    if assumed:
        notes.append(Note(message=f"read as {shown}, an assumption: neither the file nor the training images state its range"))
    elif stated is not None and stated != (black, white):
        notes.append(Note(message=f"read as {shown}, though the file states another range", detail=format_range(stated)))
    if is_dark((low, high), (black, white)):
        message = f"uses less than a sixteenth of the range {shown}: very dark, or of another depth"
        notes.append(Note(message=message, detail=f"up to {high:.6g}"))
    if pixels.dtype == np.uint16:
        table = (np.clip(np.arange(65536.0), black, white) - black) * (255 / span)
        return (table + 0.5).astype(np.uint8)[pixels], notes
    out = np.empty(pixels.shape, np.uint8)
    for channel in range(pixels.shape[2]):  # one channel at a time: float64 takes eight times the memory
        part = (np.clip(pixels[..., channel].astype(np.float64), black, white) - black) * (255 / span)
        out[..., channel] = (part + 0.5).astype(np.uint8)
    return out, notes
