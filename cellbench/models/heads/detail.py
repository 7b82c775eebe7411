"""A head that reads maps and pixels: tokens of 14 to 16 px blur cell borders, pixels keep them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, blocks_of_pixels, conv_bn_relu, resize, scores_of_blocks


class Detail(Head):
    """A small U-Net with the backbone at its bottom.

    Each 2x2 block of pixels becomes one place of 12 channels, and the last layer gives each place the scores of its four pixels (sub-pixel
    convolution, Shi et al. 2016): full resolution for a quarter of the work. The maps are projected, summed at token resolution and joined at
    1/4 of the tile.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, width: int, pixel_width: int) -> None:
        super().__init__(levels, num_classes)
        fine, coarse = pixel_width, 2 * pixel_width
        self.down2 = conv_bn_relu(12, fine)
        self.down4 = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), conv_bn_relu(fine, coarse))
        self.laterals = nn.ModuleList(nn.Conv2d(level.dim, width, 1, bias=False) for level in levels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in levels)
        self.tokens = conv_bn_relu(width, width)
        self.join4 = conv_bn_relu(width + coarse, coarse)
        self.join2 = conv_bn_relu(coarse + fine, fine)
        self.score = nn.Conv2d(fine, 4 * num_classes, 3, padding=1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        x2 = self.down2(blocks_of_pixels(pixels_BCHW))
        x4 = self.down4(x2)
        finest = max((m.shape[-2:] for m in maps), key=lambda size: size[0])
        lateral = [resize(norm(layer(m)), finest) for m, layer, norm in zip(maps, self.laterals, self.norms, strict=True)]
        y = resize(self.tokens(sum(lateral)), x4.shape[-2:])
        y = self.join4(torch.cat([y, x4], 1))
        y = self.join2(torch.cat([resize(y, x2.shape[-2:]), x2], 1))
        return scores_of_blocks(self.score(y), pixels_BCHW)
