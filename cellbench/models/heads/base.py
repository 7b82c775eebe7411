"""What every head is: a small trainable function from a backbone's maps, and perhaps the tile's pixels, to class scores at every pixel.

Letters: B tiles, K classes, D features, h x w places of a map, H x W pixels of a tile.

A head never learns which backbone it reads: it is told the levels (channels and stride of each map) and copes with any number of them,
any patch size and any tile size. Pointwise convolutions stand before a resize rather than after it: the two commute, and before it there
are up to 196 times fewer places.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cellbench.models.backbones.base import Level


class Head(nn.Module):
    """Subclasses take ``(levels, num_classes, **options)``; the options are those on the card, each with its default there."""

    stackable = False
    """A subclass says True where ``forward`` draws no random numbers, decides nothing by the values in a tensor and keeps its weights in
    convolutions and batch norms: several heads of one kind then learn as one on a GPU (``cellbench.training.stacked_heads``)."""

    def __init__(self, levels: tuple[Level, ...], num_classes: int) -> None:
        super().__init__()
        self.levels, self.num_classes = levels, num_classes

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Scores (B, K, H, W) before softmax. ``maps`` are (B, D, h, w), shallow to deep; pixels are RGB in 0..1.

        Random numbers are drawn while training only, with torch's functions: they are then seeded for each step, and the run is repeatable.
        """
        raise AssertionError(f"{type(self).__name__} gives no scores")


def resize(x_BDhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres, as every resize of the heads."""
    if x_BDhw.shape[-2:] == size:
        return x_BDhw
    return F.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=False)


def conv_bn_relu(dim_in: int, dim_out: int, kernel: int = 3) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU(inplace=True)
    )
