"""Regions of interest: outlines in a file of QuPath (GeoJSON), ImageJ or LabelMe, to which training, scoring and counting are limited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellbench.data.io.decode import printable_path
from cellbench.data.outline_files import Outline, fill_regions, read_tool_mask
from cellbench.errors import CellbenchError
from cellbench.metrics.pixel import IGNORE

REGIONS = "regions"
"""A folder of outlines that are no cells (:mod:`region_files`)."""
REGION_SUFFIXES = (".geojson", ".json", ".roi", ".zip")


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """A region of one image, under a name that no other of its regions has."""

    name: str
    outline: Outline

    def holds(self, xy: np.ndarray) -> np.ndarray:
        """Whether each point (N, 2), x and y in px, is inside, bool (N,)."""
        if self.outline.pixels is not None:
            x, y = (np.floor(xy) - self.outline.corner_px).T.astype(int)
            height, width = self.outline.pixels.shape
            known = (x >= 0) & (y >= 0) & (x < width) & (y < height)
            return known & self.outline.pixels[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
        inside = np.zeros(len(xy), bool)
        x, y = xy.T
        # Holes and parts are rings: a point is inside where a ray from it crosses an odd number of their sides. Of two regions with a common
        # side, one holds a point on that side, so no cell is counted twice or lost.
        for ring in self.outline.rings:
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                if y0 != y1:
                    inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return inside

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right."""
        if self.outline.pixels is not None:
            (x, y), (height, width) = self.outline.corner_px, self.outline.pixels.shape
            return y, x, y + height, x + width
        points = np.concatenate(self.outline.rings)
        (left, top), (right, bottom) = np.floor(points.min(0)).astype(int).tolist(), np.ceil(points.max(0)).astype(int).tolist()
        return top, left, bottom, right


def read_regions(path: Path) -> tuple[Region, ...]:
    """The regions of a file, in its order. Where it marks cells too, its annotations (QuPath) or its class ``Region*`` are the regions.

    Raises CellbenchError that names the file.
    """
    found = read_tool_mask(path)
    outlines = found.regions or found.outlines
    if not outlines:
        raise CellbenchError(f"{printable_path(path)}: marks no region. Draw one outline or more, or remove the file.")
    names = [one.name or one.label or "region" for one in outlines]
    times, seen = Counter(names), Counter[str]()
    out = []
    for name, one in zip(names, outlines, strict=True):
        seen[name] += 1
        out.append(Region(name=f"{name} {seen[name]}" if times[name] > 1 else name, outline=one))
    return tuple(out)


def region_masks(path: Path, size_px: tuple[int, int]) -> list[tuple[Region, np.ndarray]]:
    """Each region of a file with its pixels in an image (H, W). Raises CellbenchError where it is of another image."""
    shown = printable_path(path)
    read_tool_mask(path).check_size(size_px, shown)
    regions = read_regions(path)
    return list(zip(regions, fill_regions([one.outline for one in regions], size_px, shown), strict=True))


def within_regions(classes: np.ndarray, path: Path | None) -> np.ndarray:
    """A class map (H, W) whose pixels outside of the regions of a file are ``IGNORE``; None: all pixels stay."""
    if path is None:
        return classes
    inside = np.logical_or.reduce([mask for _, mask in region_masks(path, (classes.shape[0], classes.shape[1]))])
    return np.where(inside, classes, np.uint8(IGNORE))


def regions_of(path: Path | None) -> Sequence[Region]:
    """The regions of a file; none for no file."""
    return () if path is None else read_regions(path)
