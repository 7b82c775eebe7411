"""Auxiliary targets for separating touching cells: the depth of a pixel in its cell, and the border between two cells.

``distance``: a pixel's distance to the edge of its cell, divided by the maximum in that cell, so that every cell has one peak of height 1,
whatever its size (Naylor et al. 2019, doi 10.1109/TMI.2018.2865709). ``border``: pixels within ``BORDER_PX`` of two cells (Caicedo et al. 2019,
doi 10.1002/cyto.a.23863). Each is one more output channel and one more term of the loss, binary cross-entropy. Both predictions combine to
one *boundary depth*, ``distance * (1 - border)``, which replaces the mask's own distances in the watershed
(``cellbench.metrics.separation``).

Letters: B tiles, H x W pixels, A auxiliary targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from torch import Tensor

from cellbench.metrics.instances import reference_instances

TARGETS = ("border", "distance")
"""In the order of the channels of :func:`make_targets`."""
BORDER_PX = 2
"""Half the width of a border: between adjacent cells a border has four pixels, of which masks leave out none, one or two."""
FULL = 255


def requested(targets: str) -> tuple[str, ...]:
    """The targets of a run's ``targets``, in the order of their output channels.

    >>> requested("cell+border+distance")
    ('border', 'distance')
    """
    return tuple(target for target in TARGETS if target in targets.split("+"))


def make_targets(classes: np.ndarray, ids: np.ndarray | None, min_area_px: int | None = None, *, owners: Sequence[int] = ()) -> np.ndarray:
    """The truth of both targets (H, W, 2) uint8, 0..255, of a class map (H, W) uint8.

    Cells are those numbered in ``ids``, if given, else connected regions of at least ``min_area_px``. ``owners``: which classes are
    parts of which, as for :func:`cellbench.metrics.instances.merge_parts_into_objects`.
    """
    cells = reference_instances(classes, ids, min_area_px, owners=owners)[0]
    return np.stack([_border(cells.ids), _distance(cells.ids, cells.ignored)], axis=-1)


def _border(ids: np.ndarray) -> np.ndarray:
    side = 2 * BORDER_PX + 1
    most = ndimage.maximum_filter(ids, side, mode="nearest")
    far = np.iinfo(ids.dtype).max
    least = ndimage.minimum_filter(np.where(ids == 0, far, ids), side, mode="nearest")
    return np.where((most > 0) & (most != least), FULL, 0).astype(np.uint8)


def _distance(ids: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    # Edges are next to background and to other cells, but not at the image's frame or next to ignored pixels.
    inner, cells = ids > 0, ids
    if ignored is not None:
        inner |= ignored
        ids = np.where(ignored, -1, ids)
    for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        other = ids[first] != ids[second]
        if ignored is not None:
            other &= (ids[first] >= 0) & (ids[second] >= 0)
        inner[first] &= ~other
        inner[second] &= ~other
    # A pixel at an edge has depth 0.5. If a cell fills the image, there is no edge.
    deep = (ndimage.distance_transform_edt(inner) if not inner.all() else np.ones(ids.shape)) + 0.5
    highest = np.concatenate([[1.0], ndimage.maximum(deep, cells, np.arange(1, int(cells.max(initial=0)) + 1))])
    return np.where(cells > 0, np.rint(FULL * deep / highest[cells]), 0).astype(np.uint8)


def boundary_depth(logits_BAHW: Tensor, which: tuple[str, ...]) -> Tensor:
    """Depth of each pixel in its cell (B, 1, H, W), float32, 0..1: high in the middle, low at the edge and between cells."""
    found = logits_BAHW.float().sigmoid()
    height = found[:, [which.index("distance")]]
    return height * (1 - found[:, [which.index("border")]]) if "border" in which else height
