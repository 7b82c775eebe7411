"""A dataset as the harness sees it: named images with masks in three splits, proven readable before anything is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from cellbench.data.annotations import Annotation
from cellbench.data.io import images
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.masks import MARKS, MaskFacts, count_below, decide_meaning, mask_facts, mask_facts_of_cells, min_cell_area
from cellbench.errors import CellbenchError, one_line
from cellbench.file_cache import FileFactCache
from cellbench.files import compute_sha256
from cellbench.metrics.pixel import IGNORE

SPLITS = ("train", "val", "test")
CARD_NAME = "dataset.toml"
"""A card that lies in the folder of data itself."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its mask."""

    name: str
    """The image's file name; unique within its split."""
    image: Path
    mask: Path
    """The mask's file, or what holds the truth in its place."""
    size_px: tuple[int, int] = (0, 0)
    """Height, width."""
    digest: str = ""
    """Of the image file's content."""
    group: str = ""
    """The patient, slide or smear that the image is of, where known: images of one are alike, no split tears them apart, and statistics take
    them as one."""
    label: str = ""
    """What it shows as a whole, as a manifest says; for stratified splits."""
    truth: Annotation | None = None
    """How the truth is read where it is not one mask file."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples by split, and how masks become class numbers."""

    name: str
    classes: tuple[str, ...]
    values: tuple[int, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    root: Path
    thresholds: tuple[int, ...] = ()
    """In place of ``values``: class k holds the mask values from ``thresholds[k - 1]`` on."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """In place of ``values``: the mask's colour of each class."""
    owners: tuple[int, ...] = ()
    """For each class the class of the object that it is a part of, its own for an object; empty: every class is an object."""
    unused: tuple[int, ...] = ()
    """Classes that no mask holds, in no split."""
    reading: IntensityScaling = field(default_factory=IntensityScaling)
    """What all its images are read by."""
    um_per_px: float | None = None
    """The side of a pixel by the files' own statement, where all that state one state the same."""
    tolerance: int = 20
    """How far from its class's value a mask's value may lie."""
    masks: str = ""
    """How mask files are meant: numbers of ``cells``, values of ``classes``, or ``binary``; empty: undecided, and then no numbers of cells.
    :func:`interpret_masks` decides."""
    ignore: int | tuple[int, int, int] | None = None
    """The mask value (or colour) of pixels that count nowhere: ``IGNORE`` in class maps."""
    min_cell_px: int | None = None
    """Connected regions, true or predicted, below this area are specks and no cells; None: undecided."""
    digest: str = ""
    """Over every pixel file, the splits and the classes: what a finished run was trained on."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the data was read."""
    limited: bool = False
    """Whether ``[data] limit`` left images out: a quick try."""

    def samples(self, split: str) -> tuple[Sample, ...]:
        """The samples of ``train``, ``val`` or ``test``."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The image (H, W, 3) uint8 RGB and its class map (H, W) uint8. Raises CellbenchError that names the file."""
        return images.read_image(sample.image, self.reading), self.read_mask(sample)

    @property
    def color_table(self) -> dict[tuple[int, int, int], int] | None:
        """Class by colour, where colours tell the classes."""
        ignored = {self.ignore: IGNORE} if isinstance(self.ignore, tuple) else {}
        return {color: index for index, color in enumerate(self.colors)} | ignored if self.colors else None

    def read_mask(self, sample: Sample) -> np.ndarray:
        """The class map (H, W) uint8; ``IGNORE`` where a pixel counts nowhere."""
        if sample.truth is not None:
            return sample.truth.read()[0]
        if self.colors:
            return images.read_labels(sample.mask, colors=self.color_table).astype(np.uint8)
        return self.meaning(images.read_labels(sample.mask))

    def meaning(self, labels: np.ndarray) -> np.ndarray:
        """The class map (H, W) uint8 of a mask's numbers."""
        classes = (
            np.digitize(labels, self.thresholds).astype(np.uint8) if self.thresholds else images.labels_to_classes(labels, self.values)
        )
        if self.ignore is not None and not self.colors:
            classes[labels == self.ignore] = IGNORE
        return classes

    def read_instances(self, sample: Sample) -> np.ndarray | None:
        """The truth's own numbers of cells (H, W), whole, 0 being background; None where the set's masks hold none."""
        if sample.truth is not None:
            return sample.truth.read()[1]
        return self.ids_of(images.read_labels(sample.mask)) if self.masks == "cells" else None

    def ids_of(self, labels: np.ndarray) -> np.ndarray | None:
        """A mask's numbers, where they are those of its cells; the ignored one is 0."""
        if self.masks != "cells":
            return None
        return labels if self.ignore is None else np.where(labels == self.ignore, 0, labels)


def _inspect_image(path: Path, reading: IntensityScaling) -> list[object]:
    height, width = images.read_image(path, reading).shape[:2]  # first, because it tells people what is wrong with a file
    return [compute_sha256(path), height, width]


def _inspect_mask(path: Path, dataset: Dataset) -> list[Any]:
    labels = images.read_labels(path, colors=dataset.color_table)
    classes = labels.astype(np.uint8) if dataset.colors else dataset.meaning(labels)
    return [compute_sha256(path), vars(mask_facts(labels, classes, _strays(labels, classes, dataset)))]


def _strays(labels: np.ndarray, classes: np.ndarray, dataset: Dataset) -> list[int]:
    """Values in fields of 3 x 3 or more that are further from their class's than the tolerance: at most one is named."""
    if not dataset.values:
        return []
    known = np.array([*dataset.values, *[0] * (256 - len(dataset.values))], np.int32)  # whatever is ignored is at its place
    off = (np.abs(labels.astype(np.int32) - known[classes]) > dataset.tolerance) & (classes != IGNORE)
    inside = ndimage.binary_erosion(off, np.ones((3, 3), bool)) if off.any() else off
    return [int(labels[inside].max())] if inside.any() else []


def _truth(dataset: Dataset, sample: Sample) -> list[Any]:
    """As for a mask file, of a truth that is none; read anew each time, because it may be many files or part of one."""
    assert sample.truth is not None
    return [sample.truth.digest(), vars(mask_facts_of_cells(*sample.truth.read()))]


def read_mask_facts(dataset: Dataset, samples: Sequence[Sample], broken: list[Sample] | None = None) -> dict[Sample, tuple[str, MaskFacts]]:
    """The hash and facts of each sample's mask. One that cannot be read is a CellbenchError, or is left out and listed in ``broken``.

    What was read is remembered by size and time of change, so that only the first call on new files takes long.
    """
    key = [dataset.values, dataset.thresholds, dataset.colors, dataset.ignore, dataset.tolerance]
    name = f"mask-facts-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}"
    out: dict[Sample, tuple[str, MaskFacts]] = {}
    with FileFactCache(name, lambda path: _inspect_mask(path, dataset)) as known, ThreadPoolExecutor(2) as pool:

        def inspect(sample: Sample) -> None:
            try:
                digest, facts = known[sample.mask] if sample.truth is None else _truth(dataset, sample)
            except (CellbenchError, OSError) as error:
                if broken is None:
                    raise error if isinstance(error, CellbenchError) else CellbenchError(f"{sample.mask}: {one_line(error)}.") from None
                broken.append(sample)
            else:
                out[sample] = digest, MaskFacts(**facts)

        new = [sample for sample in samples if sample.truth is not None or not known.knows(sample.mask)]
        jobs = [pool.submit(inspect, sample) for sample in new]  # decoding frees the interpreter's lock
        try:
            for job in tqdm(jobs, desc=f"reading masks of {dataset.name} once", unit="mask", leave=False, disable=len(new) < 20):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        for sample in samples:
            if sample not in out and sample not in (broken or ()):
                inspect(sample)
    return out


@dataclass(frozen=True, kw_only=True)
class MaskInterpretation:
    """A dataset whose masks' meaning is decided, and what the decision rests on."""

    dataset: Dataset
    facts: dict[Sample, tuple[str, MaskFacts]]
    """Hash and facts of each mask, by sample."""
    ask: str = ""
    """What only a person can say; the dataset then holds the best guess."""
    doubt: str = ""
    """What a person should confirm."""


def interpret_masks(dataset: Dataset, samples: Sequence[Sample], broken: list[Sample] | None = None) -> MaskInterpretation:
    """How the masks of a set are meant and how small its cells may be, from all of them together, as far as its card does not say.

    Notes for people are added to the dataset's. ``broken``: as for :func:`read_mask_facts`.
    """
    facts = read_mask_facts(dataset, samples, broken)
    files = [found for sample, (_, found) in facts.items() if sample.truth is None]
    outlined = [found for sample, (_, found) in facts.items() if sample.truth is not None]
    notes, ask, doubt = [], "", ""
    if files and not (dataset.values or dataset.thresholds or dataset.colors):
        meaning = decide_meaning(files, dataset.masks, dataset.ignore)
        doubt = meaning.doubt
        if not meaning.kind:  # an ignored value was found: the others are looked at without it
            dataset = replace(dataset, ignore=meaning.ignore)
            facts = read_mask_facts(dataset, samples, broken and [*broken])
            files = [found for sample, (_, found) in facts.items() if sample.truth is None]
            meaning = decide_meaning(files, dataset.masks, dataset.ignore)
        dataset, ask = replace(dataset, masks=meaning.kind, values=meaning.values), meaning.ask
        if meaning.values:
            facts = read_mask_facts(dataset, samples, broken and [*broken])
        notes.append(f"masks: {meaning.said}")
    elif files:
        dataset = replace(dataset, masks="classes" if len(dataset.classes) > 2 else "binary")
        notes.append(f"masks: {_by_card(dataset)}; a cell is a connected region")
        if strays := [found.strays[0] for found in files if found.strays]:
            doubt = f"{len(strays)} masks hold fields of values that the card does not know, such as {strays[0]}: each is taken for the nearest class"
            doubt += f". Write ignore = {strays[0]} where it must not count" if strays[0] in MARKS and dataset.ignore is None else ""
    else:
        dataset = replace(dataset, masks="cells")
    if outlined:
        nums = [found.num_values for found in outlined]
        notes.append(f"masks: outlines of cells, {f'{min(nums)} to ' if min(nums) < max(nums) else ''}{max(nums)} an image")
        if lost := sum(sample.truth.num_outlined for sample in facts if sample.truth is not None) - sum(nums):
            notes.append(
                f"masks: {lost:,} outlined cells have no pixel of their own (below one in size, or covered by others) and are none"
            )
    everything = [found for _, found in facts.values()]
    if ignored_px := sum(found.ignored_px for found in everything):
        share = ignored_px / sum(found.size_px[0] * found.size_px[1] for found in everything)
        notes.append(f"ignored: {share:.2%} of the pixels count nowhere, neither in training nor in scores")
    limit, told = _smallest(dataset, facts)
    notes += [told, *([f"doubt: {doubt}"] if doubt else [])]
    return MaskInterpretation(
        dataset=replace(dataset, min_cell_px=limit, notes=(*dataset.notes, *notes)), facts=facts, ask=ask, doubt=doubt
    )


def _by_card(dataset: Dataset) -> str:
    marks = dataset.colors or dataset.values or (f"below {dataset.thresholds[0]}", *(f"from {value}" for value in dataset.thresholds))
    named = ", ".join(f"{mark} {name}" for mark, name in list(zip(marks, dataset.classes, strict=True))[:8])
    return f"{named}{' …' if len(dataset.classes) > 8 else ''}, by the card"


def _smallest(dataset: Dataset, facts: dict[Sample, tuple[str, MaskFacts]]) -> tuple[int, str]:
    """The least area of a cell in px, and a note on it."""
    own = {sample: _cells(dataset, sample, found) for sample, (_, found) in facts.items()}
    every = [pair for areas in own.values() for pair in areas]
    limit, why = dataset.min_cell_px, "as set"
    if limit is None:
        limit, why = min_cell_area(every), "from the areas of the masks' cells"
        # A cell that a person numbered or outlined is one, however small.
        counted = [px for sample, areas in own.items() if _is_numbered(dataset, sample) for px, _ in areas]
        limit = min([limit, *counted])
    few, num = count_below(every, limit)
    left = f"{few:,} of {num:,} marked regions are smaller and are not counted as cells" if few else "none of the masks' is smaller"
    return limit, f"smallest cell: {limit} px, {why} (min_cell_px on the card sets it); {left}"


def _is_numbered(dataset: Dataset, sample: Sample) -> bool:
    return sample.truth is not None or dataset.masks == "cells"


def _cells(dataset: Dataset, sample: Sample, found: MaskFacts) -> Sequence[Sequence[int]]:
    return found.numbered if _is_numbered(dataset, sample) else found.regions


def validated(dataset: Dataset) -> Dataset:
    """The dataset with sizes, digest, and the meaning of its masks, after every file was decoded once and every mask fits its image.

    Raises CellbenchError; also where only a person can say what the masks mean. What was read is remembered by size and time of change, so
    that only the first call on new files takes long (about 30 ms a megapixel).
    """
    everything = [s for split in SPLITS for s in dataset.samples(split)]
    read_as = dataset.reading.told()
    seen = "images" if dataset.reading == IntensityScaling() else f"images-{hashlib.sha256(json.dumps(read_as).encode()).hexdigest()[:8]}"
    with FileFactCache(seen, lambda path: _inspect_image(path, dataset.reading)) as image_facts:
        new = [s for s in everything if not image_facts.knows(s.image)]
        with ThreadPoolExecutor(2) as pool:  # decoding frees the interpreter's lock
            jobs = [pool.submit(image_facts.__getitem__, sample.image) for sample in new]
            try:
                for job in tqdm(jobs, desc=f"reading {dataset.name} once", unit="image", leave=False, disable=len(new) < 20):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
        found = interpret_masks(dataset, everything)
        dataset = found.dataset
        lines, parts = [], {}
        for split in SPLITS:
            checked = []
            for sample in dataset.samples(split):
                (image_hash, *size), (mask_hash, facts) = image_facts[sample.image], found.facts[sample]
                mask_size = list(facts.size_px)
                if size != mask_size:
                    raise CellbenchError(
                        f"{sample.mask}: the mask is {mask_size[1]} x {mask_size[0]} px, its image {sample.image.name} {size[1]} x {size[0]}. "
                        "Masks must have their image's size: replace the mask, or move the pair out of the folder."
                    )
                checked.append(replace(sample, size_px=(size[0], size[1]), digest=str(image_hash)))
                lines.append([split, sample.name, image_hash, mask_hash])
            parts[split] = tuple(checked)
    if found.ask:
        raise CellbenchError(f"{dataset.root}: {found.ask}, on the data set's card ({CARD_NAME} beside the data).")
    # What came later is left out where it is not used, so that finished runs are still found.
    meaning = [dataset.classes, dataset.values, *(more for more in (dataset.thresholds, dataset.colors) if more)]
    meaning += [read_as] if dataset.reading != IntensityScaling() else []
    facts = json.dumps([*meaning, dataset.masks, dataset.ignore, dataset.min_cell_px, sorted(lines)])
    return replace(dataset, digest=hashlib.sha256(facts.encode()).hexdigest()[:16], **parts)
