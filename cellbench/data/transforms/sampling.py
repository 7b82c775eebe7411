"""Which tiles are seen when, fixed before anything is computed, from the images' sizes, the sampling and the data seed alone.

A run's own seed has no say here: all runs of a cohort learn from the same views in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cellbench.config.run import RunSpec
from cellbench.data.transforms.framing import Framing


class TileSample(NamedTuple):
    """One training tile: where it lies, in framed pixels, and how it is turned and coloured."""

    image: int
    y: int
    x: int
    turn: int
    """0 to 7: the four right rotations, then the same of the left-right mirrored tile."""
    colour: tuple[float, float, float, float]
    """Factors of brightness, contrast and saturation, and a turn of hue as a share of the circle; (1, 1, 1, 0) changes nothing."""
    stain: tuple[float, float, float, float, float, float] = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    """Factors of the amounts of haematoxylin, eosin and DAB, then what is added to each as natural optical density."""


UNTOUCHED = (1.0, 1.0, 1.0, 0.0)
UNSTAINED = TileSample._field_defaults["stain"]
ADDED = 0.25
"""What is added to a stain at most, in optical density, for each unit of ``hed``: a quarter of what a factor changes at a density of 1."""


def num_used_images(num_images: int, fraction: float) -> int:
    """How many of the training images a share of them is: at least one, halves rounded up.

    >>> [num_seen(9, fraction) for fraction in (0.01, 0.1, 0.5, 1.0)]
    [1, 1, 5, 9]
    """
    return max(1, int(num_images * fraction + 0.5))


@dataclass(frozen=True)
class SamplingPlan:
    """The training views of every epoch. ``sizes_px`` are the (height, width) of the training images, in their order."""

    sizes_px: tuple[tuple[int, int], ...]
    run: RunSpec
    """Any run of the cohort: only its stream is read."""

    @cached_property
    def framing(self) -> Framing:
        return Framing.of(self.run)

    @cached_property
    def tile_px(self) -> tuple[int, int]:
        """Height and width of every training tile."""
        return self.framing.tile_px(tuple(self.sizes_px[image] for image in self.seen))

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """The numbers of the images that are learned from. Those of a smaller share are among those of a larger one."""
        order = np.random.default_rng([self.run.data_seed, 2**31 + 1]).permutation(len(self.sizes_px))
        return tuple(sorted(order[: num_used_images(len(self.sizes_px), self.run.fraction)].tolist()))

    @property
    def num_views(self) -> int:
        """Views an epoch."""
        if self.run.sampling == "crops":
            return len(self.sizes_px) * self.run.crops_per_image
        return sum(len(self.framing.grid(self.sizes_px[image], self.tile_px, 0.0)) for image in self._turns(0))

    @property
    def repeats(self) -> bool:
        """Whether an epoch's views come again later."""
        return self.run.repeat_views_every > 0

    def cycle(self, epoch: int) -> int:
        """Which set of views an epoch sees: its own, or one of ``views`` that take turns."""
        return epoch % self.run.repeat_views_every if self.run.repeat_views_every else epoch

    def views(self, cycle: int) -> list[TileSample]:
        """All views of a cycle, image by image."""
        out: list[TileSample] = []
        for turn, image in enumerate(self._turns(cycle)):
            rng = np.random.default_rng([self.run.data_seed, cycle, turn])
            for y, x in self._corners(self.sizes_px[image], rng):
                out.append(TileSample(image, y, x, self._turn(rng), self._colour(rng), self._stain(rng)))
        return out

    def order(self, epoch: int) -> np.ndarray:
        """The order in which an epoch goes through its cycle's views; new each epoch."""
        return np.random.default_rng([self.run.data_seed, epoch, 2**31]).permutation(self.num_views)

    def _turns(self, cycle: int) -> list[int]:
        """The images of a cycle, as many as there are in all: where not all are seen, those that are take turns."""
        # Crops go on where the last cycle ended, so that each image is seen equally often. Whole images may differ in their number of tiles,
        # and every cycle must have as many.
        start = cycle * len(self.sizes_px) if self.run.sampling == "crops" else 0
        return [self.seen[(start + turn) % len(self.seen)] for turn in range(len(self.sizes_px))]

    def _corners(self, size_px: tuple[int, int], rng: np.random.Generator) -> list[tuple[int, int]]:
        if self.run.sampling == "tiles":
            return list(self.framing.grid(size_px, self.tile_px, 0.0))
        down, right = (max(length - tile, 0) for length, tile in zip(self.framing.framed_px(size_px), self.tile_px, strict=True))
        return [(int(rng.integers(down + 1)), int(rng.integers(right + 1))) for _ in range(self.run.crops_per_image)]

    def _turn(self, rng: np.random.Generator) -> int:
        quarter = int(rng.integers(4)) if self.run.rotations else 0
        if self.tile_px[0] != self.tile_px[1]:
            quarter -= quarter % 2  # half turns only: on its side the frame would have another shape than the rest of its batch
        return quarter + 4 * (int(rng.integers(2)) if self.run.flips else 0)

    def _colour(self, rng: np.random.Generator) -> tuple[float, float, float, float]:
        reach = (self.run.brightness, self.run.contrast, self.run.saturation, self.run.hue)
        if not any(reach):
            return UNTOUCHED
        brightness, contrast, saturation, hue = (middle + rng.uniform(-r, r) for middle, r in zip(UNTOUCHED, reach, strict=True))
        return float(brightness), float(contrast), float(saturation), float(hue)

    def _stain(self, rng: np.random.Generator) -> tuple[float, float, float, float, float, float]:
        reach = self.run.hed
        if not reach:
            return UNSTAINED
        a, b, c, d, e, f = (*(1 + rng.uniform(-reach, reach, 3)), *(ADDED * rng.uniform(-reach, reach, 3)))
        return float(a), float(b), float(c), float(d), float(e), float(f)
