"""What the image files of a set hold, compared: the one range and the channels that all are read by, and where the files differ.

The range is decided over all images of a set, whatever the split or `--limit`: by the card, else by what all files state alike, else by the
largest number in any of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cellbench.data.io import images
from cellbench.data.io.images import ImageFacts
from cellbench.data.io.intensity import IntensityScaling, Range, format_range, is_dark, white_for
from cellbench.data.io.metadata import PixelSize, same_size
from cellbench.data.scan import FileWarning
from cellbench.errors import CellbenchError
from cellbench.file_cache import FileFactCache


def read_all_image_facts(paths: Sequence[Path], channels: tuple[int, ...] = ()) -> dict[Path, ImageFacts]:
    """The facts of every image that can be read; what is wrong with the others is for those to say who use them.

    Remembered by size and time of change; the first time, files of more than 8 bits are decoded, of the others only the header is read.
    """
    known = f"image-facts{'-'.join(('', *map(str, channels)))}"
    found: dict[Path, ImageFacts] = {}
    with FileFactCache(known, lambda path: images.read_image_facts(path, channels).told()) as remembered:

        def look(path: Path) -> None:
            try:
                found[path] = ImageFacts.of(remembered[path])
            except (CellbenchError, OSError):
                return

        with ThreadPoolExecutor(2) as pool:  # decoding frees the interpreter's lock
            bar = tqdm(
                pool.map(look, paths), desc="comparing depths", total=len(paths), unit="image", leave=False, disable=len(paths) < 100
            )
            for _ in bar:
                pass
    return {path: found[path] for path in paths if path in found}


def decide_scaling(
    facts: Iterable[ImageFacts], card_range: Range | None = None, channels: tuple[int, ...] = ()
) -> tuple[IntensityScaling, list[str]]:
    """What a set's images are read by, and that in words. ``card_range``: black and white by the dataset's card."""
    found = list(facts)
    wide = [one for one in found if one.dtype != "uint8"]
    whole, decimal = [one for one in wide if not one.dtype.startswith("float")], [one for one in wide if one.dtype.startswith("float")]
    said = [f"of each file the channels {', '.join(map(str, channels))} (counted from 0) are read, as the card says"] if channels else []
    if card_range is not None:
        kinds = "more than 8 bits" if wide else "more than 8 bits, of which there are none"
        said.append(f"black and white of images of {kinds}: {format_range(card_range)}, as the card says")
        return IntensityScaling(
            int_range=card_range if whole else None, float_range=card_range if decimal else None, channels=channels
        ), said
    int_range, float_range = _agreed(whole), _agreed(decimal)
    if whole:
        high = max(one.high for one in whole)
        how = "as their files state" if int_range is not None else f"by the largest number of all of them, {high:.6g}"
        int_range = int_range or (0.0, float(white_for(high)))
        said.append(f"black and white of the {len(whole)} images of more than 8 bits: {format_range(int_range)}, {how}")
    if decimal:
        how = "as their files state" if float_range is not None else "the usual range, which holds all of them"
        if float_range is None and all(one.low >= 0 and one.high <= 1 for one in decimal):
            float_range = (0.0, 1.0)
        if float_range is not None:
            said.append(f"black and white of the {len(decimal)} images of decimal numbers: {format_range(float_range)}, {how}")
    return IntensityScaling(int_range=int_range, float_range=float_range, channels=channels), said


def _agreed(facts: Sequence[ImageFacts]) -> Range | None:
    """The range that all state alike and no image exceeds."""
    stated = {one.stated for one in facts}
    if len(stated) != 1 or (only := stated.pop()) is None:
        return None
    return only if all(only[0] <= one.low and one.high <= only[1] for one in facts) else None


def common_pixel_size(facts: Iterable[ImageFacts]) -> float | None:
    """The side of a pixel, in micrometres, of a set whose images state one size; None where they state several or none."""
    sides = [one.pixel.side_um for one in facts if one.pixel is not None]
    return sides[0] if sides and all(same_size(side, sides[0]) for side in sides) else None


def find_inconsistencies(facts: Mapping[str, ImageFacts], reading: IntensityScaling) -> list[FileWarning]:
    """Where the images of a set, by name, differ in what their numbers or pixels mean."""
    sizes = {name: one.pixel for name, one in facts.items() if one.pixel is not None}
    return [*_depths(facts, reading), *find_pixel_size_inconsistencies(sizes, len(facts))]


def _depths(facts: Mapping[str, ImageFacts], reading: IntensityScaling) -> list[FileWarning]:
    found = []
    kinds = Counter(one.bits for one in facts.values())
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        counted = " and ".join(f"{kind} ({num})" for kind, num in kinds.most_common())
        said = f"Images of {counted} are mixed, and equal greys in them may not mean the same light. Export all with one depth"
        found.append(FileWarning(kind="depth", said=said, names=tuple(name for name, one in facts.items() if one.bits != usual)))
    wide = {name: one for name, one in facts.items() if one.dtype != "uint8"}
    whole = {name: one for name, one in wide.items() if not one.dtype.startswith("float")}
    if reading.int_range is not None:
        beyond = [name for name, one in whole.items() if one.low < reading.int_range[0] or one.high > reading.int_range[1]]
        if beyond:
            said = f"Numbers beyond the range {format_range(reading.int_range)}, which are clipped. Correct the range on the card"
            found.append(FileWarning(kind="beyond range", said=said, names=tuple(beyond)))
    white = {name: white_for(one.high) for name, one in whole.items()}
    if len(set(white.values())) > 1 and _agreed(list(whole.values())) is None:
        usual = Counter(white.values()).most_common(1)[0][0]
        groups = Counter(white.values())
        counted = ", ".join(f"up to {most} ({groups[most]})" for most in sorted(groups))
        said = f"The largest numbers in images of more than 8 bits fit different depths: {counted}. If the camera has one depth, name it on the card"
        said += ", such as range = [0, 4095]; else export all with one depth"
        found.append(FileWarning(kind="range", said=said, names=tuple(name for name, most in white.items() if most != usual)))
    elif dark := [
        name for name, one in wide.items() if is_dark((one.low, one.high), reading.range_of(np.dtype(one.dtype), one.high, one.stated)[0])
    ]:
        said = "Images that use less than a sixteenth of the range they are read in: very dark, or of another depth"
        found.append(FileWarning(kind="range", said=said, names=tuple(dark)))
    stated = Counter(one.stated for one in wide.values() if one.stated is not None)
    differ = len(stated) > 1 or (stated and len(wide) > sum(stated.values()))
    if stated and (differ or any(one != reading.int_range and one != reading.float_range for one in stated)):
        counted = ", ".join(
            [
                *(f"{format_range(one)} ({num})" for one, num in stated.most_common()),
                *(["nothing"] if len(wide) > sum(stated.values()) else []),
            ]
        )
        said = f"What the files state of their range is not what they are read in: {counted}"
        unlike = (name for name, one in wide.items() if one.stated not in (reading.int_range, reading.float_range))
        found.append(FileWarning(kind="stated range", said=said, names=tuple(unlike)))
    clear = tuple(name for name, one in facts.items() if one.clear)
    if clear:
        found.append(FileWarning(kind="transparent", said="Images with transparent parts, which are laid over white", names=clear))
    return found


def find_pixel_size_inconsistencies(stated: Mapping[str, PixelSize], num: int) -> list[FileWarning]:
    """Where the sizes of pixels that files state, by name, differ among themselves or within a file; ``num`` images there are in all."""
    if not stated:
        return []
    groups: dict[float, list[str]] = defaultdict(list)
    for name, size in stated.items():
        groups[next((known for known in groups if same_size(known, size.side_um)), size.side_um)].append(name)
    found, usual = [], max(groups, key=lambda side: len(groups[side]))
    if len(groups) > 1:
        missing = num - len(stated)
        counted = ", ".join(f"{side:.4g} um ({len(names)})" for side, names in sorted(groups.items()))
        said = f"Pixels are of different sizes by the files' own statement: {counted}{f', not stated ({missing})' if missing else ''}. "
        said += "Cells of one size have different sizes in pixels; resample to one"
        most = sum(len(names) == len(groups[usual]) for names in groups.values())  # where several are as frequent, all are named
        odd = [name for side, names in groups.items() if side != usual or most > 1 for name in names]
        found.append(FileWarning(kind="pixel size", said=said, names=tuple(odd)))
    oblong = tuple(name for name, size in stated.items() if not size.square)
    if oblong:
        said = f"Pixels are not square by the files' own statement, such as {stated[oblong[0]]} um (width x height). Shapes are distorted; resample"
        found.append(FileWarning(kind="oblong pixels", said=said, names=oblong))
    torn = tuple(name for name, size in stated.items() if size.contradicted)
    if torn:
        said = f"The file states two pixel sizes, such as {stated[torn[0]].contradicted}; the second is used"
        found.append(FileWarning(kind="pixel size", said=said, names=torn))
    return found
