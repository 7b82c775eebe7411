"""The sampling plan of training tiles. It depends on the image sizes, the sampling settings and the data seed only.

It does not depend on a run's own seed: all runs of a cohort train on the same views in the same order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cellbench.config.registry import Registry, digest_of
from cellbench.config.run import RunSpec
from cellbench.data.transforms.augmentation import Augmentation, Draw, colour_augmentations, draw_turn
from cellbench.data.transforms.framing import Framing

Box = tuple[int, int, int, int]
"""Top, left, bottom, right."""


class TileSample(NamedTuple):
    """One training tile: its upper left corner in framed pixels, and its augmentation."""

    image: int
    y: int
    x: int
    turn: int
    """0 to 7, for :func:`cellbench.data.transforms.augmentation.rotate_flip`."""
    draws: tuple[Draw, ...]
    """Parameters of each of the plan's augmentations."""
    crop_px: int = 0
    """Side of the square of framed pixels that is resized to the tile; 0: the tile's own pixels."""


def num_used_images(num_images: int, fraction: float) -> int:
    """The number of training images in a fraction of them: at least one, halves rounded up.

    >>> [num_used_images(9, fraction) for fraction in (0.01, 0.1, 0.5, 1.0)]
    [1, 1, 5, 9]
    """
    return max(1, int(num_images * fraction + 0.5))


@dataclass(frozen=True)
class SamplingPlan:
    """The training views of every epoch. ``sizes_px`` are the (height, width) of the training images, in their order."""

    sizes_px: tuple[tuple[int, int], ...]
    run: RunSpec
    """Any run of the cohort: only its ``stream`` is read."""
    registry: Registry = field(default_factory=Registry, compare=False)
    """Source of the user's augmentations."""
    boxes_px: tuple[tuple[Box, ...], ...] = ()
    """For each image the boxes of its regions of interest, in its own pixels: the centres of crops lie in them. None for an image: all of it."""

    @cached_property
    def augmentations(self) -> list[Augmentation]:
        return colour_augmentations(self.run, self.registry)

    @cached_property
    def own_code(self) -> tuple[str, ...]:
        """Hashes of the code of the user's augmentations."""
        return tuple(digest_of(self.registry.augmentation(name)) for name in self.run.own_augmentations)

    @cached_property
    def framing(self) -> Framing:
        return Framing.of(self.run)

    @cached_property
    def tile_px(self) -> tuple[int, int]:
        """Height and width of every training tile."""
        return self.framing.tile_px(tuple(self.sizes_px[image] for image in self.used_images))

    @cached_property
    def used_images(self) -> tuple[int, ...]:
        """Indices of the images used for training. Those of a smaller fraction are a subset of those of a larger one."""
        order = np.random.default_rng([self.run.data_seed, 2**31 + 1]).permutation(len(self.sizes_px))
        return tuple(sorted(order[: num_used_images(len(self.sizes_px), self.run.fraction)].tolist()))

    @property
    def num_views(self) -> int:
        """Views per epoch."""
        if self.run.sampling == "crops":
            return len(self.sizes_px) * self.run.crops_per_image
        return sum(len(self.framing.grid(self.sizes_px[image], self.tile_px, 0.0)) for image in self._turns(0))

    @property
    def repeats(self) -> bool:
        """Whether the views of an epoch are repeated later."""
        return self.run.repeat_views_every > 0

    def cycle(self, epoch: int) -> int:
        """The cycle of views of an epoch: its own, or one of those that are repeated."""
        return epoch % self.run.repeat_views_every if self.run.repeat_views_every else epoch

    def views(self, cycle: int) -> list[TileSample]:
        """All views of a cycle, image by image."""
        out: list[TileSample] = []
        for turn, image in enumerate(self._turns(cycle)):
            rng = np.random.default_rng([self.run.data_seed, cycle, turn])
            own_rngs = [
                np.random.default_rng([self.run.data_seed, cycle, turn, zlib.crc32(name.encode())]) for name in self.run.own_augmentations
            ]
            for y, x, crop_px in self._crops(image, rng, self._sides_px(cycle, turn)):
                code = draw_turn(rng, rotations=self.run.rotations, flips=self.run.flips, square=self.tile_px[0] == self.tile_px[1])
                out.append(TileSample(image, y, x, code, self._draws(rng, own_rngs), crop_px))
        return out

    def order(self, epoch: int) -> np.ndarray:
        """The order in which an epoch goes through its cycle's views; new each epoch."""
        return np.random.default_rng([self.run.data_seed, epoch, 2**31]).permutation(self.num_views)

    def _turns(self, cycle: int) -> list[int]:
        """The images of a cycle, as many as there are training images; a smaller fraction is repeated in turn."""
        # Crops continue where the last cycle ended, so that each image is used equally often. Whole images may differ in their number of tiles,
        # and every cycle must have as many.
        start = cycle * len(self.sizes_px) if self.run.sampling == "crops" else 0
        return [self.used_images[(start + turn) % len(self.used_images)] for turn in range(len(self.sizes_px))]

    @property
    def largest_crop_px(self) -> tuple[int, int]:
        """Height and width of the largest crop that may be resized to a tile."""
        tall, wide = self.tile_px
        return round(tall * (1 + self.run.zoom)), round(wide * (1 + self.run.zoom))

    def _sides_px(self, cycle: int, turn: int) -> list[int]:
        """The side of each crop of an image before it is magnified, drawn by their own generator; 0: that of the tile."""
        if not self.run.zoom:
            return [0] * self.run.crops_per_image
        reach, rng = math.log1p(self.run.zoom), np.random.default_rng([self.run.data_seed, cycle, turn, 2**31 + 2])
        sides: list[int] = np.rint(self.tile_px[0] * np.exp(rng.uniform(-reach, reach, self.run.crops_per_image))).astype(int).tolist()
        return sides

    def _crops(self, image: int, rng: np.random.Generator, sides_px: list[int]) -> list[tuple[int, int, int]]:
        """The corner of each crop of an image, and its side as in :meth:`_sides_px`."""
        size_px = self.sizes_px[image]
        if self.run.sampling == "tiles":
            return [(y, x, 0) for y, x in self.framing.grid(size_px, self.tile_px, 0.0)]
        framed_px, boxes, out = self.framing.framed_px(size_px), self.boxes_px[image] if self.boxes_px else (), []
        for side in sides_px:
            crop_px = (side, side) if side else self.tile_px
            down, right = (max(length - crop, 0) for length, crop in zip(framed_px, crop_px, strict=True))
            if boxes:
                y, x = self._corner_in(boxes, size_px, framed_px, crop_px, (down, right), rng)
            else:
                y, x = int(rng.integers(down + 1)), int(rng.integers(right + 1))
            out.append((y, x, side))
        return out

    def _corner_in(
        self,
        boxes: Sequence[Box],
        size_px: tuple[int, int],
        framed_px: tuple[int, int],
        crop_px: tuple[int, int],
        last: tuple[int, int],
        rng: np.random.Generator,
    ) -> tuple[int, int]:
        """The corner of a crop whose centre lies in one of the boxes, drawn by their areas, as far as the crop fits into the image."""
        areas = np.array([max(bottom - top, 1) * max(right - left, 1) for top, left, bottom, right in boxes], float)
        box = boxes[int(rng.choice(len(boxes), p=areas / areas.sum()))]
        corner = []
        for axis in (0, 1):
            scale, half = framed_px[axis] / size_px[axis], crop_px[axis] // 2
            low = min(max(round(box[axis] * scale) - half, 0), last[axis])
            high = max(min(round(box[axis + 2] * scale) - half, last[axis]), low)
            corner.append(int(rng.integers(low, high + 1)))
        return corner[0], corner[1]

    def _draws(self, rng: np.random.Generator, own_rngs: list[np.random.Generator]) -> tuple[Draw, ...]:
        """One draw for each augmentation. The user's augmentations have separate generators: adding one changes no draw of the others."""
        num = len(self.augmentations) - len(own_rngs)
        shipped = [
            one.draw(rng) for one in reversed(self.augmentations[:num])
        ]  # colours before stains: the golden numbers depend on this order
        return (*reversed(shipped), *(one.draw(own) for one, own in zip(self.augmentations[num:], own_rngs, strict=True)))
