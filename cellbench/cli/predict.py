"""``predict``: a run's masks of images and folders of images, one file beside the other, going on where it stopped.

A folder holds the masks of one run. Its tables, ``counts.csv`` and ``coco.json``, are made anew of all that lies there after each call.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cellbench.config.run import NUMERICS_VERSION
from cellbench.data.io import images
from cellbench.data.io.decode import printable_path
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.io.intensity import IntensityScaling, Note, format_notes
from cellbench.data.io.metadata import PixelSize
from cellbench.data.io.png_stream import read_png_text
from cellbench.data.scan import IgnoredFile, count_reasons, files_below
from cellbench.errors import CellbenchError
from cellbench.escaping import to_csv, to_printable
from cellbench.files import case_folded, file_name, make_folder, write_atomic
from cellbench.inference.inputs import (
    describe_magnification,
    describe_pixel_sizes,
    first_names,
    names_by_reason,
    parse_range,
    stated_pixel_sizes,
    with_range,
)
from cellbench.inference.polygons import to_coco
from cellbench.inference.segmenter import FailedImage, Segmenter
from cellbench.inference.writers import (
    CELLS,
    ENDINGS,
    GEOJSON,
    INSTANCES,
    LEFT_OUT,
    OutputFormats,
    OutputPaths,
    PredictionWriter,
    TooManyCellsError,
    find_masks,
    output_path,
    remove_partial_files,
)
from cellbench.metrics.measurements import count_by_class, density

COCO, COUNTS = "coco.json", "counts.csv"
MOST_PX = 100_000_000
"""Of an image whose cells are told apart: its whole mask is in memory then, with some 50 bytes a pixel."""
MOST_BYTES = 255 - max(map(len, ENDINGS))
"""Of a mask's name without ``.png``: file systems take 255 bytes."""


def find_images(places: Sequence[Path], out: Path) -> tuple[list[tuple[Path, Path]], list[IgnoredFile]]:
    """Each image of files and folders, with the path of its answer below ``out``, without an ending; and what else lies in the folders.

    Folders are looked through to the bottom, links to folders too.
    Names are those of :func:`mask_stems`. Raises CellbenchError.
    """
    found: dict[Path, Path] = {}
    left: list[IgnoredFile] = []
    for place in places:
        if place.is_dir():
            inside, other, seen = files_below(place)
            if seen & {out.resolve(), *out.resolve().parents}:
                raise CellbenchError(
                    f"--out {out}: lies in {place}, so that masks would be taken for images next time. Name a folder outside."
                )
            if not inside:
                there = f" Found: {count_reasons(other)}." if other else ""
                raise CellbenchError(f"{place}: holds no image. Expected files that end in {', '.join(sorted(EXTENSIONS))}.{there}")
            left += other
            found |= {path: path.relative_to(place) for path in inside}
        elif place.exists():
            if place.resolve().parent == out.resolve():
                raise CellbenchError(f"--out {out}: is the folder of {place.name}, which its mask might replace. Name another folder.")
            found[place] = Path(place.name)
        else:
            raise CellbenchError(f"{place}: there is no such file or folder.")
    return [(path, out / name) for path, name in mask_stems(found).items()], left


def mask_stems(names: Mapping[Path, Path]) -> dict[Path, Path]:
    """For each image, with its path below the folder given, the path of its mask without ``.png``; no two share a file on any file system.

    It is the image's own without its extension, and with it where two would differ in nothing else or it ends as what lies beside a mask
    does. Names that still differ in case or Unicode form alone, or are too long for an ending, get a hash. Raises CellbenchError.
    """
    beside_masks = tuple(ending.removesuffix(".png") for ending in ENDINGS if ending.endswith(".png"))

    def shared(all_names: Iterable[Path]) -> Counter[str]:
        return Counter(case_folded(name.as_posix()) for name in all_names)

    plain = shared(name.with_suffix("") for name in names.values())
    keeps = {
        path: name
        if plain[case_folded(name.with_suffix("").as_posix())] > 1 or case_folded(name.stem).endswith(beside_masks)
        else name.with_suffix("")
        for path, name in names.items()
    }
    alike = shared(keeps.values())
    out: dict[Path, Path] = {}
    for path, name in keeps.items():
        if alike[case_folded(name.as_posix())] > 1:
            mark = hashlib.sha256(os.fsencode(names[path])).hexdigest()[:8]
            name = name.with_name(f"{name.name}~{mark}")
        if len(os.fsencode(name.name)) > MOST_BYTES:
            name = name.with_name(file_name(name.name))
        out[path] = name
    twice = [name for name, num in Counter(out.values()).items() if num > 1]
    if twice:
        both = [str(path) for path, name in out.items() if name == twice[0]]
        raise CellbenchError(
            f"{both[0]} and {both[1]} would both become {twice[0]}.png. Name the folder that holds both, or call twice with two --out."
        )
    return out


def output_paths(
    segmenter: Segmenter, found: Sequence[tuple[Path, Path]], out: Path, sizes: Mapping[Path, PixelSize], um_per_px: float | None = None
) -> list[OutputPaths]:
    """The images with what is written inside their masks. ``um_per_px`` takes the place of what the files state (``sizes``)."""
    maker = provenance_of(segmenter)
    targets = []
    for image, stem in found:
        about = image.stat()
        side = um_per_px if um_per_px is not None else sizes[image].side_um if image in sizes else None
        facts = {"image": image.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "place": _from(out, image)}
        targets.append(OutputPaths(image=image, stem=stem, facts={**maker, **facts}, um_per_px=None if side is None else round(side, 6)))
    return targets


def formats_for(wanted: OutputFormats, target: OutputPaths) -> OutputFormats:
    """What is wanted of one image, by the size of its own pixels."""
    return replace(wanted, um_per_px=target.um_per_px)


def provenance_of(segmenter: Segmenter) -> dict[str, object]:
    """What the masks of one run have in common."""
    trained = segmenter.trained
    maker = {
        "run": trained.fingerprint or trained.name,
        "model": trained.name,
        "classes": list(segmenter.names),
        "numerics": NUMERICS_VERSION,
    }
    reading = trained.preparation.reading
    # As JSON gives it back, where a tuple is a list.
    return maker | ({"reading": json.loads(json.dumps(reading.told()))} if reading != IntensityScaling() else {})


def _from(out: Path, image: Path) -> str:
    """Where the image lies, from the folder of the masks: the same when both are moved."""
    try:
        return Path(os.path.relpath(image.resolve(), out.resolve())).as_posix()
    except ValueError:  # another drive
        return image.resolve().as_posix()


def refuse_mixed_outputs(targets: Sequence[OutputPaths], maker: Mapping[str, object], wanted: OutputFormats, out: Path) -> None:
    """Raises CellbenchError where the folder's tables would mix runs or ways to tell cells apart, or a mask would take the place of another
    image's."""
    mine = {target.stem: target for target in targets}
    for stem, facts in find_masks(out).items():
        mask = output_path(stem, ".png")
        if any(facts.get(key) != maker.get(key) for key in ("run", "classes", "numerics", "reading")):
            raise CellbenchError(
                f"--out {out}: holds the mask {mask.relative_to(out)} that another run ('{facts.get('model')}'), another range or another version of cellbench "
                "made, and a folder's tables are of one run. Name another --out."
            )
        target = mine.get(stem)
        if target is not None and not target.is_of(facts) and facts.get("place") != target.facts["place"]:
            raise CellbenchError(
                f"{target.image}: {mask} is the mask of another image of this name ({facts.get('place')}, from there). Name another --out, or the "
                "folder that holds both images."
            )
        how = facts.get("cells")
        if target is None and wanted.cells and how and not replace(wanted, instances=False).agrees(how):
            raise CellbenchError(
                f"--out {out}: the cells of {mask.relative_to(out)} were told apart otherwise (saddle_ratio {how['saddle_ratio']:g}, from {how['min_area_px']} px), "
                "and a folder's tables are of one way. Name another --out."
            )


def write_masks(
    segmenter: Segmenter, targets: Sequence[OutputPaths], wanted: OutputFormats, tell: Callable[[str], None]
) -> tuple[dict[OutputPaths, CellbenchError], list[tuple[str, Note]]]:
    """Writes the answers; returns the images that were skipped, with the reason, and notes on how the others were read, by their files.

    Bad ones are reported at once.
    """
    bad: dict[OutputPaths, CellbenchError] = {}
    notes: list[tuple[str, Note]] = []
    files: PredictionWriter | None = None
    with tqdm(total=len(targets), unit="image", desc="segmenting", disable=None) as bar:
        try:
            for event in segmenter.stream(target.image for target in targets):
                target = targets[event.number]
                if isinstance(event, FailedImage):
                    bad[target] = event.error
                    tell(f"skipped: {event.error}")
                    if files is not None:
                        files.__exit__()
                        files = None
                    bar.update()
                    continue
                if files is None:
                    files = PredictionWriter(target, formats_for(wanted, target), event.source.size_px, segmenter.names)
                files.add(event)
                # One bar over all images, also where there is a single large one.
                height = event.source.size_px[0]
                bar.update(len(event.classes) / height)
                if event.last:
                    notes += [(printable_path(target.image), note) for note in event.source.notes]
                    try:
                        files.keep()
                    except TooManyCellsError as error:
                        bad[target] = error
                        tell(f"skipped: {error}")
                        files.__exit__()
                    files = None
        finally:
            if files is not None:
                files.__exit__()
    return bad, notes


@dataclass(frozen=True, kw_only=True)
class ExistingMask:
    """A mask in the folder, of this call or an earlier one, and what it says of itself."""

    stem: Path
    name: str
    """Its path below the folder, without ``.png``."""
    facts: Mapping[str, Any]

    @property
    def outlined(self) -> bool:
        return "cells" in self.facts and output_path(self.stem, GEOJSON).exists()

    @property
    def counted(self) -> bool:
        return "cells" in self.facts and all(output_path(self.stem, ending).exists() for ending in (INSTANCES, CELLS))


def existing_masks(out: Path, but: Collection[Path] = ()) -> list[ExistingMask]:
    """All masks in a folder, sorted by name, without those ``but`` whose images could not be segmented now."""
    return [
        ExistingMask(stem=stem, name=stem.relative_to(out).as_posix(), facts=facts)
        for stem, facts in find_masks(out).items()
        if stem not in but
    ]


def write_coco(answers: Sequence[ExistingMask], out: Path, names: tuple[str, ...]) -> Path:
    """One file for all images with outlines, from these. Images are named with their folders below the one given."""

    def told() -> Iterator[tuple[str, tuple[int, int], dict]]:
        for answer in answers:
            tree = json.loads(output_path(answer.stem, GEOJSON).read_bytes())
            name = (Path(answer.name).parent / answer.facts["image"]).as_posix()
            yield name, tuple(tree["cellbench"]["size_px"]), tree

    write_atomic(out / COCO, json.dumps(to_coco(told(), names)))
    return out / COCO


def write_counts(answers: Sequence[ExistingMask], out: Path, names: Sequence[str] = (), owners: Sequence[int] = ()) -> Path:
    """One line an image whose cells are counted; columns that only some images have are empty for the others."""
    rows = [count_row(answer, names, owners) for answer in answers]
    columns = list(dict.fromkeys(column for row in rows for column in row)) or ["image"]
    write_atomic(out / COUNTS, to_csv(columns, [[row.get(column, "") for column in columns] for row in rows]))
    return out / COUNTS


def count_row(answer: ExistingMask, names: Sequence[str] = (), owners: Sequence[int] = ()) -> dict[str, object]:
    """An image's line by column: its size, how many cells, their density, the size of a pixel where it is known, how many regions are too small
    to be cells, and where there are several classes how many of each; from the cells' table. A part of a cell (``owners``) is counted in the
    cells that hold it."""
    with output_path(answer.stem, CELLS).open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    height, width = images.image_size(output_path(answer.stem, INSTANCES))
    side = answer.facts["cells"]["um_per_px"]
    dense = round(density(len(cells), (height, width), side), 3)
    unit = {"cells_per_megapixel": dense} if side is None else {"cells_per_mm2": dense, "um_per_px": float(f"{side:.6g}")}
    row: dict[str, object] = {
        "image": answer.name,
        "width_px": width,
        "height_px": height,
        "cells": len(cells),
        **unit,
        LEFT_OUT: num_below_min_area(answer),
    }
    each = count_by_class(cells, names, owners, side)
    return row | {f"{name} (class)" if name in row else name: num for name, num in each.items()}


def num_below_min_area(answer: ExistingMask) -> int:
    """How many regions of an image's mask are too small to be cells; written down where the cells are numbered."""
    words = read_png_text(output_path(answer.stem, INSTANCES))
    return int(json.loads(words).get(LEFT_OUT, 0)) if words else 0


def write_tables(
    out: Path, bad: Collection[Path], wanted: OutputFormats, as_coco: bool, names: tuple[str, ...], say: Callable[[str], None]
) -> int:
    """The tables of all that lies in the folder: those asked for, and those of an earlier call, which must not fall behind.

    Returns how many regions are too small to be cells, in all images whose cells are counted.
    """
    answers = existing_masks(out, bad)
    outlined, numbered = [one for one in answers if one.outlined], [one for one in answers if one.counted]
    for asked, place, found, write, what in (
        (as_coco, COCO, outlined, functools.partial(write_coco, names=names), "the outlines"),
        (wanted.instances, COUNTS, numbered, functools.partial(write_counts, names=names, owners=wanted.separation.owners), "the cells"),
    ):
        if (asked and found) or (out / place).exists():
            more = f"; {len(answers) - len(found)} other masks there have none" if len(found) < len(answers) else ""
            say(f"{write(found, out)}: {what} of all {len(found)} images in the folder, told apart by {wanted.separation.words}{more}.")
    return sum(map(num_below_min_area, numbered)) if wanted.instances else 0


def too_many_cells(target: OutputPaths) -> CellbenchError | None:
    """Why an image's cells cannot be numbered; None where they can, or where the file will tell what is wrong with it."""
    try:
        height, width = images.image_size(target.image)
    except CellbenchError:
        return None
    if height * width <= MOST_PX:
        return None
    return CellbenchError(
        f"{target.image}: {width} x {height} px, where --instances, --geojson and --coco take {MOST_PX // 10**6} megapixels. Cut it, or leave them out."
    )


def predict(
    run: str,
    places: Sequence[Path],
    *,
    out: Path,
    probability: bool = False,
    overlay: bool = False,
    geojson: bool = False,
    as_coco: bool = False,
    instances: bool = False,
    um_per_px: float | None = None,
    range_text: str | None = None,
    min_cell_px: int | None = None,
    weights: Path | None = None,
    extra: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    say: Callable[[str], None] = print,
) -> int:
    """``cellbench predict``. Exit code 0, or 1 where an image was skipped or a file of a folder left out."""
    if um_per_px is not None and not (instances and 0 < um_per_px < 1000):
        raise CellbenchError(
            f"--um-per-px {um_per_px:g}: the side of a pixel in um, above 0, for the tables that --instances writes. Give both."
        )
    if min_cell_px is not None and min_cell_px < 1:
        raise CellbenchError(f"--min-cell-px {min_cell_px}: the least area of a cell in px, 1 or more.")
    black_white = parse_range(range_text) if range_text is not None else None
    found, left = find_images(places, out)  # names first: a run takes a while to open
    sizes = stated_pixel_sizes(path for path, _ in found)
    segmenter = Segmenter.load(run, weights=weights, registry=extra, device=device, precision=precision)
    if black_white is not None:
        segmenter.trained, lines = with_range(segmenter.trained, black_white)
        for line in lines:
            say(line)
    for line in segmenter.trained.origin:
        say(line)
    targets = output_paths(segmenter, found, out, sizes, um_per_px)
    how = segmenter.trained.separation
    how = how if min_cell_px is None else replace(how, min_area_px=min_cell_px)
    wanted = OutputFormats(probability=probability, overlay=overlay, geojson=geojson or as_coco, instances=instances, separation=how)
    remove_partial_files(make_folder(out))
    refuse_mixed_outputs(targets, provenance_of(segmenter), wanted, out)
    todo = [target for target in targets if not target.done(formats_for(wanted, target))]
    before = f", {len(targets) - len(todo)} are done already" if len(todo) < len(targets) else ""
    say(f"{segmenter.trained.name}: {len(todo)} images on {segmenter.machine.name}{before}.")
    for line in (
        *describe_pixel_sizes(sizes, len(targets), um_per_px, instances),
        *describe_magnification(sizes, segmenter.trained, um_per_px),
    ):
        say(line)

    def warn(line: str) -> None:
        tqdm.write(to_printable(line), file=sys.stderr)

    for reason, paths in names_by_reason(left).items():
        warn(f"left out, {reason}: {first_names(paths)}")
    bad = {target: error for target in todo if wanted.cells and (error := too_many_cells(target)) is not None}
    for error in bad.values():
        warn(f"skipped: {error}")
    todo = [target for target in todo if target not in bad]
    try:
        skipped, notes = write_masks(segmenter, todo, wanted, warn)
        bad |= skipped
        for line in format_notes(notes):
            warn(line)
    finally:  # also where a person stops it: what is in the folder by then is in its tables
        small = write_tables(out, {target.stem for target in bad}, wanted, as_coco, segmenter.names, say)
    lost = [f"{len(bad)} images were skipped"] if bad else []
    lost += [f"{len(left)} files of the folders were left out ({count_reasons(left)})"] if left else []
    few = [f"{small:,} regions below {how.min_area_px} px are not counted as cells (--min-cell-px sets the limit)"] if small else []
    say("; ".join([f"{out}: {len(targets) - len(bad)} masks", *few, *lost]) + ".")
    return 1 if lost else 0
