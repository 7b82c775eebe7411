"""Opens a dataset: builds a :class:`Dataset` from a card and a folder or a drawing."""

from __future__ import annotations

import functools
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cellbench.config.base import checked
from cellbench.config.cards import DatasetCard
from cellbench.config.experiment import DataSpec, Experiment
from cellbench.config.registry import Registry, load, with_defaults
from cellbench.console import progress_bar
from cellbench.data.appearance import describe_appearances, group_by_appearance
from cellbench.data.audit import near_duplicates
from cellbench.data.classes import unused_classes, with_class_facts, with_owners
from cellbench.data.count_truth import CountTruth, read_count_truth
from cellbench.data.dataset import CARD_NAME, SPLITS, Dataset, Sample, interpret_masks, validated
from cellbench.data.layouts import is_laid_out, scan_folder
from cellbench.data.manifest import NAMES
from cellbench.data.region_files import add_regions
from cellbench.data.scan import Listing, find_unused
from cellbench.data.splits import Grouping, Splits, choose_folds, given_splits, split_of
from cellbench.data.uniformity import common_pixel_size, decide_scaling, find_inconsistencies, read_all_image_facts
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, facts_digest, parse_toml, read_text
from cellbench.metrics.pixel import IGNORE


def open_folds(experiment: Experiment, registry: Registry, data: Path | None) -> list[Dataset]:
    """The experiment's dataset, or one for each of its folds, in their order. Raises CellbenchError."""
    spec = experiment.data
    card, listing = _usable(registry.dataset(experiment.dataset), data, spec)
    datasets = [_opened(card, listing, spec.model_copy(update={"fold": fold})) for fold in range(max(spec.folds, 1))]
    like = registry.dataset("folder") if card.draw else registry.dataset(experiment.dataset)
    further = [_further_test_set(Path(folder), like, datasets[0], spec) for folder in spec.test_folders]
    named = _named_apart(further)
    return [replace(one, further=named, notes=(*one.notes, *(note for other in named for note in other.notes))) for one in datasets]


def _further_test_set(folder: Path, card: DatasetCard, own: Dataset, spec: DataSpec) -> Dataset:
    """A folder of ``[data] tests``: its test images, or all images if it has no split. Raises CellbenchError if its classes differ from the own."""
    card, listing = _usable(card, folder, DataSpec())
    if (
        card.classes != own.classes and not len(card.classes) == len(own.classes) == 2
    ):  # of two classes, whatever their names, one is the cells
        raise CellbenchError(
            f"[data] tests: {folder} has the classes {', '.join(card.classes)}; those of {own.name} are {', '.join(own.classes)}. "
            f"Name a folder with the same classes, or say in a {CARD_NAME} there which mask values belong to which class."
        )
    base = replace(dataset_of_card(card, listing.root), classes=own.classes, um_per_px=listing.um_per_px)
    found, what = read_test_images(base, listing, own)
    if spec.limit:
        found = replace(found, test=found.test[: spec.limit], limited=len(found.test) > spec.limit)
    same = {sample.digest for part in SPLITS for sample in own.samples(part)} & {sample.digest for sample in found.test}
    notes = [f"{found.name}, a further test set: {len(found.test)} images ({what})", *(f"{found.name}: {note}" for note in found.notes)]
    if same:
        notes.append(
            f"doubt: {len(same)} of {len(found.test)} images of {found.name} are images of {own.name} too: of those models may have seen some"
        )
    return replace(found, notes=tuple(notes))


def _named_apart(datasets: Sequence[Dataset]) -> tuple[Dataset, ...]:
    """The datasets under names that differ: those of the same name with that of the folder around."""
    times = Counter(one.name for one in datasets)
    return tuple(one if times[one.name] == 1 else replace(one, name=f"{one.root.absolute().parent.name}-{one.name}") for one in datasets)


def read_test_images(base: Dataset, listing: Listing, like: Dataset) -> tuple[Dataset, str]:
    """Other images for models that were trained on ``like``, as the test images of a dataset, and which ones of the folder: its test images, or all.

    ``base``: what its masks mean, as far as a card says it. Images are read as those of ``like``, and the same classes make up a cell.
    """
    parts = listing.parts
    chosen = parts.get("test") or (*parts.get("train", ()), *parts.get("val", ()))
    what = "the folder's test images" if parts.get("test") else "all images of the folder"
    # Models read these images as their own.
    found, contents = validated(replace(base, reading=like.reading, train=(), val=(), test=tuple(chosen), owners=(), unused=(), notes=()))
    return replace(with_owners(found, like.owners), unused=unused_classes(found, contents.values())), what


def settings_for_data(experiment: Experiment, registry: Registry, data: Path | None) -> list[tuple[str, str]]:
    """The settings that an experiment leaves to its data, ``KEY=VALUE``, each with a sentence: the number of folds, the crops of an image."""
    if not (experiment.may_choose_folds or experiment.may_choose_crops):
        return []
    spec = experiment.data
    _, listing = _usable(registry.dataset(experiment.dataset), data, spec)
    num, num_test = sum(map(len, listing.parts.values())), len(listing.parts.get("test", ()))
    out = []
    if experiment.may_choose_folds:
        num_folds, why = choose_folds(listing.root, listing.parts, spec)
        if num_folds:
            spec = spec.model_copy(update={"folds": num_folds})
            out.append((f"data.folds={num_folds}", why))
    if experiment.may_choose_crops:
        share = 1 - 1 / spec.folds if spec.folds else (1 - num_test / max(num, 1)) if num_test else 1 - spec.test_fraction
        num_train = max(1, round(num * share * (1 - spec.val_fraction)))
        num_train = min(num_train, spec.limit or num_train)
        crops = max(1, round(experiment.tiles_per_epoch / num_train))
        why = f"crops_per_image = {crops}: about {crops * num_train} training tiles in an epoch, from about {num_train} images."
        out.append((f"run.crops_per_image={crops}", why))
    return out


def open_dataset(card: DatasetCard, folder: Path | None, spec: DataSpec) -> Dataset:
    """The dataset of a card, drawn or read from ``folder`` (or a manifest or COCO file). Decodes every file once. Raises CellbenchError."""
    return _opened(*_usable(card, folder, spec), spec)


def _usable(card: DatasetCard, folder: Path | None, spec: DataSpec) -> tuple[DatasetCard, Listing]:
    card, listing = scan_dataset(card, folder, spec)
    listing.raise_first()
    return card, listing


def _opened(card: DatasetCard, listing: Listing, spec: DataSpec) -> Dataset:
    dataset, splits = split_dataset(card, listing, spec)
    if spec.limit:
        limited = any(len(dataset.samples(part)) > spec.limit for part in SPLITS)
        dataset = replace(dataset.with_samples({part: dataset.samples(part)[: spec.limit] for part in SPLITS}), limited=limited)
    dataset, contents = validated(dataset)
    # Saved last: a split file that names a damaged image would be in the way once the user removes that image.
    return with_class_facts(replace(dataset, notes=(*listing.lines, *dataset.notes, splits.keep())), contents, card)


def scan_dataset(card: DatasetCard, folder: Path | None, spec: DataSpec, *, unlabelled: bool = False) -> tuple[DatasetCard, Listing]:
    """The card that applies to the folder, and its samples with the intensity scaling of all images. Raises CellbenchError.

    A card whose code lists the folder is called. Else a card beside the data applies; a card that names folders only where they exist, for its
    facts about masks are those of its own images; and otherwise what masks mean is inferred. ``unlabelled``: masks may be missing.
    """
    if card.draw:
        return card, scan_folder(card, _drawn(card, spec))
    if spec.draw:
        raise CellbenchError(f"[data.draw] is for drawn datasets, but '{card.id}' is read from a folder. Remove the table.")
    if folder is None:
        how = f" How to get it: {card.how_to_get}" if card.how_to_get else ""
        raise CellbenchError(f"dataset '{card.id}' is read from a folder, and none was named. Give --data DIR.{how}")
    applies = ""
    if card.builder:
        listing = _built(card, folder)
    else:
        beside = (folder if folder.is_dir() else folder.parent) / CARD_NAME
        if beside.is_file():
            card = _own_card(beside, card)
        elif not is_laid_out(card, folder):
            applies = f"{folder.absolute().name} is not laid out as '{card.id}' is, so that card says nothing about it: what its masks mean is inferred"
            card = checked(DatasetCard, {"id": "folder", "title": card.title, "path": card.path}, card.path)
        listing = scan_folder(card, folder, unlabelled=unlabelled)
    listing.notes += [applies] if applies else []
    add_regions(listing)
    here = [(part, sample) for part in SPLITS for sample in listing.parts.get(part, ())]
    times = Counter(sample.name for _, sample in here)  # unique within a split only
    images = {sample.image: sample.name if times[sample.name] == 1 else f"{part}/{sample.name}" for part, sample in here}
    facts = read_all_image_facts(list(images), card.channels)
    listing.reading, listing.reading_notes = decide_scaling(facts.values(), card.range, card.channels)
    listing.um_per_px = common_pixel_size(facts.values())
    if listing.um_per_px is not None:
        num = sum(one.pixel is not None for one in facts.values())
        listing.reading_notes.append(f"pixels of {listing.um_per_px:.4g} um, as {num} of {len(facts)} images state")
    doubts, notes = find_unused(listing, (CARD_NAME, folder.name, *NAMES))
    listing.notes += notes
    listing.doubts += [*doubts, *find_inconsistencies({images[path]: one for path, one in facts.items()}, listing.reading)]
    own = {"id": listing.root.absolute().name or card.id} if card.id == "folder" else {}  # data without a card has the name of its folder
    return card.model_copy(update=own | ({"classes": listing.classes} if listing.classes else {})), listing


def open_count_truth(folder: Path, registry: Registry) -> CountTruth | None:
    """The boxes, points or counts of a folder of images without masks; None for a folder with masks, and without either. Raises CellbenchError."""
    card = registry.dataset("folder")
    try:
        scan_folder(card, folder)
    except CellbenchError:
        beside = (folder if folder.is_dir() else folder.parent) / CARD_NAME
        return read_count_truth(folder, _own_card(beside, card).categories if beside.is_file() else {})
    return None


def _built(card: DatasetCard, folder: Path) -> Listing:
    """The listing from the card's own builder."""
    listing = load(card)(folder, card)
    if not isinstance(listing, Listing):
        kind = type(listing).__name__
        raise CellbenchError(f"{card.path}: builder = {card.builder!r} returned a {kind}. Return a cellbench.data.scan.Listing.")
    return listing


def _own_card(path: Path, card: DatasetCard) -> DatasetCard:
    """The card beside the data, with classes and the meaning of masks. It is data, so it must not name code."""
    try:
        tree = parse_toml(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CellbenchError(f"{path}: cannot be read as a card: {error}.") from None
    for key in ("builder", "draw", "id", "title", "path"):
        if key in tree:
            raise CellbenchError(f"{path}: '{key}' is not allowed in a card beside the data. Remove it, or put the card into a --registry.")
    given = {"path": str(path), "id": path.absolute().parent.name, "title": card.title}
    return checked(DatasetCard, {**tree, **given}, str(path))


def dataset_of_card(card: DatasetCard, root: Path) -> Dataset:
    """A dataset without samples, with the meaning of masks from its card."""
    meaning = {
        key: getattr(card, key) for key in ("classes", "values", "thresholds", "colors", "tolerance", "ignore", "min_cell_px", "cut_px")
    }
    kind = card.kind_of_masks
    if len(card.classes) > 2 and kind != "cells" and not (card.values or card.thresholds or card.colors):
        meaning |= {"values": tuple(range(len(card.classes))), "tolerance": 0}  # class numbers
    return Dataset(name=card.id, root=root, train=(), val=(), test=(), masks=kind, drawn=bool(card.draw), **meaning)


def split_dataset(card: DatasetCard, listing: Listing, spec: DataSpec, grouped: Grouping | None = None) -> tuple[Dataset, Splits]:
    """The listed samples in three splits; nothing is written yet. ``grouped`` gives images that show the same a common group."""
    grouped = grouped or partial(near_duplicates.group_near_duplicates, reading=listing.reading)
    dataset = replace(dataset_of_card(card, listing.root), reading=listing.reading, um_per_px=listing.um_per_px)
    parts = {part: listing.parts.get(part, ()) for part in SPLITS}
    if card.draw and spec.group in ("auto", "appearance"):
        grouped = tuple  # all drawn images are different
    if spec.group == "appearance":
        grouped = partial(group_by_appearance, num_folds=spec.folds, reading=listing.reading, grouped=grouped)

    @functools.cache
    def interpreted() -> Dataset:
        return interpret_masks(dataset, [sample for part in SPLITS for sample in parts[part]]).dataset

    def foreground(sample: Sample) -> float:
        classes = interpreted().read_mask(sample)
        known = classes != IGNORE
        return float((classes[known] > 0).mean()) if known.any() else 0.0

    if spec.folds:  # folds are cut from all images
        splits = split_of(listing.root, (*parts["train"], *parts["val"]), parts["test"], spec, foreground, grouped)
    elif parts["val"]:
        splits = given_splits(listing.root, listing.layout, parts, spec, grouped)
    else:
        splits = split_of(listing.root, parts["train"], parts["test"], spec, foreground, grouped)
    notes = describe_appearances((*splits.train, *splits.val, *splits.test), listing.reading)
    return replace(dataset, train=splits.train, val=splits.val, test=splits.test, notes=(*dataset.notes, *notes)), splits


def _drawn(card: DatasetCard, spec: DataSpec) -> Path:
    """The folder of drawn images; draws them the first time."""
    settings = with_defaults(card.draw, spec.draw, "data.draw")
    key = facts_digest([card.builder, settings], 12)
    folder = cache_dir() / "drawn" / f"{card.id}-{key}"
    if not folder.is_dir():
        with progress_bar(desc=f"drawing {card.id}", unit="image") as bar:
            load(card)(folder, settings, bar.update)
    return folder


def pool_folds(datasets: Sequence[Dataset]) -> str:
    """A digest of all folds together: files, classes and splits. For a single dataset, its own digest."""
    if len(datasets) == 1:
        return datasets[0].digest
    return facts_digest([dataset.digest for dataset in datasets])
