"""What every backbone is to the rest of cellbench: a frozen function from a batch of tiles to maps at several depths.

Letters: B tiles, C=3 channels, H x W pixels of a tile, D features, h x w places of a map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cellbench.errors import CellbenchError


@dataclass(frozen=True, kw_only=True)
class Level:
    """One depth of a backbone: its map has ``dim`` channels and one place for each ``stride_px`` x ``stride_px`` pixels."""

    index: int
    dim: int
    stride_px: int


class Backbone(nn.Module):
    """A frozen feature extractor. Subclasses set ``levels`` and give ``maps``.

    ``forward`` takes pixels in 0..1 (float32, RGB, BCHW) and normalises them with the card's mean and standard deviation itself, so that
    no caller can forget to. Frozen means eval and no gradient: ``train()`` leaves the module in eval mode.
    """

    levels: tuple[Level, ...]
    """Every depth that can be asked for, shallow to deep. A plain ViT has one a block, all of one stride."""
    tile_multiple_px: int
    """Tiles must be a multiple of this high and wide."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """The maps (B, D, h, w) of normalised tiles at these levels, in this order; the network's final norm applied to each of a ViT."""
        raise AssertionError(f"{type(self).__name__} gives no maps")

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """The maps of tiles whose pixels are in 0..1, row 0 of a map at the tile's top, column 0 at its left."""
        return self.maps((pixels_BCHW - self.mean) / self.std, indices)

    @torch.inference_mode()
    def until(self, pixels_BCHW: Tensor, indices: tuple[int, ...], num_blocks: int) -> tuple[list[Tensor], Tensor]:
        """The maps at levels before block ``num_blocks``, and all tokens (B, N, D) as they enter it, for runs that train the rest."""
        return self.begin((pixels_BCHW - self.mean) / self.std, indices, num_blocks)

    def begin(self, x_BCHW: Tensor, indices: tuple[int, ...], num_blocks: int) -> tuple[list[Tensor], Tensor]:
        """What ``until`` gives, from normalised tiles; for backbones that can be cut between two blocks."""
        raise CellbenchError(f"{type(self).__name__} cannot be cut between two blocks. Set unfreeze = 0, or take a plain transformer.")

    def tail(self, num_blocks: int) -> nn.Module:
        """A trainable copy of the last ``num_blocks`` blocks and the final norm: ``(tokens (B, N, D), indices, (h, w)) -> maps``."""
        raise CellbenchError(f"{type(self).__name__} cannot be cut between two blocks. Set unfreeze = 0, or take a plain transformer.")

    def train(self, mode: bool = True) -> Backbone:
        """Frozen means eval, dropout and drop-path included: ``mode`` is ignored."""
        return super().train(False)

    def freeze(self) -> Backbone:
        """No gradient, eval mode; returns itself."""
        self.requires_grad_(False)
        return self.train()

    def pick(self, num: int) -> tuple[Level, ...]:
        """``num`` levels evenly spaced over the depth, the last one included; all of them where there are fewer.

        A ViT of 12 blocks gives 2, 5, 8, 11 for four, as DPT and UNETR-style decoders read it.
        """
        depth = len(self.levels)
        num = min(num, depth)
        return tuple(self.levels[(i + 1) * depth // num - 1] for i in range(num))
