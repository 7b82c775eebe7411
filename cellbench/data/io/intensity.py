"""How the numbers in image files become 8-bit RGB: one black and one white for a whole data set, never those of a single image.

The range is a property of the camera. Scaled by its own maximum, an image whose exposure rises by a few per cent across a power of two would
turn sixteen times darker. Images of 8 bits are always read as they are, 0..255.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellbench.data.io.decode import FileError

Range = tuple[float, float]
"""The numbers that are read as black and as white."""

WHITES = (255, 4095, 16383, 65535)
"""White of 8, 12, 14 and 16 bits, the depths of cameras: a range that no file states ends at the first of these that no image exceeds."""
_DARK = 16
"""An image whose largest number is below white / 16 was most likely taken with another depth: 12 bits read as 16 are 16 times too dark."""
_HOT_SHARE = 0.001
"""Of pixels beyond twice the range: fewer are hot pixels or dust, more are an image of another depth."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something a person should know about how one image was read: the same ``said`` for all images that it holds for."""

    said: str
    detail: str = ""
    """What differs from image to image, such as its largest number."""


def format_notes(notes: Iterable[tuple[str, Note]]) -> list[str]:
    """Notes on many files as one line for each kind, with the names of its files."""
    found: dict[str, list[str]] = {}
    for name, note in notes:
        found.setdefault(note.said, []).append(f"{name} ({note.detail})" if note.detail else name)
    return [f"{said}: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}." for said, names in found.items()]


@dataclass(frozen=True, kw_only=True)
class IntensityScaling:
    """What all images of a data set are read by. A trained run keeps it, so that later images are read as those that it learned from."""

    int_range: Range | None = None
    """Of whole numbers of more than 8 bits. None: no image had any; then the range that a file states holds for it, else 0..65535."""
    float_range: Range | None = None
    """Of decimal numbers. None: what a file states holds for it, else 0..1, and images outside that are refused."""
    channels: tuple[int, ...] = ()
    """Which of a file's channels are read, counted from 0: one as grey or three as RGB. Empty: files must be grey or RGB, perhaps with alpha."""

    def range_of(self, dtype: np.dtype, high: float, stated: Range | None) -> tuple[Range, bool]:
        """Black and white for an image of more than 8 bits whose largest number is ``high``, and whether they are only assumed."""
        given = self.float_range if dtype.kind == "f" else self.int_range
        if given is not None:
            return given, False
        if dtype.kind == "f":
            return stated or (0.0, 1.0), False
        # Numbers beyond what a file states show that the statement is of something else, such as a PNG's bits before they were spread to 16.
        return (stated, False) if stated is not None and high <= stated[1] else ((0.0, 65535.0), True)

    def told(self) -> dict[str, Any]:
        """As JSON can hold it; :meth:`of` reads it back."""
        return {"int_range": self.int_range, "float_range": self.float_range, "channels": self.channels}

    @classmethod
    def of(cls, told: Mapping[str, Any] | None) -> IntensityScaling:
        """What :meth:`told` gave, also after its way through JSON; of None, the default."""
        return cls(**{key: tuple(value) if value is not None else None for key, value in (told or {}).items()})


def white_for(high: float) -> float:
    """The white of the smallest depth that holds ``high``; 65535 beyond that.

    >>> white_for(200), white_for(3950), white_for(4108)
    (255, 4095, 16383)
    """
    return next((white for white in WHITES if high <= white), WHITES[-1])


def is_dark(low_high: tuple[float, float], black_white: Range) -> bool:
    """Whether an image uses so little of its range that another depth is likely. A constant black image is not."""
    return low_high[0] < low_high[1] and (low_high[1] - black_white[0]) * _DARK < black_white[1] - black_white[0]


def format_range(black_white: Range) -> str:
    """A range in words.

    >>> shown((0.0, 4095.0))
    '0..4095'
    """
    return f"{black_white[0]:.6g}..{black_white[1]:.6g}"


def scale_to_uint8(pixels: np.ndarray, reading: IntensityScaling, stated: Range | None = None) -> tuple[np.ndarray, list[Note]]:
    """(H, W, C) numbers of more than 8 bits as uint8 with what should be known about it; numbers beyond the range become black or white.

    Raises FileError for numbers whose black and white are unknown, and for an image far beyond the range, which is of another depth.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind == "f" and not (np.isfinite(low) and np.isfinite(high)):
        raise FileError("holds numbers that are not finite, so it is not an image of 0..1. Replace them")
    (black, white), assumed = reading.range_of(pixels.dtype, high, stated)
    if pixels.dtype.kind == "f" and (reading.float_range or stated) is None and (low < 0 or high > 1):
        raise FileError(
            "holds decimal numbers outside 0..1, whose black and white are unknown. Give range = [BLACK, WHITE] on the dataset's card, "
            "or scale them to 0..1"
        )
    if assumed and (low < 0 or high > 65535):
        raise FileError(
            "holds numbers outside 0..65535, whose black and white are unknown. Give range = [BLACK, WHITE] on the dataset's card, "
            "or save it as 16-bit"
        )
    notes, span = [], white - black
    if low < black or high > white:
        far = np.count_nonzero((pixels > white + span) | (pixels < black - span)) / pixels.size
        if far > _HOT_SHARE:
            raise FileError(
                f"holds numbers from {low:.6g} to {high:.6g}, where images are read as {format_range((black, white))}: it has another depth. "
                "Convert it, or give range = [BLACK, WHITE] on the dataset's card (`predict`: --range BLACK,WHITE)"
            )
        share = np.count_nonzero((pixels > white) | (pixels < black)) / pixels.size
        notes.append(
            Note(
                said=f"beyond the range {format_range((black, white))}, clipped",
                detail=f"{low:.6g} to {high:.6g}, {max(share, 0.0001):.2%} of it",
            )
        )
    if assumed:
        notes.append(
            Note(said=f"read as {format_range((black, white))}, an assumption: neither the file nor the images learned from say its range")
        )
    elif stated is not None and stated != (black, white):
        notes.append(
            Note(said=f"read as {format_range((black, white))}, though the file states another range", detail=format_range(stated))
        )
    if is_dark((low, high), (black, white)):
        notes.append(
            Note(
                said=f"uses less than a sixteenth of the range {format_range((black, white))}: very dark, or of another depth",
                detail=f"up to {high:.6g}",
            )
        )
    if pixels.dtype == np.uint16:
        table = (np.clip(np.arange(65536.0), black, white) - black) * (255 / span)
        return (table + 0.5).astype(np.uint8)[pixels], notes
    out = np.empty(pixels.shape, np.uint8)
    for channel in range(pixels.shape[2]):  # one at a time: float64 takes eight times the memory
        part = (np.clip(pixels[..., channel].astype(np.float64), black, white) - black) * (255 / span)
        out[..., channel] = (part + 0.5).astype(np.uint8)
    return out, notes
