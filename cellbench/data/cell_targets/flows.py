"""Vectors that lead each pixel to the centre of its cell: the flows of Cellpose, and the offsets of HoVer-Net.

``flows``: unit vectors against the flow of heat that spreads from the centre inside the cell, whatever the cell's shape (Stringer et al. 2021,
doi 10.1038/s41592-020-01018-x). ``hv``: the offset from the cell's centre of mass, from -1 to 1 in each direction (Graham et al. 2019,
doi 10.1016/j.media.2019.101563). The loss counts in cells only: outside of them there is no centre, and the classes say so.

Letters: N cells, S x S a cell's square, B tiles, H x W pixels.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from scipy import ndimage
from torch import Tensor

from cellbench.data.cell_targets.base import FULL, CellTarget, ChannelTurns, as_share, stored, weighted_cross_entropy
from cellbench.metrics.instances import Instances

LARGEST_PX = 32
"""Side of the squares in which heat is spread; larger cells are shrunk to it, since their flows are smooth."""
NARROWEST_PX = 4
"""Cells are shrunk less where they would become narrower: along a rod of one pixel no flow leads to its middle line."""


class _Vectors(CellTarget):
    """A vector for each pixel of a cell."""

    channels = ("down", "right")
    num_fields, turns, field_turns = 2, ChannelTurns.of_vector(), ChannelTurns.of_vector()

    @abstractmethod
    def vectors(self, cells: Instances) -> np.ndarray:
        """The vectors (H, W, 2), -1 to 1; 0 outside of cells."""

    def encode(self, cells: Instances, scale: tuple[float, float]) -> np.ndarray:
        """The vectors in framed pixels. A pixel flows to the same centre if an axis is scaled, so ``scale`` does not matter."""
        return stored((self.vectors(cells) + 1) / 2)

    def loss(self, logits_BAHW: Tensor, truth_BHWA: Tensor, kept_BHW: Tensor | None) -> Tensor:
        """Binary cross-entropy of both components, averaged over the pixels of cells."""
        in_cell_B1HW = ((truth_BHWA.float() - FULL / 2).abs() > 1).any(-1)[:, None].float()
        return weighted_cross_entropy(logits_BAHW, as_share(truth_BHWA), in_cell_B1HW, kept_BHW)


class Flows(_Vectors):
    """Cellpose's flows."""

    method = "flows"
    fields_meaning = "the direction to the centre of the cell, down and right, each as (component + 1) / 2"

    def vectors(self, cells: Instances) -> np.ndarray:
        """Unit vectors towards the centre of each pixel's cell."""
        out = np.zeros((*cells.ids.shape, 2), np.float32)
        by_side: dict[int, list[_Square]] = {}
        for number, box in enumerate(ndimage.find_objects(cells.ids), 1):
            if box is not None:
                square = _Square(number, box, cells.ids[box] == number)
                if max(square.small.shape) <= LARGEST_PX:
                    by_side.setdefault(square.side, []).append(square)
                else:
                    out[box][square.mask] = square.enlarged(_flow_of_narrow(square.small))[square.mask]
        for side, squares in by_side.items():  # cells of similar size together
            masks = np.zeros((len(squares), side + 2, side + 2), bool)
            for mask, square in zip(masks, squares, strict=True):
                mask[1 : square.small.shape[0] + 1, 1 : square.small.shape[1] + 1] = square.small
            for flow, square in zip(_flows(masks), squares, strict=True):
                out[square.box][square.mask] = square.enlarged(flow[1:-1, 1:-1])[square.mask]
        length = np.linalg.norm(out, axis=2, keepdims=True)
        unit: np.ndarray = out / np.maximum(length, 1e-12)
        return unit


class CentreOffsets(_Vectors):
    """HoVer-Net's horizontal and vertical maps."""

    method = "hv"
    fields_meaning = "the offset from the centre of the cell, down and right, each as (component + 1) / 2"

    def vectors(self, cells: Instances) -> np.ndarray:
        """Offsets from the centre of mass, divided by the largest one of the cell in the same direction."""
        inside = np.flatnonzero(cells.ids)
        out = np.zeros((cells.ids.size, 2), np.float32)
        number = cells.ids.ravel()[inside]
        for axis, place in enumerate(np.divmod(inside, cells.ids.shape[1])):
            centre = np.bincount(number, place, cells.num + 1) / np.maximum(np.bincount(number, minlength=cells.num + 1), 1)
            offset = place - centre[number]
            reach = np.full((2, cells.num + 1), 1e-6)  # up or left, and down or right
            np.maximum.at(reach, ((offset > 0).astype(int), number), np.abs(offset))
            out[inside, axis] = offset / reach[(offset > 0).astype(int), number]
        return out.reshape(*cells.ids.shape, 2)


class _Square:
    """A cell in its bounding box, shrunk by a whole number until it fits into ``LARGEST_PX``, unless it is too narrow for that."""

    def __init__(self, number: int, box: tuple[slice, slice], mask: np.ndarray) -> None:
        self.number, self.box, self.mask = number, box, mask
        self._step = -(-max(mask.shape) // LARGEST_PX)
        if self._step > 1:
            width_px = int(2 * ndimage.distance_transform_edt(np.pad(mask, 1)).max() - 1)
            self._step = min(self._step, max(1, width_px // NARROWEST_PX))
        self.small = mask
        if self._step > 1:
            padded = np.pad(mask, [(0, -length % self._step) for length in mask.shape])
            self.small = np.any(padded.reshape(len(padded) // self._step, self._step, -1, self._step), axis=(1, 3))

    @property
    def side(self) -> int:
        return next(side for side in (8, 16, LARGEST_PX) if side >= max(self.small.shape))

    def enlarged(self, flow_SS2: np.ndarray) -> np.ndarray:
        """The flow at each pixel of the box, (h, w, 2): bilinear between the middles of blocks."""
        flow = flow_SS2[: self.small.shape[0], : self.small.shape[1]]
        if self._step == 1:
            return flow
        places = [(np.arange(length) + 0.5) / self._step - 0.5 for length in self.mask.shape]
        where = np.meshgrid(*places, indexing="ij")
        return np.stack([ndimage.map_coordinates(flow[..., axis], where, order=1, mode="nearest") for axis in range(2)], axis=-1)


def _flows(masks_NSS: np.ndarray) -> np.ndarray:
    """Directions (N, S, S, 2) of rising heat that spreads from the median pixel of each mask; nothing lies in a mask's outermost pixels."""
    heat, inside = np.zeros(masks_NSS.shape), masks_NSS.astype(np.float64)
    centres = np.array([_median_pixel(mask) for mask in masks_NSS]).T
    longest = max(sum(np.ptp(np.nonzero(mask), axis=1) + 1) for mask in masks_NSS)
    for _ in range(2 * int(longest) + 4):
        heat[np.arange(len(heat)), *centres] += 1
        heat = ndimage.uniform_filter(heat, (0, 3, 3), mode="constant") * inside
    flow = np.zeros((*heat.shape, 2))
    flow[:, 1:-1, :, 0] = heat[:, 2:] - heat[:, :-2]
    flow[:, :, 1:-1, 1] = heat[:, :, 2:] - heat[:, :, :-2]
    flow /= np.linalg.norm(flow, axis=3, keepdims=True) + 1e-60
    return flow * masks_NSS[..., None]


def _flow_of_narrow(mask: np.ndarray) -> np.ndarray:
    """The same (h, w, 2) of one mask. Heat is in its pixels only: they are few in the box, and at its ends heat is too low for running sums."""
    padded = np.pad(mask, 1)
    places = np.flatnonzero(padded)
    order = np.full(padded.size, len(places))
    order[places] = np.arange(len(places))
    y, x = np.divmod(places, padded.shape[1])
    neighbours = np.stack([order[places + down * padded.shape[1] + right] for down in (-1, 0, 1) for right in (-1, 0, 1)])
    heat, centre = np.zeros(len(places) + 1), order.reshape(padded.shape)[1:-1, 1:-1][_median_pixel(mask)]
    for _ in range(2 * int(np.ptp(y) + np.ptp(x) + 2) + 4):
        heat[centre] += 1
        heat[:-1] = heat[neighbours].sum(0) / 9
    above, left, right, below = (heat[neighbours[k]] for k in (1, 3, 5, 7))
    out: np.ndarray = np.zeros((*mask.shape, 2))
    out[y - 1, x - 1] = np.stack([below - above, right - left], axis=1)
    return out / (np.linalg.norm(out, axis=2, keepdims=True) + 1e-60)


def _median_pixel(mask: np.ndarray) -> tuple[int, int]:
    """The pixel of a mask that is nearest to the median of its rows and columns."""
    y, x = np.nonzero(mask)
    nearest = int(((y - np.median(y)) ** 2 + (x - np.median(x)) ** 2).argmin())
    return int(y[nearest]), int(x[nearest])
