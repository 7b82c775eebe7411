"""The frozen part of a backbone: pixels in, the maps of some levels out.

Letters: B tiles, D features, h x w places of a map, T x T a tile (which need not be square), N tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cellbench.hardware import Hardware
from cellbench.models.backbones.base import Backbone, Level

TOKENS = -1
"""The index of the last tokens of a partly trained backbone: a map (B, D, N, 1) of all N tokens, prefix tokens included, before any norm.

Of a pyramid the tokens are the places of a stage's map, row by row.
"""


class Spent(NamedTuple):
    """Wall and CPU seconds of one thread."""

    wall_s: float
    cpu_s: float


class FrozenBackbone:
    """The frozen part of a backbone on a device, and the levels that a cohort's heads read.

    ``module`` is None for runs that only read pixels. With ``unfreeze = n`` it ends n blocks or stages early and returns the tokens there (index
    ``TOKENS``) and the earlier levels; the rest is the trainable tail of each run.
    """

    def __init__(self, backbone: Backbone | None, machine: Hardware, num_levels: Iterable[int], unfreeze: int = 0) -> None:
        self.machine, self.unfreeze = machine, unfreeze
        self.module = backbone.freeze().to(machine.device) if backbone is not None else None
        self._end = len(backbone.levels) - unfreeze if backbone is not None else 0
        picked = {level.index: level for num in num_levels for level in self.levels(num) if level.index < self._end}
        self.indices = tuple(sorted(picked))
        self._picked = tuple(picked[index] for index in self.indices)
        self.chunk = machine.chunk
        """Tiles in a batch."""
        self.seconds = 0.0
        """Seconds in the backbone, summed over threads. On a GPU the time to launch the work, unless something synchronises."""
        self.cpu_seconds = 0.0
        """CPU seconds of the threads, which depend less on the machine's load."""
        self._clock_lock = threading.Lock()

    def levels(self, num: int) -> tuple[Level, ...]:
        """The levels for a head that reads ``num`` of them."""
        return self.module.pick(num) if self.module is not None else ()

    @property
    def patch_px(self) -> int:
        """Side of the square of pixels that one place of the last level covers; 1 without a backbone."""
        return self.module.levels[-1].stride_px if self.module is not None else 1

    @property
    def keys(self) -> tuple[int, ...]:
        """The indices of a batch's maps."""
        return (*self.indices, TOKENS) if self.unfreeze else self.indices

    def maps(self, pixels_BCTT: Tensor) -> dict[int, Tensor]:
        """The maps of tiles, by level index, in the machine's precision and channels-last."""
        maps, spent = self.timed_maps(pixels_BCTT)
        with self._clock_lock:
            self.seconds += spent.wall_s
            self.cpu_seconds += spent.cpu_s
        return maps

    @torch.no_grad()
    def timed_maps(self, pixels_BCTT: Tensor) -> tuple[dict[int, Tensor], Spent]:
        """As :meth:`maps`, with the time they took, which :attr:`seconds` does not include."""
        if self.module is None:
            return {}, Spent(0.0, 0.0)
        start, start_cpu = time.perf_counter(), time.thread_time()
        num, step = len(pixels_BCTT), min(self.chunk, self.machine.batch_step)
        if missing := -num % step:
            pixels_BCTT = torch.cat([pixels_BCTT, pixels_BCTT.new_zeros(missing, *pixels_BCTT.shape[1:])])
        with self.machine.autocast():
            if self.unfreeze:
                maps, tokens_BND = self.module.until(pixels_BCTT, self.indices, self._end)
                maps.append(tokens_BND.transpose(1, 2).unsqueeze(-1))
            else:
                maps = self.module(pixels_BCTT, self.indices)
        # A copy with precision and layout of training; inference-mode tensors cannot be used there.
        kept = self.machine.precision
        copies = {
            i: torch.empty_like(m[:num], dtype=kept, memory_format=torch.channels_last).copy_(m[:num])
            for i, m in zip(self.keys, maps, strict=True)
        }
        return copies, Spent(time.perf_counter() - start, time.thread_time() - start_cpu)

    def map_bytes(self, tile_px: tuple[int, int]) -> int:
        """Bytes of the maps of a tile of this (height, width)."""
        size = 2 if self.machine.precision == torch.bfloat16 else 4
        places = sum(level.dim * _places(tile_px, level.stride_px) for level in self._picked)
        if self.unfreeze and self.module is not None:
            last = self.module.levels[self._end - 1]
            places += last.dim * (_places(tile_px, last.stride_px) + 16)  # class and register tokens: 9 at most in known networks
        return size * places


def _places(tile_px: tuple[int, int], stride_px: int) -> int:
    return (tile_px[0] // stride_px) * (tile_px[1] // stride_px)
