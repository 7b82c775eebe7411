"""Test-time augmentation: a tile is decoded in several poses, each prediction is taken back, and their mean is the tile's prediction.

A pose is an orientation, or a shift by half a patch, in which the tokens lie between those of the tile as it is. Whole tiles are turned, and shifted
ones grow by a patch of mirrored pixels, so the tiles of an image and their blending are the same as without, for every framing and for tiles that are
not square.

Letters: B tiles, H x W a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import FrozenBackbone, Spent
from cellbench.parallel import WorkerPool

_SHIFTS = {8: (True, False), 9: (False, True), 10: (True, True)}
"""Whether the tile moves down, and to the right, by code."""
CODES = {"none": (0,), "flips": (0, 2, 4, 6), "d4": tuple(range(8)), "shifts": (0, *_SHIFTS)}
"""The poses of a run's ``tta``: codes of ``data.transforms.augmentation.rotate_flip`` for mirrors and the half turn, or for all eight orientations;
above them shifts."""


def turn(x_BCHW: Tensor, code: int, patch_px: int) -> Tensor:
    """A batch in another pose.

    As ``rotate_flip``: ``code % 4`` quarter turns counter-clockwise, after a left-right mirror from 4 on; or shifted, and mirrored at the frame.
    """
    if code == 0:
        return x_BCHW
    if code in _SHIFTS:
        (top, bottom), (left, right) = _margins(code, patch_px)
        return F.pad(x_BCHW, (left, right, top, bottom), mode="reflect").contiguous(memory_format=torch.channels_last)
    turned = torch.rot90(x_BCHW.flip(-1) if code >= 4 else x_BCHW, code % 4, (-2, -1))
    return turned.contiguous(memory_format=torch.channels_last)  # as tiles are: another layout may round differently


def _margins(code: int, patch_px: int) -> list[tuple[int, int]]:
    """Pixels that a shift adds above and below, then to the left and right: a patch along each axis that it moves. None without patches."""
    half_px = patch_px // 2
    return [(half_px, patch_px - half_px) if moves and half_px else (0, 0) for moves in _SHIFTS[code]]


def turn_back(x_BCHW: Tensor, code: int, patch_px: int) -> Tensor:
    """The inverse of :func:`turn`."""
    if code == 0:
        return x_BCHW
    if code in _SHIFTS:
        (top, bottom), (left, right) = _margins(code, patch_px)
        return x_BCHW[..., top : x_BCHW.shape[-2] - bottom, left : x_BCHW.shape[-1] - right]
    back = torch.rot90(x_BCHW, -(code % 4), (-2, -1))
    return back.flip(-1) if code >= 4 else back


def inverse(code: int) -> int:
    """The orientation that undoes that of another code: a mirror image mirrored again is the image, and a shift turns nothing."""
    if code in _SHIFTS:
        return 0
    return -code % 4 if code < 4 else code


def turned_batches(batch: Batch, backbone: FrozenBackbone, codes: tuple[int, ...], pool: WorkerPool) -> Iterator[tuple[int, Batch, Spent]]:
    """The batch in each pose, without targets, and the time that its maps took here: none for the batch as it is, which comes first."""
    yield 0, batch, Spent(0.0, 0.0)
    rest = [code for code in codes if code]
    for some in (rest[k : k + pool.num] for k in range(0, len(rest), pool.num)):  # one per thread is in memory
        yield from pool.run_all([functools.partial(_turned, batch, backbone, code) for code in some])


def _turned(batch: Batch, backbone: FrozenBackbone, code: int) -> tuple[int, Batch, Spent]:
    pixels = turn(batch.pixels, code, backbone.patch_px)
    maps, spent = backbone.timed_maps(pixels)
    return code, Batch(maps, pixels, torch.empty(0)), spent
