"""A dataset as the harness sees it: named images with masks in three splits, proven readable before anything is trained."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cellbench.data import images
from cellbench.data.annotations import Annotation
from cellbench.data.intensity import Reading
from cellbench.errors import CellbenchError
from cellbench.files import Remembered, hash_of

SPLITS = ("train", "val", "test")


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
    reading: Reading = field(default_factory=Reading)
    """What all its images are read by."""
    um_per_px: float | None = None
    """The side of a pixel by the files' own statement, where all that state one state the same."""
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
        return {color: index for index, color in enumerate(self.colors)} or None

    def read_mask(self, sample: Sample) -> np.ndarray:
        """The class map (H, W) uint8."""
        if sample.truth is not None:
            return sample.truth.read()[0]
        if self.colors:
            return images.read_labels(sample.mask, colors=self.color_table).astype(np.uint8)
        return self.meaning(images.read_labels(sample.mask))

    def meaning(self, labels: np.ndarray) -> np.ndarray:
        """The class map (H, W) uint8 of a mask's numbers."""
        return np.digitize(labels, self.thresholds).astype(np.uint8) if self.thresholds else images.class_map(labels, self.values)

    def read_instances(self, sample: Sample) -> np.ndarray | None:
        """The truth's own numbers of cells (H, W), whole, 0 being background; None where it has none: classes only, or one value for all."""
        if sample.truth is not None:
            return sample.truth.read()[1]
        if self.values or self.thresholds or self.colors:
            return None
        return self.ids_of(images.read_labels(sample.mask))

    def ids_of(self, labels: np.ndarray) -> np.ndarray | None:
        """A mask's numbers, where they are those of its cells."""
        if self.values or self.thresholds:
            return None
        cells = labels[labels > 0]
        if not cells.size or cells.min() == cells.max():
            return None
        # Grey rims of a smoothed 0/255 mask are not cells: nearly all of it is 255.
        smoothed = labels.dtype == np.uint8 and np.count_nonzero(cells == cells.max()) > 0.8 * cells.size
        return None if smoothed else labels


def _inspect_image(path: Path, reading: Reading) -> list[object]:
    height, width = images.read_image(path, reading).shape[:2]  # first, because it tells people what is wrong with a file
    return [hash_of(path), height, width]


def _inspect_mask(path: Path, colors: dict[tuple[int, int, int], int] | None) -> list[object]:
    height, width = images.read_labels(path, colors=colors).shape[:2]
    return [hash_of(path), height, width]


def _truth(dataset: Dataset, sample: Sample) -> list[object]:
    """As for a mask file, of a truth that is none; read anew each time, because it may be many files or part of one."""
    assert sample.truth is not None
    height, width = dataset.read_mask(sample).shape
    return [sample.truth.digest(), height, width]


def proven(dataset: Dataset) -> Dataset:
    """The dataset with sizes and digest, after every file was decoded once and every mask fits its image. Raises CellbenchError.

    What was read is remembered by size and time of change, so that only the first call on new files takes long (about 30 ms a megapixel).
    """
    colors = dataset.color_table
    known = f"masks-{hashlib.sha256(json.dumps(dataset.colors).encode()).hexdigest()[:8]}" if colors else "masks"
    read_as = dataset.reading.told()
    seen = "images" if dataset.reading == Reading() else f"images-{hashlib.sha256(json.dumps(read_as).encode()).hexdigest()[:8]}"
    with (
        Remembered(seen, lambda path: _inspect_image(path, dataset.reading)) as image_facts,
        Remembered(known, lambda path: _inspect_mask(path, colors)) as mask_facts,
    ):
        todo = [s for split in SPLITS for s in dataset.samples(split)]
        new = [s for s in todo if s.truth is not None or not (image_facts.knows(s.image) and mask_facts.knows(s.mask))]
        truths: dict[Sample, list[object]] = {}

        def inspect(sample: Sample) -> None:
            image_facts[sample.image]
            if sample.truth is None:
                mask_facts[sample.mask]
            else:
                truths[sample] = _truth(dataset, sample)

        with ThreadPoolExecutor(2) as pool:  # decoding frees the interpreter's lock
            jobs = [pool.submit(inspect, sample) for sample in new]
            try:
                for job in tqdm(jobs, desc=f"reading {dataset.name} once", unit="image", leave=False, disable=len(new) < 20):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
        lines, parts = [], {}
        for split in SPLITS:
            checked = []
            for sample in dataset.samples(split):
                (image_hash, *size), (mask_hash, *mask_size) = image_facts[sample.image], truths.get(sample) or mask_facts[sample.mask]
                if size != mask_size:
                    raise CellbenchError(
                        f"{sample.mask}: the mask is {mask_size[1]} x {mask_size[0]} px, its image {sample.image.name} {size[1]} x {size[0]}. "
                        "Masks must have their image's size: replace the mask, or move the pair out of the folder."
                    )
                checked.append(replace(sample, size_px=(size[0], size[1]), digest=str(image_hash)))
                lines.append([split, sample.name, image_hash, mask_hash])
            parts[split] = tuple(checked)
    # What came later is left out where it is not used, so that finished runs are still found.
    meaning = [dataset.classes, dataset.values, *(more for more in (dataset.thresholds, dataset.colors) if more)]
    meaning += [read_as] if dataset.reading != Reading() else []
    facts = json.dumps([*meaning, sorted(lines)])
    return replace(dataset, digest=hashlib.sha256(facts.encode()).hexdigest()[:16], **parts)
