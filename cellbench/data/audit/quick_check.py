"""The severe findings of ``check`` from a sample of the images, for which ``grid`` and ``search`` refuse to train.

As many images as hold 40 megapixels are measured (all of a small set, runs of neighbours of a large one). All checks apply to them, and
identical files in two splits are searched among all images. Near-duplicates and crops are not: comparing them takes longer. The result is
cached by the digest of the data.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from cellbench.data.audit.checks import TOO_FEW, DuplicatePairs, Finding, Severity, findings, too_few
from cellbench.data.audit.image_statistics import measure_sample
from cellbench.data.audit.mask_placement import runs_of_neighbours
from cellbench.data.dataset import SPLITS, Dataset, Sample
from cellbench.data.progress import map_files
from cellbench.errors import CellbenchError, quote_name
from cellbench.files import cache_dir, text_digest, write_atomic

MOST_PX = 40_000_000
_VERSION = 4
"""Increased when findings change."""


def require_fit(dataset: Dataset, unfit: bool, say: Callable[[str], None], *, compares: bool = True) -> None:
    """Raises CellbenchError for data that ``check`` calls not fit; with ``unfit``, says so instead.

    ``compares``: whether models are to be compared on it; then images that are too few for that are named, and nothing more.
    ``dataset`` is validated (its digest known).
    """
    if dataset.drawn:
        return
    num = sum(len(dataset.samples(split)) for split in SPLITS)
    for one in too_few(num) if compares and not dataset.limited else []:
        say(f"Note: {TOO_FEW} to compare. {one.message}")
    lines = _faults(dataset)
    if lines and not unfit:
        more = f" {len(lines) - 1} more kind{'s' * (len(lines) > 2)} of fault." if len(lines) > 1 else ""
        card = "" if dataset.name == dataset.root.absolute().name else f" It was read as the card '{dataset.name}' says."
        raise CellbenchError(
            f"{dataset.root}: {lines[0]}{more}{card} `cellbench check {shlex.quote(str(dataset.root))}` shows all; --unfit trains nevertheless."
        )
    for line in lines:
        say(f"Warning: {line}")


def _faults(dataset: Dataset) -> list[str]:
    place = cache_dir() / "checked" / f"{text_digest(f'{_VERSION} {dataset.digest}', 24)}.json"
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: check again
        known = json.loads(place.read_text(encoding="utf-8"))
        if isinstance(known, list) and all(isinstance(line, str) for line in known):
            return known
    home = {sample: split for split in SPLITS for sample in dataset.samples(split)}
    some = _sampled(sorted(home, key=lambda sample: (str(sample.image), sample.name)))
    facts = map_files(
        lambda sample: measure_sample(dataset, sample, home[sample], with_keypoints=False), some, f"checking {dataset.name}, once"
    )
    found = [*(one for one in findings(facts, DuplicatePairs()) if one.severity is Severity.SEVERE), *_leaks(dataset)]
    part = f" (of {len(some)} of the {len(home)} images)" if len(some) < len(home) else ""
    lines = [
        f"NOT FIT to train on: {one.kind} ({len(one.images)}, such as {quote_name(one.images[0])}): {one.message}{part}" for one in found
    ]
    with contextlib.suppress(CellbenchError):  # only a cache: a full disk must not stop a run
        write_atomic(place, json.dumps(lines))
    return lines


def _sampled(samples: list[Sample]) -> list[Sample]:
    """As many as hold ``MOST_PX``, at least 12."""
    area_px = float(np.mean([height * width for height, width in (sample.size_px for sample in samples)])) or 1.0
    most = max(12, int(MOST_PX / area_px))
    return runs_of_neighbours(samples, most)


def _leaks(dataset: Dataset) -> list[Finding]:
    where: dict[str, set[str]] = defaultdict(set)
    names: dict[str, str] = {}
    for split in SPLITS:
        for sample in dataset.samples(split):
            where[sample.digest].add(split)
            names.setdefault(sample.digest, sample.name)
    twice = tuple(names[digest] for digest, splits in where.items() if len(splits) > 1)
    message = "The same image lies in two splits. Remove one, or split again with data.group=near-duplicates."
    return [Finding(kind="leak: same", severity=Severity.SEVERE, message=message, images=twice)] if twice else []
