"""How a folder of images and masks may be laid out, and finding out which way this one is.

In this order: the card's own folders; a manifest; ``original/`` with ``mask/`` or ``images/`` with ``masks/``, below ``train/`` and
``test/`` or not; COCO JSON; one folder an image with ``images/`` and ``masks/``, a mask a nucleus (Data Science Bowl 2018). Images and masks
are paired by stem, whatever their extensions: a loader that globs ``*.png`` loses 9 % of BCCD.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cellbench.config.cards import DatasetCard
from cellbench.data.annotations import CocoFile, MaskFiles, count_coco_categories, read_coco
from cellbench.data.dataset import Sample
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.manifest import NAMES, read_manifest
from cellbench.data.scan import FileWarning, Listing, UnusableImage, by_stem, check_outside, other_files, resolve_inside, unique_names
from cellbench.errors import CellbenchError, quote_name
from cellbench.metrics.pixel import IGNORE

LAYOUTS = (
    ("{split}/original", "{split}/mask"),
    ("{split}/images", "{split}/masks"),
    ("original", "mask"),
    ("images", "masks"),
    ("train/original", "train/mask"),
    ("train/images", "train/masks"),
)


def scan_folder(card: DatasetCard, where: Path) -> Listing:
    """What lies in a folder, or in that of a manifest or COCO file. Raises CellbenchError where it is laid out in no known way."""
    if where.is_file():
        if where.suffix.lower() in (".csv", ".toml"):
            return read_manifest(where, where.parent)
        if where.suffix.lower() == ".json":
            return _coco(card, where.parent, [where])
        raise CellbenchError(f"--data {where}: is a file. Expected a folder, a manifest (.csv, .toml) or a COCO file (.json).")
    if not where.is_dir():
        raise CellbenchError(f"--data {where}: there is no such folder.")
    inner = [entry for entry in _folders(where) if entry.name != "__MACOSX"]
    tried = [(card.images, card.masks)] if card.images else list(LAYOUTS)
    for root in [where, *(inner if len(inner) == 1 else [])]:  # one folder in between, as in Kaggle's zip, is passed
        for name in NAMES:
            if not card.images and (root / name).is_file():
                return read_manifest(root / name, root)
        for images, masks in tried:
            needed = [root / part.format(split=split) for split in ("train", "test") for part in (images, masks)]
            if all(folder.is_dir() for folder in needed):
                return _pairs(root, images, masks)
        if not card.images and (files := _coco_files(root)):
            return _coco(card, root, files)
        if not card.images and (nuclei := _nuclei(root)) is not None:
            return nuclei
    asked = " or ".join(f"{images}/ with {masks}/" for images, masks in tried[:4]).replace("{split}", "train|test")
    asked += "" if card.images else ", or manifest.csv, or a COCO file, or one folder an image with images/ and masks/"
    found = ", ".join(f"{entry.name}/" for entry in inner[:5]) or "no folder"
    raise CellbenchError(f"--data {where}: this is not laid out as '{card.id}' expects ({asked}). Found there: {found}.")


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _pairs(root: Path, images: str, masks: str) -> Listing:
    out = Listing(root=root, layout=f"{images}/ with {masks}/".replace("{split}", "train|test"))
    for split in ("train", "test") if "{split}" in images else ("train",):
        here, there = images.format(split=split), masks.format(split=split)
        pictures, labels = by_stem(root / here, root, out.problems), by_stem(root / there, root, out.problems)
        if not pictures:
            expected = f"Expected files that end in {', '.join(sorted(EXTENSIONS))}."
            out.problems.append(UnusableImage(kind="empty", name=here, said=f"{root / here}: holds no image", todo=expected))
        samples = []
        for stem, path in pictures.items():
            if stem in labels:
                samples.append(Sample(name=path.name, image=path, mask=labels[stem]))
                continue
            out.reported.add(path)
            said = f"{root.name}/{here}: '{path.name}' has no mask. Expected {there}/{stem}.png"
            out.problems.append(UnusableImage(kind="missing-mask", name=path.name, said=said, todo="Add it, or move the image out."))
        spare = sorted(set(labels) - set(pictures))
        unread = {path.stem: path for path in other_files(root / here) if path.stem in spare}
        out.reported |= {*unread.values(), *(labels[stem] for stem in spare)}
        for path in unread.values():
            said = f"{root.name}/{here}: '{path.name}' has a mask, but is of no format that is read"
            todo = f"Save it as one of {', '.join(sorted(EXTENSIONS))}, or move it and its mask out."
            out.problems.append(UnusableImage(kind="format", name=path.name, said=said, todo=todo))
        spare = [stem for stem in spare if stem not in unread]
        if spare:
            said = f"{root.name}/{there}: {len(spare)} masks have no image and are not used"
            out.doubts.append(FileWarning(kind="no image", said=said, names=tuple(labels[stem].name for stem in spare)))
        out.parts[split] = tuple(samples)
    return out


# --- COCO -------------------------------------------------------------------------------------------------------------------------------


def _coco_files(root: Path) -> list[Path]:
    """JSON files that may hold outlines: not a split, and with the words of COCO in them."""
    places = [root, root / "annotations", *(root / split for split in ("train", "valid", "val", "test"))]
    found = [
        path for folder in places if folder.is_dir() for path in sorted(folder.glob("*.json")) if not path.name.startswith(("splits", "."))
    ]
    return [path for path in found if _mentions(path)]


def _mentions(path: Path) -> bool:
    with path.open("rb") as file:
        return path.is_file() and b'"annotations"' in file.read()


def _coco(card: DatasetCard, root: Path, files: list[Path]) -> Listing:
    out = Listing(root=root, layout=f"COCO {', '.join(file.name for file in files)[:120]}")
    samples: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(count_coco_categories(file))
    out.classes, labels, told = _categories(card, files[0], counts)
    out.notes.append(told)
    read = {file: read_coco(file, labels) for file in files}
    entries = [(file, _split_of(file, root), image) for file in files for image in read[file].images]
    if not entries:
        raise CellbenchError(f"{files[0]}: holds no image. Export it again.")
    for file, held in read.items():
        out.notes += _left_out(file, held)
    names = unique_names([f"{_split_of(file, root)}/{image.name}" for file, _, image in entries])
    bases: dict[Path, list[Path]] = {}
    for file, split, image in entries:
        if file not in bases:
            words = [
                root / "images",
                root / split,
                root / f"{split}2017",
                root / "images" / split,
                root / "images" / f"{split}2017",
                root / "valid",
            ]
            bases[file] = [file.parent, root, *words]
        there = [path for base in bases[file] if (path := resolve_inside(base, image.name)) is not None and path.is_file()]
        if resolve_inside(root, image.name) is None:
            out.problems.append(check_outside(root, image.name))
        elif not there or not there[0].resolve().is_relative_to(root.resolve()):
            said = f"{file}: names the image {quote_name(image.name)}, which is not there"
            out.problems.append(
                UnusableImage(kind="missing-image", name=image.name, said=said, todo="Put it beside the file or into images/.")
            )
        else:
            bases[file].insert(0, bases[file].pop(bases[file].index(next(base for base in bases[file] if there[0].is_relative_to(base)))))
            name = names[f"{split}/{image.name}"]
            sample = Sample(name=name.removeprefix(f"{split}__"), image=there[0], mask=file, truth=image)
            samples[split].append(sample)
    out.parts = {split: tuple(found) for split, found in samples.items()}
    return out


NOT_CELLS = ("background", "bg", "_background_", "__background__")
NOT_SCORED = ("ignore", "_ignore_", "__ignore__")
"""Names of categories, in small letters, that are no kind of cell in any tool's export."""


def _categories(card: DatasetCard, file: Path, counts: Mapping[str, int]) -> tuple[tuple[str, ...], dict[str, int | None], str]:
    """The classes, the class number of each category (``IGNORE``; None: left out), and a note on them.

    The card decides, by ``categories`` or by the names of its ``classes``. Where it does neither, one category is the cell, and of several
    each is a class of its own. Raises CellbenchError for a category that the card does not know.
    """
    explicit = "classes" in card.model_fields_set
    targets = [name for name in dict.fromkeys(card.categories.values()) if name not in ("", "ignore")]
    labels: dict[str, int | None] = {}
    if unknown_names := [name for name in card.categories if name not in counts]:
        raise CellbenchError(
            f"{file}: holds no category {quote_name(unknown_names[0])}, of which the card speaks. It holds {', '.join(counts) or 'none'}."
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
    told = "; ".join(
        f"{quote_name(name)} {num:,} ({words[labels[name]] if num else 'not used'})" for name, num in list(counts.items())[:20]
    )
    return classes, labels, f"COCO categories: {told}{'; …' if len(counts) > 20 else ''}. `categories` on the card says otherwise."


def _left_out(file: Path, held: CocoFile) -> list[str]:
    notes = []
    if held.num_crowds:
        notes.append(
            f"{file.name}: {held.num_crowds:,} regions are crowds (iscrowd) and are ignored: they are no cells, and nothing in them is scored."
        )
    if held.empty:
        boxes = f", {held.num_boxes:,} of them with a box only" if held.num_boxes else ""
        shown = ", ".join(held.empty[:10]) + (" …" if len(held.empty) > 10 else "")
        notes.append(f"{file.name}: {len(held.empty):,} annotations have no outline and are skipped{boxes}: id {shown}.")
    if held.empty and not any(image.regions for image in held.images):
        raise CellbenchError(f"{file}: no annotation has an outline{boxes}. Export it with polygons or run lengths (segmentation).")
    return notes


def _split_of(file: Path, root: Path) -> str:
    words = re.split(r"[^a-z]+", f"{'' if file.parent == root else file.parent.name} {file.stem}".lower())
    for split, known in (("test", {"test", "testing"}), ("val", {"val", "valid", "validation"})):
        if known & set(words):
            return split
    return "train"


# --- one folder an image ----------------------------------------------------------------------------------------------------------------


def _nuclei(root: Path) -> Listing | None:
    """``ID/images/ID.png`` with ``ID/masks/*.png``, perhaps below ``train/`` and ``test/`` (or ``stage1_train/`` …); None if it is not so."""
    top = _folders(root)
    tops = {split: [folder for folder in top if re.search(rf"(^|_){split}(ing)?$", folder.name.lower())] for split in ("train", "test")}
    homes = {split: folders[0] for split, folders in tops.items() if len(folders) == 1} if tops["train"] else {"train": root}
    out = Listing(root=root, layout="one folder an image, one mask a nucleus")
    for split, home in homes.items():
        samples = []
        for folder in _folders(home):
            if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
                continue
            pictures = list(by_stem(folder / "images", root, out.problems).values())
            masks = tuple(by_stem(folder / "masks", root, out.problems).values())
            if len(pictures) != 1:
                said = f"{folder}: holds {len(pictures)} images, one was expected"
                out.problems.append(
                    UnusableImage(
                        kind="not-one", name=folder.name, said=said, todo="Take it out, or use images/ and masks/ of many images."
                    )
                )
            elif not masks:
                said = f"{root.name}: '{pictures[0].name}' has no mask. Expected files in {folder.relative_to(root)}/masks"
                out.problems.append(
                    UnusableImage(kind="missing-mask", name=pictures[0].name, said=said, todo="Add them, or move the image out.")
                )
            else:
                samples.append(Sample(name=pictures[0].name, image=pictures[0], mask=folder / "masks", truth=MaskFiles(paths=masks)))
        if samples or split == "train":
            out.parts[split] = tuple(samples)
    return out if out.parts.get("train") or out.problems else None
