"""Augmentations of training tiles: rotations by right angles, flips, stain and colour changes, and those of the user.

A user's :class:`Augmentation` of colours is one class, which draws parameters for each tile and applies them to a batch. A shipped one gets random
numbers instead, those of all tiles at once. To add one here: a field of ``cellbench.config.run.RunSpec``, marked as part of the cohort, and a class
in :func:`shipped_augmentations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cellbench.config.registry import Registry, load
from cellbench.config.run import RunSpec
from cellbench.data.transforms.background_normalisation import WHITE
from cellbench.hardware import to_device

Draw = tuple[float, ...]
Draws = np.ndarray | list[Draw]
"""Parameters of B tiles: (B, P) float64, or for a user's augmentation a tuple each."""

# RGB to YIQ (NTSC, 1953): a turn of hue is a rotation of I and Q, linear, where HSV's hue would need a branch at every pixel.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)
_RGB = torch.linalg.inv(_YIQ)


class Augmentation(Protocol):
    """A change of colours; pixels stay where they are. A user's class takes its strength, the number in front of its name, as only argument."""

    def draw(self, rng: np.random.Generator) -> Draw:
        """The parameters for one tile: plain floats, always as many draws from ``rng``."""

    def apply(self, pixels_BCHW: Tensor, draws: list[Draw]) -> Tensor:
        """Tiles (B, 3, H, W) float32 in 0..1, changed in place or not, each with its own parameters; again in 0..1. Draws nothing."""


class ShippedAugmentation(Protocol):
    """As :class:`Augmentation`, with parameters that are computed from uniform random numbers, of many tiles at once."""

    @property
    def reach(self) -> tuple[float, ...]:
        """The largest absolute value of each of the N random numbers of a tile; none if all tiles stay as they are."""

    def parameters(self, drawn_BN: np.ndarray) -> np.ndarray:
        """The parameters (B, P) from random numbers, each uniform from its negative reach to its reach."""

    def apply(self, pixels_BCHW: Tensor, draws: Draws) -> Tensor:
        """As of :class:`Augmentation`."""


def shipped_augmentations(run: RunSpec) -> list[ShippedAugmentation]:
    """The shipped augmentations of a run, in the order in which they are applied."""
    return [
        ReferenceStains(run.reference_stains),
        StainJitter(run.hed),
        ColourJitter(run.brightness, run.contrast, run.saturation, run.hue),
    ]


def own_augmentations(run: RunSpec, registry: Registry) -> dict[str, Augmentation]:
    """The user's augmentations of a run by name, in the order in which they are applied, after the shipped ones."""
    return {name: load(registry.augmentation(name))(strength) for name, strength in run.own_augmentations.items()}


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
        self.reach = (reach,) * 4 if reach else ()

    def parameters(self, drawn_BN: np.ndarray) -> np.ndarray:
        return np.exp(drawn_BN[:, :1] + drawn_BN[:, 1:]) if self.reach else _repeated(self.NEUTRAL, len(drawn_BN))

    def apply(self, pixels_BCHW: Tensor, draws: Draws) -> Tensor:
        if _all_equal(draws, self.NEUTRAL):
            return pixels_BCHW
        factors = to_device(_double(draws).to(pixels_BCHW.dtype).view(-1, 3, 1, 1), pixels_BCHW.device)
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
        self.reach = (hed,) * 6 if hed else ()

    def parameters(self, drawn_BN: np.ndarray) -> np.ndarray:
        if not self.reach:
            return _repeated(self.NEUTRAL, len(drawn_BN))
        return np.concatenate([1 + drawn_BN[:, :3], self.ADDED * drawn_BN[:, 3:]], axis=1)

    def apply(self, pixels_BCHW: Tensor, draws: Draws) -> Tensor:
        if _all_equal(draws, self.NEUTRAL):
            return pixels_BCHW
        from skimage.color import hed_from_rgb, rgb_from_hed

        # skimage multiplies rows of pixels from the left, so a matrix for columns is its transpose.
        to_hed, to_rgb = (torch.from_numpy(matrix.copy()).double().T for matrix in (hed_from_rgb, rgb_from_hed))
        factors_B3, shifts_B3 = _double(draws).split(3, dim=1)
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
        reach = (brightness, contrast, saturation, hue)
        self.reach = reach if any(reach) else ()

    def parameters(self, drawn_BN: np.ndarray) -> np.ndarray:
        return self.NEUTRAL + drawn_BN if self.reach else _repeated(self.NEUTRAL, len(drawn_BN))

    def apply(self, pixels_BCHW: Tensor, draws: Draws) -> Tensor:
        if _all_equal(draws, self.NEUTRAL):
            return pixels_BCHW
        grey = _YIQ[0]
        brightness, contrast, saturation, hue = _double(draws).unbind(1)
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


def apply_all(augmentations: Sequence[ShippedAugmentation | Augmentation], pixels_BCHW: Tensor, draws: Sequence[Draws]) -> Tensor:
    """Tiles (B, 3, H, W) after all augmentations. ``draws``: of all tiles, by augmentation."""
    for one, of_tiles in zip(augmentations, draws, strict=True):
        pixels_BCHW = one.apply(pixels_BCHW, of_tiles)  # type: ignore[arg-type]  # a user's gets tuples
    return pixels_BCHW


def _repeated(draw: Draw, num: int) -> np.ndarray:
    return np.tile(draw, (num, 1))


def _all_equal(draws: Draws, draw: Draw) -> bool:
    return bool((np.asarray(draws) == draw).all())


def _double(draws: Draws) -> Tensor:
    return torch.from_numpy(np.asarray(draws, np.float64))
