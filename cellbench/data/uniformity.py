"""Compares the image files of a set: decides the range and channels with which all are read, and reports where files differ.

The range is decided over all images of a set, whatever the split or `--limit`: by the card, else by the range that all files state, else by the
largest value in any file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cellbench.data.io import images
from cellbench.data.io.images import ImageFacts
from cellbench.data.io.intensity import IntensityScaling, Range, format_range, is_dark, white_for
from cellbench.data.io.metadata import PixelSize, same_size
from cellbench.data.progress import map_files
from cellbench.data.scan import FileWarning
from cellbench.errors import CellbenchError
from cellbench.file_cache import FileFactCache


def read_all_image_facts(paths: Sequence[Path], channels: tuple[int, ...] = ()) -> dict[Path, ImageFacts]:
    """The facts of every readable image. Unreadable ones raise their errors when opened later.

    Cached by size and time of change; the first time, files of more than 8 bits are decoded, for other files only the header is read.
    """
    name = f"image-facts{'-'.join(('', *map(str, channels)))}"
    found: dict[Path, ImageFacts] = {}
    with FileFactCache(name, lambda path: images.read_image_facts(path, channels).to_dict()) as cache:

        def read(path: Path) -> None:
            try:
                found[path] = ImageFacts.of(cache[path])
            except (CellbenchError, OSError):
                return

        map_files(read, paths, "comparing depths", hide_below=100)
    return {path: found[path] for path in paths if path in found}


def decide_scaling(
    facts: Iterable[ImageFacts], card_range: Range | None = None, channels: tuple[int, ...] = ()
) -> tuple[IntensityScaling, list[str]]:
    """The scaling of a set's images, and notes. ``card_range``: black and white by the dataset's card."""
    wide = [one for one in facts if one.dtype != "uint8"]
    integer, decimal = [one for one in wide if not one.is_float], [one for one in wide if one.is_float]
    notes = [f"of each file the channels {', '.join(map(str, channels))} (counted from 0) are read, as the card says"] if channels else []
    if card_range is not None:
        kinds = "more than 8 bits" if wide else "more than 8 bits, of which there are none"
        notes.append(f"black and white of images of {kinds}: {format_range(card_range)}, as the card says")
        int_range, float_range = card_range if integer else None, card_range if decimal else None
        return IntensityScaling(int_range=int_range, float_range=float_range, channels=channels), notes
    int_range, float_range = _common_range(integer), _common_range(decimal)
    if integer:
        high = max(one.high for one in integer)
        how = "as their files state" if int_range is not None else f"by the largest value of all of them, {high:.6g}"
        int_range = int_range or (0.0, float(white_for(high)))
        notes.append(f"black and white of the {len(integer)} images of more than 8 bits: {format_range(int_range)}, {how}")
    if decimal:
        how = "as their files state" if float_range is not None else "the usual range, which holds all of them"
        if float_range is None and all(one.low >= 0 and one.high <= 1 for one in decimal):
            float_range = (0.0, 1.0)
        if float_range is not None:
            notes.append(f"black and white of the {len(decimal)} images of floats: {format_range(float_range)}, {how}")
    return IntensityScaling(int_range=int_range, float_range=float_range, channels=channels), notes


def _common_range(facts: Sequence[ImageFacts]) -> Range | None:
    """The range that all files state and no image exceeds."""
    stated = {one.stated for one in facts}
    if len(stated) != 1 or (only := stated.pop()) is None:
        return None
    return only if all(only[0] <= one.low and one.high <= only[1] for one in facts) else None


def common_pixel_size(facts: Iterable[ImageFacts]) -> float | None:
    """The side of a pixel in micrometres, if all stated sizes agree."""
    sides = [one.pixel.side_um for one in facts if one.pixel is not None]
    return sides[0] if sides and all(same_size(side, sides[0]) for side in sides) else None


def find_inconsistencies(facts: Mapping[str, ImageFacts], reading: IntensityScaling) -> list[FileWarning]:
    """Where the images of a set, by name, differ in the meaning of their values or pixels."""
    sizes = {name: one.pixel for name, one in facts.items() if one.pixel is not None}
    return [*_depth_inconsistencies(facts, reading), *find_pixel_size_inconsistencies(sizes, len(facts))]


def _depth_inconsistencies(facts: Mapping[str, ImageFacts], reading: IntensityScaling) -> list[FileWarning]:
    found: list[FileWarning] = []

    def warn(kind: str, message: str, names: Iterable[str]) -> None:
        if names := tuple(names):
            found.append(FileWarning(kind=kind, message=message, names=names))

    kinds = Counter(one.bits for one in facts.values())
    if len(kinds) > 1:
        counted = " and ".join(f"{kind} ({num})" for kind, num in kinds.most_common())
        message = f"Images of {counted} are mixed, and equal greys in them may not mean the same light. Export all with one depth"
        warn("depth", message, (name for name, one in facts.items() if one.bits != kinds.most_common(1)[0][0]))
    wide = {name: one for name, one in facts.items() if one.dtype != "uint8"}
    integer = {name: one for name, one in wide.items() if not one.is_float}
    if (limits := reading.int_range) is not None:
        message = f"Values beyond the range {format_range(limits)}, which are clipped. Correct the range on the card"
        warn("beyond range", message, (name for name, one in integer.items() if one.low < limits[0] or one.high > limits[1]))
    white = {name: white_for(one.high) for name, one in integer.items()}
    groups = Counter(white.values())
    if len(groups) > 1 and _common_range(list(integer.values())) is None:
        counted = ", ".join(f"up to {most} ({groups[most]})" for most in sorted(groups))
        message = f"The largest values in images of more than 8 bits fit different depths: {counted}. If the camera has one depth, name it on the card"
        message += ", such as range = [0, 4095]; else export all with one depth"
        warn("range", message, (name for name, most in white.items() if most != groups.most_common(1)[0][0]))
    else:
        message = "Images that use less than a sixteenth of the range they are read in: very dark, or of another depth"
        ranges = {name: reading.range_of(np.dtype(one.dtype), one.high, one.stated)[0] for name, one in wide.items()}
        warn("range", message, (name for name, one in wide.items() if is_dark((one.low, one.high), ranges[name])))
    stated = Counter(one.stated for one in wide.values() if one.stated is not None)
    num_silent = len(wide) - sum(stated.values())
    used = (reading.int_range, reading.float_range)
    if stated and (len(stated) > 1 or num_silent or any(one not in used for one in stated)):
        shown = [f"{format_range(one)} ({num})" for one, num in stated.most_common()] + (["nothing"] if num_silent else [])
        message = f"The range that the files state is not the range they are read in: {', '.join(shown)}"
        found.append(FileWarning(kind="stated range", message=message, names=tuple(n for n, one in wide.items() if one.stated not in used)))
    warn("transparent", "Images with transparent parts, which are laid over white", (name for name, one in facts.items() if one.clear))
    return found


def find_pixel_size_inconsistencies(stated: Mapping[str, PixelSize], num: int) -> list[FileWarning]:
    """Where the pixel sizes that files state, by name, differ among themselves or within a file; ``num``: images in all."""
    if not stated:
        return []
    groups: dict[float, list[str]] = defaultdict(list)
    for name, size in stated.items():
        groups[next((known for known in groups if same_size(known, size.side_um)), size.side_um)].append(name)
    found, usual = [], max(groups, key=lambda side: len(groups[side]))
    if len(groups) > 1:
        missing = num - len(stated)
        counted = ", ".join(f"{side:.4g} um ({len(names)})" for side, names in sorted(groups.items()))
        message = f"The files state different pixel sizes: {counted}{f', not stated ({missing})' if missing else ''}. "
        message += "Cells of one size have different sizes in pixels; resample to one"
        most = sum(len(names) == len(groups[usual]) for names in groups.values())  # if several are equally frequent, all are named
        odd = [name for side, names in groups.items() if side != usual or most > 1 for name in names]
        found.append(FileWarning(kind="pixel size", message=message, names=tuple(odd)))
    if oblong := tuple(name for name, size in stated.items() if not size.square):
        message = (
            f"The files state pixels that are not square, such as {stated[oblong[0]]} um (width x height). Shapes are distorted; resample"
        )
        found.append(FileWarning(kind="oblong pixels", message=message, names=oblong))
    if torn := tuple(name for name, size in stated.items() if size.contradicted):
        message = f"The file states two pixel sizes, such as {stated[torn[0]].contradicted}; the second is used"
        found.append(FileWarning(kind="pixel size", message=message, names=torn))
    return found
