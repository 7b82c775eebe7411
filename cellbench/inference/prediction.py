"""Writes masks of images and folders of images: names the files, finds existing ones, and writes the rest.

An output folder holds the masks of one run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cellbench.config.run import NUMERICS_VERSION
from cellbench.console import progress_bar
from cellbench.data.io import images
from cellbench.data.io.decode import printable_path
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.io.intensity import IntensityScaling, Note
from cellbench.data.io.metadata import PixelSize
from cellbench.data.scan import IgnoredFile, count_reasons, files_below, pattern_root
from cellbench.errors import CellbenchError, first_names
from cellbench.files import case_folded, file_name, text_digest
from cellbench.inference.pipeline import FailedImage
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.writers import ENDINGS, OutputFormats, OutputPaths, PredictionWriter, find_masks, output_path
from cellbench.metrics.training_features import FAR, Trust

MOST_PX = 100_000_000
"""Size of the largest image whose cells are separated: its whole mask is in memory then, with some 50 bytes a pixel."""
MOST_BYTES = 255 - max(map(len, ENDINGS))
"""Of a mask's name without ``.png``: file systems take 255 bytes."""


def find_images(places: Sequence[Path], out: Path) -> tuple[list[tuple[Path, Path]], list[IgnoredFile]]:
    """Each image of files, folders and patterns, with the path of its mask below ``out``, without an ending; and what else lies in the folders.

    Folders are searched with their subfolders, links to folders too. Names are those of :func:`mask_stems`. Raises CellbenchError.
    """
    found: dict[Path, Path] = {}
    ignored: list[IgnoredFile] = []
    for place in places:
        root = place if place.is_dir() else pattern_root(place)
        if root is not None:
            inside, other, seen = files_below(place)
            if seen & {out.resolve(), *out.resolve().parents}:
                raise CellbenchError(
                    f"--out {out}: lies in {root}, so that masks would be taken for images next time. Name a folder outside."
                )
            if not inside:
                there = f" Found: {count_reasons(other)}." if other else ""
                raise CellbenchError(f"{place}: holds no image. Expected files that end in {', '.join(sorted(EXTENSIONS))}.{there}")
            ignored += other
            found |= {path: path.relative_to(root) for path in inside}
        elif place.exists():
            if place.resolve().parent == out.resolve():
                raise CellbenchError(f"--out {out}: is the folder of {place.name}, which its mask might replace. Name another folder.")
            found[place] = Path(place.name)
        else:
            raise CellbenchError(f"{place}: there is no such file or folder.")
    return [(path, out / name) for path, name in mask_stems(found).items()], ignored


def mask_stems(names: Mapping[Path, Path]) -> dict[Path, Path]:
    """For each image, with its path below the folder given, the path of its mask without ``.png``; no two share a file on any file system.

    It is the image's own path without its extension; with it where two images differ in nothing else, or where it ends like a file that lies
    beside a mask. Names that still differ only in case or Unicode form, or are too long for an ending, get a hash. Raises CellbenchError.
    """
    beside_masks = tuple(ending.removesuffix(".png") for ending in ENDINGS if ending.endswith(".png"))

    def counts(all_names: Iterable[Path]) -> Counter[str]:
        return Counter(case_folded(name.as_posix()) for name in all_names)

    plain = counts(name.with_suffix("") for name in names.values())
    chosen = {
        path: name
        if plain[case_folded(name.with_suffix("").as_posix())] > 1 or case_folded(name.stem).endswith(beside_masks)
        else name.with_suffix("")
        for path, name in names.items()
    }
    alike = counts(chosen.values())
    out: dict[Path, Path] = {}
    for path, name in chosen.items():
        if alike[case_folded(name.as_posix())] > 1:
            mark = text_digest(str(names[path]), 8)
            name = name.with_name(f"{name.name}~{mark}")
        if len(os.fsencode(name.name)) > MOST_BYTES:
            name = name.with_name(file_name(name.name))
        out[path] = name
    if twice := [name for name, num in Counter(out.values()).items() if num > 1]:
        both = [str(path) for path, name in out.items() if name == twice[0]]
        raise CellbenchError(
            f"{both[0]} and {both[1]} would both become {twice[0]}.png. Name the folder that holds both, or call twice with two --out."
        )
    return out


def output_paths(
    segmenter: Segmenter, found: Sequence[tuple[Path, Path]], out: Path, sizes: Mapping[Path, PixelSize], um_per_px: float | None = None
) -> list[OutputPaths]:
    """The images with what is written inside their masks. ``um_per_px`` takes the place of what the files state (``sizes``)."""
    provenance = provenance_of(segmenter)
    targets = []
    for image, stem in found:
        status = image.stat()
        side = um_per_px if um_per_px is not None else sizes[image].side_um if image in sizes else None
        facts = {"image": image.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "place": _relative(image, out)}
        targets.append(
            OutputPaths(image=image, stem=stem, facts={**provenance, **facts}, um_per_px=None if side is None else round(side, 6))
        )
    return targets


def provenance_of(segmenter: Segmenter) -> dict[str, object]:
    """The metadata that all masks of one run share."""
    trained = segmenter.trained
    facts: dict[str, object] = {
        "run": trained.fingerprint or trained.name,
        "model": trained.name,
        "classes": list(segmenter.class_names),
        "numerics": NUMERICS_VERSION,
    }
    if segmenter.skip_empty:
        facts["skip_empty"] = True
    reading = trained.preparation.reading
    # As JSON gives it back, where a tuple is a list.
    return facts | ({"reading": json.loads(json.dumps(reading.to_dict()))} if reading != IntensityScaling() else {})


def _relative(image: Path, out: Path) -> str:
    """Where the image lies, from the folder of the masks: the same when both are moved."""
    try:
        return Path(os.path.relpath(image.resolve(), out.resolve())).as_posix()
    except ValueError:  # another drive
        return image.resolve().as_posix()


def refuse_mixed_outputs(targets: Sequence[OutputPaths], provenance: Mapping[str, object], wanted: OutputFormats, out: Path) -> None:
    """Raises CellbenchError if the folder would mix runs or separation settings, or a mask would replace that of another image."""
    by_stem = {target.stem: target for target in targets}
    for stem, facts in find_masks(out).items():
        mask = output_path(stem, ".png")
        if any(facts.get(key) != provenance.get(key) for key in ("run", "classes", "numerics", "reading", "skip_empty")):
            raise CellbenchError(
                f"--out {out}: holds the mask {mask.relative_to(out)} that another run ('{facts.get('model')}'), another range, another version of "
                "cellbench, or a call with or without --skip-empty made, and a folder's tables are of one run. Name another --out."
            )
        target = by_stem.get(stem)
        if target is not None and not target.is_of(facts) and facts.get("place") != target.facts["place"]:
            raise CellbenchError(
                f"{target.image}: {mask} is the mask of another image of this name ({facts.get('place')}, from there). Name another --out, or the "
                "folder that holds both images."
            )
        how = facts.get("cells")
        if target is None and wanted.cells and how and not replace(wanted, instances=False).agrees(how):
            before = ", ".join(f"{name} {value}" for name, value in how.items() if name != "um_per_px")
            raise CellbenchError(
                f"--out {out}: the cells of {mask.relative_to(out)} were separated with other settings ({before}), and a folder's tables are of "
                "one setting. Name another --out."
            )


def why_too_large(target: OutputPaths) -> CellbenchError | None:
    """Why an image's cells cannot be separated; None where they can, or where reading the file will say what is wrong with it."""
    try:
        height, width = images.image_size(target.image)
    except CellbenchError:
        return None
    if height * width <= MOST_PX:
        return None
    return CellbenchError(
        f"{target.image}: {width} x {height} px; --instances, --geojson and --coco take up to {MOST_PX // 10**6} megapixels. Cut the image, or leave "
        "these options out."
    )


def write_masks(
    segmenter: Segmenter, targets: Sequence[OutputPaths], wanted: OutputFormats, warn: Callable[[str], None]
) -> tuple[dict[OutputPaths, CellbenchError], list[tuple[str, Note]], dict[str, Trust]]:
    """Writes the masks and what is wanted beside them. Images that fail are skipped, and ``warn`` gets the reason at once.

    Returns the skipped images with the reasons; notes on how the others were read, and what is known of their masks, by their files.
    """
    skipped: dict[OutputPaths, CellbenchError] = {}
    notes: list[tuple[str, Note]] = []
    known: dict[str, Trust] = {}
    files: PredictionWriter | None = None

    with progress_bar(total=len(targets), unit="image", desc="segmenting") as bar:
        try:
            for event in segmenter.stream(target.image for target in targets):
                target = targets[event.number]
                if isinstance(event, FailedImage):
                    skipped[target] = event.error
                    warn(f"skipped: {event.error}")
                    if files is not None:
                        files.__exit__()
                    files = None
                    bar.update()
                    continue
                if files is None:
                    files = PredictionWriter(target, formats_of(wanted, target), event.source.size_px, segmenter.class_names)
                files.add(event)
                # One bar over all images, also where there is a single large one.
                bar.update(len(event.classes) / event.source.size_px[0])
                if event.last:
                    notes += [(printable_path(target.image), note) for note in event.source.notes]
                    known[printable_path(target.image)] = event.trust
                    files.keep()
                    files = None
        finally:
            if files is not None:
                files.__exit__()
    return skipped, notes, known


def describe_trust(known: Mapping[str, Trust]) -> list[str]:
    """Sentences on images that do not look like the training images; a single one where all do."""
    distances = {name: trust.distance for name, trust in known.items() if trust.distance is not None}
    far = {name: f"{name} ({distance:.1f})" for name, distance in sorted(distances.items(), key=lambda one: -one[1]) if distance > FAR}
    unusual = [
        f"{name} ({distance:.1f})"
        for name, distance in sorted(distances.items(), key=lambda one: -one[1])
        if distance > 1 and name not in far
    ]
    lines = []
    if far:
        lines.append(
            f"{len(far)} of {len(distances)} images are unlike the training images, so their masks may be wrong (distance above {FAR:g}; "
            f"images of the same set are at 1 or less): {first_names(list(far.values()))}."
        )
    if unusual:
        lines.append(f"{len(unusual)} of {len(distances)} images look unusual (distance 1 to {FAR:g}): {first_names(unusual)}.")
    return lines


def describe_expected_dice(known: Mapping[str, Trust]) -> list[str]:
    """A sentence on the Dice to expect of the masks; none where no error can be stated."""
    estimates = {name: trust.dice for name, trust in known.items() if trust.dice is not None}
    errors = [trust.dice_error for trust in known.values() if trust.dice_error is not None]
    if not estimates or not errors:
        return []
    low = min(estimates, key=lambda name: estimates[name])
    lowest = f", lowest {estimates[low]:.2f} ({low})" if len(estimates) > 1 else ""
    of = f" in the mean of {len(estimates)} images" if len(estimates) > 1 else ""
    return [
        f"Expected Dice by the probabilities: {np.mean(list(estimates.values())):.2f}{of}{lowest}; error of one image ± {errors[0]:.2f}."
    ]


def formats_of(wanted: OutputFormats, target: OutputPaths) -> OutputFormats:
    """The output formats of one image, with its own pixel size."""
    return replace(wanted, um_per_px=target.um_per_px)
