"""The published head: tokens doubled in size up to three times by transposed convolutions, then resized to the tile."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, conv_bn_relu, resize


class TransposedConv(Head):
    """1x1 to ``width``, then doublings (transposed 4x4 with stride 2, and a 3x3) that halve the channels, then 1x1 to classes and a resize.

    As published for 14-px patches: 16 -> 32 -> 64 -> 128 places, resized to 224; a fourth doubling would overshoot to 256. A backbone with a
    finer stride starts at the stage of its stride, with that stage's channels, and never exceeds the tile's size. The last 1x1 is before the
    resize, with which it commutes, and not after it as published.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, width: int, doublings: int) -> None:
        super().__init__(levels, num_classes)
        level = levels[-1]
        steps = min(doublings, int(math.log2(level.stride_px)))
        first = max(0, round(math.log2(16 / level.stride_px)))
        dims = [max(width >> step, 8) for step in range(first, first + steps + 1)]
        self.project = conv_bn_relu(level.dim, dims[0], 1)
        self.up = nn.Sequential(*(self._doubling(a, b) for a, b in itertools.pairwise(dims)))
        self.score = nn.Conv2d(dims[-1], num_classes, 1)

    @staticmethod
    def _doubling(dim_in: int, dim_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ConvTranspose2d(dim_in, dim_out, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dim_out),
            nn.ReLU(inplace=True),
            *conv_bn_relu(dim_out, dim_out),
        )

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        return resize(self.score(self.up(self.project(maps[-1]))), pixels_BCHW.shape[-2:])
