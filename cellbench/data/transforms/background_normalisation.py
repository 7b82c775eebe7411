"""Stain normalisation without a reference image: an image's own background becomes white, its own foreground gets a fixed density.

Letters: H x W image, h x w its thumbnail, 3 red-green-blue. In bright field the *amount* of a pixel is its optical density, the natural logarithm of
the background divided by it; in dark field (fluorescence) it is the light beyond the background, where 1 is the whole range of 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from cellbench.dark_field import is_dark_field

WHITE, AMOUNT = 235.0, 0.5
"""Grey level of the background, and amount of the foreground's median, in normalised images. 20 levels remain for what is lighter than the background."""
THUMBNAIL_PX, MOST_MEAN_PX = 400, 4
"""Longest side of the thumbnail. One of its pixels is the mean of at most 4 x 4: cells of a whole slide would vanish in larger means."""
SURFACE = 1 / 8
"""Standard deviation of the smoothing that makes the background's surface, as a share of the longest side."""
ROUNDS = 3
"""Estimates of the background; each leaves out the foreground of the one before."""
DEVIATIONS, LEAST = 4, {False: 0.04, True: 0.01}
"""Foreground differs from the background by this many robust deviations, and by at least this amount in bright field and in dark field."""
PRIOR_SHARE = 0.005
"""Share of an image's pixels at which its own foreground counts as much as that of the training images."""
LEAST_OF_TYPICAL = {False: 1 / 5, True: 1 / 20}
"""Smallest amount that an image's foreground is taken to have, as a share of that of the training images: stains differ fourfold, exposures tenfold."""
MOST_LIGHTER = 0.5
"""Largest number of pixels on the other side of the background, as a share of the foreground, in images that are normalised."""
MOST_SPECKS = 0.02
"""That share of all pixels may always lie on the other side."""
QUIET = 1.5
"""Deviation of the noise in a normalised image, in grey levels, that is always left: blood smears and tissue have 0.4 to 1.4, dim fluorescence up to 8."""
NOISE_STRIPS, NOISE_ROWS = 8, 64
"""Noise is measured in this many strips of an image, of this many rows."""
STRIP_ROWS = 512


@dataclass(frozen=True)
class Estimate:
    """Background and foreground of one image."""

    dark_field: bool
    surface: np.ndarray
    """The background's levels (h, w, 3) float32, 1 to 256."""
    amount: float
    """The foreground's median, in the mean of the channels; 0 without foreground."""
    share: float
    """Of foreground in the image."""
    lighter: float
    """Of pixels on the other side of the background."""
    noise: float
    """Deviation of the noise in the mean of the channels, in grey levels of the image."""

    @property
    def one_sided(self) -> bool:
        """Whether this is bright or dark field; in phase contrast, cells are darker and lighter than the background."""
        return self.lighter <= max(MOST_LIGHTER * self.share, MOST_SPECKS)

    @property
    def noise_per_factor(self) -> float:
        """Deviation of the noise in the normalised image's background, in grey levels, where amounts are not scaled."""
        return WHITE * self.noise / (256 if self.dark_field else float(self.surface.mean()))


@dataclass(frozen=True, kw_only=True)
class Background:
    """Each image's background becomes white and level, its foreground's median amount ``AMOUNT``; dark field is inverted.

    Independent of how many cells there are, where a mean over the image is not. Flat field and white balance are per channel, the amount's scale is
    common to all, so hues of stains remain. Dim fluorescence becomes as strong as any, and its noise with it: an image with more noise than the training
    images is smoothed until it has as much. An image whose background cannot be found is unchanged.
    """

    bright_field: float = AMOUNT
    """Typical amount in the training images: that of an image with hardly any foreground."""
    dark_field: float = AMOUNT
    most_noise: float | None = None
    """Deviation of the noise in a normalised image, in grey levels, beyond which it is smoothed; None in runs before ``NUMERICS_VERSION`` 6: never."""

    @classmethod
    def fitted(cls, images: Iterable[np.ndarray]) -> Background | None:
        """The medians of the images' own amounts, (H, W, 3) uint8 RGB each; None if most of them are neither bright nor dark field."""
        all_estimates = [estimate(image) for image in images]
        if 2 * sum(one is not None and not one.one_sided for one in all_estimates) > len(all_estimates):
            return None
        found = [one for one in all_estimates if one is not None and one.one_sided and one.share >= PRIOR_SHARE]
        bright, dark = ([one.amount for one in found if one.dark_field is which] for which in (False, True))
        fitted = cls(**{name: float(np.median(amounts)) for name, amounts in (("bright_field", bright), ("dark_field", dark)) if amounts})
        noises = [fitted._factor(one) * one.noise_per_factor for one in found]
        return replace(fitted, most_noise=max(QUIET, float(np.median(noises)) if noises else 0.0))

    def image(self, image: np.ndarray) -> np.ndarray:
        """The image (H, W, 3) uint8, foreground dark on white."""
        found = estimate(image)
        if found is None or not found.one_sided:
            return image
        factor = self._factor(found)
        # exp(-factor * amount) is a product of one factor by the pixel and one by the background, the first of 256 values only.
        levels, surface = np.arange(1, 257, dtype=np.float64), found.surface.astype(np.float64)
        if found.dark_field:
            of_level, of_surface = np.exp(-factor * levels / 256), np.exp(factor * surface / 256)
        else:
            of_level, of_surface = (levels / 256) ** factor, (surface / 256) ** -factor
        out = _times(image, (WHITE * of_level).astype(np.float32), of_surface.astype(np.float32))
        excess = factor * found.noise_per_factor / self.most_noise if self.most_noise else 0.0
        # A Gaussian of deviation s leaves 1 / (2 s sqrt(pi)) of white noise.
        return cv2.GaussianBlur(out, (0, 0), excess / (2 * math.sqrt(math.pi)), borderType=cv2.BORDER_REFLECT) if excess > 1 else out

    def _factor(self, found: Estimate) -> float:
        """What turns the image's amounts into densities of the normalised image."""
        typical = self.dark_field if found.dark_field else self.bright_field
        # A mean of logarithms: the dust of an empty image has no say, as it is few pixels or pale.
        own = found.share / (found.share + PRIOR_SHARE)
        return float(
            AMOUNT / np.exp(own * np.log(max(found.amount, LEAST_OF_TYPICAL[found.dark_field] * typical)) + (1 - own) * np.log(typical))
        )


def estimate(image: np.ndarray) -> Estimate | None:
    """Background and foreground of an image (H, W, 3) uint8; None if all its pixels are equal."""
    from skimage.filters import threshold_otsu

    levels = thumbnail(image) + 1
    grey = levels.mean(axis=-1)
    if np.ptp(grey) < 1e-3:
        return None
    threshold = float(threshold_otsu(grey))
    dark_field = is_dark_field(grey - 1, threshold - 1)
    background = grey <= threshold if dark_field else grey > threshold
    cells = ~background
    for _ in range(ROUNDS):
        # The parabola continues into corners that a vignette has put on the wrong side of the threshold; what it cannot follow is smoothed.
        surface = _parabola(levels, background)
        surface = surface * _smooth(levels / surface, background)
        amount = ((levels - surface) / 256 if dark_field else np.log(surface / levels)).mean(axis=-1)
        middle = float(np.median(amount[background]))
        spread = 1.4826 * float(np.median(np.abs(amount[background] - middle)))
        # Not beyond half-way to the cells: between crowded ones the brighter side is not background alone, and its spread is large.
        reach = max(min(DEVIATIONS * spread, (float(np.median(amount[cells])) - middle) / 2), LEAST[dark_field])
        foreground = amount - middle > reach
        near = np.abs(amount - middle) <= reach
        if not near.any():
            break
        background = near
    num = int(foreground.sum())
    return Estimate(
        dark_field=dark_field,
        surface=surface,
        # In dark field weighted by the amount: around bright nuclei there is more halo than nucleus.
        amount=_median(amount[foreground], amount[foreground] if dark_field else np.ones(num)) if num else 0.0,
        share=num / foreground.size,
        lighter=float((amount - middle < -reach).mean()),
        noise=noise_deviation(image),
    )


def noise_deviation(image: np.ndarray) -> float:
    """The deviation of an image's noise, of the mean of its channels, in grey levels: of (H, W, 3) uint8.

    By a filter to which planes and edges along the axes are nothing (Immerkaer 1996), with the median of its values, so that cells count little.
    """
    tops = np.unique(np.linspace(0, max(len(image) - NOISE_ROWS, 0), NOISE_STRIPS).astype(int))
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    strips = (image[top : top + NOISE_ROWS].mean(axis=-1, dtype=np.float32) for top in tops)
    return float(np.median(np.concatenate([np.abs(cv2.filter2D(strip, -1, kernel)).ravel() for strip in strips]))) / (6 * 0.6745)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Means (h, w, 3) float32 of blocks of an image (H, W, 3), at most ``THUMBNAIL_PX`` along its longest side."""
    step = -(-max(image.shape[:2]) // THUMBNAIL_PX)
    side = min(step, MOST_MEAN_PX)
    height, width = (length // step * step for length in image.shape[:2])
    if not (height and width):  # a strip narrower than a block
        return image[::step, ::step].astype(np.float32)
    blocks = image[:height, :width].reshape(height // step, step, width // step, step, 3)
    small = np.zeros((height // step, width // step, 3), np.float32)
    for y in range(side):
        for x in range(side):
            small += blocks[:, y, :, x]
    return small / side**2


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _parabola(levels_hw3: np.ndarray, background_hw: np.ndarray) -> np.ndarray:
    """The background's least-squares parabola in both directions, kept within half and twice its mean."""
    y, x = (np.linspace(-1, 1, length, dtype=np.float32) for length in background_hw.shape)
    terms = np.stack(np.broadcast_arrays(np.float32(1), x, y[:, None], x * y[:, None], x**2, y[:, None] ** 2), axis=-1)
    where = background_hw.copy()
    where[np.indices(where.shape).sum(axis=0) % 5 > 0] = False  # a fifth of the pixels will do
    where = where if where.sum() >= 100 else background_hw
    found = np.linalg.lstsq(terms[where], levels_hw3[where], rcond=1e-4)[0]
    overall = levels_hw3[background_hw].mean(axis=0)
    return np.clip(terms @ found, overall / 2, np.minimum(overall * 2, 256))


def _smooth(levels_hw3: np.ndarray, background_hw: np.ndarray) -> np.ndarray:
    """The background's Gaussian-weighted mean around each place (h, w, 3); far from any background, the mean over all of it."""
    weight = background_hw.astype(np.float32)
    overall = levels_hw3[background_hw].mean(axis=0)
    sigma = max(max(weight.shape) * SURFACE, 1.0)
    coarse = max(1, round(sigma / 6))  # so smooth a surface loses nothing, and a blur takes the fourth power of it less time
    near, size = np.dstack([levels_hw3 * weight[..., None], weight]), weight.shape[::-1]
    blurred = cv2.resize(near, (-(-size[0] // coarse), -(-size[1] // coarse)), interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(blurred, (0, 0), sigma / coarse, borderType=cv2.BORDER_REFLECT)
    blurred = cv2.resize(blurred, size, interpolation=cv2.INTER_LINEAR)
    return (blurred[..., :3] + 1e-3 * overall) / (blurred[..., 3:] + 1e-3)


def _times(image: np.ndarray, of_level: np.ndarray, of_surface_hw3: np.ndarray) -> np.ndarray:
    """Each pixel's factor by its level times that of its place, interpolated between the thumbnail's pixels; strip by strip, as a slide is large."""
    height, width = image.shape[:2]
    wide = cv2.resize(of_surface_hw3, (width, len(of_surface_hw3)), interpolation=cv2.INTER_LINEAR)
    at = ((np.arange(height) + 0.5) * len(wide) / height - 0.5).clip(0, len(wide) - 1)
    below = np.minimum(at.astype(int) + 1, len(wide) - 1)
    share = (at - at.astype(int)).astype(np.float32)[:, None, None]
    out = np.empty(image.shape, np.uint8)
    for top in range(0, height, STRIP_ROWS):
        rows = slice(top, top + STRIP_ROWS)
        surface = wide[at[rows].astype(int)] * (1 - share[rows]) + wide[below[rows]] * share[rows]
        surface *= cv2.LUT(np.ascontiguousarray(image[rows]), of_level)
        surface += 0.5  # to the nearest
        out[rows] = np.minimum(surface, 255)
    return out
