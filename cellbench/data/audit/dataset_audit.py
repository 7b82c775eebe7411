"""Audits a dataset: reads every image and mask once, and lists what would falsify a comparison of models, or is worth a look."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from cellbench.config.cards import DatasetCard
from cellbench.config.experiment import DataSpec
from cellbench.data.audit import near_duplicates
from cellbench.data.audit.checks import TOO_FEW, Finding, Severity, find_duplicates, findings, severe_first, statistics, too_few
from cellbench.data.audit.image_statistics import SampleFacts, measure_sample
from cellbench.data.classes import describe_absent_classes, infer_owners, with_owners
from cellbench.data.dataset import SPLITS, Dataset, Sample, interpret_masks
from cellbench.data.loading import dataset_of_card, scan_dataset, split_dataset
from cellbench.data.progress import map_files
from cellbench.data.scan import Listing, UnusableImage
from cellbench.errors import CellbenchError
from cellbench.statistics.power import describe_detectable


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of reading every image and mask of a dataset."""

    verdict: str
    numbers: Sequence[tuple[str, str]]
    """Statistics, as label and value."""
    findings: Sequence[Finding]
    """The most severe first."""
    notes: Sequence[str]
    facts: Sequence[SampleFacts]
    """Measurements of each image."""
    dataset: Dataset
    """As it was read; its samples are those of ``facts``, in their order, all in ``train``."""


def audit(card: DatasetCard, folder: Path, spec: DataSpec) -> Audit:
    """Reads every image once. Raises CellbenchError if no image with a mask is found."""
    card, listing = scan_dataset(card, folder, spec)
    found = _scan_findings(listing)
    if not any(listing.parts.values()):
        raise CellbenchError(f"--data {folder}: holds no image with a mask. {found[0].message if found else ''}".rstrip())
    samples = tuple(sample for part in SPLITS for sample in listing.parts.get(part, ()))
    dataset = replace(dataset_of_card(card, listing.root), train=samples, reading=listing.reading)
    meaning = interpret_masks(dataset, samples, broken=[])
    owners, parts_notes = infer_owners(card, [facts.class_content for facts in meaning.facts.values()])
    dataset = with_owners(meaning.dataset, owners)
    notes = [*listing.notes, *listing.reading_notes, *meaning.dataset.notes, *parts_notes]
    as_read = dataset
    threads = min(8, os.cpu_count() or 1)
    facts = map_files(partial(measure_sample, dataset, split="train"), samples, f"checking {dataset.name}", hide_below=0, threads=threads)
    for severity, message in ((Severity.SEVERE, meaning.ask), (Severity.LOOK, meaning.doubt)):
        if message:
            found.append(Finding(kind="meaning", severity=severity, message=f"{message[0].upper()}{message[1:]}.", images=("all masks",)))
    duplicates = find_duplicates(facts)
    first = dict(zip(map(_key, samples), duplicates.groups(len(samples)), strict=True))

    def grouped(some: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return near_duplicates.group_by_first(some, [first[_key(sample)] for sample in some])

    try:
        dataset, splits = split_dataset(card, listing, spec, grouped)
        notes.append(f"split {'as drawn from the seed' if splits.record else f'read from {splits.place}'}")
        home = {_key(sample): (part, sample.group) for part in SPLITS for sample in dataset.samples(part)}
        placed = zip(facts, (home[_key(sample)] for sample in samples), strict=True)
        facts = [replace(f, split=part, group=group) for f, (part, group) in placed]
    except CellbenchError as error:
        found.append(Finding(kind="split", severity=Severity.SEVERE, message=str(error), images=("the split",)))
    num_test = sum(f.split == "test" for f in facts)
    sizes = {"test images": num_test} if 0 < num_test < len(facts) else {}
    notes.append(describe_detectable({**sizes, "images, all tested in folds": len(facts)}))
    found += [*too_few(len(facts)), *findings(facts, duplicates), *_absent(facts, dataset.classes), *_expected(card.expected, facts)]
    found = severe_first(found)
    return Audit(
        verdict=verdict(dataset.name, len(facts), found),
        numbers=[("layout", listing.layout), *statistics(facts, dataset.classes)],
        findings=found,
        notes=notes,
        facts=facts,
        dataset=as_read,
    )


def verdict(name: str, num: int, found: Sequence[Finding]) -> str:
    def listed(severity: Severity) -> str:
        return ", ".join(f"{f.kind} ({len(f.images)})" for f in found if f.severity is severity)

    if [f.kind for f in found if f.severity is Severity.SEVERE] == [TOO_FEW]:
        return f"{name}: TOO FEW TO COMPARE. {next(f.message for f in found if f.kind == TOO_FEW)}"
    if severe := listed(Severity.SEVERE):
        return f"{name}: NOT FIT. {severe} would falsify a result; {num} images read."
    look = listed(Severity.LOOK)
    return f"{name}: fit to train on; {num} images read." + (f" Worth a look: {look}." if look else "")


def _scan_findings(listing: Listing) -> list[Finding]:
    """Problems of file names and layout, one finding per kind."""
    problems: dict[str, list[UnusableImage]] = {}
    for problem in listing.problems:
        problems.setdefault(problem.kind, []).append(problem)
    found = [
        Finding(kind=kind, severity=Severity.SEVERE, message=some[0].describe(len(some) - 1), images=tuple(one.name for one in some))
        for kind, some in problems.items()
    ]
    return found + [
        Finding(kind=doubt.kind, severity=Severity.LOOK, message=f"{doubt.message}.", images=doubt.names) for doubt in listing.doubts
    ]


def _key(sample: Sample) -> tuple[Path, Path, str]:
    return sample.image, sample.mask, sample.name


def _absent(facts: Sequence[SampleFacts], classes: Sequence[str]) -> list[Finding]:
    pixels = {split: np.array([f.shares for f in facts if f.split == split and f.shares]) for split in SPLITS}
    return [
        Finding(kind="class", severity=Severity.LOOK, message=message, images=(name,))
        for name, message in describe_absent_classes(classes, pixels)
    ]


def _expected(expected: dict[str, int], facts: Sequence[SampleFacts]) -> list[Finding]:
    found = {"train": sum(f.split != "test" for f in facts), "test": sum(f.split == "test" for f in facts), "all": len(facts)}
    wrong = [f"{part}: {found.get(part, 0)} of {num}" for part, num in expected.items() if found.get(part, 0) != num]
    message = "The published set has another number of images: a part, or a loader's loss?"
    return [Finding(kind="count", severity=Severity.NOTE, message=message, images=tuple(wrong))] if wrong else []
