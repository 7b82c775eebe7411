"""A UNETR-like head: deep tokens at the bottom of a U-Net, shallower tokens as its skip connections, the pixels as the last of them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, conv_bn_relu, resize, scaled_pixels


class UNETR(Head):
    """The deepest level at 1/16 of the tile, the others at 1/8, 1/4 and 1/2, each joined and convolved twice; then the pixels at full resolution.

    UNETR (Hatamizadeh et al. 2022) and CellViT (Hörst et al. 2024) enlarge by transposed convolutions of fixed factors. Here each map is
    projected at token resolution and resized to a given size, which suits every patch size and costs less.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, width: int) -> None:
        super().__init__(levels, num_classes)
        num = len(levels)
        # Stride 2 is that of four levels' shallowest one; `width` channels at full resolution, twice as many at each coarser scale.
        self._strides = [2 ** (5 - num + k) for k in range(num)]
        dims = [width * stride for stride in self._strides]
        self.laterals = nn.ModuleList(conv_bn_relu(level.dim, dim, 1) for level, dim in zip(levels, dims, strict=True))
        self.bottom = conv_bn_relu(dims[-1], dims[-1])
        self.joins = nn.ModuleList(
            nn.Sequential(conv_bn_relu(fine + coarse, fine), conv_bn_relu(fine, fine)) for fine, coarse in itertools.pairwise(dims)
        )
        self.pixels = conv_bn_relu(3, width)
        self.last = conv_bn_relu(dims[0] + width, width)
        self.score = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        height, width = pixels_BCHW.shape[-2:]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in self._strides]
        y = resize(self.bottom(self.laterals[-1](maps[-1])), sizes[-1])
        for k in reversed(range(len(maps) - 1)):
            y = self.joins[k](torch.cat([resize(y, sizes[k]), resize(self.laterals[k](maps[k]), sizes[k])], 1))
        return self.score(self.last(torch.cat([resize(y, (height, width)), self.pixels(scaled_pixels(pixels_BCHW))], 1)))
