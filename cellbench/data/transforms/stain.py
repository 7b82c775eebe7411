"""Stain normalisation: maps an image's colours to those of the training images, to which alone the normaliser is fitted.

Letters: H x W image, N pixels, 3 red-green-blue. Optical densities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cellbench.data.transforms.background_normalisation import Background

ThreeFloats = tuple[float, float, float]
MOST_IMAGES = 200
"""Maximum number of images for fitting, evenly spaced; more do not change their mean noticeably."""
LIGHT, BETA, ALPHA = 240, 0.15, 1.0
"""Macenko's light through empty glass in grey levels, the density below which a pixel counts as glass, and the percentile taken as extreme."""
MIN_IMAGES = 100
"""Minimum number of stained pixels; below it an image counts as unstained."""


@dataclass(frozen=True, kw_only=True)
class Reinhard:
    """Each CIELAB channel's mean and deviation over an image, moved to these (Reinhard et al. 2001, in the colour space that pathology uses)."""

    mean: ThreeFloats
    deviation: ThreeFloats

    @classmethod
    def fitted(cls, images: Iterable[np.ndarray]) -> Reinhard:
        """The mean of the images' own means and deviations; (H, W, 3) uint8 RGB each."""
        from skimage.color import rgb2lab

        all_means, all_deviations = zip(*(_lab_statistics(rgb2lab(image)) for image in images), strict=True)
        return cls(mean=_three(np.mean(all_means, axis=0)), deviation=_three(np.mean(all_deviations, axis=0)))

    def image(self, image: np.ndarray) -> np.ndarray:
        """The image (H, W, 3) uint8 in the new colours. A constant channel keeps its deviation of zero."""
        from skimage.color import lab2rgb, rgb2lab

        lab = rgb2lab((image / np.float32(255)).astype(np.float32))
        mean, deviation = _lab_statistics(lab)
        lab = (lab - mean.astype(np.float32)) * (np.array(self.deviation) / np.maximum(deviation, 1e-6)).astype(np.float32)
        lab += np.array(self.mean, np.float32)
        # Beyond this there is no colour (Z below zero), and skimage would cut off the same, with a warning for each image.
        lab[..., 0] = np.maximum(lab[..., 0], 0)
        lab[..., 2] = np.minimum(lab[..., 2], 200 / 116 * (lab[..., 0] + 16))
        return _bytes(lab2rgb(lab) * 255)


@dataclass(frozen=True, kw_only=True)
class Macenko:
    """Two stains' colours and strengths, estimated from an image's optical densities and replaced by these (Macenko et al. 2009).

    Made for haematoxylin and eosin; Giemsa's azure and eosin are two stains as well.
    """

    stains: tuple[ThreeFloats, ThreeFloats]
    """Unit vectors of optical density; the first has more red in it, as haematoxylin and azure do."""
    most: tuple[float, float]
    """99th percentile of each stain's amount."""

    @classmethod
    def fitted(cls, images: Iterable[np.ndarray]) -> Macenko | None:
        """Fits to the pixels of all images together, (H, W, 3) uint8 RGB each; None if they show no stain."""
        return cls._of(_densities(np.concatenate([image.reshape(-1, 3)[:: max(1, image.size // 3 // 20_000)] for image in images])))

    @classmethod
    def _of(cls, densities_N3: np.ndarray) -> Macenko | None:
        stained = densities_N3[(densities_N3 >= BETA).all(axis=1)]
        if len(stained) < MIN_IMAGES:
            return None
        _, vectors = np.linalg.eigh(np.cov(stained.T))
        plane = vectors[:, :0:-1]
        plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)  # otherwise the angles may lie on both sides of 180 degrees
        along, across = (stained @ plane).T
        low, high = np.percentile(np.arctan2(across, along), [ALPHA, 100 - ALPHA])
        extremes = np.stack([plane @ (np.cos(angle), np.sin(angle)) for angle in (low, high)])
        extremes = extremes[np.argsort(-extremes[:, 0])]
        if np.linalg.matrix_rank(extremes, tol=1e-3) < 2:  # one colour alone
            return None
        most = np.percentile(_amounts(densities_N3, extremes), 99, axis=0)
        return (
            cls(stains=(_three(extremes[0]), _three(extremes[1])), most=(float(most[0]), float(most[1]))) if (most > 1e-3).all() else None
        )

    def image(self, image: np.ndarray) -> np.ndarray:
        """The image (H, W, 3) uint8 in the new stains; an unstained one is unchanged."""
        densities = _densities(image.reshape(-1, 3))
        own = self._of(densities)
        if own is None:
            return image
        amounts = _amounts(densities, np.array(own.stains)) * (np.array(self.most) / np.array(own.most)).astype(np.float32)
        return _bytes(LIGHT * np.exp(-amounts @ np.array(self.stains, np.float32))).reshape(image.shape)


Normaliser = Reinhard | Macenko | Background
KINDS: dict[str, type[Reinhard] | type[Macenko] | type[Background]] = {
    "reinhard": Reinhard,
    "macenko": Macenko,
    "background": Background,
}


def _lab_statistics(lab_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = lab_HW3.reshape(-1, 3)
    return flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)


def _densities(pixels_N3: np.ndarray) -> np.ndarray:
    # Of 256 values only: a table is thirty times faster than two million logarithms.
    return (-np.log((np.arange(256) + 1) / LIGHT)).astype(np.float32)[pixels_N3]


def _amounts(densities_N3: np.ndarray, stains_23: np.ndarray) -> np.ndarray:
    return densities_N3 @ np.linalg.pinv(stains_23).astype(np.float32)


def _three(values: np.ndarray) -> ThreeFloats:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _bytes(levels: np.ndarray) -> np.ndarray:
    return np.clip(levels + 0.5, 0, 255).astype(np.uint8)  # to the nearest
