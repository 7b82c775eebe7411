"""``cellbench check``: is this data fit to train on? Reads everything once, prints a verdict, writes JSON and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.audit import near_duplicates
from cellbench.data.audit.checks import Finding, Severity, find_duplicates, findings, statistics
from cellbench.data.audit.keypoint_matching import Keypoints
from cellbench.data.audit.mask_placement import PlacementFeatures
from cellbench.data.audit.mask_statistics import SampleFacts, measure_sample
from cellbench.data.classes import describe_absent_classes, infer_owners, with_owners
from cellbench.data.classes import survey_classes as held_in
from cellbench.data.dataset import SPLITS, Dataset, Sample, interpret_masks
from cellbench.data.loading import dataset_of_card, scan_dataset, split_dataset
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, write_atomic
from cellbench.reporting import render
from cellbench.reporting.report_data import Facts, Page, Section, Table, Text

SHOWN = 5
"""Names told of each finding on the screen; the files have all."""


def check(folder: Path, *, card: str = "folder", spec: DataSpec | None = None, extra: Path | None = None, out: Path | None = None,
          say: Callable[[str], None] = print) -> int:  # fmt: skip
    """Audits a folder (or manifest, or COCO file). Exit code 0 where it is fit, 1 where a finding would falsify a result.

    Raises CellbenchError where it cannot look. Nothing is written into the folder; ``out``: where the files go.
    """
    facts_card, listing = scan_dataset(Registry(extra).dataset(card), folder, spec or DataSpec())
    problems: dict[str, list[str]] = {}
    for problem in listing.problems:
        problems.setdefault(problem.kind, []).append(problem.name)
    found = [
        Finding(
            kind=kind,
            severity=Severity.SEVERE,
            said=next(p for p in listing.problems if p.kind == kind).told(len(names) - 1),
            images=tuple(names),
        )
        for kind, names in problems.items()
    ]
    found += [Finding(kind=doubt.kind, severity=Severity.LOOK, said=f"{doubt.said}.", images=doubt.names) for doubt in listing.doubts]
    notes = [*listing.notes, *listing.reading_words]
    if not any(listing.parts.values()):
        raise CellbenchError(f"--data {folder}: holds no image with a mask. {found[0].said if found else ''}".rstrip())
    samples = tuple(sample for part in SPLITS for sample in listing.parts.get(part, ()))
    dataset = replace(dataset_of_card(facts_card, listing.root), train=samples, reading=listing.reading)
    found_meaning = interpret_masks(dataset, samples, broken=[])
    dataset, notes = found_meaning.dataset, [*notes, *found_meaning.dataset.notes]
    owners, said_of_parts = infer_owners(facts_card, list(held_in(dataset).values()))
    dataset, notes = with_owners(dataset, owners), [*notes, *said_of_parts]
    for severity, said in ((Severity.SEVERE, found_meaning.ask), (Severity.LOOK, found_meaning.doubt)):
        if said:
            found.append(Finding(kind="meaning", severity=severity, said=f"{said[0].upper()}{said[1:]}.", images=("all masks",)))
    facts = _read(dataset, dataset.tolerance)
    same = find_duplicates(facts)
    first = dict(zip(map(_key, samples), same.first(len(samples)), strict=True))

    def grouped(some: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return near_duplicates.group_by_first(some, [first[_key(sample)] for sample in some])

    try:
        dataset, splits = split_dataset(facts_card, listing, spec or DataSpec(), grouped)
        notes.append(f"split {'as drawn from the seed' if splits.record else f'read from {splits.place}'}")
        home = {_key(sample): {"split": part, "group": sample.group} for part in SPLITS for sample in dataset.samples(part)}
        facts = [replace(f, **home[_key(sample)]) for f, sample in zip(facts, samples, strict=True)]
    except CellbenchError as error:
        found.append(Finding(kind="split", severity=Severity.SEVERE, said=str(error), images=("the split",)))
    order = list(Severity)
    found += [*findings(facts, same), *_absent(facts, dataset.classes), *_expected(facts_card.expected, facts)]
    found = sorted(found, key=lambda finding: order.index(finding.severity))
    numbers = [("layout", listing.layout), *statistics(facts, dataset.classes)]
    verdict = _verdict(dataset.name, len(facts), found)
    for line in _lines(verdict, numbers, found, notes):
        say(line)
    place = make_folder(out or Path("reports") / f"check-{_plain(folder)}")
    write_atomic(place / "check.json", _json(verdict, numbers, found, notes, facts))
    write_atomic(place / "check.html", _page(folder, verdict, numbers, found, notes))
    say(f"written to {place / 'check.json'} and check.html")
    return 1 if any(finding.severity is Severity.SEVERE for finding in found) else 0


def _key(sample: Sample) -> tuple[Path, Path, str]:
    return sample.image, sample.mask, sample.name


def _plain(folder: Path) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in folder.absolute().name)[:80] or "data"


def _read(dataset: Dataset, tolerance: int) -> list[SampleFacts]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and numpy free the interpreter's lock
        jobs = [pool.submit(measure_sample, dataset, sample, "train", tolerance) for sample in dataset.train]
        try:
            return [job.result() for job in tqdm(jobs, desc=f"checking {dataset.name}", unit="image", leave=False)]
        finally:
            pool.shutdown(cancel_futures=True)


def _absent(facts: Sequence[SampleFacts], classes: Sequence[str]) -> list[Finding]:
    pixels = {split: np.array([f.shares for f in facts if f.split == split and f.shares]) for split in SPLITS}
    return [
        Finding(kind="class", severity=Severity.LOOK, said=said, images=(name,)) for name, said in describe_absent_classes(classes, pixels)
    ]


def _expected(expected: dict[str, int], facts: Sequence[SampleFacts]) -> list[Finding]:
    found = {"train": sum(f.split != "test" for f in facts), "test": sum(f.split == "test" for f in facts), "all": len(facts)}
    wrong = [f"{part}: {found.get(part, 0)} of {num}" for part, num in expected.items() if found.get(part, 0) != num]
    said = "The published set has another number of images: a part, or a loader's loss?"
    return [Finding(kind="count", severity=Severity.NOTE, said=said, images=tuple(wrong))] if wrong else []


def _verdict(name: str, num: int, found: Sequence[Finding]) -> str:
    severe = [finding for finding in found if finding.severity is Severity.SEVERE]
    look = [finding for finding in found if finding.severity is Severity.LOOK]
    if severe:
        return f"{name}: NOT FIT. {', '.join(f'{f.kind} ({len(f.images)})' for f in severe)} would falsify a result; {num} images read."
    told = f" Worth a look: {', '.join(f'{f.kind} ({len(f.images)})' for f in look)}." if look else ""
    return f"{name}: fit to train on; {num} images read.{told}"


def _lines(verdict: str, numbers: Sequence[tuple[str, str]], found: Sequence[Finding], notes: Sequence[str]) -> list[str]:
    width = max(len(name) for name, _ in numbers)
    lines = [verdict, "", *(f"  {name.ljust(width)}  {value}" for name, value in numbers), ""]
    for finding in found:
        more = f", … {len(finding.images) - SHOWN} more" if len(finding.images) > SHOWN else ""
        names = [name if name.isprintable() else ascii(name) for name in finding.images[:SHOWN]]
        lines += [f"  {finding.severity.value:6}  {finding.kind}: {finding.said}", f"          {', '.join(names)}{more}"]
    return [*lines, *(f"  {note}" for note in notes)]


def _json(
    verdict: str, numbers: Sequence[tuple[str, str]], found: Sequence[Finding], notes: Sequence[str], facts: Sequence[SampleFacts]
) -> str:
    rows = [
        {key: value for key, value in vars(f).items() if not isinstance(value, np.ndarray | Keypoints | PlacementFeatures)} for f in facts
    ]
    told = [{"kind": f.kind, "severity": f.severity.value, "said": f.said, "images": f.images} for f in found]
    return json.dumps({"verdict": verdict, "findings": told, "statistics": dict(numbers), "notes": notes, "images": rows}, indent=1)


def _page(folder: Path, verdict: str, numbers: Sequence[tuple[str, str]], found: Sequence[Finding], notes: Sequence[str]) -> str:
    rows = [
        (f.severity.value, f.kind, str(len(f.images)), f.said, ", ".join(f.images[:50]) + (" …" if len(f.images) > 50 else ""))
        for f in found
    ]
    table = Table(headings=("how bad", "what", "images", "what it means", "which"), rows=rows, sentence_columns=(1, 3, 4))
    sections = [
        Section("Findings", [table] if rows else [Text(["None."])]),
        Section("What is there", [Facts(numbers)]),
        Section("How it was read", [Text(notes)] if notes else []),
    ]
    page = Page(title=f"Is {folder.absolute().name} fit to train on?", subtitle="cellbench check", verdict=[verdict], sections=sections)
    return render.to_html(page)
