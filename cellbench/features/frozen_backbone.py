"""The frozen part of a backbone: pixels in, the maps of its levels out.

Letters: B tiles, D features, h x w places of a map, T x T a tile (which need not be square), N tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from cellbench.hardware import Hardware
from cellbench.models.backbones.base import Backbone, Level

TOKENS = -1
"""The index of a trunk's last tokens, as a map (B, D, N, 1) of all N tokens, prefix tokens included, before any norm."""


class FrozenBackbone:
    """The frozen part of a backbone on a device, and the levels of it that a cohort's heads read.

    ``backbone`` is None for runs that read pixels only. With ``unfreeze = n`` the trunk ends n blocks early: what it gives is the tokens
    there (under the index ``TOKENS``) and the levels before; the rest is each run's own tail.
    """

    def __init__(self, backbone: Backbone | None, machine: Hardware, num_levels: Iterable[int], unfreeze: int = 0) -> None:
        self.machine, self.unfreeze = machine, unfreeze
        self.backbone = backbone.freeze().to(machine.device) if backbone is not None else None
        self._end = len(backbone.levels) - unfreeze if backbone is not None else 0
        picked = {level.index: level for num in num_levels for level in self.levels(num) if level.index < self._end}
        self.indices = tuple(sorted(picked))
        self._picked = tuple(picked[index] for index in self.indices)
        self.chunk = machine.chunk
        """Tiles that go through the backbone at once."""
        self.seconds = 0.0
        """Spent in the backbone so far, by all lanes together. On a GPU this is the time to hand the work over, unless something waits for it."""
        self.cpu_seconds = 0.0
        """Of the processor, by the lanes' own threads: other processes make ``seconds`` longer, this hardly."""
        self._adding = threading.Lock()

    def levels(self, num: int) -> tuple[Level, ...]:
        """The levels that a head which reads ``num`` of them is given."""
        return self.backbone.pick(num) if self.backbone is not None else ()

    @property
    def keys(self) -> tuple[int, ...]:
        """What a batch's maps are found under."""
        return (*self.indices, TOKENS) if self.unfreeze else self.indices

    @torch.no_grad()
    def maps(self, pixels_BCTT: Tensor) -> dict[int, Tensor]:
        """The maps of tiles, by level index, in the machine's precision and channels-last."""
        if self.backbone is None:
            return {}
        start, start_cpu = time.perf_counter(), time.thread_time()
        num = len(pixels_BCTT)
        if num < self.chunk:
            # Always the same shape: kernels are chosen by it, and another one may round differently (measured with bf16).
            pixels_BCTT = torch.cat([pixels_BCTT, pixels_BCTT.new_zeros(self.chunk - num, *pixels_BCTT.shape[1:])])
        with self.machine.autocast():
            if self.unfreeze:
                maps, tokens_BND = self.backbone.until(pixels_BCTT, self.indices, self._end)
                maps.append(tokens_BND.transpose(1, 2).unsqueeze(-1))
            else:
                maps = self.backbone(pixels_BCTT, self.indices)
        # A copy, because a head cannot learn from the tensors of inference mode; it changes precision and layout on the way.
        kept = self.machine.precision
        copies = {
            i: torch.empty_like(m[:num], dtype=kept, memory_format=torch.channels_last).copy_(m[:num])
            for i, m in zip(self.keys, maps, strict=True)
        }
        with self._adding:
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.thread_time() - start_cpu
        return copies

    def map_bytes(self, tile_px: tuple[int, int]) -> int:
        """Bytes of the maps of one tile of this height and width."""
        size = 2 if self.machine.precision == torch.bfloat16 else 4
        places = sum(level.dim * _places(tile_px, level.stride_px) for level in self._picked)
        if self.unfreeze and self.backbone is not None:
            last = self.backbone.levels[-1]
            places += last.dim * (_places(tile_px, last.stride_px) + 16)  # class and register tokens: 9 in the largest set known
        return size * places


def _places(tile_px: tuple[int, int], stride_px: int) -> int:
    return (tile_px[0] // stride_px) * (tile_px[1] // stride_px)
