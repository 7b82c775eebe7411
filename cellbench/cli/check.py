"""``check``: audits a dataset. Reads every image once, prints a verdict, and writes JSON and an HTML page with pictures of the findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cellbench.config.experiment import DataSpec
from cellbench.config.loading import data_spec
from cellbench.config.options import CheckOptions
from cellbench.config.registry import Registry
from cellbench.console import Column, format_table, say, sentence_width
from cellbench.data.audit.checks import Finding, Severity, severe_first
from cellbench.data.audit.dataset_audit import Audit, audit, verdict
from cellbench.data.audit.examples import Example, draw_examples, draw_fault, draw_samples
from cellbench.data.audit.image_statistics import SampleFacts
from cellbench.data.audit.keypoint_matching import Keypoints
from cellbench.data.audit.label_faults import LabelFaults
from cellbench.data.audit.mask_placement import PlacementFeatures
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io.images import png_bytes
from cellbench.files import make_folder, write_atomic
from cellbench.reporting import render
from cellbench.reporting.report_data import Block, Facts, Folded, Gallery, Heading, Page, Section, Text

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
        more = severe_first([*found.findings, faults.finding])
        found = replace(found, findings=more, verdict=verdict(found.dataset.name, len(found.facts), more))
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


def _plain(folder: Path) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in folder.absolute().name)[:80] or "data"


def _lines(found: Audit) -> list[str]:
    columns, room = [Column("name"), Column("text", folded=True)], sentence_width()
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
    }
    rows = ",\n".join(f"  {json.dumps(image)}" for image in images)  # a line each: with an indent, Python's slow encoder writes
    return f'{json.dumps(tree, indent=1)[:-2]},\n "images": [\n{rows}\n ]\n}}'


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
