"""What the masks of a dataset hold: which classes are in which split, how many images are empty, and which class is a part of which.

A nucleus and its cytoplasm are two classes and one cell. The card says so (``objects``, ``parts``); where it does not, the masks are asked: a
class whose outline lies almost wholly along one other class is a part of that class's objects.

Letters: K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from cellbench.config.cards import DatasetCard
from cellbench.data.dataset import SPLITS, Dataset, Sample
from cellbench.errors import CellbenchError
from cellbench.file_cache import FileFactCache
from cellbench.metrics.instances import has_parts

PART_SHARE = 0.75
"""Of a class's outline along one other class, from which on it is a part. White blood cells (Zheng 2018): nuclei 1.00, cytoplasm 0.47 along
its nucleus; red cells, white cells and platelets that touch in drawn smears: 0.01."""
DOUBT_SHARE = 0.4
"""From which on it is reported that they were *not* taken as parts."""
THICK_PX = 3
"""Mean thickness of what encloses a part. Rims of a smoothed mask, whose values pass through another class's, are thinner."""
MOST_PARTS = 4
"""Of a class in one region of another, in the mean: more are cells in a sheet of others (lobes of a nucleus: 2 to 3)."""
WORDS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassContent:
    """What masks hold, summed over any number of them; int64 each."""

    pixels: np.ndarray
    """(K,)."""
    contacts: np.ndarray
    """(K, K), symmetric: pairs of neighbouring pixels (of four) by their two classes."""
    regions: np.ndarray
    """(K, K): connected regions of the row's class that touch the column's."""
    areas_px: np.ndarray
    """(K, K): and their area."""

    def __add__(self, other: ClassContent) -> ClassContent:
        return ClassContent(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


def class_content(classes: np.ndarray, num: int) -> ClassContent:
    """Of one class map (H, W); pixels that are not below ``num`` count nowhere."""
    known = classes < num
    pixels = np.bincount(classes[known], minlength=num)[:num].astype(np.int64)
    contacts, regions, areas = (np.zeros((num, num), np.int64) for _ in range(3))
    present = [label for label in range(1, num) if pixels[label]]
    if len(present) > 1:  # nothing to be part of otherwise
        for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            a, b = classes[first], classes[second]
            at = (a != b) & known[first] & known[second]
            pairs = np.bincount(a[at].astype(np.int64) * num + b[at], minlength=num * num).reshape(num, num)
            contacts += pairs + pairs.T
        for label in present:
            parts, count = ndimage.label(classes == label)
            size = np.bincount(parts.ravel(), minlength=count + 1)
            for other in present:
                if other != label and contacts[label, other]:
                    touching = np.unique(parts[ndimage.binary_dilation(classes == other)])
                    touching = touching[touching > 0]
                    regions[label, other], areas[label, other] = len(touching), size[touching].sum()
    return ClassContent(pixels=pixels, contacts=contacts, regions=regions, areas_px=areas)


def survey_classes(dataset: Dataset) -> dict[Sample, ClassContent]:
    """Each sample's mask, but for those that cannot be read. What was read is remembered by the file's size and time of change."""
    num = len(dataset.classes)
    meaning = {
        f.name: getattr(dataset, f.name)
        for f in fields(dataset)
        if f.name not in (*SPLITS, "name", "root", "digest", "notes", "owners", "unused")
    }
    key = hashlib.sha256(repr(sorted(meaning.items())).encode()).hexdigest()[:8]

    def listed(path: Path) -> list[list]:
        one = class_content(dataset.read_mask(Sample(name=path.name, image=path, mask=path)), num)
        return [getattr(one, field.name).tolist() for field in fields(ClassContent)]

    out: dict[Sample, ClassContent] = {}
    with FileFactCache(f"classes-{key}", listed) as known:

        def read(sample: Sample) -> None:
            with contextlib.suppress(CellbenchError, OSError):
                if sample.truth is not None:
                    out[sample] = class_content(dataset.read_mask(sample), num)
                else:
                    values = zip(fields(ClassContent), known[sample.mask], strict=True)
                    out[sample] = ClassContent(**{field.name: np.array(value, np.int64) for field, value in values})

        todo = [sample for split in SPLITS for sample in dataset.samples(split)]
        with ThreadPoolExecutor(2) as pool:  # decoding frees the interpreter's lock
            list(
                tqdm(
                    pool.map(read, todo),
                    total=len(todo),
                    desc=f"classes of {dataset.name}",
                    unit="image",
                    leave=False,
                    disable=len(todo) < 200,
                )
            )
    return out


def infer_owners(card: DatasetCard, found: Sequence[ClassContent]) -> tuple[tuple[int, ...], list[str]]:
    """For each class the class of the object that it belongs to, by the card and else by the masks; and what a person should know about it.

    Empty where every class is an object. Raises CellbenchError where the card leaves open which object a part belongs to, and the masks do too.
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
                        f"Write it as parts = {{ {part} = 'CLASS' }}."
                    )
                owner = names[objects[int(touching.argmax())]]
            owners[k] = names.index(owner)
            notes.append(f"'{part}' is a part of '{owner}': one object together, as the card says.")
    elif total is not None:
        owners, notes = _asked(names, total)
    return (tuple(owners) if has_parts(owners) else ()), notes


def _asked(names: Sequence[str], total: ClassContent) -> tuple[list[int], list[str]]:
    outline = total.contacts.sum(1)
    shares = np.divide(total.contacts, outline[:, None], out=np.zeros(total.contacts.shape), where=outline[:, None] > 0)
    shares[:, 0] = 0
    owners, notes = list(range(len(names))), []
    for part in np.argsort(-shares.max(1), kind="stable").tolist():  # the most enclosed first
        owner = int(shares[part].argmax())
        share = shares[part, owner]
        # The more enclosed of two is the part; where both lie wholly along each other (no background), the smaller one.
        if part == 0 or share < DOUBT_SHARE or (shares[owner, part], -total.pixels[owner]) >= (share, -total.pixels[part]):
            continue
        thick = total.areas_px[owner, part] >= THICK_PX * total.contacts[owner, part]
        few = total.regions[part, owner] <= MOST_PARTS * total.regions[owner, part]
        said = f"{share:.0%} of the outline of '{names[part]}' lies along '{names[owner]}'"
        if share >= PART_SHARE and thick and few:
            owners[part] = owner
            notes.append(f"{said}: taken as a part of it, one object together. If that is wrong, give `objects` on the card.")
        elif thick:
            notes.append(f"{said}: taken as an object of its own. If it is a part of it, give `parts` on the card.")
    for part in range(len(names)):  # a part of a part is of the same object
        while owners[owners[part]] != owners[part]:
            owners[part] = owners[owners[part]]
    return owners, notes


def with_owners(dataset: Dataset, owners: Sequence[int]) -> Dataset:
    """The dataset whose cells are found so: its digest tells it from one where every class is an object."""
    if not has_parts(owners):
        return dataset
    facts = json.dumps([dataset.digest, "parts", list(owners)])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16] if dataset.digest else ""
    return replace(dataset, owners=tuple(owners), digest=digest)


def describe_absent_classes(classes: Sequence[str], pixels: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """Classes without a pixel somewhere: (class, sentence). ``pixels``: by split, (N, K) for its N images; splits without images say nothing."""
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
    """A sentence about images without a cell, if there are any; ``pixels`` as for :func:`describe_absent_classes`."""
    num = {split: int((counts[:, 1:].sum(1) == 0).sum()) for split, counts in pixels.items() if len(counts)}
    told = [f"{n} of {len(pixels[split])} {WORDS[split]} images" for split, n in num.items() if n]
    if not told:
        return []
    out = [f"without a cell: {', '.join(told)}. Means leave out those where nothing is found; a find there scores 0."]
    if num.get("val") and num["val"] == len(pixels["val"]):
        out.append("no validation image has a cell: epochs are chosen by the validation loss.")
    return out


def unused_classes(dataset: Dataset, found: Iterable[ClassContent]) -> tuple[int, ...]:
    """The classes that none of the masks holds; none where there is no cell at all, which is nothing about single classes."""
    pixels = sum((one.pixels for one in found), np.zeros(len(dataset.classes), np.int64))
    return tuple(k for k in range(1, len(pixels)) if not pixels[k]) if pixels[1:].any() else ()


def with_class_facts(dataset: Dataset, card: DatasetCard) -> Dataset:
    """The dataset with what its masks say of its classes: ``owners``, ``unused``, and notes. Raises CellbenchError as :func:`infer_owners` does."""
    found = survey_classes(dataset)
    owners, notes = infer_owners(card, list(found.values()))
    pixels = {split: np.array([found[sample].pixels for sample in dataset.samples(split) if sample in found]) for split in SPLITS}
    notes += [sentence for _, sentence in describe_absent_classes(dataset.classes, pixels)] + describe_empty_images(pixels)
    return replace(with_owners(dataset, owners), unused=unused_classes(dataset, found.values()), notes=(*dataset.notes, *notes))
