"""The layout of images with COCO files: in the folder, in ``annotations/`` or in folders of splits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from cellbench.config.cards import DatasetCard
from cellbench.data.annotations import CocoFile, count_coco_categories, read_coco
from cellbench.data.categories import classes_of_categories
from cellbench.data.dataset import Sample
from cellbench.data.outline_layout import outlines_by_stem
from cellbench.data.scan import Listing, resolve_inside, unique_names
from cellbench.errors import CellbenchError, first_names, quote_name


def find_coco(root: Path, card: DatasetCard) -> Listing | None:
    """JSON files with COCO's key words, in the folder, in ``annotations/`` or in folders of splits."""
    places = [root, root / "annotations", *(root / split for split in ("train", "valid", "val", "test"))]
    files = [path for folder in places if folder.is_dir() for path in sorted(folder.glob("*.json")) if path.is_file()]
    files = [path for path in files if not path.name.startswith(("splits", ".")) and b'"annotations"' in path.read_bytes()]
    if not files:
        return None
    out = scan_coco(root, card, files)
    others = outlines_by_stem(root)
    for sample in (one for some in out.parts.values() for one in some):
        if found := [path for path in others.get(sample.image.stem, ()) if path.suffix.lower() != ".json"]:
            message = f"{root.name}: '{sample.name}' has outlines in {sample.mask.name} and in {found[0].relative_to(root)}"
            out.reject("several-masks", sample.image.name, message, "Move those out that are not to be used, such as older ones.")
    return out


def scan_coco(root: Path, card: DatasetCard, files: list[Path]) -> Listing:
    out = Listing(root=root, layout=f"COCO {', '.join(file.name for file in files)[:120]}")
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(count_coco_categories(file))
    out.classes, labels, note = classes_of_categories(card, files[0], counts)
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


def _skipped(file: Path, coco: CocoFile) -> list[str]:
    notes = []
    if coco.num_crowds:
        notes.append(
            f"{file.name}: {coco.num_crowds:,} regions are crowds (iscrowd) and are ignored: they are no cells, and nothing in them is scored."
        )
    if coco.empty:
        boxes = f", {coco.num_boxes:,} of them with a box only" if coco.num_boxes else ""
        shown = first_names(coco.empty, 10)
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
