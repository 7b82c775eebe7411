"""The known layouts of folders with images and masks. To add a layout, add an entry to ``LAYOUTS``.

Images and masks are paired by stem, whatever their extensions: a loader that globs ``*.png`` loses 9 % of BCCD. ``a.png`` also goes with ``a_mask.png``
and ``a_img.png`` with ``a_masks.png`` (:func:`pair_stems`). Subfolders on both sides are the patients, slides or splits of the images.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cellbench.config.cards import DatasetCard
from cellbench.data.annotations import MaskFiles, NoMask
from cellbench.data.coco_layout import find_coco, scan_coco
from cellbench.data.dataset import SPLITS as SPLIT_NAMES
from cellbench.data.dataset import Sample
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.manifest import NAMES, read_manifest
from cellbench.data.manifest import SPLITS as SPLIT_WORDS
from cellbench.data.mask_names import ANNOTATED, IMAGE_WORDS, MASK_WORDS
from cellbench.data.outline_layout import scan_outlines, tool_files
from cellbench.data.scan import FileWarning, Listing, files_below, other_files, unique_names
from cellbench.errors import CellbenchError, quantity, quote_name


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay out a folder."""

    name: str
    """Description in the error that no layout matches."""
    scan: Callable[[Path, DatasetCard], Listing | None]
    """Returns the samples of a folder; None if its layout differs. Opens no image."""


def scan_folder(card: DatasetCard, where: Path, *, unlabelled: bool = False) -> Listing:
    """The samples of a folder, a manifest or a COCO file; with ``unlabelled`` also of a folder without any mask.

    Raises CellbenchError if no layout matches.
    """
    if where.is_file():
        if where.suffix.lower() in (".csv", ".toml"):
            return read_manifest(where, where.parent)
        if where.suffix.lower() == ".json":
            return scan_coco(where.parent, card, [where])
        raise CellbenchError(f"--data {where}: is a file. Expected a folder, a manifest (.csv, .toml) or a COCO file (.json).")
    if not where.is_dir():
        raise CellbenchError(f"--data {where}: there is no such folder.")
    layouts = [paired_folders(card.images, card.masks)] if card.images else LAYOUTS
    if (listing := _first_match(layouts, card, where)) is not None:
        return listing
    found = [entry.name for entry in _folders(where)]
    num, boxes = len(files_below(where)[0]), any(where.rglob("*.xml"))
    if num and not any(MASK_WORDS.search(f"_{name}") for name in found):
        if unlabelled:
            return _scan_images(where)
        if not boxes:
            table = next((path for path in sorted(where.rglob("*")) if path.suffix.lower() in (".csv", ".tsv")), None)
            raise CellbenchError(
                f"--data {where}: holds {quantity(num, 'image')} and no masks. Each image to learn from needs one: masks/NAME.png for "
                "images/NAME.png, or NAME_mask.png beside NAME.png. `predict` and `explore` take plain folders"
                + (
                    f"; `evaluate` and `score` compare counts with a table .csv whose columns are called image and count ({table.name} is there)."
                    if table
                    else "."
                )
            )
    if boxes:
        raise CellbenchError(
            f"--data {where}: holds images with .xml files and no masks. Boxes are enough to compare counts (`evaluate RUN --data`, "
            "`score NAME MASKS --data`); to learn from, each image needs a mask."
        )
    expected = ", or ".join(layout.name for layout in layouts)
    shown = ", ".join(f"{name}/" for name in found[:5]) or "no folder"
    raise CellbenchError(f"--data {where}: this is not laid out as '{card.id}' expects ({expected}). Found there: {shown}.")


def is_laid_out(card: DatasetCard, where: Path) -> bool:
    """Whether a folder has the folders that the card names; True for a card that names none."""
    return not card.images or (where.is_dir() and _first_match([paired_folders(card.images, card.masks)], card, where) is not None)


def _scan_images(where: Path) -> Listing:
    """The images of a folder and its subfolders without their masks, each with an annotation that marks nothing."""
    out = Listing(root=where, layout="images without masks", labelled=False)
    paths = files_below(where)[0]
    names = unique_names([path.relative_to(where).as_posix() for path in paths])
    out.parts["train"] = tuple(
        Sample(name=names[path.relative_to(where).as_posix()], image=path, mask=path, truth=NoMask(image=path)) for path in paths
    )
    return out


def _first_match(layouts: Iterable[Layout], card: DatasetCard, where: Path) -> Listing | None:
    inner = [entry for entry in _folders(where) if entry.name != "__MACOSX"]
    for root in [where, *(inner if len(inner) == 1 else [])]:  # Kaggle's zip has one folder in between
        for layout in layouts:
            if (listing := layout.scan(root, card)) is not None:
                return listing
    return None


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _manifest(root: Path, card: DatasetCard) -> Listing | None:
    return next((read_manifest(root / name, root) for name in NAMES if (root / name).is_file()), None)


# --- pairs of files -----------------------------------------------------------------------------------------------------------------------

DEEPEST = 4
"""Levels of subfolders that are looked into."""


def pair_stems(images: Iterable[str], masks: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """For each image's stem that of its mask, and for stems that several masks fit these masks.

    >>> pair_stems(["a", "b_img", "c"], ["a", "b_masks", "c_mask", "c-seg"])
    ({'a': 'a', 'b_img': 'b_masks'}, {'c': ['c_mask', 'c-seg']})
    """
    masks = list(masks)
    same, short = set(masks), dict[str, list[str]]()
    for stem in masks:
        short.setdefault(MASK_WORDS.sub("", stem), []).append(stem)
    pairs: dict[str, str] = {}
    several: dict[str, list[str]] = {}
    for stem in images:
        fitting = [stem] if stem in same else short.get(stem) or short.get(IMAGE_WORDS.sub("", stem)) or []
        if len(fitting) == 1:
            pairs[stem] = fitting[0]
        elif fitting:
            several[stem] = fitting
    return pairs, several


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A folder of images and the folder of their masks, relative to the root."""

    images: str
    masks: str
    split: str
    group: str


def paired_folders(images: str, masks: str) -> Layout:
    """``{split}`` in both names stands for ``train``, ``val`` and ``test``; ``{group}`` for the folder of a patient or slide.

    Subfolders that both folders have are splits, or else groups.
    """
    name = f"{images}/ with {masks}/".replace("{split}", "train|test").replace("{group}", "PATIENT")
    return Layout(name=name, scan=partial(_scan_pairs, images=images, masks=masks, name=name))


def _scan_pairs(root: Path, card: DatasetCard, *, images: str, masks: str, name: str) -> Listing | None:
    places = _places(root, images, masks)
    if not any(place.split == "train" for place in places):
        return None
    out = Listing(root=root, layout=name)
    found = [(place, out.images_in(root / place.images), out.images_in(root / place.masks)) for place in _with_subfolders(root, places)]
    if not any(labels for _, _, labels in found) and any(tool_files(root / place.masks) for place in places):
        return None  # outlines instead of masks
    if "{group}" in images and all(len(pictures) < 2 for _, pictures, _ in found):
        return None  # one folder an image
    for place in places:
        if not any(pictures for one, pictures, _ in found if one.images == place.images or one.images.startswith(f"{place.images}/")):
            here = root / place.images
            out.reject("empty", place.images, f"{here}: holds no image", f"Expected files that end in {', '.join(sorted(EXTENSIONS))}.")
    samples: list[tuple[str, Sample]] = []
    for place, pictures, labels in found:
        samples += [(place.split, sample) for sample in _paired(out, place, pictures, labels)]
    drawn = {
        ANNOTATED.sub("", path.stem): path
        for folder in {one for place, _, _ in found for one in (place.images, place.masks)}
        for path in tool_files(root / folder)
    }
    if both := sorted(drawn[sample.image.stem].name for _, sample in samples if sample.image.stem in drawn):
        out.notes.append(f"{len(both)} images have a mask and a file of outlines, such as {quote_name(both[0])}: the masks are used")
    return _listed(out, samples)


def _places(root: Path, images: str, masks: str) -> list[_Place]:
    """The pairs of folders that exist."""
    words = [form for word in SPLIT_WORDS if word for form in (word, word.capitalize(), word.upper())] if "{split}" in images else ["train"]
    groups = [folder.name for folder in _folders(root)] if "{group}" in images else [""]
    out: dict[tuple[str, str], _Place] = {}
    for word, group in itertools.product(words, groups):
        here, there = (text.format(split=word, group=group) for text in (images, masks))
        if (root / here).is_dir() and (root / there).is_dir():
            split = SPLIT_WORDS[word.lower()]
            out.setdefault((split, group), _Place(images=here, masks=there, split=split, group=group))
    return list(out.values())


def _with_subfolders(root: Path, places: Iterable[_Place], depth: int = 0) -> Iterator[_Place]:
    """The places, and below each those subfolders that are on both sides."""
    for place in places:
        yield place
        if depth < DEEPEST:
            on_both = {folder.name for folder in _folders(root / place.images)} & {folder.name for folder in _folders(root / place.masks)}
            yield from _with_subfolders(root, [_below(place, name, depth) for name in sorted(on_both)], depth + 1)


def _below(place: _Place, name: str, depth: int) -> _Place:
    split = SPLIT_WORDS.get(name.lower(), "") if depth == 0 and place.split == "train" and not place.group else ""
    group = place.group if split else f"{place.group}/{name}".lstrip("/")
    return _Place(images=f"{place.images}/{name}", masks=f"{place.masks}/{name}", split=split or place.split, group=group)


def _paired(out: Listing, place: _Place, pictures: dict[str, Path], labels: dict[str, Path]) -> list[Sample]:
    """The samples of two folders; what has no partner becomes a problem or a doubt of ``out``."""
    root, here, there = out.root, place.images, place.masks
    pairs, several = pair_stems(pictures, labels)
    for stem, path in pictures.items():
        if stem in several:
            message = (
                f"{root.name}/{here}: '{path.name}' has {len(several[stem])} masks: {', '.join(labels[one].name for one in several[stem])}"
            )
            out.reject("several-masks", path.name, message, "Keep one of them there.")
            out.reported |= {path, *(labels[one] for one in several[stem])}
        elif stem not in pairs:
            message = f"{root.name}/{here}: '{path.name}' has no mask. Expected {there}/{stem}.png"
            out.reject("missing-mask", path.name, message, "Add it, or move the image out.")
            out.reported.add(path)
    used = {*pairs.values(), *(one for some in several.values() for one in some)}
    spare = {stem: path for stem, path in sorted(labels.items()) if stem not in used}
    unread = {path.stem: path for path in other_files(root / here) if path.stem in spare}
    out.reported |= {*unread.values(), *spare.values()}
    for path in unread.values():
        advice = f"Save it as one of {', '.join(sorted(EXTENSIONS))}, or move it and its mask out."
        out.reject("format", path.name, f"{root.name}/{here}: '{path.name}' has a mask, but its format is not supported", advice)
    if names := tuple(path.name for stem, path in spare.items() if stem not in unread):
        message = f"{root.name}/{there}: {len(names)} masks have no image and are not used"
        out.doubts.append(FileWarning(kind="no image", message=message, names=names))
    return [
        Sample(name=pictures[stem].relative_to(root / here).as_posix(), image=pictures[stem], mask=labels[mask], group=place.group)
        for stem, mask in pairs.items()
    ]


def _listed(out: Listing, samples: list[tuple[str, Sample]]) -> Listing:
    """The listing with its samples by split. Names that two images share get the folders before them."""
    groups = dict.fromkeys(sample.group for _, sample in samples if sample.group)
    for split in SPLIT_NAMES:
        here = [sample for one, sample in samples if one == split]
        paths = [f"{sample.group}/{sample.name}".lstrip("/") for sample in here]
        names = unique_names(paths)
        out.parts[split] = tuple(
            replace(sample, name=names[path], group=sample.group if len(groups) > 1 else "")
            for sample, path in zip(here, paths, strict=True)
        )
    if len(groups) > 1:
        out.notes.append(
            f"groups: the {len(groups)} subfolders, such as {quote_name(next(iter(groups)))}, are each kept together, like patients "
            "(data.group=none splits them)"
        )
    return out


def _masks_beside_images(root: Path, card: DatasetCard) -> Listing | None:
    """``NAME.png`` with ``NAME_mask.png`` in one folder, or in each of several: splits, patients or slides."""
    out = Listing(root=root, layout="NAME.png with NAME_mask.png beside it")
    samples: list[tuple[str, Sample]] = []
    folders = sorted({path.parent for path in files_below(root)[0]})
    for folder in folders:
        every = out.images_in(folder)
        labels = {stem: path for stem, path in every.items() if MASK_WORDS.search(stem)}
        pictures = {stem: path for stem, path in every.items() if stem not in labels}
        if not pair_stems(pictures, labels)[0]:
            continue
        parts = folder.relative_to(root).parts
        split = SPLIT_WORDS.get(parts[0].lower(), "") if parts else ""
        here = folder.relative_to(root).as_posix()
        place = _Place(images=here, masks=here, split=split or "train", group="/".join(parts[bool(split) :]))
        samples += [(place.split, sample) for sample in _paired(out, place, pictures, labels)]
    return _listed(out, samples) if samples else None


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
    Layout(name="a COCO file", scan=find_coco),
    paired_folders("{group}/images", "{group}/masks"),
    Layout(name="one folder an image with images/ and masks/", scan=_folder_per_image),
    Layout(name="NAME.png with NAME_mask.png beside it", scan=_masks_beside_images),
    Layout(name="images with .geojson, _seg.npy, ROI or LabelMe files", scan=scan_outlines),
)
"""Tried in this order if the card names no folders."""
