"""A baseline without weights: colour filters at several scales, like ilastik's pixel features."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cellbench.config.cards import BackboneCard
from cellbench.models.backbones.base import Backbone, Level

RESPONSES = 6


class FilterBank(Backbone):
    """For each colour channel and scale: smoothed value, gradient magnitude, Laplacian, both eigenvalues of the Hessian, local deviation.

    The set of Berg et al. 2019 (ilastik, doi 10.1038/s41592-019-0582-9), averaged to one vector for each ``patch_px`` x ``patch_px``
    pixels. Wide filters work on a downsampled tile, as in an image pyramid. It has one level.
    """

    def __init__(self, card: BackboneCard, sigmas_px: list[float]) -> None:
        super().__init__(card.mean, card.std)
        self._patch = card.patch_px
        self._scales = [(sigma, _reduction(sigma, card.patch_px)) for sigma in sigmas_px]
        self.levels = (Level(index=0, dim=3 * RESPONSES * len(sigmas_px), stride_px=card.patch_px),)
        self.tile_multiple_px = card.patch_px

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        # In half precision the variance, a difference of two squares, would be rounding noise.
        with torch.autocast(x_BCHW.device.type, enabled=False):
            # Tile by tile: sixteen at once took 300 MB more and were slower, since nothing stayed in the CPU cache. In an exported network, which
            # takes any number of tiles, a loop over them would be written out for the number at export.
            parts = [x_BCHW.float()] if torch.compiler.is_exporting() else x_BCHW.float().split(1)
            tiles = [torch.cat([self._responses(x, sigma, by) for sigma, by in self._scales], 1) for x in parts]
        pooled = torch.cat(tiles)
        return [pooled for _ in indices]

    def _responses(self, x_BCHW: Tensor, sigma_px: float, by: int) -> Tensor:
        x = F.avg_pool2d(x_BCHW, by) if by > 1 else x_BCHW
        sigma = sigma_px / by
        smooth = _blur(x, sigma)
        deviation = (_blur(x**2, sigma) - smooth**2).clamp_min_(0).sqrt_()
        # Scale-normalised derivatives (Lindeberg 1998): responses of all scales have a comparable size.
        dy, dx = (sigma * d for d in _slopes(smooth))
        (dyy, dyx), (_, dxx) = ([sigma * d for d in _slopes(d)] for d in (dy, dx))
        middle, spread = (dyy + dxx) / 2, (((dyy - dxx) / 2) ** 2 + dyx**2).sqrt_()
        out = torch.cat([smooth, (dy**2 + dx**2).sqrt_(), 2 * middle, middle + spread, middle - spread, deviation], 1)
        return F.avg_pool2d(out, self._patch // by) if self._patch > by else out


def _reduction(sigma_px: float, patch_px: int) -> int:
    """Downsampling factor before a Gaussian: its sigma must stay at least 1.4 places, or it is no longer a Gaussian."""
    by = 1
    while by * 2 <= patch_px and patch_px % (by * 2) == 0 and sigma_px / (by * 2) >= 1.4:
        by *= 2
    return by


def _blur(x_BCHW: Tensor, sigma: float) -> Tensor:
    height, width = x_BCHW.shape[-2:]
    return _band(height, sigma).to(x_BCHW) @ x_BCHW @ _band(width, sigma).to(x_BCHW).T


@functools.lru_cache(maxsize=64)
def _band(length: int, sigma: float) -> Tensor:
    """A Gaussian along one axis as a matrix (length, length), the edge pixel repeated beyond the edge.

    A matrix product: depthwise convolutions with long one-dimensional kernels were 50 times slower on a CPU.
    """
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    matrix = torch.zeros(length, length, dtype=torch.float64)
    rows = torch.arange(length)
    for offset, value in zip(offsets.long().tolist(), (kernel / kernel.sum()).tolist(), strict=True):
        matrix[rows, (rows + offset).clamp(0, length - 1)] += value
    return matrix.float()


def _slopes(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences down and to the right."""
    padded = F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate")
    return (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2, (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2


def filter_bank(card: BackboneCard, state: dict[str, Any] | None) -> FilterBank:
    """The filter bank of a card; ``state`` is ignored."""
    return FilterBank(card, card.arch["sigmas_px"])
