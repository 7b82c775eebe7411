"""The layout of images with outlines or cell numbers of QuPath, ImageJ, Cellpose or LabelMe, a file an image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cellbench.config.cards import DatasetCard
from cellbench.data.categories import classes_of_categories
from cellbench.data.dataset import SPLITS as SPLIT_NAMES
from cellbench.data.dataset import Sample
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.manifest import SPLITS as SPLIT_WORDS
from cellbench.data.mask_names import ANNOTATED, MASK_WORDS
from cellbench.data.outline_files import SUFFIXES, ToolAnnotation, read_tool_mask
from cellbench.data.regions import REGIONS
from cellbench.data.scan import Listing, files_below, other_files, unique_names
from cellbench.errors import CellbenchError

UNCLASSIFIED = "unclassified"
"""Stands for outlines without a class."""


def tool_files(folder: Path) -> list[Path]:
    """The files of outlines and cell numbers in a folder, by name."""
    return [path for path in other_files(folder) if path.suffix.lower() in SUFFIXES and not path.name.startswith(("splits", "."))]


def outlines_by_stem(root: Path) -> dict[str, list[Path]]:
    """The files of outlines and cell numbers of a folder and its subfolders, by the stem of the image that they are named after."""
    folders = {root, *(one for one in root.rglob("*") if one.is_dir() and one.relative_to(root).parts[0] != REGIONS)}
    out: dict[str, list[Path]] = {}
    for path in (path for folder in sorted(folders) for path in tool_files(folder)):
        stem = ANNOTATED.sub("", path.stem)
        ending = f".{stem.rpartition('.')[2].lower()}"
        out.setdefault(stem.rpartition(".")[0] if ending in EXTENSIONS else stem, []).append(path)
    return out


def scan_outlines(root: Path, card: DatasetCard) -> Listing | None:
    """Images, each with a file of QuPath, ImageJ, Cellpose or LabelMe of its name, beside it or in another folder; folders may be splits."""
    pictures = files_below(root)[0]
    by_stem = outlines_by_stem(root)
    pairs = {}
    for path in pictures:
        found = by_stem.get(path.stem, [])
        pairs[path] = [one for one in found if one.parent == path.parent] or found
    if not any(pairs.values()):
        return None
    out = Listing(root=root, layout="images with outlines of QuPath, ImageJ, Cellpose or LabelMe")
    counts: Counter[str] = Counter()
    used: dict[Path, Path] = {}
    limited: set[Path] = set()
    num_points = 0
    for path, found in pairs.items():
        name = path.relative_to(root).as_posix()
        if len(found) == 1:
            used[path] = found[0]
            mask = read_tool_mask(found[0])
            counts.update(one.label or UNCLASSIFIED for one in mask.outlines)
            num_points += len(mask.points)
            limited |= {path} if mask.regions else set()
        elif not MASK_WORDS.search(path.stem) or found:  # a picture of masks that a tool writes beside them is no image
            shown = ", ".join(one.name for one in found)
            message = f"{root.name}: '{name}' has {f'{len(found)} annotations: {shown}' if found else 'no annotation'}"
            out.reject(
                "several-masks" if found else "missing-mask", path.name, message, "Each image needs one: take others out, or add it."
            )
    if num_points and not counts:
        raise CellbenchError(
            f"--data {root}: its files mark {num_points:,} points and no outline. Points are enough to compare counts (`evaluate RUN --data`, "
            "`score NAME MASKS --data`); to learn from, each cell needs an outline."
        )
    if num_points:
        out.notes.append(f"outlines: {num_points:,} points are no cells with an area and are not used")
    labels: dict[str, int | None] = {UNCLASSIFIED: 1}
    if counts:
        out.classes, labels, note = classes_of_categories(card, next(iter(used.values())), counts, "classes of outlines")
        out.notes.append(note)
    class_of = tuple((("" if label == UNCLASSIFIED else label), number) for label, number in labels.items())
    names = unique_names([path.relative_to(root).as_posix() for path in used])
    parts: dict[str, list[Sample]] = {split: [] for split in SPLIT_NAMES}
    for path, file in used.items():
        place = path.relative_to(root)
        truth = ToolAnnotation(path=file, image=path, labels=class_of)
        sample = Sample(name=names[place.as_posix()], image=path, mask=file, truth=truth, regions=file if path in limited else None)
        parts[next((SPLIT_WORDS[part.lower()] for part in place.parts[:-1] if part.lower() in SPLIT_WORDS), "train") or "train"].append(
            sample
        )
    out.parts = {split: tuple(some) for split, some in parts.items()}
    return out
