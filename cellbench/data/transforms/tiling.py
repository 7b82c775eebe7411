"""Cuts an image into overlapping tiles and joins predictions: one tiler for training, validation, test and prediction.

Joining the tiles of an image restores the image, for every size and overlap, including images smaller than a tile and non-square
images. Predictions are joined band by band, so memory grows with an image's width, not with its area.

Letters: C classes, H x W image, T x T tile; a tile need not be square.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def tile_origins(length_px: int, tile_px: int, overlap_px: int) -> list[int]:
    """Left edges of the fewest equally spaced tiles that cover ``length_px`` and overlap by at least ``overlap_px``.

    Even spacing, so that the last tile is never a sliver (Isensee et al., nnU-Net, 2021).

    >>> tile_origins(500, 224, 32)
    [0, 138, 276]
    """
    if not 0 <= overlap_px < tile_px or length_px < 1:
        raise ValueError(f"{length_px} px cannot be cut into tiles of {tile_px} px that overlap by {overlap_px} px")
    if length_px <= tile_px:
        return [0]
    num = -((overlap_px - length_px) // (tile_px - overlap_px))
    return [round(i * (length_px - tile_px) / (num - 1)) for i in range(num)]


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Where the tiles of one image lie: ``ys`` x ``xs``, row by row."""

    height_px: int
    width_px: int
    tile_px: tuple[int, int]
    """Height, width."""
    ys: tuple[int, ...]
    xs: tuple[int, ...]

    @classmethod
    def over(cls, height_px: int, width_px: int, tile_px: int | tuple[int, int], overlap: float) -> TileGrid:
        """The grid over an image.

        ``tile_px``: a tile's side or its (height, width); ``overlap``: the least share of a tile (0 to 0.9) that its neighbour covers.
        """
        tall, wide = _sides(tile_px)
        ys, xs = (tuple(tile_origins(length, side, round(side * overlap))) for length, side in ((height_px, tall), (width_px, wide)))
        return cls(height_px=height_px, width_px=width_px, tile_px=(tall, wide), ys=ys, xs=xs)

    def __len__(self) -> int:
        return len(self.ys) * len(self.xs)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The (y, x) of each tile's upper left corner, row by row."""
        return ((y, x) for y in self.ys for x in self.xs)

    def owned(self) -> Iterator[tuple[slice, slice]]:
        """For each tile, the rows and columns whose pixels are nearest to its centre. Together they cover each pixel of the image once."""
        rows, columns = _owned(self.ys, self.height_px, self.tile_px[0]), _owned(self.xs, self.width_px, self.tile_px[1])
        return ((row, column) for row in rows for column in columns)

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The blending weights of each tile row and tile column: (rows, tile height) and (columns, tile width), float32.

        A Hann taper, divided by the sum of all tapers at the same pixel. The window is separable, so the products of the two
        add up to one at every pixel of the image.
        """
        return _tapers(self.ys, self.height_px, self.tile_px[0]), _tapers(self.xs, self.width_px, self.tile_px[1])


def _tapers(starts: tuple[int, ...], length_px: int, tile_px: int) -> Tensor:
    # Half-pixel offset: never zero, so that a border pixel that only one tile covers still counts in full after the division.
    hann = np.sin(np.pi * (np.arange(tile_px) + 0.5) / tile_px) ** 2
    total = np.zeros(max(length_px, tile_px))
    for start in starts:
        total[start : start + tile_px] += hann
    import torch

    return torch.from_numpy(np.stack([hann / total[start : start + tile_px] for start in starts])).float()


def _owned(starts: tuple[int, ...], length_px: int, tile_px: int) -> list[slice]:
    edges = [0, *((a + tile_px + b) // 2 for a, b in pairwise(starts)), length_px]
    return [slice(low - start, high - start) for start, low, high in zip(starts, edges, edges[1:], strict=False)]


def _sides(tile_px: int | tuple[int, int]) -> tuple[int, int]:
    return tile_px if isinstance(tile_px, tuple) else (tile_px, tile_px)


def cut_tile(image: np.ndarray, y: int, x: int, tile_px: int | tuple[int, int]) -> np.ndarray:
    """The tile (T, T, ...) whose upper left corner is (y, x). Pixels beyond the lower or right edge are mirrored."""
    tall, wide = _sides(tile_px)
    tile = image[y : y + tall, x : x + wide]
    below, right = tall - tile.shape[0], wide - tile.shape[1]
    if below or right:
        # "symmetric" repeats the edge pixel and, unlike "reflect", works from a single row on
        tile = np.pad(tile, [(0, below), (0, right)] + [(0, 0)] * (image.ndim - 2), mode="symmetric")
    return tile


class Stitcher:
    """Joins the scores of an image's tiles by blending, and returns each band of rows as soon as no later tile overlaps it.

    Tiles must come in the grid's order. Holds one row of tiles: (C, T, W) float32.
    """

    def __init__(self, grid: TileGrid, num_classes: int, device: torch.device | str = "cpu") -> None:
        import torch

        self._grid = grid
        self._rows, self._columns = _weights_on(grid, str(device))
        self._sum_CTW = torch.zeros(num_classes, grid.tile_px[0], max(grid.width_px, grid.tile_px[1]), device=device)
        self._next = 0

    def add(self, scores_BCTT: Tensor) -> list[tuple[int, Tensor]]:
        """Takes the next tiles' scores; returns the bands that became final, as (first row, (C, rows, W) blended scores)."""
        grid, done, taken = self._grid, [], 0
        while taken < len(scores_BCTT):
            row, column = divmod(self._next, len(grid.xs))
            num = min(len(grid.xs) - column, len(scores_BCTT) - taken)  # of this row
            tapers_BTT = self._rows[row].unsqueeze(1) * self._columns[column : column + num].unsqueeze(1)
            for x, scores_CTT, taper_TT in zip(
                grid.xs[column : column + num], scores_BCTT[taken : taken + num].unbind(), tapers_BTT.unbind(), strict=True
            ):
                self._sum_CTW[:, :, x : x + grid.tile_px[1]].addcmul_(scores_CTT, taper_TT)
            self._next += num
            taken += num
            if column + num == len(grid.xs):
                done.append(self._finish(row))
        return done

    def _finish(self, row: int) -> tuple[int, Tensor]:
        import torch.nn.functional as F

        grid, y = self._grid, self._grid.ys[row]
        end = grid.ys[row + 1] if row + 1 < len(grid.ys) else grid.height_px
        band = self._sum_CTW[:, : end - y, : grid.width_px]
        self._sum_CTW = F.pad(self._sum_CTW[:, end - y :], (0, 0, 0, end - y))
        return y, band


@functools.lru_cache(maxsize=16)
def _weights_on(grid: TileGrid, device: str) -> tuple[Tensor, Tensor]:
    """The weights on a device. Kept, because a copy to a GPU waits for its earlier work."""
    rows, columns = grid.weights
    return rows.to(device), columns.to(device)
