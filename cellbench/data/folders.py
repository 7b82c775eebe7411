"""Opens a folder of images and masks, or draws one: from a dataset card and ``--data`` to a :class:`Dataset`.

Images and masks are paired by stem, whatever their extensions: a loader that globs ``*.png`` loses 9 % of BCCD.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cellbench.data.dataset import Dataset, Sample, proven
from cellbench.data.images import EXTENSIONS
from cellbench.data.splits import split_of
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir
from cellbench.registry import DatasetCard, load, with_defaults
from cellbench.spec import DataSpec

LAYOUTS = (
    ("{split}/original", "{split}/mask"),
    ("{split}/images", "{split}/masks"),
    ("original", "mask"),
    ("images", "masks"),
)


def open_dataset(card: DatasetCard, folder: Path | None, spec: DataSpec) -> Dataset:
    """The dataset of a card: drawn, or read from ``folder``. Every file is proven readable. Raises CellbenchError."""
    if card.draw:
        root = _drawn(card, spec)
    else:
        if spec.draw:
            raise CellbenchError(f"[data.draw] is for drawn datasets, but '{card.id}' is read from a folder. Remove the table.")
        if folder is None:
            how = f" How to get it: {card.how_to_get}" if card.how_to_get else ""
            raise CellbenchError(f"dataset '{card.id}' is read from a folder, and none was named. Give --data DIR.{how}")
        root = folder
    if not root.is_dir():
        raise CellbenchError(f"--data {root}: there is no such folder.")
    root, images, masks = _layout(card, root)
    notes: list[str] = []
    if "{split}" in images:
        parts = {s: _pairs(root, images.format(split=s), masks.format(split=s), notes) for s in ("train", "test")}
    else:
        parts = {"train": _pairs(root, images, masks, notes), "test": ()}
    labels = Dataset(name=card.id, classes=card.classes, values=card.values, root=root, train=(), val=(), test=())
    splits = split_of(root, parts["train"], parts["test"], spec, lambda sample: float((labels.read_mask(sample) > 0).mean()))
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    if spec.limit:
        parts = {name: samples[: spec.limit] for name, samples in parts.items()}
    dataset = proven(Dataset(name=card.id, classes=card.classes, values=card.values, root=root, **parts))
    notes.append(splits.keep())  # only now: a split that names a damaged image would be in the way of whoever takes it out
    return replace(dataset, notes=tuple(notes))


def _drawn(card: DatasetCard, spec: DataSpec) -> Path:
    settings = with_defaults(card.draw, spec.draw, "data.draw")
    key = hashlib.sha256(json.dumps([card.builder, settings], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / "drawn" / f"{card.id}-{key}"
    if not folder.is_dir():
        with tqdm(desc=f"drawing {card.id}", unit="image", leave=False) as bar:
            load(card)(folder, settings, bar.update)
    return folder


def _layout(card: DatasetCard, root: Path) -> tuple[Path, str, str]:
    """The folder that holds the data and the names of its image and mask folders; one folder in between, as in Kaggle's zip, is passed."""
    tried = [(card.images, card.masks)] if card.images else list(LAYOUTS)
    inner = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    for base in [root, *(inner if len(inner) == 1 else [])]:
        for images, masks in tried:
            needed = [base / part.format(split=split) for split in ("train", "test") for part in (images, masks)]
            if all(folder.is_dir() for folder in needed):
                return base, images, masks
    asked = " or ".join(f"{images}/ with {masks}/" for images, masks in tried).replace("{split}", "train|test")
    found = ", ".join(f"{entry.name}/" for entry in inner[:5]) or "no folder"
    raise CellbenchError(f"--data {root}: this is not laid out as '{card.id}' expects ({asked}). Found there: {found}.")


def _pairs(root: Path, images: str, masks: str, notes: list[str]) -> tuple[Sample, ...]:
    pictures, labels = _by_stem(root / images), _by_stem(root / masks)
    where = f"{root.name}/{images}"
    if not pictures:
        raise CellbenchError(f"{root / images}: holds no image. Expected files that end in {', '.join(sorted(EXTENSIONS))}.")
    lonely = [path.name for stem, path in pictures.items() if stem not in labels]
    if lonely:
        more = f"; {len(lonely) - 1} more like it" if len(lonely) > 1 else ""
        raise CellbenchError(f"{where}: '{lonely[0]}' has no mask. Expected {masks}/{Path(lonely[0]).stem}.png{more}. Add it, or move the image out.")
    spare = sorted(set(labels) - set(pictures))
    if spare:
        notes.append(f"{root.name}/{masks}: {len(spare)} masks have no image and are not used, '{labels[spare[0]].name}' first.")
    return tuple(Sample(name=path.name, image=path, mask=labels[stem]) for stem, path in pictures.items())


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem, extension = os.path.splitext(entry.name)
        if extension.lower() not in EXTENSIONS or entry.name.startswith(".") or not entry.is_file():
            continue
        if stem in found:
            raise CellbenchError(f"{folder}: '{found[stem].name}' and '{entry.name}' share a stem, so their masks cannot be told apart. Rename one.")
        found[stem] = Path(entry.path)
    return found
