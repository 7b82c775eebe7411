"""What a view does to a tile: a right turn or mirror, a change of its stains, and a change of colour, each one linear map a pixel."""

from __future__ import annotations

import math

import numpy as np
import torch
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from cellbench.data.transforms.sampling import UNSTAINED, UNTOUCHED

# RGB to YIQ (NTSC, 1953): a turn of hue is a rotation of I and Q, linear, where HSV's hue would need a branch at every pixel.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)
_RGB = torch.linalg.inv(_YIQ)


def rotate_flip(tile: np.ndarray, code: int) -> np.ndarray:
    """A tile (T, T, ...) turned by ``code % 4`` quarter turns counter-clockwise, after a left-right mirror from 4 on."""
    return np.rot90(tile[:, ::-1] if code >= 4 else tile, code % 4)


def jitter_stain(pixels_BCHW: Tensor, stains: list[tuple[float, float, float, float, float, float]]) -> Tensor:
    """Tiles (B, 3, H, W) in 0..1 with each one's haematoxylin, eosin and DAB multiplied by three factors and shifted by three densities.

    Ruifrok and Johnston's stain vectors, by skimage (Tellez et al. 2018, doi 10.1109/TMI.2018.2820199, varied the same three). Amounts are
    not cut off at zero, as ``skimage.color.rgb2hed`` does: so factors of 1 change nothing, and the whole is one affine map of optical
    densities.
    """
    if all(stain == UNSTAINED for stain in stains):
        return pixels_BCHW
    # skimage multiplies rows of pixels from the left, so a matrix for columns is its transpose.
    to_hed, to_rgb = (torch.from_numpy(matrix.copy()).double().T for matrix in (hed_from_rgb, rgb_from_hed))
    factors_B3, shifts_B3 = torch.tensor(stains, dtype=torch.float64).split(3, dim=1)
    matrix = to_rgb @ torch.diag_embed(factors_B3) @ to_hed
    offset = shifts_B3 @ to_rgb.T
    density = pixels_BCHW.clamp_min(1e-6).log_().neg_().flatten(2)  # 1e-6, as skimage: black has no finite density
    changed = torch.baddbmm(offset.to(pixels_BCHW).unsqueeze(-1), matrix.to(pixels_BCHW), density)
    return changed.neg_().exp_().clamp_(0, 1).view_as(pixels_BCHW)


def jitter_colour(pixels_BCHW: Tensor, colours: list[tuple[float, float, float, float]]) -> Tensor:
    """Tiles (B, 3, H, W) in 0..1 with each one's brightness, contrast, saturation and hue changed; clipped to 0..1.

    In that order, as torchvision's ColorJitter names them: a factor; a blend with the tile's mean grey; a blend with each pixel's grey;
    a rotation in the chroma plane. All four are affine, so the whole is one 3x3 matrix and an offset for each tile.
    """
    if all(colour == UNTOUCHED for colour in colours):
        return pixels_BCHW
    grey = _YIQ[0]
    means = torch.einsum("bc,c->b", pixels_BCHW.mean((2, 3)).cpu().double(), grey)
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
