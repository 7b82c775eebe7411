"""``predict``: segments images and folders of images with a trained run. The same command resumes after an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cellbench.cli.runs import open_run
from cellbench.config.options import PredictOptions
from cellbench.console import say, say_lines, warn
from cellbench.data.dataset import Sample
from cellbench.data.io.images import image_size
from cellbench.data.io.intensity import format_notes
from cellbench.data.region_files import match_regions
from cellbench.data.regions import region_masks
from cellbench.data.scan import count_reasons, pattern_root
from cellbench.errors import CellbenchError, first_names
from cellbench.files import make_folder
from cellbench.inference.inputs import (
    describe_magnification,
    describe_pixel_sizes,
    names_by_reason,
    parse_range,
    stated_pixel_sizes,
    with_range,
)
from cellbench.inference.prediction import (
    describe_expected_dice,
    describe_trust,
    find_images,
    formats_of,
    output_paths,
    provenance_of,
    refuse_mixed_outputs,
    why_too_large,
    write_masks,
)
from cellbench.inference.tables import write_tables
from cellbench.inference.writers import OutputFormats, keep_regions, remove_partial_files


def predict(options: PredictOptions) -> int:
    """Writes the masks. Returns exit code 0, or 1 if an image was skipped or a file of a folder ignored."""
    _check(options)
    out, um_per_px = options.out, options.um_per_px
    black_white = parse_range(options.range) if options.range is not None else None
    found, ignored = find_images(options.images, out)  # first, because opening the run takes seconds
    sizes = stated_pixel_sizes(path for path, _ in found)
    segmenter = open_run(options)
    if black_white is not None:
        segmenter.trained, lines = with_range(segmenter.trained, black_white)
        say_lines(lines)
    separation = segmenter.trained.separation
    if options.min_cell_px is not None:
        separation = replace(separation, min_area_px=options.min_cell_px)
    wanted = OutputFormats(
        probability=options.probability,
        overlay=options.overlay,
        geojson=options.geojson or options.coco,
        instances=options.instances,
        separation=separation,
    )
    targets = output_paths(segmenter, found, out, sizes, um_per_px)
    regions = find_regions(options.regions, [target.image for target in targets]) if options.regions is not None else {}
    remove_partial_files(make_folder(out))
    refuse_mixed_outputs(targets, provenance_of(segmenter), wanted, out)
    for target in targets:
        if target.image in regions:
            keep_regions(target.stem, regions[target.image])
    todo = [target for target in targets if not target.done(formats_of(wanted, target))]
    done = f", {len(targets) - len(todo)} are done already" if len(todo) < len(targets) else ""
    say(f"{segmenter.trained.name}: {len(todo)} images on {segmenter.machine.name}{done}.")
    say_lines(describe_pixel_sizes(sizes, len(targets), um_per_px, options.instances))
    say_lines(describe_magnification(sizes, segmenter.trained, um_per_px))
    for reason, paths in names_by_reason(ignored).items():
        warn(f"ignored, {reason}: {first_names(paths)}")
    skipped = {target: error for target in todo if wanted.cells and (error := why_too_large(target)) is not None}
    for error in skipped.values():
        warn(f"skipped: {error}")
    try:
        more, notes, known = write_masks(segmenter, [target for target in todo if target not in skipped], wanted, warn)
        skipped |= more
        for line in (*format_notes(notes), *describe_trust(known)):
            warn(line)
        say_lines(describe_expected_dice(known))
    finally:  # also after Ctrl-C: the tables list all masks in the folder
        num_small = write_tables(out, {target.stem for target in skipped}, wanted, options.coco, segmenter.class_names, say)
    parts = [f"{out}: {len(targets) - len(skipped)} masks"]
    if num_small:
        parts.append(f"{num_small:,} regions below {separation.min_area_px} px are not counted as cells (--min-cell-px sets the limit)")
    if skipped:
        parts.append(f"{len(skipped)} images were skipped")
    if ignored:
        parts.append(f"{len(ignored)} files of the folders were ignored ({count_reasons(ignored)})")
    say("; ".join(parts) + ".")
    return 1 if skipped or ignored else 0


def find_regions(where: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """The file of regions of each image that has one, of a folder or of a file for one image; says which have none. Raises CellbenchError."""
    spare: list[Path] = []
    if where.is_file() and len(images) == 1:
        found = {images[0]: where}
    elif where.is_dir() or pattern_root(where) is not None:
        samples = [Sample(name=path.name, image=path, mask=path) for path in images]
        matched, spare = match_regions(where, samples)
        found = {sample.image: file for sample, file in matched.items()}
    else:
        what = f"one file for {len(images)} images; name a folder of NAME.geojson" if where.is_file() else "there is no such file or folder"
        raise CellbenchError(f"--regions {where}: {what}.")
    if not found:
        raise CellbenchError(
            f"--regions {where}: holds no regions of these images. Expected {images[0].stem}.geojson, as QuPath exports it."
        )
    for image, file in found.items():
        region_masks(file, image_size(image))  # refuses what cannot be of this image, before it is segmented
    if len(found) < len(images):
        say(
            f"regions: of {len(found)} of {len(images)} images; the others are counted whole: {first_names([p.name for p in images if p not in found])}."
        )
    if spare:
        warn(f"regions: {len(spare)} files belong to none of these images: {first_names([path.name for path in spare])}.")
    return found


def _check(options: PredictOptions) -> None:
    if options.um_per_px is not None and not (options.instances and 0 < options.um_per_px < 1000):
        raise CellbenchError(
            f"--um-per-px {options.um_per_px:g}: a pixel size in um, above 0, for the tables that --instances writes. Give both options."
        )
    if options.regions is not None and not options.instances:
        raise CellbenchError(
            f"--regions {options.regions}: cells are counted in regions, in the tables that --instances writes. Give both options."
        )
    if options.min_cell_px is not None and options.min_cell_px < 1:
        raise CellbenchError(f"--min-cell-px {options.min_cell_px}: the smallest area of a cell in px, 1 or more.")
