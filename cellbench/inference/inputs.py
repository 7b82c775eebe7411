"""Input files of `predict`: their pixel sizes, the intensity range they are read in, and ignored files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from cellbench.data.io.decode import printable_path
from cellbench.data.io.images import read_pixel_size
from cellbench.data.io.intensity import Range, format_range
from cellbench.data.io.metadata import PixelSize, same_size
from cellbench.data.scan import IgnoredFile
from cellbench.data.uniformity import find_pixel_size_inconsistencies
from cellbench.errors import CellbenchError, first_names
from cellbench.inference.trained_run import TrainedRun


def stated_pixel_sizes(images: Iterable[Path]) -> dict[Path, PixelSize]:
    """The pixel size that each file states; without files that state none or cannot be opened."""
    found = {}
    for path in images:
        with contextlib.suppress(CellbenchError):  # reported when it is segmented
            if (size := read_pixel_size(path)) is not None:
                found[path] = size
    return found


def describe_pixel_sizes(sizes: Mapping[Path, PixelSize], num: int, um_per_px: float | None, measured: bool) -> list[str]:
    """Remarks on the pixel sizes that files state, of ``num`` images.

    ``um_per_px``: the size used instead; ``measured``: whether cells are measured.
    """
    lines = [doubt.line for doubt in find_pixel_size_inconsistencies({printable_path(path): size for path, size in sizes.items()}, num)]
    if um_per_px is not None:
        other = [
            f"{printable_path(path)} ({size} um)"
            for path, size in sizes.items()
            if not (size.square and same_size(size.side_um, um_per_px))
        ]
        lines += (
            [f"--um-per-px {um_per_px:g} is used instead of the sizes that {len(other)} files state: {first_names(other)}."]
            if other
            else []
        )
    elif measured and sizes and len(sizes) < num:
        lines.append(
            f"{num - len(sizes)} of {num} images state no pixel size: their areas are in pixels. Give --um-per-px to set one size for all."
        )
    return lines


def describe_magnification(sizes: Mapping[Path, PixelSize], trained: TrainedRun, um_per_px: float | None) -> list[str]:
    """A remark on images of another magnification than the training images."""
    side = trained.preparation.um_per_px
    if side is None:
        return []
    learned = f"{trained.name} was trained on pixels of {side:.4g} um, and cells look larger or smaller in"
    if um_per_px is not None:
        return [] if same_size(um_per_px, side) else [f"{learned} these images of {um_per_px:g} um."]
    other = [f"{printable_path(path)} ({size} um)" for path, size in sizes.items() if not same_size(size.side_um, side)]
    return [f"{learned} {len(other)} images with other sizes: {first_names(other)}."] if other else []


def names_by_reason(left: Iterable[IgnoredFile]) -> dict[str, list[str]]:
    """The names of ignored files, by reason."""
    found: dict[str, list[str]] = {}
    for one in left:
        found.setdefault(one.reason, []).append(printable_path(one.path))
    return found


def parse_range(text: str) -> Range:
    """The black and white of ``--range``, like ``0,4095``. Raises CellbenchError."""
    try:
        black, white = (float(part) for part in text.split(","))
        if not (math.isfinite(black) and math.isfinite(white) and black < white):
            raise ValueError
    except ValueError:
        raise CellbenchError(f"--range {text}: expected BLACK,WHITE, the lower first, like 0,4095.") from None
    return black, white


def with_range(trained: TrainedRun, black_white: Range) -> tuple[TrainedRun, list[str]]:
    """The run, with this range for images of more than 8 bits; and a remark where it replaces another range."""
    reading = trained.preparation.reading
    given = replace(reading, int_range=black_white, float_range=black_white)
    known = [format_range(one) for one in (reading.int_range, reading.float_range) if one not in (None, black_white)]
    changed = replace(trained, preparation=replace(trained.preparation, reading=given))
    if not known:
        return changed, []
    return changed, [f"--range {format_range(black_white)} is used instead of {known[0]}, the range of {trained.name}'s training images."]
