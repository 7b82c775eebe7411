"""The known layouts of folders with images and masks. To add a layout, add an entry to ``LAYOUTS``.

Images and masks are paired by stem, whatever their extensions: a loader that globs ``*.png`` loses 9 % of BCCD.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cellbench.config.cards import DatasetCard
from cellbench.data.annotations import CocoFile, MaskFiles, count_coco_categories, read_coco
from cellbench.data.dataset import Sample
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.manifest import NAMES, read_manifest
from cellbench.data.scan import FileWarning, Listing, other_files, resolve_inside, unique_names
from cellbench.errors import CellbenchError, quote_name
from cellbench.metrics.pixel import IGNORE


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay out a folder."""

    name: str
    """Description in the error that no layout matches."""
    scan: Callable[[Path, DatasetCard], Listing | None]
    """Returns the samples of a folder; None if its layout differs. Opens no image."""


def scan_folder(card: DatasetCard, where: Path) -> Listing:
    """The samples of a folder, a manifest or a COCO file. Raises CellbenchError if no layout matches."""
    if where.is_file():
        if where.suffix.lower() in (".csv", ".toml"):
            return read_manifest(where, where.parent)
        if where.suffix.lower() == ".json":
            return _scan_coco(where.parent, card, [where])
        raise CellbenchError(f"--data {where}: is a file. Expected a folder, a manifest (.csv, .toml) or a COCO file (.json).")
    if not where.is_dir():
        raise CellbenchError(f"--data {where}: there is no such folder.")
    layouts = [paired_folders(card.images, card.masks)] if card.images else LAYOUTS
    inner = [entry for entry in _folders(where) if entry.name != "__MACOSX"]
    for root in [where, *(inner if len(inner) == 1 else [])]:  # Kaggle's zip has one folder in between
        for layout in layouts:
            if (listing := layout.scan(root, card)) is not None:
                return listing
    found = ", ".join(f"{entry.name}/" for entry in inner[:5]) or "no folder"
    expected = ", or ".join(layout.name for layout in layouts)
    raise CellbenchError(f"--data {where}: this is not laid out as '{card.id}' expects ({expected}). Found there: {found}.")


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _manifest(root: Path, card: DatasetCard) -> Listing | None:
    return next((read_manifest(root / name, root) for name in NAMES if (root / name).is_file()), None)


# --- a folder of images beside a folder of masks ----------------------------------------------------------------------------------------


def paired_folders(images: str, masks: str) -> Layout:
    """``{split}`` in both names stands for ``train`` and ``test``."""
    name = f"{images}/ with {masks}/".replace("{split}", "train|test")
    return Layout(name=name, scan=partial(_scan_pairs, images=images, masks=masks))


def _scan_pairs(root: Path, card: DatasetCard, *, images: str, masks: str) -> Listing | None:
    splits = ("train", "test") if "{split}" in images else ("train",)
    folders = {split: (images.format(split=split), masks.format(split=split)) for split in splits}
    if not all((root / folder).is_dir() for pair in folders.values() for folder in pair):
        return None
    out = Listing(root=root, layout=paired_folders(images, masks).name)
    for split, (here, there) in folders.items():
        pictures, labels = out.images_in(root / here), out.images_in(root / there)
        if not pictures:
            out.reject("empty", here, f"{root / here}: holds no image", f"Expected files that end in {', '.join(sorted(EXTENSIONS))}.")
        out.parts[split] = tuple(Sample(name=path.name, image=path, mask=labels[stem]) for stem, path in pictures.items() if stem in labels)
        for stem, path in pictures.items():
            if stem not in labels:
                message = f"{root.name}/{here}: '{path.name}' has no mask. Expected {there}/{stem}.png"
                out.reject("missing-mask", path.name, message, "Add it, or move the image out.")
                out.reported.add(path)
        spare = {stem: labels[stem] for stem in sorted(set(labels) - set(pictures))}
        unread = {path.stem: path for path in other_files(root / here) if path.stem in spare}
        out.reported |= {*unread.values(), *spare.values()}
        for path in unread.values():
            advice = f"Save it as one of {', '.join(sorted(EXTENSIONS))}, or move it and its mask out."
            out.reject("format", path.name, f"{root.name}/{here}: '{path.name}' has a mask, but its format is not supported", advice)
        if names := tuple(path.name for stem, path in spare.items() if stem not in unread):
            message = f"{root.name}/{there}: {len(names)} masks have no image and are not used"
            out.doubts.append(FileWarning(kind="no image", message=message, names=names))
    return out


# --- COCO -------------------------------------------------------------------------------------------------------------------------------


def _coco_folder(root: Path, card: DatasetCard) -> Listing | None:
    """JSON files with COCO's key words, in the folder, in ``annotations/`` or in folders of splits."""
    places = [root, root / "annotations", *(root / split for split in ("train", "valid", "val", "test"))]
    files = [path for folder in places if folder.is_dir() for path in sorted(folder.glob("*.json")) if path.is_file()]
    files = [path for path in files if not path.name.startswith(("splits", ".")) and b'"annotations"' in path.read_bytes()]
    return _scan_coco(root, card, files) if files else None


def _scan_coco(root: Path, card: DatasetCard, files: list[Path]) -> Listing:
    out = Listing(root=root, layout=f"COCO {', '.join(file.name for file in files)[:120]}")
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(count_coco_categories(file))
    out.classes, labels, note = _categories(card, files[0], counts)
    out.notes.append(note)
    read = {file: read_coco(file, labels) for file in files}
    entries = [(file, _split_of(file, root), image) for file in files for image in read[file].images]
    if not entries:
        raise CellbenchError(f"{files[0]}: holds no image. Export it again.")
    for file, coco in read.items():
        out.notes += _skipped(file, coco)
    names = unique_names([f"{split}/{image.name}" for _, split, image in entries])
    samples: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    places: dict[Path, list[Path]] = {}
    for file, split, image in entries:
        years = (split, f"{split}2017")
        below = [root / "images", *(root / year for year in years), *(root / "images" / year for year in years), root / "valid"]
        bases = places.setdefault(file, [file.parent, root, *below])
        found = [(k, path) for k, base in enumerate(bases) if (path := resolve_inside(base, image.name)) is not None and path.is_file()]
        if resolve_inside(root, image.name) is None:
            out.reject_outside(image.name)
        elif not found or not found[0][1].resolve().is_relative_to(root.resolve()):
            message = f"{file}: names the image {quote_name(image.name)}, which does not exist"
            out.reject("missing-image", image.name, message, "Put it beside the file or into images/.")
        else:
            bases.insert(0, bases.pop(found[0][0]))  # the next image is probably there too
            name = names[f"{split}/{image.name}"].removeprefix(f"{split}__")
            samples[split].append(Sample(name=name, image=found[0][1], mask=file, truth=image))
    out.parts = {split: tuple(some) for split, some in samples.items()}
    return out


NOT_CELLS = ("background", "bg", "_background_", "__background__")
NOT_SCORED = ("ignore", "_ignore_", "__ignore__")
"""Lower-case names of categories that never denote a kind of cell in exports."""


def _categories(card: DatasetCard, file: Path, counts: Mapping[str, int]) -> tuple[tuple[str, ...], dict[str, int | None], str]:
    """The classes, the class number of each category (``IGNORE``; None: left out), and a note on them.

    The card decides, by ``categories`` or by the names of its ``classes``. Otherwise a single category is the cell, and each of several is a
    class. Raises CellbenchError for a category that the card does not cover.
    """
    explicit = "classes" in card.model_fields_set
    targets = [name for name in dict.fromkeys(card.categories.values()) if name not in ("", "ignore")]
    labels: dict[str, int | None] = {}
    if unknown_names := [name for name in card.categories if name not in counts]:
        raise CellbenchError(
            f"{file}: holds no category {quote_name(unknown_names[0])}, which the card names. It holds {', '.join(counts) or 'none'}."
        )
    lower = {name.casefold(): name for name in card.classes} if explicit else {}
    for name in counts:
        if name.casefold() in lower or name in card.categories:
            continue
        if name.casefold() in (*NOT_CELLS, *NOT_SCORED) or not counts[name]:
            labels[name] = IGNORE if name.casefold() in NOT_SCORED else None
    others = [name for name in counts if name not in labels and name not in card.categories]
    classes = card.classes
    if not explicit and targets:
        classes = ("background", *targets)
    elif not explicit and len(others) > 1:
        classes = ("background", *sorted(others))
    single = len(classes) == 2 and len(others) == 1 and not targets
    for name in others:
        same = next((index for index, known in enumerate(classes) if known.casefold() == name.casefold()), 1 if single else None)
        if same is None:
            raise CellbenchError(
                f"{file}: category {quote_name(name)} is no class of the card ({', '.join(classes)}). Name it there, or say what it is: "
                f'categories = {{ {json.dumps(name)} = "{classes[-1]}" }}, or "" to leave it out.'
            )
        labels[name] = same or None
    for name, target in card.categories.items():
        if target not in ("", "ignore", *classes):
            raise CellbenchError(
                f"{card.path}: categories: {quote_name(name)} is to be {quote_name(target)}, which is no class ({', '.join(classes)})."
            )
        labels[name] = classes.index(target) or None if target in classes else IGNORE if target else None
    if len(classes) > IGNORE:
        raise CellbenchError(f"{file}: {len(classes)} classes; {IGNORE} are the most. Merge some by categories = {{...}} on the card.")
    words = {None: "left out", IGNORE: "ignored"} | {k: f"class '{name}'" for k, name in enumerate(classes) if k}
    shown = "; ".join(
        f"{quote_name(name)} {num:,} ({words[labels[name]] if num else 'not used'})" for name, num in list(counts.items())[:20]
    )
    return classes, labels, f"COCO categories: {shown}{'; …' if len(counts) > 20 else ''}. `categories` on the card overrides this."


def _skipped(file: Path, coco: CocoFile) -> list[str]:
    notes = []
    if coco.num_crowds:
        notes.append(
            f"{file.name}: {coco.num_crowds:,} regions are crowds (iscrowd) and are ignored: they are no cells, and nothing in them is scored."
        )
    if coco.empty:
        boxes = f", {coco.num_boxes:,} of them with a box only" if coco.num_boxes else ""
        shown = ", ".join(coco.empty[:10]) + (" …" if len(coco.empty) > 10 else "")
        notes.append(f"{file.name}: {len(coco.empty):,} annotations have no outline and are skipped{boxes}: id {shown}.")
    if coco.empty and not any(image.regions for image in coco.images):
        raise CellbenchError(f"{file}: no annotation has an outline{boxes}. Export it with polygons or run lengths (segmentation).")
    return notes


def _split_of(file: Path, root: Path) -> str:
    words = re.split(r"[^a-z]+", f"{'' if file.parent == root else file.parent.name} {file.stem}".lower())
    for split, known in (("test", {"test", "testing"}), ("val", {"val", "valid", "validation"})):
        if known & set(words):
            return split
    return "train"


# --- one folder an image ----------------------------------------------------------------------------------------------------------------


def _folder_per_image(root: Path, card: DatasetCard) -> Listing | None:
    """``ID/images/ID.png`` with ``ID/masks/*.png``, optionally below ``train/`` and ``test/`` (or ``stage1_train/`` …)."""
    top = _folders(root)
    tops = {split: [folder for folder in top if re.search(rf"(^|_){split}(ing)?$", folder.name.lower())] for split in ("train", "test")}
    homes = {split: folders[0] for split, folders in tops.items() if len(folders) == 1} if tops["train"] else {"train": root}
    out = Listing(root=root, layout="one folder an image, one mask a nucleus")
    for split, home in homes.items():
        samples = []
        for folder in _folders(home):
            if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
                continue
            pictures, masks = list(out.images_in(folder / "images").values()), tuple(out.images_in(folder / "masks").values())
            if len(pictures) != 1:
                advice = "Take it out, or use images/ and masks/ of many images."
                out.reject("not-one", folder.name, f"{folder}: holds {len(pictures)} images, one is expected", advice)
            elif not masks:
                message = f"{root.name}: '{pictures[0].name}' has no mask. Expected files in {folder.relative_to(root)}/masks"
                out.reject("missing-mask", pictures[0].name, message, "Add them, or move the image out.")
            else:
                samples.append(Sample(name=pictures[0].name, image=pictures[0], mask=folder / "masks", truth=MaskFiles(paths=masks)))
        if samples or split == "train":
            out.parts[split] = tuple(samples)
    return out if out.parts.get("train") or out.problems else None


LAYOUTS = (
    Layout(name=" or ".join(NAMES), scan=_manifest),
    paired_folders("{split}/original", "{split}/mask"),
    paired_folders("{split}/images", "{split}/masks"),
    paired_folders("original", "mask"),
    paired_folders("images", "masks"),
    paired_folders("train/original", "train/mask"),
    paired_folders("train/images", "train/masks"),
    Layout(name="a COCO file", scan=_coco_folder),
    Layout(name="one folder an image with images/ and masks/", scan=_folder_per_image),
)
"""Tried in this order if the card names no folders."""
