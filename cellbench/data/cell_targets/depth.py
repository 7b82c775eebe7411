"""The depth of a pixel in its cell, and the border between two cells.

``distance``: a pixel's distance to the edge of its cell, divided by the maximum in that cell, so that every cell has one peak of height 1,
whatever its size (Naylor et al. 2019, doi 10.1109/TMI.2018.2865709). ``border``: pixels within ``BORDER_PX`` of two cells (Caicedo et al. 2019,
doi 10.1002/cyto.a.23863). Each is one more output channel and one more term of the loss, binary cross-entropy. Both predictions combine to
one field, the *boundary depth* ``distance * (1 - border)``, which replaces the mask's own distances in the watershed
(``cellbench.metrics.separation``).

Letters: B tiles, H x W pixels, A channels.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from cellbench.data.cell_targets.base import FULL, CellTarget, ChannelTurns, as_share
from cellbench.metrics.instances import Instances, near_two_cells

BORDER_PX = 2
"""Half the width of a border: between adjacent cells a border has four pixels, of which masks leave out none, one or two."""


class Depth(CellTarget):
    """The distance to the edge of the cell, and with ``border`` also the borders between cells."""

    num_fields, field_turns, method = 1, ChannelTurns.none(1), "watershed"
    fields_meaning = "the depth of a pixel in its cell, 1 in the middle"

    def __init__(self, *, border: bool) -> None:
        self.channels = ("border", "distance") if border else ("distance",)
        self.turns = ChannelTurns.none(len(self.channels))

    def encode(self, cells: Instances, scale: tuple[float, float]) -> np.ndarray:
        """Borders and distances in framed pixels."""
        made = {"border": lambda: _border(cells.ids), "distance": lambda: edge_distance(cells.ids, cells.ignored)}
        return np.stack([made[channel]() for channel in self.channels], axis=-1)

    def loss(self, logits_BAHW: Tensor, truth_BHWA: Tensor, kept_BHW: Tensor | None) -> Tensor:
        """Binary cross-entropy of each channel, averaged over all pixels, then summed."""
        wanted = as_share(truth_BHWA)
        if kept_BHW is not None:
            if not kept_BHW.any():
                return 0 * logits_BAHW.float().sum()
            logits_BAHW, wanted = (x.movedim(1, -1)[kept_BHW] for x in (logits_BAHW, wanted))
        return F.binary_cross_entropy_with_logits(logits_BAHW.float(), wanted) * len(self.channels)

    def fields(self, logits_BAHW: Tensor) -> Tensor:
        """The depth of each pixel in its cell: high in the middle, low at the edge and between cells."""
        found = logits_BAHW.float().sigmoid()
        return found[:, 1:] * (1 - found[:, :1]) if len(self.channels) > 1 else found


def _border(ids: np.ndarray) -> np.ndarray:
    return np.where(near_two_cells(ids, BORDER_PX), FULL, 0).astype(np.uint8)


def edge_distance(ids: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    """A pixel's distance to the edge of its cell, divided by the maximum in the cell, (H, W) uint8."""
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
