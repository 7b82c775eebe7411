"""``predict``: a run's masks of images and folders of images, one file beside the other, going on where it stopped."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cellbench.data import images
from cellbench.data.image_files import shown_name
from cellbench.data.images import EXTENSIONS
from cellbench.data.intensity import Note, Reading, lines_of
from cellbench.data.listing import LeftOut, counted, files_below
from cellbench.data.metadata import PixelSize
from cellbench.data.png_rows import words_of
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, write_atomic
from cellbench.inputs import by_reason, range_of, read_by, sizes_of, sizes_told, some, unlike_learned
from cellbench.measure import as_csv, class_counts, density
from cellbench.outlines import coco
from cellbench.outputs import CELLS, INSTANCES, LEFT_OUT, Files, Target, TooManyCells, Wanted, swept
from cellbench.segmenter import Refused, Segmenter

COCO, COUNTS = "coco.json", "counts.csv"
MOST_PX = 100_000_000
"""Of an image whose cells are numbered: its whole mask is in memory then, with some 50 bytes a pixel."""


def images_of(places: Sequence[Path], out: Path) -> tuple[list[tuple[Path, Path]], list[LeftOut]]:
    """Each image of files and folders, with the path of its answer below ``out``, without an ending; and what else lies in the folders.

    Folders are looked through to the bottom, links to folders too.
    Images whose names would be the same without their extensions keep them: ``a.jpg.png`` and ``a.tif.png``. Raises CellbenchError.
    """
    found: dict[Path, Path] = {}
    left: list[LeftOut] = []
    for place in places:
        if place.is_dir():
            inside, other, seen = files_below(place)
            if seen & {out.resolve(), *out.resolve().parents}:
                raise CellbenchError(f"--out {out}: lies in {place}, so that masks would be taken for images next time. Name a folder outside.")
            if not inside:
                there = f" Found: {counted(other)}." if other else ""
                raise CellbenchError(f"{place}: holds no image. Expected files that end in {', '.join(sorted(EXTENSIONS))}.{there}")
            left += other
            found |= {path: path.relative_to(place) for path in inside}
        elif place.exists():
            if place.resolve().parent == out.resolve():
                raise CellbenchError(f"--out {out}: is the folder of {place.name}, which its mask might replace. Name another folder.")
            found[place] = Path(place.name)
        else:
            raise CellbenchError(f"{place}: there is no such file or folder.")
    plain = Counter(name.with_suffix("") for name in found.values())
    named = {path: name if plain[name.with_suffix("")] > 1 else name.with_suffix("") for path, name in found.items()}
    twice = [name for name, num in Counter(named.values()).items() if num > 1]
    if twice:
        both = [str(path) for path, name in named.items() if name == twice[0]]
        raise CellbenchError(f"{both[0]} and {both[1]} would both become {twice[0]}.png. Name the folder that holds both, or call twice with two --out.")
    return [(path, out / name) for path, name in named.items()], left


def targets_of(
    segmenter: Segmenter,
    found: Sequence[tuple[Path, Path]],
    sizes: Mapping[Path, PixelSize],
    um_per_px: float | None = None,
    min_cell_px: int | None = None,
) -> list[Target]:
    """The images with what is written inside their masks."""
    made_by = {"run": segmenter.trained.fingerprint or segmenter.trained.name, "model": segmenter.trained.name, "classes": list(segmenter.names)}
    if segmenter.trained.preparation.reading != Reading():
        made_by["reading"] = segmenter.trained.preparation.reading.told()
    if min_cell_px is not None:
        made_by["min_cell_px"] = min_cell_px
    targets = []
    for image, stem in found:
        about = image.stat()
        side = um_per_px if um_per_px is not None else sizes[image].side_um if image in sizes else None
        facts = {"image": image.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns}
        if side is not None:  # tables in another unit are other tables
            facts["um_per_px"] = round(side, 6)
        targets.append(Target(image=image, stem=stem, words=json.dumps({**made_by, **facts}, sort_keys=True), um_per_px=side))
    return targets


def of_one(wanted: Wanted, target: Target) -> Wanted:
    """What is wanted of one image, by the size of its own pixels."""
    return replace(wanted, um_per_px=target.um_per_px)


def masks(
    segmenter: Segmenter, targets: Sequence[Target], wanted: Wanted, tell: Callable[[str], None]
) -> tuple[dict[Target, CellbenchError], list[tuple[str, Note]]]:
    """Writes the answers; returns the images that were passed over, with the reason, and notes on how the others were read, by their files.

    Bad ones are told at once.
    """
    bad: dict[Target, CellbenchError] = {}
    notes: list[tuple[str, Note]] = []
    files: Files | None = None
    with tqdm(total=len(targets), unit="image", desc="segmenting", disable=None) as bar:
        try:
            for event in segmenter.stream(target.image for target in targets):
                target = targets[event.number]
                if isinstance(event, Refused):
                    bad[target] = event.error
                    tell(f"passed over: {event.error}")
                    if files is not None:
                        files.__exit__()
                        files = None
                    bar.update()
                    continue
                if files is None:
                    files = Files(target, of_one(wanted, target), event.source.size_px, segmenter.names)
                files.add(event)
                # One bar over all images, also where there is a single large one.
                height = event.source.size_px[0]
                bar.update(len(event.classes) / height)
                if event.last:
                    notes += [(shown_name(target.image), note) for note in event.source.notes]
                    try:
                        files.keep()
                    except TooManyCells as error:
                        bad[target] = error
                        tell(f"passed over: {error}")
                        files.__exit__()
                    files = None
        finally:
            if files is not None:
                files.__exit__()
    return bad, notes


def write_coco(targets: Sequence[Target], out: Path, names: tuple[str, ...]) -> Path:
    """One file for all images, from their outlines."""

    def told() -> Iterator[tuple[str, tuple[int, int], dict]]:
        for target in targets:
            tree = json.loads(target.stem.with_name(target.stem.name + ".geojson").read_bytes())
            yield str(target.image.name), tuple(tree["cellbench"]["size_px"]), tree

    write_atomic(out / COCO, json.dumps(coco(told(), names)))
    return out / COCO


def write_counts(targets: Sequence[Target], out: Path, names: Sequence[str] = (), owners: Sequence[int] = ()) -> Path:
    """One line an image whose cells are counted; columns that only some images have are empty for the others."""
    rows = [counts_of(target, out, names, owners) for target in targets]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_atomic(out / COUNTS, as_csv(columns, [[row.get(column, "") for column in columns] for row in rows]))
    return out / COUNTS


def counts_of(target: Target, out: Path, names: Sequence[str] = (), owners: Sequence[int] = ()) -> dict[str, object]:
    """An image's line by column: its size, how many cells, their density, the size of a pixel where it is known, where there are several
    classes how many of each, and how many regions are too small to be cells; from the cells' table. A part of a cell (``owners``) is counted in
    the cells that hold it."""
    with target.stem.with_name(target.stem.name + CELLS).open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    height, width = images.size(target.stem.with_name(target.stem.name + INSTANCES))
    side = target.um_per_px
    dense = round(density(len(cells), (height, width), side), 3)
    unit = {"cells_per_megapixel": dense} if side is None else {"cells_per_mm2": dense, "um_per_px": float(f"{side:.6g}")}
    row: dict[str, object] = {"image": str(target.stem.relative_to(out)), "width_px": width, "height_px": height, "cells": len(cells), **unit}
    row |= {LEFT_OUT: left_out(target)}
    each = class_counts(cells, names, owners, side)
    return row | {f"{name} (class)" if name in row else name: num for name, num in each.items()}


def left_out(target: Target) -> int:
    """How many regions of an image's mask are too small to be cells; written down where the cells are numbered."""
    words = words_of(target.stem.with_name(target.stem.name + INSTANCES))
    return int(json.loads(words).get(LEFT_OUT, 0)) if words else 0


def too_large(target: Target) -> CellbenchError | None:
    """Why an image's cells cannot be numbered; None where they can, or where the file will tell what is wrong with it."""
    try:
        height, width = images.size(target.image)
    except CellbenchError:
        return None
    if height * width <= MOST_PX:
        return None
    return CellbenchError(f"{target.image}: {width} x {height} px, where --instances takes {MOST_PX // 10**6} megapixels. Cut it, or leave that out.")


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
    """``cellbench predict``. Exit code 0, or 1 where an image was passed over or a file of a folder left out."""
    if um_per_px is not None and not (instances and 0 < um_per_px < 1000):
        raise CellbenchError(f"--um-per-px {um_per_px:g}: the side of a pixel in um, above 0, for the tables that --instances writes. Give both.")
    if min_cell_px is not None and min_cell_px < 1:
        raise CellbenchError(f"--min-cell-px {min_cell_px}: the least area of a cell in px, 1 or more.")
    black_white = range_of(range_text) if range_text is not None else None
    found, left = images_of(places, out)  # names first: a run takes a while to open
    sizes = sizes_of(path for path, _ in found)
    segmenter = Segmenter.load(run, weights=weights, registry=extra, device=device, precision=precision)
    if black_white is not None:
        segmenter.trained, lines = read_by(segmenter.trained, black_white)
        for line in lines:
            say(line)
    for line in segmenter.trained.origin:
        say(line)
    targets = targets_of(segmenter, found, sizes, um_per_px, min_cell_px)
    how = segmenter.trained.separation
    how = how if min_cell_px is None else replace(how, min_area_px=min_cell_px)
    wanted = Wanted(probability=probability, overlay=overlay, geojson=geojson or as_coco, separation=how)
    if instances:
        wanted = replace(wanted, instances=True)
    swept(make_folder(out))
    todo = [target for target in targets if not target.done(of_one(wanted, target))]
    before = f", {len(targets) - len(todo)} are done already" if len(todo) < len(targets) else ""
    say(f"{segmenter.trained.name}: {len(todo)} images on {segmenter.machine.name}{before}.")
    for line in sizes_told(sizes, len(targets), um_per_px, instances):
        say(line)
    for line in unlike_learned(sizes, segmenter.trained, um_per_px):
        say(line)
    for reason, paths in by_reason(left).items():
        tqdm.write(f"left out, {reason}: {some(paths)}", file=sys.stderr)
    large = {target: error for target in todo if instances and (error := too_large(target)) is not None}
    for error in large.values():
        tqdm.write(f"passed over: {error}", file=sys.stderr)
    todo = [target for target in todo if target not in large]
    passed, notes = masks(segmenter, todo, wanted, lambda text: tqdm.write(text, file=sys.stderr))
    bad = large | passed
    for line in lines_of(notes):
        tqdm.write(line, file=sys.stderr)
    good = [target for target in targets if target not in bad]
    if as_coco and good:
        say(f"{write_coco(good, out, segmenter.names)}: the outlines of {len(good)} images.")
    if instances and good:
        say(f"{write_counts(good, out, segmenter.names, how.owners)}: the cells of {len(good)} images, told apart by {how.words}.")
    small = sum(map(left_out, good)) if instances else 0
    lost = [f"{len(bad)} images were skipped"] if bad else []
    lost += [f"{len(left)} files of the folders were left out ({counted(left)})"] if left else []
    few = [f"{small:,} regions below {how.min_area_px} px are not counted as cells (--min-cell-px sets the limit)"] if small else []
    say("; ".join([f"{out}: {len(good)} masks", *few, *lost]) + ".")
    return 1 if lost else 0


