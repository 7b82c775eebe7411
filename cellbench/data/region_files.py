"""Finds the file of regions of each image, by name: ``regions/NAME.geojson`` in a data folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cellbench.data.dataset import Sample
from cellbench.data.external_masks import files_by_key, match_images
from cellbench.data.regions import REGION_SUFFIXES, REGIONS
from cellbench.data.scan import FileWarning, Listing, files_below, is_inside, pattern_root
from cellbench.errors import CellbenchError, quoted


def match_regions(where: Path, samples: Sequence[Sample]) -> tuple[dict[Sample, Path], list[Path]]:
    """The file of each image that has one in a folder (or by a pattern) and its subfolders, and the files that belong to no image.

    Raises CellbenchError for two files of one image.
    """
    folder = pattern_root(where) or where
    files = [path for path in files_below(where, REGION_SUFFIXES)[0] if is_inside(folder, path)]
    found: dict[Sample, Path] = {}
    for sample, here in match_images(samples, files_by_key(files, folder)):
        if len(here) > 1:
            raise CellbenchError(
                f"{folder}: '{sample.name}' has {len(here)} files of regions: {quoted([path.name for path in here])}. Keep one."
            )
        if here:
            found[sample] = here[0]
    used = set(found.values())
    return found, [path for path in files if path not in used]


def add_regions(listing: Listing) -> None:
    """Limits the images of a listing to the regions of the folder ``regions/`` in it, if there is one. Raises CellbenchError."""
    folder = listing.root / REGIONS
    every = [sample for part in listing.parts.values() for sample in part]
    if folder.is_dir():
        found, spare = match_regions(folder, every)
        listing.parts = {
            name: tuple(replace(one, regions=found.get(one, one.regions)) for one in part) for name, part in listing.parts.items()
        }
        listing.reported |= set(spare)
        if spare:
            names = tuple(path.name for path in spare)
            listing.doubts.append(
                FileWarning(kind="no image", message=f"{REGIONS}: {len(spare)} files belong to no image and limit nothing", names=names)
            )
    if num := sum(one.regions is not None for part in listing.parts.values() for one in part):
        rest = f"; the other {len(every) - num} are used whole" if num < len(every) else ""
        listing.notes.append(f"regions: {num} images are limited to regions of interest: pixels outside do not count{rest}")
