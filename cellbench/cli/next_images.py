"""``next``: ranks unlabelled images by what labelling them would teach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cellbench import startup
from cellbench.config.options import NextOptions
from cellbench.config.registry import Registry
from cellbench.console import Column, format_table, number_columns, progress_bar, say, say_lines, warn
from cellbench.data.dataset import SPLITS, Sample
from cellbench.data.layouts import scan_folder
from cellbench.data.scan import files_below
from cellbench.errors import CellbenchError, quantity
from cellbench.escaping import to_csv
from cellbench.files import make_folder, write_atomic
from cellbench.hardware import detect_hardware
from cellbench.inference.committee import Committee
from cellbench.inference.labelling_order import Ranked, mask_spread, rank_images
from cellbench.metrics.training_features import Descriptor
from cellbench.models.backbones.weights import weights_folder
from cellbench.tracking.tracker import open_experiment

SHOWN = 15
"""Images in the terminal; the file lists all."""


def next_images(options: NextOptions) -> int:
    """Prints the first images and writes all to ``next.csv``. Returns exit code 0, or 1 if an image could not be read."""
    samples = find_unlabelled(options.data, Registry(options.registry))
    startup.configure_threads(options.device)
    tracker, machine = open_experiment(options.experiment), detect_hardware(options.device, options.precision)
    committee = Committee(tracker, Registry(options.registry), machine, weights_folder(options.weights), warn, trained=True)
    new = committee.find_new(samples)
    if left := len(samples) - len(new):
        say(f"{left} of {len(samples)} images are training images of '{tracker.name}', or parts or copies of them, and are left out.")
    if not new:
        raise CellbenchError(
            f"{options.data}: all of its images were trained on, so there is nothing to label. Name a folder of new images."
        )
    found = committee.predict_new(new)
    runs = f"{quantity(len(found.models), 'run')} of {', '.join(dict.fromkeys(found.models))}"
    say(f"{len(new)} images, ranked by {runs} ('{tracker.name}'), on {machine.name}.")
    kept: list[Sample] = []
    spreads: list[float | None] = []
    descriptors: list[Descriptor | None] = []
    num_failed = 0
    for sample, predictions in progress_bar(found.predictions, total=len(new), desc="predicting", unit="image"):
        if isinstance(predictions, CellbenchError):
            warn(f"skipped: {predictions}")
            num_failed += 1
            continue
        kept.append(sample)
        spreads.append(mask_spread([one.mask for one in predictions]))
        descriptors.append(None if found.described_by is None else predictions[found.described_by].trust.descriptor)
    ranked = rank_images(spreads, descriptors, found.training_features)
    if len(found.models) == 1:
        say("With one run there is no disagreement: images are ranked by their distance from the labelled ones alone.")
    say_lines(_table(kept, ranked))
    place = make_folder(options.out or Path("reports") / f"next-{options.data.absolute().name}") / "next.csv"
    write_atomic(place, _csv(kept, ranked))
    say(f"all {len(ranked)} images in this order: {place}")
    return 1 if num_failed else 0


def find_unlabelled(folder: Path, registry: Registry) -> list[Sample]:
    """The images of a folder that have no mask, named by their path in it. Raises CellbenchError if there are none."""
    if not folder.is_dir():
        raise CellbenchError(f"{folder}: there is no such folder. Name one of images without masks.")
    listing = scan_folder(registry.dataset("folder"), folder, unlabelled=True)
    samples = [sample for part in SPLITS for sample in listing.parts.get(part, ())]
    if listing.labelled:
        used = {path for sample in samples for path in (sample.image, sample.mask)}
        masks = {sample.mask.parent for sample in samples} - {sample.image.parent for sample in samples}
        paths = [path for path in files_below(listing.root)[0] if path not in used and path.parent not in masks]
        if not paths:
            raise CellbenchError(f"{folder}: each of its {len(samples)} images has a mask. Name a folder of images without masks.")
        example = samples[0]
        samples = [replace(example, name=path.name, image=path, mask=path, truth=None) for path in paths]
    return [replace(sample, name=sample.image.relative_to(listing.root).as_posix()) for sample in samples]


def _table(samples: Sequence[Sample], ranked: Sequence[Ranked]) -> list[str]:
    columns = [*number_columns(""), Column("image", cut=True), *number_columns("score", "spread", "distance")]
    rows = [
        (str(k), samples[one.number].name, f"{one.score:.3f}", _number(one.spread), _number(one.distance))
        for k, one in enumerate(ranked[:SHOWN], 1)
    ]
    return ["", *format_table(columns, rows), *([f"… {len(ranked) - SHOWN} more"] if len(ranked) > SHOWN else []), ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _csv(samples: Sequence[Sample], ranked: Sequence[Ranked]) -> str:
    rows = [
        (k, samples[one.number].name, f"{one.score:.6f}", _number(one.spread), _number(one.distance)) for k, one in enumerate(ranked, 1)
    ]
    return to_csv(["rank", "image", "score", "spread", "distance"], rows)
