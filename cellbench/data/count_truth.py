"""True counts without masks: boxes or points of cells, in Pascal VOC files, a COCO file or a table, or the numbers themselves in a table.

``evaluate`` and ``score`` compare counts with them. A cell is where the centre of its box is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from cellbench.data.categories import NOT_CELLS, NOT_SCORED
from cellbench.data.count_files import UNNAMED, CountRecord, Mark, read_coco_boxes, read_count_table, read_points, read_voc
from cellbench.data.dataset import Sample
from cellbench.data.io import images
from cellbench.data.io.decode import printable_path
from cellbench.data.manifest import SPLITS
from cellbench.data.region_files import match_regions
from cellbench.data.regions import REGIONS, regions_of
from cellbench.data.scan import files_below
from cellbench.errors import CellbenchError, quote_name, quoted
from cellbench.files import compute_sha256, facts_digest, read_text, to_nfc
from cellbench.metrics.counting import CountRow, PlacedCells, count_rows
from cellbench.metrics.instances import Instances


@dataclass(frozen=True, kw_only=True)
class CountTruth:
    """Images with their cells, each of a class by name."""

    root: Path
    what: str
    """For messages: ``boxes of VOC files``."""
    samples: tuple[Sample, ...]
    marks: Mapping[str, Sequence[Mark]]
    """By the name of the sample."""
    notes: tuple[str, ...] = ()

    @property
    def num_of(self) -> dict[str, int]:
        """The number of cells of each class, the most frequent first."""
        every = Counter[str]()
        for some in self.marks.values():
            for mark in some:
                every[mark.label] += mark.num
        return dict(every.most_common())

    @property
    def digest(self) -> str:
        """Of all images, cells and regions."""
        each = [
            (
                one.name,
                one.digest,
                one.regions and compute_sha256(one.regions),
                [(mark.label, mark.xy, mark.num) for mark in self.marks[one.name]],
            )
            for one in self.samples
        ]
        return facts_digest(each)

    @property
    def placed(self) -> bool:
        """Whether it is known where each cell is."""
        return all(mark.xy is not None for some in self.marks.values() for mark in some)

    def cells(self, sample: Sample, class_of: Mapping[str, int]) -> PlacedCells:
        """The cells of an image; a class that ``class_of`` does not hold has number 0, which does not count."""
        each = [(mark.xy or (math.nan, math.nan), class_of.get(mark.label, 0)) for mark in self.marks[sample.name] for _ in range(mark.num)]
        xy = np.array([place for place, _ in each], float).reshape(-1, 2)
        return PlacedCells(xy=xy, classes=np.array([label for _, label in each], int))


@dataclass(frozen=True, kw_only=True)
class CountedClasses:
    """The classes in which a truth and a prediction are counted: those that both tell apart, or one class of all cells."""

    names: Mapping[int, str]
    of_label: Mapping[str, int]
    """The number of each class of the truth; 0: not counted."""
    of_found: Mapping[int, int]
    """The same of each class number of the prediction."""
    note: str

    def count(self, truth: CountTruth, sample: Sample, cells: Instances) -> list[CountRow]:
        """The counts of an image by region and class: its predicted ``cells`` beside the true ones."""
        placed = PlacedCells.of(cells)
        predicted = PlacedCells(xy=placed.xy, classes=np.array([self.of_found.get(int(k), 0) for k in placed.classes], int))
        return count_rows(sample.name, truth.cells(sample, self.of_label), predicted, self.names, regions_of(sample.regions))


def match_classes(truth: CountTruth, found: Mapping[int, str], what: str) -> CountedClasses:
    """The classes of a truth and those that are predicted, by class number; ``what`` predicts them. Raises CellbenchError for an unknown class."""
    num_of = truth.num_of
    shown = ", ".join(f"{quote_name(name)} {num:,}" for name, num in list(num_of.items())[:20])
    if len(found) < 2 or len(num_of) < 2:
        label = next(iter(found.values())) if len(found) == 1 else UNNAMED
        together = " count together, as cells" if len(num_of) > 1 else ""
        how = "; `categories` in dataset.toml beside the images leaves some out" if together else ""
        return CountedClasses(
            names={1: label},
            of_label=dict.fromkeys(num_of, 1),
            of_found=dict.fromkeys(found, 1),
            note=f"truth: {shown or 'no cell'}{together}{how}",
        )
    known = {name.casefold(): k for k, name in found.items()}
    if unknown := [name for name in num_of if name.casefold() not in known]:
        raise CellbenchError(
            f"the truth has the class {quote_name(unknown[0])}; {what} counts {', '.join(found.values())}. Write into dataset.toml beside the "
            f'images which one it is: categories = {{ "{unknown[0]}" = "{next(iter(found.values()))}" }}, or "" to leave it out.'
        )
    of_label = {name: known[name.casefold()] for name in num_of}
    names = {k: name for k, name in found.items() if k in of_label.values()}
    left = [name for k, name in found.items() if k not in names]
    more = f"; not in the truth and not counted: {', '.join(left)}" if left else ""
    return CountedClasses(names=names, of_label=of_label, of_found={k: k for k in names}, note=f"truth: {shown}{more}")


def read_count_truth(where: Path, categories: Mapping[str, str]) -> CountTruth | None:
    """The true counts of a folder of images, of a table or a COCO file beside images; None where there are none.

    The images are those of the folder's test split if it has one, else all that have a truth. ``categories``: another name for a class; ``""``
    leaves it out. Raises CellbenchError.
    """
    root = where if where.is_dir() else where.parent
    pictures = [path for path in files_below(root)[0] if path.relative_to(root).parts[0] != REGIONS] if root.is_dir() else []
    files = files_below(root, (".xml", ".json", ".csv", ".geojson"))[0] if where.is_dir() else [where]
    files = [path for path in files if not path.is_relative_to(root / REGIONS)]
    kinds = (
        (".xml", read_voc, "boxes of VOC files"),
        (".json", read_coco_boxes, "boxes of COCO"),
        (".csv", read_count_table, ""),
        (".geojson", read_points, "points of GeoJSON files"),
    )
    for ending, read, what in kinds:
        rows = [row for path in files if path.suffix.lower() == ending for row in read(path)]
        if any(row.mark for row in rows):
            if unknown := [name for name in categories if name not in {row.mark.label for row in rows if row.mark}]:
                raise CellbenchError(
                    f"{root}: dataset.toml: categories names {quote_name(unknown[0])}, which {rows[0].file.name} does not hold."
                )
            kind = what or ("points" if any(row.mark and row.mark.xy for row in rows) else "counts")
            return _joined(root, f"{kind} of {rows[0].file.name}" if ending in (".json", ".csv") else what, pictures, rows, categories)
    return None


def _joined(root: Path, what: str, pictures: Sequence[Path], rows: Sequence[CountRecord], categories: Mapping[str, str]) -> CountTruth:
    """The rows by image."""
    by_name: dict[str, list[Path]] = {}
    for path in pictures:
        relative = PurePosixPath(to_nfc(path.relative_to(root).as_posix()))
        for key in {relative.as_posix(), relative.name, relative.with_suffix("").as_posix(), relative.stem}:
            by_name.setdefault(key, []).append(path)
    of_image: dict[Path, list[CountRecord]] = {}
    lost: dict[str, None] = {}
    for row in rows:
        found = _image_of(row, root, by_name)
        if found is None:
            lost[row.image] = None
        else:
            of_image.setdefault(found, []).append(row)
    if not of_image:
        raise CellbenchError(
            f"{printable_path(rows[0].file)}: names {quote_name(rows[0].image)}, and no such image is in {root}. Put the images there."
        )
    split = _split_of_images(root, of_image)
    chosen = [path for path in of_image if split.get(path) == "test"] or list(of_image)
    samples, marks = [], {}
    for path in sorted(chosen):
        size = images.image_size(path)
        name = to_nfc(path.relative_to(root).as_posix()) if len(by_name[to_nfc(path.name)]) > 1 else to_nfc(path.name)
        files = sorted({row.file for row in of_image[path]})
        samples.append(Sample(name=name, image=path, mask=files[0], size_px=size, digest=compute_sha256(path)))
        marks[name] = [mark for row in of_image[path] if (mark := _checked(row, name, size, categories)) is not None]
    notes = [f"truth: {what}, of {len(samples)} images"]
    if len(chosen) < len(of_image):
        notes[0] += f" of the folder's test split; {len(of_image) - len(chosen)} others are not counted"
    if lost:
        notes.append(f"truth: {len(lost)} images that it names are not in the folder and do not count: {quoted(list(lost))}")
    if num := len(pictures) - len(of_image):
        without = [path.name for path in pictures if path not in of_image]
        notes.append(f"truth: {num} images have no truth and do not count: {quoted(without)}")
    truth = CountTruth(root=root, what=what, samples=tuple(samples), marks=marks, notes=tuple(notes))
    return _with_regions(truth, root)


def _with_regions(truth: CountTruth, root: Path) -> CountTruth:
    if not (root / REGIONS).is_dir():
        return truth
    found, spare = match_regions(root / REGIONS, truth.samples)
    if found and not truth.placed:
        raise CellbenchError(
            f"{root / REGIONS}: cells cannot be counted by region where the truth is {truth.what}, without places. Give points or boxes."
        )
    samples = tuple(replace(one, regions=found.get(one)) for one in truth.samples)
    rest = "" if len(found) == len(samples) else ", the others whole"
    notes = [f"regions: {len(found)} of {len(samples)} images are counted by region, and only there{rest}"] if found else []
    notes += [f"regions: {len(spare)} files belong to none of these images: {quoted([path.name for path in spare])}"] if spare else []
    return replace(truth, samples=samples, notes=(*truth.notes, *notes))


def _image_of(row: CountRecord, root: Path, by_name: Mapping[str, Sequence[Path]]) -> Path | None:
    name = to_nfc(row.image).replace("\\", "/").removeprefix("./")
    for key in (
        name,
        name.rpartition("/")[2],
        PurePosixPath(name).stem,
        to_nfc(row.file.stem) if row.file.suffix.lower() in (".xml", ".geojson") else name,
    ):
        here = by_name.get(key, ())
        beside = [path for path in here if path.parent == row.file.parent]
        if len(here) == 1 or len(beside) == 1:
            return (beside or list(here))[0]
        if len(here) > 1:
            shown = quoted([path.relative_to(root).as_posix() for path in here])
            raise CellbenchError(f"{printable_path(row.file)}: {quote_name(row.image)} may be {shown}. Name images with their folders.")
    return None


def _split_of_images(root: Path, found: Mapping[Path, object]) -> dict[Path, str]:
    """``test`` for the images of a folder of that name, or of VOC's ``ImageSets/Main/test.txt``."""
    listed: set[str] = set()
    for path in root.rglob("test.txt"):
        if path.parent.name == "Main":
            listed = {line.split()[0] for line in read_text(path).splitlines() if line.strip()}
    return {
        path: "test"
        for path in found
        if path.stem in listed or any(SPLITS.get(part.lower()) == "test" for part in path.relative_to(root).parts[:-1] if part)
    }


def _checked(row: CountRecord, name: str, size_px: tuple[int, int], categories: Mapping[str, str]) -> Mark | None:
    """The mark of a row under its class; None for an image without cells, and for what is left out. Raises CellbenchError."""
    height, width = size_px
    if row.size_px is not None and row.size_px != size_px and min(row.size_px) > 0:
        raise CellbenchError(
            f"{printable_path(row.file)}: is of an image of {row.size_px[1]} x {row.size_px[0]} px; {name} has {width} x {height}. "
            "Its places are those of another size."
        )
    if row.mark is None:
        return None
    label = categories.get(row.mark.label, row.mark.label)
    if not label or label.casefold() in (*NOT_CELLS, *NOT_SCORED):
        return None
    if row.mark.xy is not None and not (0 <= row.mark.xy[0] <= width and 0 <= row.mark.xy[1] <= height):
        x, y = row.mark.xy
        raise CellbenchError(
            f"{printable_path(row.file)}: {name}: a cell at {x:g}, {y:g} is outside of its image of {width} x {height} px."
        )
    return Mark(label=label, xy=row.mark.xy, num=row.mark.num)
