"""Single cells as a table: place, size, form and mean colour of each (scikit-image's region properties), their count and density.

Lengths and areas are in pixels, or in um where the image's scale is given; positions are always in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellbench.escaping import to_csv
from cellbench.metrics.instances import Instances

_PROPERTIES = ("label", "centroid", "bbox", "area", "equivalent_diameter_area", "eccentricity", "intensity_mean")


@dataclass(frozen=True, kw_only=True)
class CellTable:
    """A table of the N cells of one image (H, W): ``rows`` under ``columns``, as they are written."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    @property
    def text(self) -> str:
        """The table as CSV."""
        return to_csv(self.columns, self.rows)


def measure_cells(
    found: Instances,
    image: np.ndarray,
    names: Sequence[str],
    um_per_px: float | None = None,
    classes: np.ndarray | None = None,
    owners: Sequence[int] = (),
) -> CellTable:
    """The table of the cells found in an image (H, W, 3) uint8 RGB; ``names`` of the classes, ``um_per_px`` the side of a pixel.

    Where some classes are parts of others (``owners``, as for :func:`cellbench.metrics.instances.merge_parts_into_objects`), ``classes`` (H, W)
    is the class map, and each part has a column with its area in the cell, 0 where the cell has none: ``nucleus_area_px``.

    ``cell`` is the number in the label image, ``x_px`` and ``y_px`` the centroid from the upper left, ``diameter`` that of a disc of the same
    area, ``eccentricity`` 0 for a disc and towards 1 for a line, ``at_edge`` 1 where the image's frame may cut the cell, ``red`` to ``blue``
    the mean colour, 0..255.
    """
    unit, side = ("px", 1.0) if um_per_px is None else ("um", um_per_px)
    columns: tuple[str, ...] = (
        "cell",
        "class",
        "x_px",
        "y_px",
        f"area_{unit}" + "2" * (unit == "um"),
        f"diameter_{unit}",
        "eccentricity",
        "at_edge",
    )
    columns += ("red", "green", "blue", *(part_column(names[k], um_per_px) for k in part_classes(owners)))
    if not found.num:  # scikit-image would return other columns
        return CellTable(columns=columns, rows=())
    from skimage.measure import regionprops_table

    props: Mapping[str, np.ndarray] = regionprops_table(found.ids, image, properties=_PROPERTIES)
    height, width = found.ids.shape
    inside = [np.bincount(found.ids[classes == k], minlength=found.num + 1) for k in part_classes(owners)]
    at_edge = (props["bbox-0"] == 0) | (props["bbox-1"] == 0) | (props["bbox-2"] == height) | (props["bbox-3"] == width)
    rows = tuple(
        (
            int(number),
            names[found.classes[number]],
            round(float(props["centroid-1"][k]), 2),
            round(float(props["centroid-0"][k]), 2),
            round(float(props["area"][k]) * side**2, 4),
            round(float(props["equivalent_diameter_area"][k]) * side, 4),
            round(float(props["eccentricity"][k]), 4),
            int(at_edge[k]),
            *(round(float(props[f"intensity_mean-{channel}"][k]), 2) for channel in range(3)),
            *(round(float(area[number]) * side**2, 4) for area in inside),
        )
        for k, number in enumerate(props["label"])
    )
    return CellTable(columns=columns, rows=rows)


def part_classes(owners: Sequence[int]) -> list[int]:
    """The classes that are parts of another class's objects."""
    return [label for label, owner in enumerate(owners) if owner != label]


def part_column(name: str, um_per_px: float | None = None) -> str:
    """The column of a part's area in each cell."""
    return f"{name}_area_{'px' if um_per_px is None else 'um2'}"


def count_by_class(
    rows: Sequence[Mapping[str, str]], names: Sequence[str], owners: Sequence[int] = (), um_per_px: float | None = None
) -> dict[str, int]:
    """Number of cells of each class from the rows of a table of cells, and for a part the number of cells with one; empty for one class.

    >>> rows = [{"class": "cytoplasm", "nucleus_area_px": "90.0"}, {"class": "cytoplasm", "nucleus_area_px": "0.0"}]
    >>> count_by_class(rows, ["background", "cytoplasm", "nucleus"], (0, 1, 1))
    {'cytoplasm': 2, 'nucleus': 1}
    """
    if len(names) < 3:
        return {}
    parts = part_classes(owners)
    return {
        name: sum(float(row[part_column(name, um_per_px)]) > 0 if k in parts else row["class"] == name for row in rows)
        for k, name in enumerate(names)
        if k
    }


def density(num: int, area_px: int, um_per_px: float | None = None) -> float:
    """Cells in a megapixel, or in a square millimetre where the side of a pixel is known.

    >>> density(30, 2_000_000), density(30, 2_000_000, 0.5)
    (15.0, 60.0)
    """
    return num / (area_px / 1e6 if um_per_px is None else area_px * um_per_px**2 / 1e6)
