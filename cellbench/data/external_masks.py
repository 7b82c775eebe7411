"""Masks that another tool predicted for the test images of a dataset: a folder of files, or one COCO file, matched to images by name.

Nothing is left out silently: a test image without a mask, two masks of one image, another size and an unknown class are each one error that names the
files; masks of other images are counted in a note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from cellbench.data.annotations import CocoRegions, count_coco_categories, read_coco
from cellbench.data.categories import NOT_CELLS, NOT_SCORED
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io import images
from cellbench.data.io.decode import printable_path
from cellbench.data.mask_names import ADDED, BEFORE, IMAGE_WORDS, NO_MASKS
from cellbench.data.masks import MaskFacts, decide_meaning, mask_facts, off_values
from cellbench.data.outline_files import SUFFIXES, ToolMask, describe_left_out, read_tool_mask
from cellbench.data.scan import LINKS_ADVICE, files_below, is_inside, pattern_root
from cellbench.errors import CellbenchError, quoted
from cellbench.files import compute_sha256, text_digest, to_nfc
from cellbench.metrics.pixel import IGNORE

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExternalMasks:
    """One mask for each test image."""

    classes: tuple[str, ...]
    files: Mapping[str, Path]
    """By the name of the image; for COCO the one file."""
    coco: Mapping[str, CocoRegions] = field(default_factory=dict)
    """By the name of the image."""
    kind: str = "outlines"
    """``outlines``, ``cells`` (numbers), ``binary`` or ``classes``."""
    values: tuple[int, ...] = ()
    """Of a class map: the value of each class; empty: the class number."""
    tolerance: int = 0
    colors: Mapping[tuple[int, int, int], int] | None = None
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """Of all masks and what their values mean."""
        known = {path: compute_sha256(path) for path in set(self.files.values())}
        lines = [f"{name} {known[path]}" for name, path in sorted(self.files.items())]
        return text_digest("\n".join([self.kind, str(self.values), *lines]), 64)

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        """Classes (H, W) uint8, and cell numbers (H, W) int32; None where cells are connected regions. Raises CellbenchError."""
        if self.coco:
            region = self.coco[sample.name]
            if tuple(region.size_px) != tuple(sample.size_px):
                raise CellbenchError(_other_size(f"{printable_path(region.file)}: {sample.name}", region.size_px, sample))
            return region.read()
        path = self.files[sample.name]
        if path.suffix.lower() in SUFFIXES and not _is_array(path):
            mask = read_tool_mask(path)
            return mask.paint(sample.size_px, label_classes((one.label for one in mask.outlines), self.classes, path), printable_path(path))
        labels = _read_labels(path, self.colors)
        if labels.shape != tuple(sample.size_px):
            raise CellbenchError(_other_size(printable_path(path), labels.shape, sample))
        if self.kind == "classes":
            return (images.labels_to_classes(labels, self.values) if self.values else labels.astype(np.uint8)), None
        classes = images.labels_to_classes(labels, self.values)
        return classes, labels.astype(np.int32) if self.kind == "cells" else None


def find_masks(where: Path, dataset: Dataset, tested: Sequence[Sample]) -> ExternalMasks:
    """The masks at ``where`` (a folder, a COCO file, or a pattern such as ``masks/*_seg.npy``) for the images ``tested``. Raises CellbenchError."""
    files = _mask_files(where)
    if len(files) == 1 and (coco := _find_coco(files[0], dataset, tested)) is not None:
        return coco
    known = {sample.name: sample for split in ("train", "val") for sample in dataset.samples(split)}
    pairs, notes = _matched(where, files, tested, [one for one in known.values() if one not in tested])
    kinds = {_kind(path) for path in pairs.values()}
    if kinds == {"outlines"}:
        notes += _check_outlines(list(pairs.values()), dataset.classes)
        return ExternalMasks(classes=dataset.classes, files=pairs, notes=tuple(notes))
    if kinds != {"labels"}:
        raise CellbenchError(f"{where}: holds both outlines and label images. Name one kind, as in 'masks/*.geojson' with quotes.")
    return _meaning(pairs, dataset, notes)


def named_classes(where: Path) -> list[str]:
    """The classes that outlines name, in order of appearance; none for label images, and where an outline has no class. Raises CellbenchError."""
    files = _mask_files(where)
    if len(files) == 1 and files[0].suffix.lower() == ".json" and b'"categories"' in files[0].read_bytes():
        labels = [name for name, num in count_coco_categories(files[0]).items() if num]
    else:
        labels = [one.label for path in files if _kind(path) == "outlines" for one in read_tool_mask(path).outlines]
    labels = [label for label in dict.fromkeys(labels) if label.casefold() not in (*NOT_CELLS, *NOT_SCORED)]
    return [] if "" in labels else labels


def label_classes(labels: Iterable[str], classes: Sequence[str], path: Path) -> dict[str, int | None]:
    """The class number of each label: with one class of cells that class, else the class of this name. Raises CellbenchError."""
    known = {name.casefold(): k for k, name in enumerate(classes)}
    out: dict[str, int | None] = {}
    for label in dict.fromkeys(labels):
        plain = label.casefold()
        if plain in NOT_SCORED:
            out[label] = IGNORE
        elif plain in NOT_CELLS:
            out[label] = None
        elif plain in known:
            out[label] = known[plain]
        elif len(classes) == 2:
            out[label] = 1
        else:
            which = f"the class {quoted([label])}" if label else "outlines without a class"
            raise CellbenchError(f"{printable_path(path)}: has {which}; the data has {', '.join(classes[1:])}. Give each cell one of them.")
    return out


# --- files ------------------------------------------------------------------------------------------------------------------------------


def _mask_files(where: Path) -> list[Path]:
    if where.is_file():
        return [where]
    if not where.is_dir() and pattern_root(where) is None:
        raise CellbenchError(f"{where}: there is no such folder or file. Expected a folder of masks, a COCO file, or a pattern in quotes.")
    found, _, _ = files_below(where, {*SUFFIXES, *images.EXTENSIONS})
    if not found:
        raise CellbenchError(
            f"{where}: holds no masks. Expected label images (PNG, TIFF, .npy), _seg.npy, GeoJSON, ROI zips or a COCO file."
        )
    root = pattern_root(where) or where
    if outside := [path for path in found if not is_inside(root, path)]:
        raise CellbenchError(f"{root}: {quoted([str(path.relative_to(root)) for path in outside])} lead out of the folder. {LINKS_ADVICE}")
    return found


def _matched(where: Path, files: Sequence[Path], tested: Sequence[Sample], others: Sequence[Sample]) -> tuple[dict[str, Path], list[str]]:
    """The mask file of each tested image, and notes. ``others``: images of the data that are not tested."""
    root = where if where.is_dir() else pattern_root(where) or where.parent
    files = [path for path in files if not NO_MASKS.search(path.stem)]
    pairs: dict[str, Path] = {}
    missing: list[str] = []
    used: set[Path] = set()
    for sample, found in match_images(tested, files_by_key(files, root)):
        found = [path for path in found if compute_sha256(path) != sample.digest]  # tools write beside a copy of the image
        if len(found) > 1:
            names = [path.relative_to(root).as_posix() for path in found]
            endings = {path.name.removeprefix(sample.image.stem) for path in found}
            one = f"kind, as in '{root}/*{max(endings, key=len)}' with quotes" if len(endings) == len(found) else "folder of them"
            raise CellbenchError(f"{where}: '{sample.name}' has {len(found)} masks: {quoted(names)}. Name one {one}.")
        if found:
            pairs[sample.name] = found[0]
            used.add(found[0])
        else:
            missing.append(sample.name)
    if missing:
        raise CellbenchError(
            f"{where}: {len(missing)} of {len(tested)} test images have no mask: {quoted(missing)}. "
            "Models are compared on all of them: add these masks, empty ones where nothing was found."
        )
    known = {key for keys in _keys_of_images(others) for key in keys}
    pictures = {sample.digest for sample in (*tested, *others)}
    spare = [path for path in files if path not in used and compute_sha256(path) not in pictures]  # tools write beside copies of images
    not_tested = [path.name for path in spare if any(key in known for key in _keys_of_mask(path, root))]
    foreign = [path.name for path in spare if path.name not in not_tested]
    notes = []
    if not_tested:
        notes.append(f"not used: {len(not_tested)} masks of images that are not test images: {quoted(not_tested)}.")
    if foreign:
        notes.append(f"not used: {len(foreign)} files that belong to no image of the data: {quoted(foreign)}.")
    return pairs, notes


def files_by_key(files: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """The files by what their images may be called."""
    out: dict[str, list[Path]] = {}
    for path in files:
        for key in _keys_of_mask(path, root):
            out.setdefault(key, []).append(path)
    return out


def match_images(samples: Sequence[Sample], by_key: Mapping[str, Sequence[T]]) -> Iterator[tuple[Sample, list[T]]]:
    """Each image with everything that one of its names stands for."""
    for sample, keys in zip(samples, _keys_of_images(samples), strict=True):
        yield sample, list(dict.fromkeys(one for key in keys for one in by_key.get(key, ())))


def _keys_of_mask(path: Path, root: Path) -> set[str]:
    """What the image of a mask may be called: its stem, and with the folders before it."""
    relative = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    stem, keys = to_nfc(path.stem), set[str]()
    while True:
        keys |= {stem, _without_ending(stem), BEFORE.sub("", stem)}
        shorter = ADDED.sub("", stem)
        if shorter == stem:
            break
        stem = shorter
    folders = "__".join(map(to_nfc, relative.parts[:-1]))
    return keys | ({f"{folders}__{key}" for key in keys} if folders else set())


def _keys_of_images(samples: Sequence[Sample]) -> Iterator[list[str]]:
    """Names of each image: unique in its split, and the plain stem where no other image has it."""
    stems = [to_nfc(sample.image.stem) for sample in samples]
    num_of = Counter(stems)
    for sample, plain in zip(samples, stems, strict=True):
        own, short = _without_ending(to_nfc(sample.name).replace("/", "__")), IMAGE_WORDS.sub("", plain)
        alone = num_of[plain] == 1
        yield [own, *([plain] if alone else []), *([short] if alone and short not in num_of else [])]


def _without_ending(name: str) -> str:
    """A name without the ending of an image file; dots of its own stay.

    >>> _without_ending("a.5.tif"), _without_ending("a.5")
    ('a.5', 'a.5')
    """
    stem, dot, ending = name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in images.EXTENSIONS else name


def _other_size(shown: str, size_px: Sequence[int], sample: Sample) -> str:
    height, width = sample.size_px
    return (
        f"{shown}: is {size_px[1]} x {size_px[0]} px, the image {sample.name} {width} x {height}. Export the mask at the image's full size."
    )


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def _kind(path: Path) -> str:
    return "outlines" if path.suffix.lower() in SUFFIXES and not _is_array(path) else "labels"


# --- what they mean ---------------------------------------------------------------------------------------------------------------------


def _check_outlines(paths: Sequence[Path], classes: Sequence[str]) -> list[str]:
    """Notes on parts of the files that are no cells. Raises CellbenchError for an unknown class before anything is scored."""
    notes = []
    regions: list[str] = []
    for path in paths:
        mask: ToolMask = read_tool_mask(path)
        label_classes((one.label for one in mask.outlines), classes, path)
        if left := describe_left_out(mask.left_out):
            notes.append(f"{path.name}: {left} without an area: no cells, not scored.")
        if mask.regions:
            regions.append(path.name)
    if regions:
        notes.append(f"regions that hold cells are not cells themselves and are not scored: {quoted(regions)}.")
    return notes


def _meaning(pairs: Mapping[str, Path], dataset: Dataset, notes: list[str]) -> ExternalMasks:
    """Label images: cell numbers, cell and background, or with several classes their values."""
    several = len(dataset.classes) > 2
    colors = dataset.color_table if several else None
    facts: list[MaskFacts] = []
    for path in pairs.values():
        labels = _read_labels(path, colors)
        facts.append(mask_facts(labels, (labels > 0).astype(np.uint8)))
        if several and dataset.values and not colors:
            _check_values(path, labels, dataset)
        elif several and labels.max() >= len(dataset.classes):
            raise CellbenchError(
                f"{printable_path(path)}: holds the value {labels.max()}; the data has {_numbered(dataset.classes)}. "
                "With several classes, give class maps with these values, or outlines with the names of classes."
            )
    if several:
        numbers = not dataset.values or all(max(one.values, default=0) < len(dataset.classes) for one in facts)
        values, tolerance = ((), 0) if numbers or colors else (dataset.values, dataset.tolerance)
        notes.append("masks: class maps; a cell is a connected region")
        found = {"classes": dataset.classes, "files": pairs, "kind": "classes", "notes": tuple(notes)}
        return ExternalMasks(**found, values=values, tolerance=tolerance, colors=colors)  # type: ignore[arg-type]
    meaning = decide_meaning(facts)
    if not meaning.kind:  # 255 beside cell numbers: a prediction has no ignored pixels
        meaning = decide_meaning(facts, "cells")
    if meaning.ask and "pixel to pixel" in meaning.ask:
        folder = next(iter(pairs.values())).parent
        raise CellbenchError(
            f"{folder}: the values vary from pixel to pixel, as probabilities do. Save masks: 0, and a number for each cell."
        )
    kind = "binary" if meaning.kind == "binary" else "cells"
    notes.append(f"masks: {meaning.description}" if kind == "binary" else "masks: cell numbers")
    return ExternalMasks(classes=dataset.classes, files=pairs, kind=kind, values=meaning.values, colors=colors, notes=tuple(notes))


def _check_values(path: Path, labels: np.ndarray, dataset: Dataset) -> None:
    if int(labels.max()) < len(dataset.classes):
        return
    classes = images.labels_to_classes(labels, dataset.values)
    if (off := off_values(labels, classes, dataset.values, dataset.tolerance)).any():
        known = ", ".join(f"{value} {name}" for value, name in zip(dataset.values, dataset.classes, strict=True))
        raise CellbenchError(f"{printable_path(path)}: holds the value {labels[off][0]}, which is no class. Known: {known}.")


def _numbered(classes: Sequence[str]) -> str:
    return ", ".join(f"{k} {name}" for k, name in enumerate(classes))


def _read_labels(path: Path, colors: Mapping[tuple[int, int, int], int] | None) -> np.ndarray:
    if _is_array(path):
        ids = read_tool_mask(path).ids
        assert ids is not None  # of an .npy
        return ids
    try:
        return images.read_labels(path)
    except CellbenchError:
        if colors is None:
            raise
        return images.read_labels(path, colors=colors)


def _find_coco(file: Path, dataset: Dataset, tested: Sequence[Sample]) -> ExternalMasks | None:
    """The masks of a COCO file; None for any other file."""
    if file.suffix.lower() != ".json" or b'"categories"' not in file.read_bytes():
        return None
    counts = count_coco_categories(file)
    labels = label_classes((name for name, num in counts.items() if num), dataset.classes, file)
    found = read_coco(file, {name: labels.get(name) for name in counts})
    by_key: dict[str, list[CocoRegions]] = {}
    for one in found.images:
        name = to_nfc(one.name).replace("\\", "/")
        for key in {_without_ending(name.replace("/", "__")), _without_ending(name.rpartition("/")[2])}:
            by_key.setdefault(key, []).append(one)
    pairs: dict[str, CocoRegions] = {}
    for sample, here in match_images(tested, by_key):
        if len(here) > 1:
            raise CellbenchError(f"{file}: '{sample.name}' may be {quoted([one.name for one in here])}. Give each image its own name.")
        if here:
            pairs[sample.name] = here[0]
    if missing := [sample.name for sample in tested if sample.name not in pairs]:
        raise CellbenchError(
            f"{file}: {len(missing)} of {len(tested)} test images are not in it: {quoted(missing)}. Models are compared on all of them: add them."
        )
    notes = [f"{file.name}: {len(found.empty):,} annotations have no outline and are not scored."] if found.empty else []
    if spare := [one.name for one in found.images if one not in pairs.values()]:
        notes.append(f"not used: {len(spare)} images of the file that are not test images: {quoted(spare)}.")
    return ExternalMasks(classes=dataset.classes, files=dict.fromkeys(pairs, file), coco=pairs, notes=tuple(notes))
