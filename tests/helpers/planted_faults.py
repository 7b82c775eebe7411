"""Faults planted in masks: cells removed, false cells added, cells shifted, so that what is found can be counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

KINDS = ("missing", "false", "outline")
"""As ``cellbench.data.audit.label_faults`` calls them."""


@dataclass(frozen=True)
class Planted:
    kind: str
    x: float
    y: float
    """Where: the centre of the cell that was removed, added or shifted to."""
    radius: float
    """Of a disc of its area."""


def plant(ids: np.ndarray, rng: np.random.Generator, share: float, shift: float = 0.35) -> tuple[np.ndarray, list[Planted]]:
    """The cell numbers (H, W) with ``share`` of the cells removed, as many false ones, and as many shifted by ``shift`` diameters."""
    out, found = ids.copy(), []
    areas = np.bincount(ids.ravel())[1:]
    boxes = ndimage.find_objects(ids)
    usable = [k for k, area in enumerate(areas, 1) if area > 0.25 * np.median(areas[areas > 0])]
    each = rng.binomial(len(usable), share, 3)
    chosen = rng.permutation(usable)[: each[0] + each[1] + each[2]]
    removed, shifted, copied = np.split(chosen, np.cumsum(each[:2]))
    for cell in removed:
        out[ids == cell] = 0
        found.append(_at("missing", ids == cell))
    for cell in shifted:
        shape, diameter = ids == cell, 2 * np.sqrt(areas[cell - 1] / np.pi)
        for angle in rng.uniform(0, 2 * np.pi, 20):
            step = np.round(shift * diameter * np.array([np.sin(angle), np.cos(angle)])).astype(int)
            moved = _moved(shape, boxes[cell - 1], step)
            if moved.sum() > 0.9 * shape.sum() and not (moved & (out > 0) & ~shape).any():
                out[shape], out[moved] = 0, cell
                found.append(_at("outline", moved))
                break
    free = ndimage.distance_transform_edt(ids == 0)
    for number, cell in enumerate(copied, 1):
        box, shape = boxes[cell - 1], ids == cell
        radius = max(box[0].stop - box[0].start, box[1].stop - box[1].start) / 2
        places = np.argwhere((free > radius + 2) & (ndimage.distance_transform_edt(out == 0) > radius + 2))
        if len(places):
            centre = np.array([(side.start + side.stop) / 2 for side in box])
            moved = _moved(shape, box, np.round(places[rng.integers(len(places))] - centre).astype(int))
            if moved.sum() > 0.9 * shape.sum():
                out[moved] = ids.max() + number
                found.append(_at("false", moved))
    return out, found


def _moved(shape: np.ndarray, box: tuple[slice, slice], step: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(shape[box])
    y, x = y + box[0].start + step[0], x + box[1].start + step[1]
    inside = (y >= 0) & (y < shape.shape[0]) & (x >= 0) & (x < shape.shape[1])
    out = np.zeros_like(shape)
    out[y[inside], x[inside]] = True
    return out


def _at(kind: str, shape: np.ndarray) -> Planted:
    y, x = (float(np.mean(one)) for one in np.nonzero(shape))
    return Planted(kind, round(x, 1), round(y, 1), float(np.sqrt(shape.sum() / np.pi)))
