"""The sampling plan of training tiles. It depends on the image sizes, the sampling settings and the data seed only.

It does not depend on a run's own seed: all runs of a cohort train on the same views in the same order.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cellbench.config.registry import Registry, digest_of
from cellbench.config.run import RunSpec
from cellbench.data.transforms.augmentation import Augmentation, Draw, Draws, ShippedAugmentation, own_augmentations, shipped_augmentations
from cellbench.data.transforms.batched_draws import draw_tiles
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


class TileSamples:
    """B training tiles as arrays. To make an object for each takes as long as a GPU needs for the tile's features."""

    def __init__(self, places_B5: np.ndarray, draws: Sequence[Draws]) -> None:
        self.places_B5 = places_B5
        """Image, y, x, turn and ``crop_px`` of each tile, int64."""
        self.draws = draws
        """The parameters of all tiles, by augmentation."""

    def __len__(self) -> int:
        return len(self.places_B5)

    def __iter__(self) -> Iterator[TileSample]:
        """In plain numbers, which JSON writes."""
        draws = zip(*(map(tuple, one.tolist()) if isinstance(one, np.ndarray) else one for one in self.draws), strict=True)
        for (image, y, x, turn, crop_px), of_tile in zip(self.places_B5.tolist(), draws, strict=True):
            yield TileSample(image, y, x, turn, of_tile, crop_px)

    def take(self, rows: np.ndarray) -> TileSamples:
        """Some of the tiles."""
        return TileSamples(
            self.places_B5[rows], [one[rows] if isinstance(one, np.ndarray) else [one[k] for k in rows] for one in self.draws]
        )


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
    def augmentations(self) -> list[ShippedAugmentation | Augmentation]:
        """In the order in which they are applied."""
        return [*self._shipped, *self._own.values()]

    @cached_property
    def _shipped(self) -> list[ShippedAugmentation]:
        return shipped_augmentations(self.run)

    @cached_property
    def _own(self) -> dict[str, Augmentation]:
        return own_augmentations(self.run, self.registry)

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

    def views(self, cycle: int) -> TileSamples:
        """All views of a cycle, image by image."""
        turns, own = self._turns(cycle), {name: list[Draw]() for name in self._own}
        # Colours before stains: the golden numbers depend on this order.
        reach = tuple(most for one in reversed(self._shipped) for most in one.reach)
        corners: list[np.ndarray] = []
        sides: list[np.ndarray] = []
        parts: list[tuple[np.ndarray, ...]] = []
        for turn, image in enumerate(turns):
            rng = np.random.default_rng([self.run.data_seed, cycle, turn])
            sides.append(self._sides_px(cycle, turn))
            corners.append(self._corners(image, rng, sides[-1]))
            num = len(corners[-1])
            parts.append(draw_tiles(rng, num, reach, rotations=self.run.rotations, flips=self.run.flips))
            # The user's augmentations have separate generators: adding one changes no draw of the others.
            for name, augmentation in self._own.items():
                own_rng = np.random.default_rng([self.run.data_seed, cycle, turn, zlib.crc32(name.encode())])
                own[name] += [augmentation.draw(own_rng) for _ in range(num)]
        quarters_B, mirrors_B, drawn_BN = map(np.concatenate, zip(*parts, strict=True))
        if self.tile_px[0] != self.tile_px[1]:
            quarters_B -= quarters_B % 2
        images_B = np.repeat(turns, [len(one) for one in corners])
        sides_B = np.concatenate(sides) if self.run.zoom else np.zeros_like(images_B)
        places_B5 = np.column_stack([images_B, np.concatenate(corners), quarters_B + 4 * mirrors_B, sides_B])
        return TileSamples(places_B5, [*self._parameters(drawn_BN), *own.values()])

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

    def _sides_px(self, cycle: int, turn: int) -> np.ndarray:
        """The sides of an image's crops before they are magnified, drawn by their own generator; empty without."""
        if not self.run.zoom:
            return np.zeros(0, np.int64)
        reach, rng = math.log1p(self.run.zoom), np.random.default_rng([self.run.data_seed, cycle, turn, 2**31 + 2])
        return np.rint(self.tile_px[0] * np.exp(rng.uniform(-reach, reach, self.run.crops_per_image))).astype(np.int64)

    def _corners(self, image: int, rng: np.random.Generator, sides_px: np.ndarray) -> np.ndarray:
        """The upper left corners (B, 2) of an image's crops, whose sides are those of :meth:`_sides_px`."""
        size_px, num = self.sizes_px[image], self.run.crops_per_image
        if self.run.sampling == "tiles":
            return np.array(list(self.framing.grid(size_px, self.tile_px, 0.0)))
        framed_px = self.framing.framed_px(size_px)
        crops_px = sides_px[:, None] if len(sides_px) else self.tile_px
        last_B2 = np.broadcast_to(np.maximum(np.array(framed_px) - crops_px, 0), (num, 2))
        if boxes := self.boxes_px[image] if self.boxes_px else ():
            return self._corners_in(boxes, size_px, framed_px, np.broadcast_to(crops_px, (num, 2)), last_B2, rng)
        return rng.integers(last_B2 + 1)

    def _corners_in(
        self,
        boxes: Sequence[Box],
        size_px: tuple[int, int],
        framed_px: tuple[int, int],
        crops_B2: np.ndarray,
        last_B2: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """The corners of crops whose centres lie in one of the boxes, drawn by their areas, as far as a crop fits into the image."""
        areas = np.array([max(bottom - top, 1) * max(right - left, 1) for top, left, bottom, right in boxes], float)
        shares = (areas / areas.sum()).cumsum()
        shares /= shares[-1]  # as Generator.choice has them, which takes ten times as long
        corners = []
        for crop_px, last in zip(crops_B2.tolist(), last_B2.tolist(), strict=True):
            box = boxes[int(shares.searchsorted(rng.random(), side="right"))]
            for axis in (0, 1):
                scale, half = framed_px[axis] / size_px[axis], crop_px[axis] // 2
                low = min(max(round(box[axis] * scale) - half, 0), last[axis])
                high = max(min(round(box[axis + 2] * scale) - half, last[axis]), low)
                corners.append(int(rng.integers(low, high + 1)))
        return np.array(corners).reshape(-1, 2)

    def _parameters(self, drawn_BN: np.ndarray) -> list[np.ndarray]:
        """The parameters (B, P) of each shipped augmentation from the numbers of all, the last one's first."""
        ends = itertools.accumulate(len(one.reach) for one in reversed(self._shipped))
        parts = np.split(drawn_BN, list(ends)[:-1], axis=1)
        return [one.parameters(part) for one, part in zip(self._shipped, reversed(parts), strict=True)]
