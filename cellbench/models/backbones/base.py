"""The interface of a backbone: a frozen function from a batch of tiles to feature maps at several depths.

Letters: B tiles, C=3 channels, H x W pixels of a tile, D features, h x w places of a map, N tokens.

A backbone of your own subclasses :class:`Backbone`, sets ``levels`` and ``tile_multiple_px`` and implements :meth:`Backbone.maps`. A
function ``(card, state) -> Backbone`` beside its card builds it; ``doctor --contracts`` checks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cellbench.errors import CellbenchError


@dataclass(frozen=True, kw_only=True)
class Level:
    """One depth of a backbone. Its map of a tile of H x W px is (B, ``dim``, H // ``stride_px``, W // ``stride_px``)."""

    index: int
    """Its place in ``Backbone.levels``, from 0 (shallow)."""
    dim: int
    """Channels D of its map."""
    stride_px: int
    """Side in pixels of the square that one place of the map covers: the patch size of a plain ViT."""


class Backbone(nn.Module):
    """A frozen feature extractor. Subclasses set ``levels`` and ``tile_multiple_px`` and implement :meth:`maps`.

    Calling a backbone takes pixels in 0..1 and normalises them itself, so callers must not. Frozen means no gradient and eval mode:
    ``train()`` has no effect on dropout, drop path or batch norm.

    Args:
        mean: of each RGB channel, for pixels in 0..1, as in pretraining; the ``mean`` of the card.
        std: standard deviation of each RGB channel, likewise.

    """

    levels: tuple[Level, ...]
    """All depths, shallow to deep: the blocks of a plain ViT (all of one stride), the stages of a hierarchical network."""
    tile_multiple_px: int
    """Height and width of a tile must be multiples of this."""
    mean: Tensor
    """(1, 3, 1, 1) float32."""
    std: Tensor
    """(1, 3, 1, 1) float32."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """The feature maps of normalised tiles. To be implemented by subclasses.

        Args:
            x_BCHW: (B, 3, H, W), RGB, normalised by ``mean`` and ``std``; H and W are multiples of ``tile_multiple_px`` and may differ.
            indices: of the levels wanted, in any order.

        Returns:
            A map (B, D, h, w) for each index, in the order of ``indices``, of D = ``dim``, h = H // ``stride_px`` and w = W // ``stride_px``
            of its level; float32 outside of autocast. Row 0 is the top of the tile, column 0 its left edge. Without class and register
            tokens; a ViT applies its final norm to each level. A tile's maps do not depend on the rest of the batch.

        """
        raise NotImplementedError

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """:meth:`maps` of tiles (B, 3, H, W) float32, RGB in 0..1. Raises ValueError for an unknown level or a wrong size of tiles."""
        height, width = pixels_BCHW.shape[-2:]
        if height % self.tile_multiple_px or width % self.tile_multiple_px:
            raise ValueError(f"a tile of {height} x {width} px: sides must be multiples of {self.tile_multiple_px} px")
        if not all(0 <= index < len(self.levels) for index in indices):
            raise ValueError(f"levels {indices}: there are 0 to {len(self.levels) - 1}")
        return self.maps((pixels_BCHW - self.mean) / self.std, indices)

    @torch.inference_mode()
    def until(self, pixels_BCHW: Tensor, indices: tuple[int, ...], num_blocks: int) -> tuple[list[Tensor], Tensor]:
        """:meth:`begin` of tiles (B, 3, H, W) float32, RGB in 0..1, for runs that train the remaining blocks."""
        return self.begin((pixels_BCHW - self.mean) / self.std, indices, num_blocks)

    def begin(self, x_BCHW: Tensor, indices: tuple[int, ...], num_blocks: int) -> tuple[list[Tensor], Tensor]:
        """The first ``num_blocks`` blocks on normalised tiles. Optional, for runs with ``unfreeze``.

        Returns the maps at ``indices`` (all below ``num_blocks``), as :meth:`maps` gives them, and all tokens (B, N, D) that enter the next
        block, before any norm.
        """
        raise CellbenchError(f"{type(self).__name__} cannot be cut between two blocks. Set unfreeze = 0, or take a backbone of timm.")

    def tail(self, num_blocks: int) -> nn.Module:
        """A trainable copy of the last ``num_blocks`` blocks and the final norm. Optional, for runs with ``unfreeze``.

        It is called as ``(tokens (B, N, D), indices, (h, w)) -> maps``.
        """
        raise CellbenchError(f"{type(self).__name__} cannot be cut between two blocks. Set unfreeze = 0, or take a backbone of timm.")

    def check_first_stays_frozen(self, num_blocks: int, parts: str = "blocks") -> None:
        """For :meth:`tail`. Raises CellbenchError where ``num_blocks`` is all of them; ``parts`` is their name in the message."""
        if num_blocks >= len(self.levels):
            raise CellbenchError(
                f"unfreeze = {num_blocks}: the backbone has {len(self.levels)} {parts}, and at least the first must stay frozen."
            )

    def train(self, mode: bool = True) -> Backbone:
        """Ignores ``mode``: frozen means eval mode, dropout and drop path included."""
        return super().train(False)

    def freeze(self) -> Backbone:
        """Turns off gradients, sets eval mode and returns itself."""
        self.requires_grad_(False)
        return self.train()

    def pick(self, num: int) -> tuple[Level, ...]:
        """``num`` levels evenly spaced over the depth, the last one included; all levels where there are fewer.

        For a ViT of 12 blocks and ``num`` = 4: 2, 5, 8 and 11, as in DPT and UNETR decoders.
        """
        depth = len(self.levels)
        num = min(num, depth)
        return tuple(self.levels[(i + 1) * depth // num - 1] for i in range(num))


def norm_channels(map_BDhw: Tensor) -> Tensor:
    """Each place of a map normed over its channels, without learned factors, as the maps of pyramids are."""
    map_BhwD = map_BDhw.permute(0, 2, 3, 1)
    return functional.layer_norm(map_BhwD, map_BhwD.shape[-1:], eps=1e-6).permute(0, 3, 1, 2).contiguous()
