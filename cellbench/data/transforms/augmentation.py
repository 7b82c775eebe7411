"""Augmentations of training tiles: rotations by right angles, flips, stain and colour changes, and those of the user.

An :class:`Augmentation` of colours is one class: made with its settings of a run, it draws parameters for each tile and applies them to a batch.
:func:`colour_augmentations` lists those of a run in the order in which they are applied. To add one here: a field of
``cellbench.config.run.RunSpec``, marked as part of the cohort, and a class in that list.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cellbench.config.registry import Registry, load
from cellbench.config.run import RunSpec
from cellbench.data.transforms.background_normalisation import WHITE
from cellbench.hardware import to_device

Draw = tuple[float, ...]

# RGB to YIQ (NTSC, 1953): a turn of hue is a rotation of I and Q, linear, where HSV's hue would need a branch at every pixel.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)
_RGB = torch.linalg.inv(_YIQ)


class Augmentation(Protocol):
    """A change of colours; pixels stay where they are. A user's class takes its strength, the number in front of its name, as only argument."""

    def draw(self, rng: np.random.Generator) -> Draw:
        """The parameters for one tile: plain floats, always as many draws from ``rng``."""

    def apply(self, pixels_BCHW: Tensor, draws: list[Draw]) -> Tensor:
        """Tiles (B, 3, H, W) float32 in 0..1, changed in place or not, each with its own parameters; again in 0..1. Draws nothing."""


def colour_augmentations(run: RunSpec, registry: Registry) -> list[Augmentation]:
    """The augmentations of a run, in the order in which they are applied: the shipped ones, then the user's."""
    shipped: list[Augmentation] = [
        ReferenceStains(run.reference_stains),
        StainJitter(run.hed),
        ColourJitter(run.brightness, run.contrast, run.saturation, run.hue),
    ]
    return shipped + [load(registry.augmentation(name))(strength) for name, strength in run.own_augmentations.items()]


def draw_turn(rng: np.random.Generator, *, rotations: bool, flips: bool, square: bool) -> int:
    """A code for :func:`rotate_flip`, 0 to 7: a quarter turn, or where tiles are not square a half turn, and a mirror."""
    quarter = int(rng.integers(4)) if rotations else 0
    if not square:
        quarter -= quarter % 2
    return quarter + 4 * (int(rng.integers(2)) if flips else 0)


def rotate_flip(tile: np.ndarray, code: int) -> np.ndarray:
    """A tile (T, T, ...) turned by ``code % 4`` quarter turns counter-clockwise, after a left-right mirror from 4 on."""
    return np.rot90(tile[:, ::-1] if code >= 4 else tile, code % 4)


class ReferenceStains:
    """Factors of the optical density of red, green and blue: tiles as if normalised to random reference stains, where test images have one.

    After Mahbod et al. 2023 (arXiv 2309.06143), who drew references from images. The factors exp(u + v) have a u common to the channels, a paler or
    a stronger stain, and a v for each, another colour. The background of images normalised by their ``background`` stays as it is.
    """

    NEUTRAL: Draw = (1.0, 1.0, 1.0)

    def __init__(self, reach: float = 0.0) -> None:
        self._reach = reach

    def draw(self, rng: np.random.Generator) -> Draw:
        if not self._reach:
            return self.NEUTRAL
        return tuple(np.exp(rng.uniform(-self._reach, self._reach) + rng.uniform(-self._reach, self._reach, 3)).tolist())

    def apply(self, pixels_BCHW: Tensor, draws: list[Draw]) -> Tensor:
        if all(factors == self.NEUTRAL for factors in draws):
            return pixels_BCHW
        factors = to_device(torch.tensor(draws, dtype=pixels_BCHW.dtype).view(-1, 3, 1, 1), pixels_BCHW.device)
        white = WHITE / 255
        return ((pixels_BCHW / white).clamp_min_(1e-6) ** factors).mul_(white).clamp_(0, 1)


class StainJitter:
    """Factors of the amounts of haematoxylin, eosin and DAB, and what is added to each as natural optical density.

    Ruifrok and Johnston's stain vectors, by skimage (Tellez et al. 2018, doi 10.1109/TMI.2018.2820199, varied the same three). Amounts are
    not cut off at zero, as ``skimage.color.rgb2hed`` does: so factors of 1 change nothing, and the whole is one affine map of optical
    densities.
    """

    NEUTRAL: Draw = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    ADDED = 0.25
    """Largest addition, in optical density, per unit of ``hed``: a quarter of what a factor changes at a density of 1."""

    def __init__(self, hed: float = 0.0) -> None:
        self._reach = hed

    def draw(self, rng: np.random.Generator) -> Draw:
        if not self._reach:
            return self.NEUTRAL
        factors, added = (rng.uniform(-self._reach, self._reach, 3) for _ in range(2))
        return (*(1 + factors).tolist(), *(self.ADDED * added).tolist())

    def apply(self, pixels_BCHW: Tensor, draws: list[Draw]) -> Tensor:
        if all(stain == self.NEUTRAL for stain in draws):
            return pixels_BCHW
        from skimage.color import hed_from_rgb, rgb_from_hed

        # skimage multiplies rows of pixels from the left, so a matrix for columns is its transpose.
        to_hed, to_rgb = (torch.from_numpy(matrix.copy()).double().T for matrix in (hed_from_rgb, rgb_from_hed))
        factors_B3, shifts_B3 = torch.tensor(draws, dtype=torch.float64).split(3, dim=1)
        matrix = to_rgb @ torch.diag_embed(factors_B3) @ to_hed
        offset = shifts_B3 @ to_rgb.T
        density = pixels_BCHW.clamp_min(1e-6).log_().neg_().flatten(2)  # 1e-6, as skimage: black has no finite density
        matrix, offset = (to_device(x.to(pixels_BCHW.dtype), pixels_BCHW.device) for x in (matrix, offset))
        changed = torch.baddbmm(offset.unsqueeze(-1), matrix, density)
        return changed.neg_().exp_().clamp_(0, 1).view_as(pixels_BCHW)


class ColourJitter:
    """Brightness, contrast, saturation and hue, in that order, as in torchvision's ColorJitter.

    A factor; a blend with the tile's mean grey; a blend with each pixel's grey; a rotation in the chroma plane, as a share of the circle.

    All four are affine, so the whole is one 3x3 matrix and an offset for each tile.
    """

    NEUTRAL: Draw = (1.0, 1.0, 1.0, 0.0)

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0) -> None:
        self._reach = (brightness, contrast, saturation, hue)

    def draw(self, rng: np.random.Generator) -> Draw:
        if not any(self._reach):
            return self.NEUTRAL
        return tuple(float(middle + rng.uniform(-reach, reach)) for middle, reach in zip(self.NEUTRAL, self._reach, strict=True))

    def apply(self, pixels_BCHW: Tensor, draws: list[Draw]) -> Tensor:
        if all(colour == self.NEUTRAL for colour in draws):
            return pixels_BCHW
        grey = _YIQ[0]
        brightness, contrast, saturation, hue = torch.tensor(draws, dtype=torch.float64).unbind(1)
        angle = 2 * math.pi * hue
        rotation = torch.eye(3, dtype=torch.float64).repeat(len(draws), 1, 1)
        # In single precision: the golden numbers depend on it.
        rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos().float().double()
        rotation[:, 2, 1] = angle.sin().float().double()
        rotation[:, 1, 2] = -rotation[:, 2, 1]
        blend = saturation[:, None, None]
        desaturate = blend * torch.eye(3, dtype=torch.float64) + (1 - blend) * grey.expand(3, 3)
        # Grey stays grey under both, so the offset of the contrast passes through them unchanged.
        matrix = ((brightness * contrast)[:, None, None] * (_RGB @ rotation @ _YIQ @ desaturate)).to(pixels_BCHW.dtype)
        # The tiles' means stay on a GPU, to avoid waiting for it; a Mac's GPU has no double precision.
        means = pixels_BCHW.mean((2, 3)).to("cpu" if pixels_BCHW.device.type == "mps" else pixels_BCHW.device).double()
        offset = to_device((1 - contrast) * brightness, means.device) * torch.einsum("bc,c->b", means, to_device(grey, means.device))
        offset = offset.to(pixels_BCHW).view(-1, 1, 1)
        flat = torch.baddbmm(offset, to_device(matrix, pixels_BCHW.device), pixels_BCHW.flatten(2))
        return flat.view_as(pixels_BCHW).clamp_(0, 1)


def apply_all(augmentations: list[Augmentation], pixels_BCHW: Tensor, draws: list[tuple[Draw, ...]]) -> Tensor:
    """Tiles (B, 3, H, W) after all augmentations, each tile with its draws."""
    for one, of_tiles in zip(augmentations, zip(*draws, strict=True), strict=True):
        pixels_BCHW = one.apply(pixels_BCHW, list(of_tiles))
    return pixels_BCHW
