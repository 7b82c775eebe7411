"""Test-time augmentation: a tile is decoded in several orientations, each prediction is turned back, and their mean is the tile's prediction.

Whole tiles are turned, so the tiles of an image and their blending are the same as without, for every framing and for tiles that are not square.

Letters: B tiles, H x W a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import FrozenBackbone, Spent
from cellbench.parallel import WorkerPool

CODES = {"none": (0,), "flips": (0, 2, 4, 6), "d4": tuple(range(8))}
"""The orientations of a run's ``tta``, as codes of ``data.transforms.augmentation.rotate_flip``: mirrors and the half turn, or all eight."""


def turn(x_BCHW: Tensor, code: int) -> Tensor:
    """As ``rotate_flip``, for a batch: ``code % 4`` quarter turns counter-clockwise, after a left-right mirror from 4 on."""
    if code == 0:
        return x_BCHW
    turned = torch.rot90(x_BCHW.flip(-1) if code >= 4 else x_BCHW, code % 4, (-2, -1))
    return turned.contiguous(memory_format=torch.channels_last)  # as tiles are: another layout may round differently


def turn_back(x_BCHW: Tensor, code: int) -> Tensor:
    """The inverse of :func:`turn`."""
    if code == 0:
        return x_BCHW
    back = torch.rot90(x_BCHW, -(code % 4), (-2, -1))
    return back.flip(-1) if code >= 4 else back


def inverse(code: int) -> int:
    """The code that undoes another: a mirror image mirrored again is the image."""
    return -code % 4 if code < 4 else code


def turned_batches(batch: Batch, backbone: FrozenBackbone, codes: tuple[int, ...], pool: WorkerPool) -> Iterator[tuple[int, Batch, Spent]]:
    """The batch in each orientation, without targets, and the time that its maps took here: none for the batch as it is, which comes first."""
    yield 0, batch, Spent(0.0, 0.0)
    rest = [code for code in codes if code]
    for some in (rest[k : k + pool.num] for k in range(0, len(rest), pool.num)):  # one per thread is in memory
        yield from pool.run_all([functools.partial(_turned, batch, backbone, code) for code in some])


def _turned(batch: Batch, backbone: FrozenBackbone, code: int) -> tuple[int, Batch, Spent]:
    pixels = turn(batch.pixels, code)
    maps, spent = backbone.timed_maps(pixels)
    return code, Batch(maps, pixels, torch.empty(0)), spent
