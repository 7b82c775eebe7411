"""What a view does to a tile: a right turn or mirror, and a change of colour that is one linear map a pixel."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cellbench.plan import UNTOUCHED

# RGB to YIQ (NTSC, 1953): a turn of hue is a rotation of I and Q, linear, where HSV's hue would need a branch at every pixel.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)
_RGB = torch.linalg.inv(_YIQ)


def turn(tile: np.ndarray, code: int) -> np.ndarray:
    """A tile (T, T, ...) turned by ``code % 4`` quarter turns counter-clockwise, after a left-right mirror from 4 on."""
    return np.rot90(tile[:, ::-1] if code >= 4 else tile, code % 4)


def recolour(pixels_BCHW: Tensor, colours: list[tuple[float, float, float, float]]) -> Tensor:
    """Tiles (B, 3, H, W) in 0..1 with each one's brightness, contrast, saturation and hue changed; clipped to 0..1.

    In that order, as torchvision's ColorJitter names them: a factor; a blend with the tile's mean grey; a blend with each pixel's grey;
    a rotation in the chroma plane. All four are affine, so the whole is one 3x3 matrix and an offset for each tile.
    """
    if all(colour == UNTOUCHED for colour in colours):
        return pixels_BCHW
    grey = _YIQ[0]
    means = torch.einsum("bc,c->b", pixels_BCHW.mean((2, 3)).double(), grey)
    matrices, offsets = [], []
    for (brightness, contrast, saturation, hue), mean in zip(colours, means, strict=True):
        angle = 2 * math.pi * hue
        rotation = torch.eye(3, dtype=torch.float64)
        rotation[1:, 1:] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        desaturate = saturation * torch.eye(3, dtype=torch.float64) + (1 - saturation) * grey.expand(3, 3)
        # Grey stays grey under both, so the offset of the contrast passes through them unchanged.
        matrices.append(brightness * contrast * (_RGB @ rotation @ _YIQ @ desaturate))
        offsets.append((1 - contrast) * brightness * mean)
    matrix = torch.stack(matrices).to(pixels_BCHW)
    offset = torch.stack(offsets).to(pixels_BCHW).view(-1, 1, 1)
    flat = torch.baddbmm(offset, matrix, pixels_BCHW.flatten(2))
    return flat.view_as(pixels_BCHW).clamp_(0, 1)
