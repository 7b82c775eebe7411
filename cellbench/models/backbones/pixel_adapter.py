"""Pixels for tokens: a small CNN on the tile feeds a backbone's last blocks, as the spatial prior of ViT-Adapter does (Chen et al. 2023)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelAdapter(nn.Module):
    """Adds to each patch token what three convolutions of stride 2 see in its patch. The sum is weighted by zeros at first, so that nothing changes."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        self.stem = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in itertools.pairwise(sizes)
            )
        )
        self.to_tokens = nn.Conv2d(4 * width, dim, 1)
        for weights in self.to_tokens.parameters():
            nn.init.zeros_(weights)

    def forward(self, x_BND: Tensor, pixels_BCHW: Tensor, places: tuple[int, int]) -> Tensor:
        """The tokens (B, N, D), class and register tokens first, with those of the ``places`` (h, w) fed."""
        fed = self.to_tokens(F.adaptive_avg_pool2d(self.stem(pixels_BCHW), places)).flatten(2).transpose(1, 2)
        num_prefix = x_BND.shape[1] - fed.shape[1]
        return torch.cat([x_BND[:, :num_prefix], x_BND[:, num_prefix:] + fed], 1)
