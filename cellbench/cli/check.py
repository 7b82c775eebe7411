"""``check``: audits a dataset. Reads every image once, prints a verdict, and writes JSON and an HTML page with pictures of the findings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellbench.config.cards import DatasetCard
from cellbench.config.experiment import DataSpec
from cellbench.config.loading import data_spec
from cellbench.config.options import CheckOptions
from cellbench.config.registry import Registry
from cellbench.console import Column, format_table, progress_bar, say, sentence_width
from cellbench.data.audit import near_duplicates
from cellbench.data.audit.checks import TOO_FEW, Finding, Severity, find_duplicates, findings, statistics, too_few
from cellbench.data.audit.examples import Example, draw_examples, draw_fault, draw_samples
from cellbench.data.audit.image_statistics import SampleFacts, measure_sample
from cellbench.data.audit.keypoint_matching import Keypoints
from cellbench.data.audit.label_faults import LabelFaults
from cellbench.data.audit.mask_placement import PlacementFeatures
from cellbench.data.classes import describe_absent_classes, infer_owners, with_owners
from cellbench.data.dataset import SPLITS, Dataset, Sample, interpret_masks
from cellbench.data.io.images import png_bytes
from cellbench.data.loading import dataset_of_card, scan_dataset, split_dataset
from cellbench.data.scan import Listing, UnusableImage
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, write_atomic
from cellbench.reporting import render
from cellbench.reporting.report_data import Block, Facts, Folded, Gallery, Heading, Page, Section, Text
from cellbench.statistics.power import describe_detectable

SHOWN = 5
"""Image names printed per finding; the files list all."""
SHOWN_FAULTS = 6
"""Pictures of each kind of likely faults of masks, the highest score first."""
SHORT_CHARS = 200
"""Longer lists of names are folded on the page."""
_SEVERITY = {Severity.SEVERE: "severe", Severity.LOOK: "worth a look", Severity.NOTE: "note"}


def check(options: CheckOptions) -> int:
    judge = None
    if options.experiment is not None:
        from cellbench.cli.label_faults import open_judge  # torch and MLflow are needed only here

        judge = open_judge(options)
    return check_folder(
        options.data,
        card=options.dataset,
        spec=data_spec(options.changes),
        registry=Registry(options.registry),
        out=options.out,
        judge=judge,
    )


def check_folder(
    folder: Path,
    *,
    card: str = "folder",
    spec: DataSpec | None = None,
    registry: Registry | None = None,
    out: Path | None = None,
    judge: Judge | None = None,
    say: Callable[[str], None] = say,
) -> int:
    """Audits a folder, manifest or COCO file. Returns exit code 0 if models can be compared on it, 1 if a finding forbids that.

    Raises CellbenchError if the data cannot be read. Writes nothing to the folder; ``out``: folder for the report; ``judge``: finds faults of masks.
    """
    if out is not None and out.exists():
        make_folder(out)  # reports a file of this name before the images are read
    found = audit((registry or Registry()).dataset(card), folder, spec or DataSpec())
    faults = judge(found.dataset, found.facts) if judge is not None else None
    if faults is not None and faults.found:
        more = sorted([*found.findings, faults.finding], key=lambda finding: list(Severity).index(finding.severity))
        found = replace(found, findings=more, verdict=_verdict(found.dataset.name, len(found.facts), more))
    for line in (*_lines(found), *(faults.lines() if faults is not None else ())):
        say(line)
    place = make_folder(out or Path("reports") / f"check-{_plain(folder)}")
    write_atomic(place / "check.json", _json(found))
    write_atomic(place / "check.html", _page(folder, found, faults))
    if faults is not None:
        write_atomic(place / "faults.csv", faults.csv())
        say(f"all likely faults of masks, with their places: {place / 'faults.csv'}")
    say(f"pictures of the findings: {place / 'check.html'}; all names and measurements: {place / 'check.json'}")
    return 1 if any(finding.severity is Severity.SEVERE for finding in found.findings) else 0


Judge = Callable[[Dataset, Sequence[SampleFacts]], LabelFaults]
"""Finds the likely faults of the masks of a dataset's ``train``, whose facts are given in this order."""


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
    facts = _read(dataset)
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
    notes += [describe_detectable(num_test)] if 0 < num_test < len(facts) else []
    notes.append(describe_detectable(len(facts), "images, all tested in folds,"))
    found += [*too_few(len(facts)), *findings(facts, duplicates), *_absent(facts, dataset.classes), *_expected(card.expected, facts)]
    found = sorted(found, key=lambda finding: list(Severity).index(finding.severity))
    return Audit(
        verdict=_verdict(dataset.name, len(facts), found),
        numbers=[("layout", listing.layout), *statistics(facts, dataset.classes)],
        findings=found,
        notes=notes,
        facts=facts,
        dataset=as_read,
    )


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


def _plain(folder: Path) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in folder.absolute().name)[:80] or "data"


def _read(dataset: Dataset) -> list[SampleFacts]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and numpy free the interpreter's lock
        jobs = [pool.submit(measure_sample, dataset, sample, "train") for sample in dataset.train]
        try:
            return [job.result() for job in progress_bar(jobs, desc=f"checking {dataset.name}", unit="image")]
        finally:
            pool.shutdown(cancel_futures=True)


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


def _verdict(name: str, num: int, found: Sequence[Finding]) -> str:
    def listed(severity: Severity) -> str:
        return ", ".join(f"{f.kind} ({len(f.images)})" for f in found if f.severity is severity)

    if [f.kind for f in found if f.severity is Severity.SEVERE] == [TOO_FEW]:
        return f"{name}: TOO FEW TO COMPARE. {next(f.message for f in found if f.kind == TOO_FEW)}"
    if severe := listed(Severity.SEVERE):
        return f"{name}: NOT FIT. {severe} would falsify a result; {num} images read."
    look = listed(Severity.LOOK)
    return f"{name}: fit to train on; {num} images read." + (f" Worth a look: {look}." if look else "")


def _lines(found: Audit) -> list[str]:
    columns, room = [Column(heading="name"), Column(heading="text", folded=True)], sentence_width()
    numbers = format_table(columns, [(f"  {name}", value) for name, value in found.numbers], room=room, headings=False)
    rows = []
    for finding in found.findings:
        more = f", … {len(finding.images) - SHOWN} more" if len(finding.images) > SHOWN else ""
        names = [name if name.isprintable() else ascii(name) for name in finding.images[:SHOWN]]
        rows += [(f"  {finding.severity.value:6}", f"{finding.kind}: {finding.message}"), ("", f"{', '.join(names)}{more}")]
    lines = format_table(columns, rows, room=room, headings=False)
    return [found.verdict, "", *numbers, "", *lines, *(f"  {note}" for note in found.notes)]


def _json(found: Audit) -> str:
    images = [
        {key: value for key, value in vars(f).items() if not isinstance(value, np.ndarray | Keypoints | PlacementFeatures)}
        for f in found.facts
    ]
    tree = {
        "verdict": found.verdict,
        "findings": [{"kind": f.kind, "severity": f.severity.value, "said": f.message, "images": f.images} for f in found.findings],
        "statistics": dict(found.numbers),
        "notes": found.notes,
        "images": images,
    }
    return json.dumps(tree, indent=1)


def _page(folder: Path, found: Audit, faults: LabelFaults | None) -> str:
    sample_of = dict(zip(found.facts, found.dataset.train, strict=True))
    shown = [block for finding in found.findings for block in _finding_blocks(found.dataset, sample_of, finding, faults)]
    understood = _gallery(
        draw_samples(found.dataset, [sample for f, sample in sample_of.items() if not f.error and f.size_px == f.mask_px])
    )
    sections = [
        Section("Findings", shown or [Text(["None."])]),
        Section("Statistics", [Facts(found.numbers)]),
        Section("How it was read", [*([Text(found.notes)] if found.notes else []), *understood]),
    ]
    title = f"Is {folder.absolute().name} fit to train on?"
    return render.to_html(Page(title=title, subtitle="cellbench check", verdict=[found.verdict], sections=sections))


def _finding_blocks(dataset: Dataset, sample_of: Mapping[SampleFacts, Sample], finding: Finding, faults: LabelFaults | None) -> list[Block]:
    if finding.kind == "meaning":  # of all masks: some of them show it
        fit = tuple(f for f in sample_of if not f.error and f.size_px == f.mask_px)
        finding = replace(finding, images=tuple(f.name for f in fit), facts=tuple((f,) for f in fit))
    if faults is not None and finding is faults.finding:
        shown = faults.first_of_each_kind(SHOWN_FAULTS)
        examples = [draw_fault(dataset, sample, fault, len(faults.models)) for sample, fault in shown]
    else:
        examples = draw_examples(dataset, sample_of, finding)
    heading = f"{finding.kind} · {_SEVERITY[finding.severity]}"
    blocks = [Heading(heading), Text([finding.message]), *_gallery(examples)]
    if finding.kind != "meaning" and len(finding.images) > len(examples):  # captions name the others
        names = ", ".join(finding.images)
        blocks.append(Text([names]) if len(names) < SHORT_CHARS else Folded(f"all {len(finding.images)} names", names))
    return blocks


def _gallery(examples: Sequence[Example]) -> list[Block]:
    pictures = [(one.caption, png_bytes(one.picture)) for one in examples]
    return [Gallery(pictures=pictures, wide=any(one.is_wide for one in examples))] if pictures else []
