"""Classes of a dataset: which occur in which split, which are parts of others, and how many images are empty.

A nucleus and its cytoplasm are two classes and one cell. The card declares this (``objects``, ``parts``). Otherwise the masks decide: a
class whose outline lies almost entirely along one other class is a part of that class's objects.

Letters: K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from cellbench.config.cards import DatasetCard
from cellbench.data.class_content import ClassContent
from cellbench.data.dataset import SPLITS, Dataset, Sample
from cellbench.errors import CellbenchError
from cellbench.files import facts_digest
from cellbench.metrics.instances import has_parts

PART_SHARE = 0.75
"""A class is a part of another from this share of its outline along the other. White blood cells (Zheng 2018): nuclei 1.00, cytoplasm 0.47
along its nucleus; red cells, white cells and platelets that touch in drawn smears: 0.01."""
DOUBT_SHARE = 0.4
"""From this share on, a note says that the class was *not* taken as a part."""
THICK_PX = 3
"""Minimum mean thickness of the enclosing class. Rims of a smoothed mask, whose values pass through another class's, are thinner."""
MOST_PARTS = 4
"""Maximum mean number of regions of a part in one region of its object: more are cells within a sheet of others (lobes of a nucleus: 2 to 3)."""
WORDS = {"train": "training", "val": "validation", "test": "test"}


def infer_owners(card: DatasetCard, found: Sequence[ClassContent]) -> tuple[tuple[int, ...], list[str]]:
    """For each class the class of its object, by the card or else by the masks, and notes for the user.

    Empty where every class is an object. Raises CellbenchError where neither card nor masks say which object a part belongs to.
    """
    names, num = card.classes, len(card.classes)
    total = sum(found[1:], found[0]) if found else None
    owners, notes = list(range(num)), []
    if (given := card.part_of()) is not None:
        for part, owner in given.items():
            k = names.index(part)
            if owner is None:
                objects = [names.index(name) for name in names[1:] if name not in given]
                touching = total.contacts[k, objects] if total is not None else np.zeros(1)
                if not touching.any():
                    raise CellbenchError(
                        f"{card.path}: parts: '{part}' touches none of {', '.join(names[j] for j in objects)}, so its object is not known. "
                        f"Write parts = {{ {part} = 'CLASS' }}."
                    )
                owner = names[objects[int(touching.argmax())]]
            owners[k] = names.index(owner)
            notes.append(f"'{part}' is a part of '{owner}': one object together, as the card says.")
    elif total is not None:
        owners, notes = _owners_by_contact(names, total)
    return (tuple(owners) if has_parts(owners) else ()), notes


def _owners_by_contact(names: Sequence[str], total: ClassContent) -> tuple[list[int], list[str]]:
    outline = total.contacts.sum(1)
    shares = np.divide(total.contacts, outline[:, None], out=np.zeros(total.contacts.shape), where=outline[:, None] > 0)
    shares[:, 0] = 0
    owners, notes = list(range(len(names))), []
    for part in np.argsort(-shares.max(1), kind="stable").tolist():  # the most enclosed first
        owner = int(shares[part].argmax())
        share = shares[part, owner]
        # The more enclosed of two is the part; if both lie entirely along each other (no background), the smaller one.
        if part == 0 or share < DOUBT_SHARE or (shares[owner, part], -total.pixels[owner]) >= (share, -total.pixels[part]):
            continue
        thick = total.areas_px[owner, part] >= THICK_PX * total.contacts[owner, part]
        few = total.regions[part, owner] <= MOST_PARTS * total.regions[owner, part]
        fact = f"{share:.0%} of the outline of '{names[part]}' lies along '{names[owner]}'"
        if share >= PART_SHARE and thick and few:
            owners[part] = owner
            notes.append(f"{fact}: taken as a part of it, one object together. If that is wrong, give `objects` on the card.")
        elif thick:
            notes.append(f"{fact}: taken as an object of its own. If it is a part of it, give `parts` on the card.")
    for part in range(len(names)):  # a part of a part is of the same object
        while owners[owners[part]] != owners[part]:
            owners[part] = owners[owners[part]]
    return owners, notes


def with_owners(dataset: Dataset, owners: Sequence[int]) -> Dataset:
    """The dataset with these owners; its digest differs from one where every class is an object."""
    if not has_parts(owners):
        return dataset
    digest = facts_digest([dataset.digest, "parts", list(owners)]) if dataset.digest else ""
    return replace(dataset, owners=tuple(owners), digest=digest)


def describe_absent_classes(classes: Sequence[str], pixels: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """(class, sentence) for each class that is absent from a split. ``pixels``: by split, (N, K) for its N images; empty splits do not count."""
    there = {split: counts.sum(0) > 0 for split, counts in pixels.items() if len(counts)}
    out = []
    for k, name in enumerate(classes):
        missing = [split for split, has in there.items() if not has[k]]
        if k == 0 or not missing:
            continue
        if len(missing) == len(there):
            out.append((name, f"class '{name}' is in no mask of this data. It has no score, and means leave it out."))
            continue
        then = {
            "train": "no model can learn it",
            "val": "it has no part in choosing epochs",
            "test": "it has no score, and means leave it out",
        }
        where = " and ".join(f"in no {WORDS[split]} mask" for split in missing)
        out.append((name, f"class '{name}' is {where}: {'; '.join(then[split] for split in missing)}."))
    return out


def describe_empty_images(pixels: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences on images without a cell; ``pixels`` as for :func:`describe_absent_classes`."""
    num = {split: int((counts[:, 1:].sum(1) == 0).sum()) for split, counts in pixels.items() if len(counts)}
    counts = [f"{n} of {len(pixels[split])} {WORDS[split]} images" for split, n in num.items() if n]
    if not counts:
        return []
    out = [f"without a cell: {', '.join(counts)}. Means leave out those where nothing is found; a find there scores 0."]
    if num.get("val") and num["val"] == len(pixels["val"]):
        out.append("no validation image has a cell: epochs are chosen by the validation loss.")
    return out


def unused_classes(dataset: Dataset, found: Iterable[ClassContent]) -> tuple[int, ...]:
    """The classes that occur in no mask; none if there is no cell at all, which says nothing about single classes."""
    pixels = sum((one.pixels for one in found), np.zeros(len(dataset.classes), np.int64))
    return tuple(k for k in range(1, len(pixels)) if not pixels[k]) if pixels[1:].any() else ()


def with_class_facts(dataset: Dataset, contents: Mapping[Sample, ClassContent], card: DatasetCard) -> Dataset:
    """The dataset with ``owners``, ``unused`` and notes on its classes. Raises CellbenchError as :func:`infer_owners` does."""
    owners, notes = infer_owners(card, list(contents.values()))
    pixels = {split: np.array([contents[sample].pixels for sample in dataset.samples(split)]) for split in SPLITS}
    notes += [sentence for _, sentence in describe_absent_classes(dataset.classes, pixels)] + describe_empty_images(pixels)
    return replace(with_owners(dataset, owners), unused=unused_classes(dataset, contents.values()), notes=(*dataset.notes, *notes))
