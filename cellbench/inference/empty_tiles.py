"""Tiles without structure, such as the glass beside a tissue: one of them can stand for the others of its colour."""

from __future__ import annotations

import numpy as np

BLOCK_PX = 8
"""Values are means over squares of this side, in which the noise of a camera averages out."""
MAX_RANGE = 6
"""The largest difference of values in a tile without structure, of 255.

Measured on half-overlapping tiles: among 2,325 of DSB 2018 (112 px), these were 61 % of the tiles without a nucleus, and 0.02 % of the pixels of
nuclei lay in them, at their edges; among 1,638 of BCCD (224 px) there were none.
"""


def empty_colour(tile_TTC: np.ndarray) -> np.ndarray | None:
    """The mean colour (3,) of a tile (H, W, 3) uint8 without structure; None for a tile that may hold a cell."""
    tall, wide, channels = tile_TTC.shape
    down, across = np.arange(0, tall, BLOCK_PX), np.arange(0, wide, BLOCK_PX)
    sums = np.add.reduceat(np.add.reduceat(tile_TTC, down, axis=0, dtype=np.float32), across, axis=1)
    areas = np.outer(np.diff(down, append=tall), np.diff(across, append=wide))
    means = (sums / areas[:, :, None]).reshape(-1, channels)
    return means.mean(0) if (np.ptp(means, axis=0) <= MAX_RANGE).all() else None


class EmptyTiles:
    """The tiles without structure in a batch, each of another colour."""

    def __init__(self) -> None:
        self._known: list[tuple[np.ndarray, int]] = []

    def row(self, tile_TTC: np.ndarray, next_row: int) -> int:
        """The row of the batch whose prediction a tile gets: ``next_row``, its own, or that of an earlier tile without structure."""
        colour = empty_colour(tile_TTC)
        if colour is None:
            return next_row
        for known, row in self._known:
            if (np.abs(known - colour) <= MAX_RANGE).all():
                return row
        self._known.append((colour, next_row))
        return next_row
