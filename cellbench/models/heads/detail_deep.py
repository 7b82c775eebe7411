"""The larger sizes of ``detail``: a residual pixel branch down to 1/8 of the tile, with tokens joined at 1/8 and at 1/4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, blocks_of_pixels, conv_bn_relu, resize, scores_of_blocks


class DetailDeep(Head):
    """A residual U-Net on the pixels with the backbone's maps inside.

    Half of the levels, the deep ones, are summed at token resolution and joined at 1/8; the others, which hold finer detail, are joined at
    1/4. Pixels come in and scores go out as in ``Detail``, at half resolution. ``blocks``: residual blocks (He et al. 2016) of each stage.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, width: int, pixel_width: int, blocks: int) -> None:
        super().__init__(levels, num_classes)
        at2, at4, at8 = pixel_width, 2 * pixel_width, 4 * pixel_width
        self.down2 = conv_bn_relu(12, at2)
        self.down4 = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), conv_bn_relu(at2, at4), _stage(at4, blocks))
        self.down8 = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), conv_bn_relu(at4, at8), _stage(at8, blocks))
        self._num_shallow = len(levels) // 2
        self.laterals = nn.ModuleList(nn.Sequential(nn.Conv2d(level.dim, width, 1, bias=False), nn.BatchNorm2d(width)) for level in levels)
        self.join8 = nn.Sequential(conv_bn_relu(width + at8, at8), _stage(at8, blocks))
        self.join4 = nn.Sequential(conv_bn_relu((width if self._num_shallow else 0) + at8 + at4, at4), _stage(at4, blocks))
        self.join2 = nn.Sequential(conv_bn_relu(at4 + at2, at2), _stage(at2, 1))
        self.score = nn.Conv2d(at2, 4 * num_classes, 3, padding=1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        x2 = self.down2(blocks_of_pixels(pixels_BCHW))
        x4 = self.down4(x2)
        x8 = self.down8(x4)
        lateral = [layer(m) for m, layer in zip(maps, self.laterals, strict=True)]
        shallow, deep = lateral[: self._num_shallow], lateral[self._num_shallow :]
        y = self.join8(torch.cat([x8, _summed(deep, x8)], 1))
        y = self.join4(torch.cat([resize(y, x4.shape[-2:]), x4, *([_summed(shallow, x4)] if shallow else [])], 1))
        y = self.join2(torch.cat([resize(y, x2.shape[-2:]), x2], 1))
        return scores_of_blocks(self.score(y), pixels_BCHW)


def _summed(maps: list[Tensor], at: Tensor) -> Tensor:
    """The sum of maps at the size of ``at``; maps of one stride are summed before the resize."""
    by_size: dict[tuple[int, ...], Tensor] = {}
    for m in maps:
        size = tuple(m.shape[-2:])
        by_size[size] = by_size[size] + m if size in by_size else m
    first, *others = (resize(m, at.shape[-2:]) for m in by_size.values())
    return sum(others, start=first)


class _Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = conv_bn_relu(dim, dim)
        self.second = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def _stage(dim: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(_Residual(dim) for _ in range(blocks)))
