"""A head that also sees the tile: tokens say what is there, pixels say where it ends, because 14 to 16 px tokens blur cell borders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellbench.backbones.base import Level
from cellbench.heads.base import Head, conv_bn_relu, resize


class Detail(Head):
    """A small U-shaped net whose bottom is the backbone.

    Pixels go down through three scales (1, 1/2, 1/4); the backbone's depths are projected, summed at token resolution and resized to 1/4;
    the two are joined on the way up. About as many channels as a token has pixels at each scale, so that it runs on a laptop.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, width: int, pixel_width: int) -> None:
        super().__init__(levels, num_classes)
        fine, middle, coarse = pixel_width, 2 * pixel_width, 4 * pixel_width
        self.down1 = conv_bn_relu(3, fine)
        self.down2 = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), conv_bn_relu(fine, middle))
        self.down4 = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), conv_bn_relu(middle, coarse))
        self.laterals = nn.ModuleList(nn.Conv2d(level.dim, width, 1, bias=False) for level in levels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in levels)
        self.tokens = conv_bn_relu(width, width)
        self.join4 = conv_bn_relu(width + coarse, coarse)
        self.join2 = conv_bn_relu(coarse + middle, middle)
        self.join1 = conv_bn_relu(middle + fine, fine)
        self.score = nn.Conv2d(fine, num_classes, 1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        x1 = self.down1((pixels_BCHW - 0.5) / 0.25)
        x2 = self.down2(x1)
        x4 = self.down4(x2)
        finest = max((tuple(m.shape[-2:]) for m in maps), key=lambda size: size[0])
        tokens = sum(resize(norm(lateral(m)), finest) for m, lateral, norm in zip(maps, self.laterals, self.norms, strict=True))
        y = resize(self.tokens(tokens), tuple(x4.shape[-2:]))
        y = self.join4(torch.cat([y, x4], 1))
        y = self.join2(torch.cat([resize(y, tuple(x2.shape[-2:])), x2], 1))
        y = self.join1(torch.cat([resize(y, tuple(x1.shape[-2:])), x1], 1))
        return self.score(y)
