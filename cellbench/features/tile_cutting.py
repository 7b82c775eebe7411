"""Cuts tiles out of framed images, for the feature pass: in the processor's memory, or on a GPU that holds the images.

Both give the same tiles. A GPU waits for a processor that cuts, turns and sends each tile: with a ViT-Ti the pass then reached 8 % of the bare
forward's speed.

Letters: B tiles, T x T a tile (which need not be square), N pixels of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellbench.data.cell_targets.base import CellTarget, ChannelTurns
from cellbench.data.transforms.augmentation import rotate_flip
from cellbench.data.transforms.tiling import cut_tile
from cellbench.hardware import num_cores, to_device
from cellbench.metrics.pixel import IGNORE
from cellbench.parallel import WorkerPool

Framed = tuple[np.ndarray, ...]
"""A framed image (H, W, 3), its class map (H, W), and cell targets (H, W, A) if runs train on them; all uint8."""
MIRROR, UPSIDE_DOWN = 4, 6
"""Codes of :func:`rotate_flip`."""
Neighbours = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Two pixels beside each place along one axis, and the share of each."""


class Tiles(NamedTuple):
    """Tiles on the device of the backbone."""

    pixels: Tensor
    """(B, 3, T, T) float32, 0..1, channels-last."""
    target: Tensor
    """(B, T, T) int64."""
    cell_targets: tuple[Tensor, ...]
    """(B, T, T, A) uint8 each."""
    ignoring: bool
    """False if no pixel of the target is ``IGNORE``."""


class TileCutter(Protocol):
    """Cuts tiles in two steps, the first of which may run ahead in another thread."""

    def prepare(self, places_B5: np.ndarray) -> Any:
        """``places_B5``: image, y, x and code of :func:`rotate_flip` of each tile, and the side of the crop that is resized to it; 0: the tile's own."""

    def cut(self, prepared: Any) -> Tiles: ...


class HostCutter:
    """Cuts from arrays, and sends the tiles to a device. ``framed`` gives an image by its number."""

    def __init__(
        self, framed: Callable[[int], Framed], tile_px: tuple[int, int], device: torch.device, cell_targets: Sequence[CellTarget] = ()
    ) -> None:
        self._framed, self._tile_px, self._device = framed, tile_px, device
        self._turns = [target.turns for target in cell_targets]

    def prepare(self, places_B5: np.ndarray) -> list[np.ndarray]:
        return [np.stack(arrays) for arrays in zip(*(self._tile(*place) for place in places_B5.tolist()), strict=True)]

    def _tile(self, image: int, y: int, x: int, turn: int, crop_px: int) -> list[np.ndarray]:
        pixels, mask, *more = self._framed(image)
        side = (crop_px, crop_px) if crop_px else self._tile_px
        cut = [cut_tile(array, y, x, side) for array in (pixels, mask)]
        cut += (cut_truth(truth, y, x, side, turns) for truth, turns in zip(more, self._turns, strict=True))
        tile = resized(tuple(cut), self._tile_px[0]) if crop_px else cut
        pixels, mask, *more = (rotate_flip(array, turn) for array in tile)
        return [pixels, mask, *(turns.turn_truth(truth, turn) for truth, turns in zip(more, self._turns, strict=True))]

    def cut(self, prepared: list[np.ndarray]) -> Tiles:
        images, masks, *more = prepared
        return Tiles(
            as_pixels(self._sent(images)),
            self._sent(masks).long(),
            tuple(self._sent(array) for array in more),
            bool(masks.max() == IGNORE),  # on the CPU, to avoid waiting for the GPU
        )

    def _sent(self, array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array), self._device)


class DeviceCutter:
    """Holds all framed images on the device and cuts a batch of tiles in a few operations. ``images``: the numbers of those that are used."""

    def __init__(
        self,
        framed: Callable[[int], Framed],
        images: Sequence[int],
        tile_px: tuple[int, int],
        device: torch.device,
        cell_targets: Sequence[CellTarget] = (),
        largest_px: tuple[int, int] | None = None,
    ) -> None:
        """``largest_px``: height and width of the largest crop that is resized to a tile, if there are any."""
        self._device = device
        self._row = np.full(max(images) + 1, len(images))  # of other images: beyond all rows
        self._row[list(images)] = np.arange(len(images))
        self._tile_px, largest_px = tile_px[0], largest_px or tile_px
        self._turns = [target.turns for target in cell_targets]
        # Decoded on all cores, and sent one by one: the arrays of all images together may not fit into the processor's memory.
        with WorkerPool(num_cores()) as pool:
            sent = list(pool.prefetch(images, lambda image: _padded(framed(image), largest_px, self._turns), self._send))
        self._arrays = [torch.cat(parts) for parts in zip(*(flat for flat, _, _ in sent), strict=True)]
        self._ignoring = np.array([ignoring for _, _, ignoring in sent])
        sizes = np.array([size for _, size, _ in sent], np.int64).reshape(-1, 2)
        self._width = sizes[:, 1]
        self._start = np.concatenate([[0], np.cumsum(sizes.prod(1))[:-1]])
        # The row and column that each pixel of a turned tile comes from, by the same function that turns arrays.
        rows_TT, columns_TT = np.indices(tile_px)
        square = tile_px[0] == tile_px[1]
        turns = [code if square or code % 2 == 0 else 0 for code in range(8)]  # others are never drawn for tiles that are not square
        turned = [np.stack([rotate_flip(array, code) for code in turns]) for array in (rows_TT, columns_TT)]
        self._rows, self._columns = (torch.from_numpy(array).to(device) for array in turned)
        places = np.stack(turned, axis=-1)
        first, below, beside = places[:, 0, 0], places[:, 1 % tile_px[0], 0], places[:, 0, 1 % tile_px[1]]
        self._first, self._down, self._right = first, below - first, beside - first
        """By turn, the row and column of a tile's first pixel, and what a step down or to the right adds to them."""
        self._steps = tuple(torch.arange(side, device=device) for side in tile_px)

    @staticmethod
    def bytes_of(sizes_px: Sequence[tuple[int, int]], cell_targets: Sequence[CellTarget] = ()) -> int:
        """Bytes of framed images of these sizes on the device."""
        return sum(tall * wide for tall, wide in sizes_px) * (4 + sum(len(target.channels) for target in cell_targets))

    def prepare(self, places_B5: np.ndarray) -> np.ndarray:
        """(B, 8) int64, for each tile.

        The upper left pixel of its crop among all N, its image's width, its turn and its crop; its first pixel among all N, and the steps to those below
        and beside it; and whether the image has pixels to ignore.
        """
        image, (y, x, turn, crop_px) = self._row[places_B5[:, 0]], places_B5[:, 1:].T
        width = self._width[image]
        upper_left = self._start[image] + y * width + x
        first, down, right = (of_turn[turn, 0] * width + of_turn[turn, 1] for of_turn in (self._first, self._down, self._right))
        return np.stack([upper_left, width, turn, crop_px, upper_left + first, down, right, self._ignoring[image]], axis=1)

    def cut(self, prepared: np.ndarray) -> Tiles:
        columns_B8 = to_device(torch.from_numpy(prepared), self._device)
        zoomed, index_BTT = self._zoomed(columns_B8) if prepared[:, 3].any() else (None, self._index(columns_B8))
        both, *more = (array[index_BTT] for array in self._arrays)
        both_BTT4, turn = both.view(torch.uint8), columns_B8[:, 2]
        truths = tuple(turns.turn_tiles(truth, turn) for truth, turns in zip(more, self._turns, strict=True))
        image = both_BTT4[..., :3] if zoomed is None else zoomed
        return Tiles(as_pixels(image), both_BTT4[..., 3].long(), truths, bool(prepared[:, 7].any()))

    def _index(self, columns_B8: Tensor) -> Tensor:
        """The pixels (B, T, T) of tiles that are not resized, by a single operation on as many numbers."""
        first, down, right = columns_B8[:, 4:7, None].unbind(1)
        return (first + down * self._steps[0])[:, :, None] + (right * self._steps[1])[:, None]

    def _zoomed(self, columns_B8: Tensor) -> tuple[Tensor, Tensor]:
        """The images of crops that are resized (B, T, T, 3), and the nearest pixels (B, T, T), for the class map and cell targets."""
        turn = columns_B8[:, 2]
        upper_left, width, _, crop_px, *_ = columns_B8[..., None, None].unbind(1)
        rows, columns = self._rows[turn], self._columns[turn]
        side = torch.where(crop_px > 0, crop_px, self._tile_px)
        image = self._bilinear(upper_left, width, *(_neighbours(place, side, self._tile_px) for place in (rows, columns)))
        return image, upper_left + _nearest(rows, side, self._tile_px) * width + _nearest(columns, side, self._tile_px)

    def _bilinear(self, first: Tensor, width: Tensor, rows: Neighbours, columns: Neighbours) -> Tensor:
        """The images (B, T, T, 3) float32, whole numbers from 0 to 255, at places between pixels."""
        corners = ((row, column) for row in rows for column in columns)
        parts = (
            self._arrays[0][first + y * width + x].view(torch.uint8)[..., :3].float() * (of_y * of_x)[..., None]
            for (y, of_y), (x, of_x) in corners
        )
        return torch.stack(list(parts)).sum(0).round_()

    def _send(self, framed: Framed) -> tuple[list[Tensor], tuple[int, int], bool]:
        pixels, mask, *more = framed
        # Pixel and class as one number of 32 bits, which a GPU gathers faster than four of 8.
        both = np.dstack([pixels, mask]).reshape(-1, 4).view(np.int32)
        flat = [both, *(np.ascontiguousarray(one.reshape(-1, one.shape[2])) for one in more)]
        return [torch.from_numpy(array).to(self._device) for array in flat], mask.shape[:2], bool((mask == IGNORE).any())


def _padded(framed: Framed, tile_px: tuple[int, int], turns: Sequence[ChannelTurns]) -> Framed:
    """Arrays at least as large as a tile, mirrored as :func:`cut_tile` mirrors them."""
    tall, wide = (max(side, tile) for side, tile in zip(framed[1].shape, tile_px, strict=True))
    pixels, mask, *more = framed
    truths = (cut_truth(truth, 0, 0, (tall, wide), turn) for truth, turn in zip(more, turns, strict=True))
    return cut_tile(pixels, 0, 0, (tall, wide)), cut_tile(mask, 0, 0, (tall, wide)), *truths


def cut_truth(truth_HWA: np.ndarray, y: int, x: int, tile_px: tuple[int, int], turns: ChannelTurns) -> np.ndarray:
    """A tile of a cell target, mirrored beyond the image's edges as :func:`cut_tile` does it, directions included."""
    tile = cut_tile(truth_HWA, y, x, tile_px)
    tall, wide = truth_HWA.shape[0] - y, truth_HWA.shape[1] - x
    if turns.is_plain or (tall >= tile_px[0] and wide >= tile_px[1]):
        return tile
    tile = tile.copy()
    for start in range(tall, tile_px[0], 2 * tall):  # every second repetition is a mirror image
        tile[start : start + tall] = turns.turn_truth(tile[start : start + tall], UPSIDE_DOWN)
    for start in range(wide, tile_px[1], 2 * wide):
        tile[:, start : start + wide] = turns.turn_truth(tile[:, start : start + wide], MIRROR)
    return tile


def _nearest(place: Any, side_px: Any, tile_px: int) -> Any:
    """The pixel of a crop of ``side_px`` at the middle of each pixel of the tile that it is resized to."""
    return (2 * place + 1) * side_px // (2 * tile_px)


def _neighbours(place: Tensor, side_px: Tensor, tile_px: int) -> Neighbours:
    """The two pixels of a crop around the same middle, and their shares, as ``torch.nn.functional.interpolate`` has them."""
    at = ((place + 0.5) * side_px / tile_px - 0.5).clamp_min(0)
    low = at.long()
    return (low, 1 - (at - low)), (torch.minimum(low + 1, side_px - 1), at - low)


def resized(crop: Framed, tile_px: int) -> Framed:
    """A square crop as a tile: the image bilinear, class map and cell targets by the nearest pixel."""
    image, *others = crop
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    tile = F.interpolate(pixels, size=(tile_px, tile_px), mode="bilinear")[0].permute(1, 2, 0).round().byte().numpy()
    at = _nearest(np.arange(tile_px), len(image), tile_px)
    return tile, *(array[at][:, at] for array in others)


def as_pixels(tiles_BTTC: Tensor) -> Tensor:
    """uint8 tiles (B, T, T, 3) as (B, 3, T, T) float32 in 0..1."""
    tiles_BCTT = tiles_BTTC.permute(0, 3, 1, 2)
    # The same numbers: one kernel of a GPU, one array of a processor.
    return tiles_BCTT / 255 if tiles_BCTT.device.type == "cuda" else tiles_BCTT.float().div_(255)
