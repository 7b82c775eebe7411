"""``predict``: a run's masks of images and folders of images, one file beside the other, going on where it stopped."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cellbench.data import images
from cellbench.data.images import EXTENSIONS
from cellbench.data.png_rows import words_of
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, write_atomic
from cellbench.measure import as_csv, density
from cellbench.outlines import coco
from cellbench.outputs import CELLS, INSTANCES, LEFT_OUT, Files, Target, TooManyCells, Wanted, swept
from cellbench.segmenter import Refused, Segmenter

COCO, COUNTS = "coco.json", "counts.csv"
MOST_PX = 100_000_000
"""Of an image whose cells are numbered: its whole mask is in memory then, with some 50 bytes a pixel."""


def images_of(places: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Each image of files and folders (looked through to the bottom), with the path of its answer below ``out``, without an ending.

    Images whose names would be the same without their extensions keep them: ``a.jpg.png`` and ``a.tif.png``. Raises CellbenchError.
    """
    found: dict[Path, Path] = {}
    for place in places:
        if place.is_dir():
            if out.resolve() == place.resolve() or place.resolve() in out.resolve().parents:
                raise CellbenchError(f"--out {out}: lies in {place}, so that masks would be taken for images next time. Name a folder outside.")
            shown = [path for path in sorted(place.rglob("*")) if not any(part.startswith(".") for part in path.relative_to(place).parts)]
            inside = [path for path in shown if path.suffix.lower() in EXTENSIONS and path.is_file()]
            if not inside:
                raise CellbenchError(f"{place}: holds no image. Expected files that end in {', '.join(sorted(EXTENSIONS))}.")
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
    return [(path, out / name) for path, name in named.items()]


def targets_of(
    segmenter: Segmenter, places: Sequence[Path], out: Path, um_per_px: float | None = None, min_cell_px: int | None = None
) -> list[Target]:
    """The images with what is written inside their masks."""
    made_by = {"run": segmenter.trained.fingerprint or segmenter.trained.name, "model": segmenter.trained.name, "classes": list(segmenter.names)}
    if um_per_px is not None:  # tables in another unit are other tables
        made_by["um_per_px"] = um_per_px
    if min_cell_px is not None:
        made_by["min_cell_px"] = min_cell_px
    targets = []
    for image, stem in images_of(places, out):
        about = image.stat()
        facts = {"image": image.name, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns}
        targets.append(Target(image=image, stem=stem, words=json.dumps({**made_by, **facts}, sort_keys=True)))
    return targets


def masks(segmenter: Segmenter, targets: Sequence[Target], wanted: Wanted, tell: Callable[[str], None]) -> dict[Target, CellbenchError]:
    """Writes the answers; returns the images that were passed over, with the reason. Bad ones are told at once."""
    bad: dict[Target, CellbenchError] = {}
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
                    files = Files(target, wanted, event.source.size_px, segmenter.names)
                files.add(event)
                # One bar over all images, also where there is a single large one.
                height = event.source.size_px[0]
                bar.update(len(event.classes) / height)
                if event.last:
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
    return bad


def write_coco(targets: Sequence[Target], out: Path, names: tuple[str, ...]) -> Path:
    """One file for all images, from their outlines."""

    def told() -> Iterator[tuple[str, tuple[int, int], dict]]:
        for target in targets:
            tree = json.loads(target.stem.with_name(target.stem.name + ".geojson").read_bytes())
            yield str(target.image.name), tuple(tree["cellbench"]["size_px"]), tree

    write_atomic(out / COCO, json.dumps(coco(told(), names)))
    return out / COCO


def write_counts(targets: Sequence[Target], out: Path, um_per_px: float | None) -> Path:
    """One line an image: its size, how many cells, their density, and how many regions are too small to be cells; from the tables of the cells."""
    unit = "cells_per_mm2" if um_per_px is not None else "cells_per_megapixel"
    rows = []
    for target in targets:
        num = target.stem.with_name(target.stem.name + CELLS).read_text(encoding="utf-8").count("\n") - 1
        height, width = images.size(target.stem.with_name(target.stem.name + INSTANCES))
        rows.append((str(target.stem.relative_to(out)), width, height, num, round(density(num, (height, width), um_per_px), 3), left_out(target)))
    write_atomic(out / COUNTS, as_csv(("image", "width_px", "height_px", "cells", unit, LEFT_OUT), rows))
    return out / COUNTS


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
    min_cell_px: int | None = None,
    weights: Path | None = None,
    extra: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    say: Callable[[str], None] = print,
) -> int:
    """``cellbench predict``. Exit code 0, or 1 where an image was passed over."""
    if um_per_px is not None and not (instances and 0 < um_per_px < 1000):
        raise CellbenchError(f"--um-per-px {um_per_px:g}: the side of a pixel in um, above 0, for the tables that --instances writes. Give both.")
    if min_cell_px is not None and min_cell_px < 1:
        raise CellbenchError(f"--min-cell-px {min_cell_px}: the least area of a cell in px, 1 or more.")
    images_of(places, out)  # names first: a run takes a while to open
    segmenter = Segmenter.load(run, weights=weights, registry=extra, device=device, precision=precision)
    targets = targets_of(segmenter, places, out, um_per_px, min_cell_px)
    how = segmenter.trained.separation
    how = how if min_cell_px is None else replace(how, min_area_px=min_cell_px)
    wanted = Wanted(probability=probability, overlay=overlay, geojson=geojson or as_coco, separation=how)
    if instances:
        wanted = replace(wanted, instances=True, um_per_px=um_per_px)
    swept(make_folder(out))
    todo = [target for target in targets if not target.done(wanted)]
    before = f", {len(targets) - len(todo)} are done already" if len(todo) < len(targets) else ""
    say(f"{segmenter.trained.name}: {len(todo)} images on {segmenter.machine.name}{before}.")
    large = {target: error for target in todo if instances and (error := too_large(target)) is not None}
    for error in large.values():
        tqdm.write(f"passed over: {error}", file=sys.stderr)
    todo = [target for target in todo if target not in large]
    bad = large | masks(segmenter, todo, wanted, lambda text: tqdm.write(text, file=sys.stderr))
    good = [target for target in targets if target not in bad]
    if as_coco and good:
        say(f"{write_coco(good, out, segmenter.names)}: the outlines of {len(good)} images.")
    if instances and good:
        say(f"{write_counts(good, out, um_per_px)}: the cells of {len(good)} images, told apart by {how.words}.")
    small = sum(map(left_out, good)) if instances else 0
    told = f"; {small:,} regions below {how.min_area_px} px are not counted as cells (--min-cell-px sets the limit)" if small else ""
    say(f"{out}: {len(good)} masks{told}" + (f"; {len(bad)} images were passed over." if bad else "."))
    return 1 if bad else 0
