"""The interface of a head: a small trainable function from a backbone's feature maps, and perhaps the tile's pixels, to class scores.

Letters: B tiles, K classes, D features, h x w places of a map, H x W pixels of a tile.

A head gets levels (channels and stride of each map), not a backbone: it must work with any number of them, any stride and any tile size.
The shipped heads put pointwise convolutions before a resize: the two commute, and there are up to 196 times fewer places before it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cellbench.models.backbones.base import Level


class Head(nn.Module):
    """A decoder. Subclasses take ``(levels, num_classes, **options)`` with keyword-only options, and implement :meth:`forward`.

    Args:
        levels: what the maps of :meth:`forward` will be, shallow to deep: as many as ``levels`` on the head's card, fewer where the backbone
            has fewer. A map of level ``l`` has ``l.dim`` channels and one place for each ``l.stride_px`` x ``l.stride_px`` pixels.
        num_classes: K, with the background as class 0.

    The options are those under ``[options]`` on the card, each with its default there. Weights are initialised with torch's global generator,
    which is seeded from the run.

    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int) -> None:
        super().__init__()
        self.levels, self.num_classes = levels, num_classes

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Class scores of each pixel. To be implemented by subclasses.

        Args:
            maps: one (B, D, h, w) for each of ``levels``, in their order; float32, or bfloat16 under autocast.
            pixels_BCHW: (B, 3, H, W) float32, RGB in 0..1, not normalised. A head that reads their values, not only their size, has
                ``pixels = true`` on its card.

        Returns:
            Logits (B, K, H, W), before softmax, finite, row 0 at the top of the tile.

        Random numbers may be drawn in training mode only, with torch's functions: they are seeded at each step, so that a run is repeatable.
        State that must survive a resume belongs in ``state_dict()``.

        """
        raise NotImplementedError


def resize(x_BDhw: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, D, h, w) to (B, D, H, W), bilinear with half-pixel centres, as all heads resize."""
    if x_BDhw.shape[-2:] == size:
        return x_BDhw
    return F.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=False)


def conv_bn_relu(dim_in: int, dim_out: int, kernel: int = 3) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU(inplace=True)
    )


def blocks_of_pixels(pixels_BCHW: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in 0..1 to (B, 12, h, w): each 2x2 block of pixels as one place, scaled; an odd edge is repeated."""
    height, width = pixels_BCHW.shape[-2:]
    even = F.pad(pixels_BCHW, (0, width % 2, 0, height % 2), mode="replicate") if height % 2 or width % 2 else pixels_BCHW
    return F.pixel_unshuffle(scaled_pixels(even), 2)


def scores_of_blocks(scores_BKhw: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """The scores (B, K, H, W) of pixels from those of their 2x2 blocks (B, 4 K, h, w): sub-pixel convolution (Shi et al. 2016)."""
    height, width = pixels_BCHW.shape[-2:]
    return F.pixel_shuffle(scores_BKhw, 2)[..., :height, :width]


def scaled_pixels(pixels_BCHW: Tensor) -> Tensor:
    """Pixels in 0..1 with about mean 0 and deviation 1."""
    return (pixels_BCHW - 0.5) / 0.25
