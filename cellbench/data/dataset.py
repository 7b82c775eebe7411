"""A dataset: named images with masks in three splits, every file decoded once before training starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from cellbench.data.annotations import Annotation
from cellbench.data.class_content import ClassContent
from cellbench.data.io import images
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.masks import MARKS, MaskFacts, count_below, decide_meaning, mask_facts, mask_facts_of_cells, min_cell_area, off_values
from cellbench.data.parted_masks import parted_cells
from cellbench.data.progress import map_files
from cellbench.data.regions import within_regions
from cellbench.errors import CellbenchError, one_line
from cellbench.file_cache import FileFactCache
from cellbench.files import compute_sha256, facts_digest, text_digest
from cellbench.metrics.instances import MIN_AREA_PX, connected_instances, merge_parts_into_objects
from cellbench.metrics.pixel import IGNORE

SPLITS = ("train", "val", "test")
CARD_NAME = "dataset.toml"
"""Name of a card in the data folder itself."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its mask."""

    name: str
    """The image's file name; unique within its split."""
    image: Path
    mask: Path
    """The mask file, or the file or folder that holds the annotation."""
    size_px: tuple[int, int] = (0, 0)
    """Height, width."""
    digest: str = ""
    """Hash of the image file's content."""
    group: str = ""
    """The patient, slide or smear of the image, if known. Its images stay in one split, and statistics treat them as one unit."""
    appearance: str = ""
    """With ``group = "appearance"``, which images look alike. They stay in one split too, but statistics do not treat them as one unit."""
    label: str = ""
    """Label of the whole image from a manifest, for stratified splits."""
    truth: Annotation | None = None
    """The annotation, if it is not a mask file."""
    regions: Path | None = None
    """The file of its regions of interest; pixels outside of them do not count. None: the whole image counts."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples by split, and the meaning of their masks."""

    name: str
    classes: tuple[str, ...]
    values: tuple[int, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    root: Path
    thresholds: tuple[int, ...] = ()
    """Instead of ``values``: class k starts at mask value ``thresholds[k - 1]``."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """Instead of ``values``: the mask colour of each class."""
    owners: tuple[int, ...] = ()
    """For each class the class of the object that it is part of, its own for an object; empty: every class is an object."""
    unused: tuple[int, ...] = ()
    """Classes that occur in no mask."""
    reading: IntensityScaling = field(default_factory=IntensityScaling)
    """Black, white and channels with which all images are read."""
    um_per_px: float | None = None
    """Side of a pixel as stated by the files, if all stated sizes agree."""
    tolerance: int = 20
    """Greatest distance of a mask value from its class's value."""
    masks: str = ""
    """Meaning of the mask values: ``cells`` (numbers), ``classes`` or ``binary``; empty: undecided, see :func:`interpret_masks`."""
    ignore: int | tuple[int, int, int] | None = None
    """The mask value (or colour) of ignored pixels: ``IGNORE`` in class maps."""
    min_cell_px: int | None = None
    """Smaller connected regions, true or predicted, are not cells; None: undecided."""
    cut_px: int = 0
    """Width of the lines that part touching cells in masks without numbers; 0: cells are connected regions."""
    digest: str = ""
    """Hash over all files, the splits and the classes: identifies the data of a finished run."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data was read."""
    drawn: bool = False
    """Whether the images are synthetic."""
    limited: bool = False
    """Whether ``[data] limit`` left images out."""
    further: tuple[Dataset, ...] = ()
    """The further test sets of ``[data] tests``, each with test images only."""

    def samples(self, split: str) -> tuple[Sample, ...]:
        """The samples of ``train``, ``val`` or ``test``."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def with_samples(self, parts: Mapping[str, tuple[Sample, ...]]) -> Dataset:
        """The dataset with other samples of ``train``, ``val`` and ``test``."""
        return replace(self, train=parts["train"], val=parts["val"], test=parts["test"])

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The image (H, W, 3) uint8 RGB and its class map (H, W) uint8. Raises CellbenchError that names the file."""
        return images.read_image(sample.image, self.reading), self.read_mask(sample)

    @property
    def color_table(self) -> dict[tuple[int, int, int], int] | None:
        """Class by colour; None where the mask has no colours."""
        ignored = {self.ignore: IGNORE} if isinstance(self.ignore, tuple) else {}
        return {color: index for index, color in enumerate(self.colors)} | ignored if self.colors else None

    def read_mask(self, sample: Sample) -> np.ndarray:
        """The class map (H, W) uint8; ``IGNORE`` where a pixel does not count."""
        if sample.truth is not None:
            classes = sample.truth.read()[0]
        elif self.colors:
            classes = self._read_colors(sample)
        else:
            classes = self.meaning(images.read_labels(sample.mask))
        return within_regions(classes, sample.regions)

    def _read_colors(self, sample: Sample) -> np.ndarray:
        return images.read_labels(sample.mask, colors=self.color_table).astype(np.uint8)

    def meaning(self, labels: np.ndarray) -> np.ndarray:
        """The class map (H, W) uint8 of mask values."""
        classes = (
            np.digitize(labels, self.thresholds).astype(np.uint8) if self.thresholds else images.labels_to_classes(labels, self.values)
        )
        if self.ignore is not None and not self.colors:
            classes[labels == self.ignore] = IGNORE
        return classes

    def read_instances(self, sample: Sample) -> np.ndarray | None:
        """The cell numbers (H, W) of the annotation, integers, 0 is background; None where the masks hold none."""
        if sample.truth is None and sample.regions is None and self.masks != "cells" and not self.cut_px:
            return None  # without decoding the mask
        return self.read_truth(sample)[1]

    def read_truth(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """:meth:`read_mask` and :meth:`read_instances` from one reading of the file."""
        ids: np.ndarray | None
        if sample.truth is not None:
            classes, ids = sample.truth.read()
        elif self.colors:
            classes = self._read_colors(sample)
            ids = self.parted(classes) if self.cut_px else None
        else:
            labels = images.read_labels(sample.mask)
            classes, ids = self.meaning(labels), self.ids_of(labels)
        if sample.regions is None:
            return classes, ids
        if ids is None:  # of whole cells, so that it is known how much of each lies in the regions
            ids = connected_instances(merge_parts_into_objects(classes, self.owners), 1).ids
        return within_regions(classes, sample.regions), ids

    def ids_of(self, labels: np.ndarray) -> np.ndarray | None:
        """Mask values as cell numbers, where they are such or have lines between cells; the ignored value becomes 0."""
        if self.masks != "cells":
            return self.parted(self.meaning(labels)) if self.cut_px else None
        return labels if self.ignore is None else np.where(labels == self.ignore, 0, labels)

    def parted(self, classes: np.ndarray) -> np.ndarray:
        """The cell numbers (H, W) of a class map whose touching cells are parted by lines."""
        return parted_cells(merge_parts_into_objects(classes, self.owners), self.cut_px, self.min_cell_px or MIN_AREA_PX)


def _inspect_image(path: Path, reading: IntensityScaling) -> list[Any]:
    height, width = images.read_image(path, reading).shape[:2]  # before hashing: its errors say what is wrong with a file
    return [compute_sha256(path), height, width]


def _inspect_mask(path: Path, dataset: Dataset, regions: Path | None = None) -> dict[str, Any]:
    labels = images.read_labels(path, colors=dataset.color_table)
    classes = labels.astype(np.uint8) if dataset.colors else dataset.meaning(labels)
    if regions is not None:
        classes = within_regions(classes, regions)
    strays: list[int] = []
    if dataset.values:
        off = off_values(labels, classes, dataset.values, dataset.tolerance)
        inside = ndimage.binary_erosion(off, np.ones((3, 3), bool)) if off.any() else off
        strays = [int(labels[inside].max())] if inside.any() else []
    digest = compute_sha256(path) if regions is None else f"{compute_sha256(path)} {compute_sha256(regions)}"
    return vars(mask_facts(labels, classes, strays, len(dataset.classes), digest))


def read_mask_facts(dataset: Dataset, samples: Sequence[Sample], broken: list[Sample] | None = None) -> dict[Sample, MaskFacts]:
    """The facts of each sample's mask. An unreadable one is a CellbenchError, or is left out and listed in ``broken``.

    Facts of mask files are cached by size and time of change, so that only the first call on new files takes long. Annotations are read
    each time, because they may be many files or part of one.
    """
    key = [dataset.values, dataset.thresholds, dataset.colors, dataset.ignore, dataset.tolerance, len(dataset.classes)]
    name = f"mask-facts-{facts_digest(key, 8)}"
    out: dict[Sample, MaskFacts] = {}
    with FileFactCache(name, lambda path: _inspect_mask(path, dataset)) as known:

        def inspect(sample: Sample) -> None:
            try:
                if sample.truth is not None:
                    classes, ids = sample.truth.read()
                    digest = sample.truth.digest()
                    if sample.regions not in (None, sample.mask):
                        classes, digest = within_regions(classes, sample.regions), f"{digest} {compute_sha256(sample.regions)}"
                    out[sample] = mask_facts_of_cells(classes, ids, len(dataset.classes), digest)
                elif sample.regions is not None:
                    out[sample] = MaskFacts(**_inspect_mask(sample.mask, dataset, sample.regions))
                else:
                    out[sample] = MaskFacts(**known[sample.mask])
            except (CellbenchError, OSError) as error:
                if broken is None:
                    raise error if isinstance(error, CellbenchError) else CellbenchError(f"{sample.mask}: {one_line(error)}.") from None
                broken.append(sample)

        new = [sample for sample in samples if sample.truth is not None or sample.regions is not None or not known.knows(sample.mask)]
        map_files(inspect, new, f"reading masks of {dataset.name} once", unit="mask")
        for sample in samples:
            if sample not in out and sample not in (broken or ()):
                inspect(sample)
    return out


@dataclass(frozen=True, kw_only=True)
class MaskInterpretation:
    """A dataset whose masks have a decided meaning, and the facts behind the decision."""

    dataset: Dataset
    facts: dict[Sample, MaskFacts]
    ask: str = ""
    """Question that the user must answer; the dataset then has the best guess."""
    doubt: str = ""
    """Assumption that the user should confirm."""


def interpret_masks(dataset: Dataset, samples: Sequence[Sample], broken: list[Sample] | None = None) -> MaskInterpretation:
    """Decides the meaning of a set's masks and the minimum area of a cell from all masks together, unless the card gives them.

    Notes for the user are added to the dataset's. ``broken``: as for :func:`read_mask_facts`.
    """
    facts = read_mask_facts(dataset, samples, broken)
    outlined = [found for sample, found in facts.items() if sample.truth is not None]
    notes: list[str] = []
    ask = doubt = ""
    ignore = dataset.ignore if isinstance(dataset.ignore, int) else None

    def of_files() -> list[MaskFacts]:
        return [found for sample, found in facts.items() if sample.truth is None]

    if of_files() and not (dataset.values or dataset.thresholds or dataset.colors):
        meaning = decide_meaning(of_files(), dataset.masks, ignore)
        doubt = meaning.doubt
        if not meaning.kind:  # found an ignored value: decide again without it
            dataset, ignore = replace(dataset, ignore=meaning.ignore), meaning.ignore
            facts = read_mask_facts(dataset, samples, broken and [*broken])
            meaning = decide_meaning(of_files(), dataset.masks, ignore)
        dataset, ask = replace(dataset, masks=meaning.kind, values=meaning.values), meaning.ask
        if meaning.values:
            facts = read_mask_facts(dataset, samples, broken and [*broken])
        notes.append(f"masks: {meaning.description}")
    elif of_files():
        dataset = replace(dataset, masks="classes" if len(dataset.classes) > 2 else "binary")
        region = f"a region between lines of up to {dataset.cut_px} px" if dataset.cut_px else "a connected region"
        notes.append(f"masks: {_values_of_card(dataset)}; a cell is {region}")
        if strays := [found.strays[0] for found in of_files() if found.strays]:
            doubt = f"{len(strays)} masks hold fields of values that the card does not name, such as {strays[0]}: each pixel takes the nearest class"
            doubt += f". Write ignore = {strays[0]} where it must not count" if strays[0] in MARKS and dataset.ignore is None else ""
    else:
        dataset = replace(dataset, masks="cells")
    if outlined:
        nums = [found.num_values for found in outlined]
        notes.append(f"masks: outlines of cells, {f'{min(nums)} to ' if min(nums) < max(nums) else ''}{max(nums)} an image")
        if lost := sum(sample.truth.num_outlined for sample in facts if sample.truth is not None) - sum(nums):
            notes.append(
                f"masks: {lost:,} outlined cells have no pixel of their own (smaller than one, or covered by others) and do not count"
            )
    if ignored_px := sum(found.ignored_px for found in facts.values()):
        share = ignored_px / sum(found.size_px[0] * found.size_px[1] for found in facts.values())
        notes.append(f"ignored: {share:.2%} of the pixels do not count, neither in training nor in scores")
    limit, note = _min_cell_px(dataset, facts)
    notes += [note, *([f"doubt: {doubt}"] if doubt else [])]
    dataset = replace(dataset, min_cell_px=limit, notes=(*dataset.notes, *notes))
    return MaskInterpretation(dataset=dataset, facts=facts, ask=ask, doubt=doubt)


def _values_of_card(dataset: Dataset) -> str:
    marks = dataset.colors or dataset.values or (f"below {dataset.thresholds[0]}", *(f"from {value}" for value in dataset.thresholds))
    named = ", ".join(f"{mark} {name}" for mark, name in list(zip(marks, dataset.classes, strict=True))[:8])
    return f"{named}{' …' if len(dataset.classes) > 8 else ''}, by the card"


def _min_cell_px(dataset: Dataset, facts: dict[Sample, MaskFacts]) -> tuple[int, str]:
    """The minimum area of a cell in px, and a note on it."""
    every: list[Sequence[int]] = []
    counted: list[int] = []
    for sample, found in facts.items():
        if sample.truth is not None or dataset.masks == "cells":  # numbered or outlined cells count, however small
            counted += [px for px, _ in found.numbered]
            every += found.numbered
        else:
            every += found.regions
    limit, why = dataset.min_cell_px, "as set"
    if limit is None:
        limit, why = min([min_cell_area(every), *counted]), "from the areas of the masks' cells"
    few, num = count_below(every, limit)
    left = f"{few:,} of {num:,} marked regions are smaller and are not counted as cells" if few else "none of the masks' is smaller"
    return limit, f"smallest cell: {limit} px, {why} (min_cell_px on the card sets it); {left}"


def validated(dataset: Dataset) -> tuple[Dataset, dict[Sample, ClassContent]]:
    """The dataset with sizes, digest and the meaning of its masks, and the classes in each mask. Decodes every file once.

    Raises CellbenchError for unreadable files, masks of another size than their image, and masks whose meaning the user must decide. Facts are
    cached by size and time of change, so that only the first call on new files takes long (about 30 ms a megapixel).
    """
    everything = [s for split in SPLITS for s in dataset.samples(split)]
    scaling = dataset.reading.to_dict()
    default = dataset.reading == IntensityScaling()
    name = "images" if default else f"images-{text_digest(json.dumps(scaling), 8)}"
    with FileFactCache(name, lambda path: _inspect_image(path, dataset.reading)) as image_facts:
        new = [s.image for s in everything if not image_facts.knows(s.image)]
        map_files(image_facts.__getitem__, new, f"reading {dataset.name} once")
        found = interpret_masks(dataset, everything)
        dataset = found.dataset
        lines: list[list[Any]] = []
        parts: dict[str, tuple[Sample, ...]] = {}
        contents: dict[Sample, ClassContent] = {}
        for split in SPLITS:
            checked = []
            for sample in dataset.samples(split):
                (image_hash, *size), facts = image_facts[sample.image], found.facts[sample]
                mask_size = list(facts.size_px)
                if size != mask_size:
                    raise CellbenchError(
                        f"{sample.mask}: the mask is {mask_size[1]} x {mask_size[0]} px, its image {sample.image.name} {size[1]} x {size[0]}. "
                        "Masks must have their image's size: replace the mask, or move the pair out of the folder."
                    )
                checked.append(replace(sample, size_px=(size[0], size[1]), digest=str(image_hash)))
                contents[checked[-1]] = facts.class_content
                lines.append([split, sample.name, image_hash, facts.digest])
            parts[split] = tuple(checked)
    if found.ask:
        raise CellbenchError(f"{dataset.root}: {found.ask}, on the dataset's card ({CARD_NAME} beside the data).")
    # Newer settings are included only if used, so that finished runs are still found.
    meaning = [
        dataset.classes,
        dataset.values,
        *(more for more in (dataset.thresholds, dataset.colors) if more),
        *([] if default else [scaling]),
        *([{"cut_px": dataset.cut_px}] if dataset.cut_px else []),
    ]
    key = json.dumps([*meaning, dataset.masks, dataset.ignore, dataset.min_cell_px, sorted(lines)])
    return replace(dataset.with_samples(parts), digest=text_digest(key)), contents
