"""Decoded images, kept while memory allows: decoding a PNG costs more than looking at its tiles."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np

from cellbench.data.dataset import Dataset
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.transforms.cell_targets import make_targets
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.stain import KINDS, MOST_IMAGES, Normaliser

T = TypeVar("T", bound=tuple[np.ndarray, ...])

Pair = tuple[np.ndarray, np.ndarray]
Key = tuple[int, Preparation | Framing | None]
"""An image's number, and what was made of it: an image and class map as they are or as prepared, or auxiliary targets in a framing."""


class ImageCache:
    """Images (H, W, 3) uint8 and class maps (H, W) uint8 of one split, as read and as prepared.

    Keeps the most recently used within ``budget_bytes``.

    May be asked from several threads.
    """

    def __init__(self, dataset: Dataset, split: str, budget_bytes: int) -> None:
        self._dataset, self.samples = dataset, dataset.samples(split)
        self._budget, self._held = budget_bytes, 0
        self._kept: OrderedDict[Key, tuple[np.ndarray, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._normalisers: dict[tuple[str, tuple[int, ...]], Normaliser | None] = {}

    @property
    def reading(self) -> IntensityScaling:
        """What the images are read by."""
        return self._dataset.reading

    @property
    def um_per_px(self) -> float | None:
        """The side of a pixel of the data set's images, where it is known and one."""
        return self._dataset.um_per_px

    @property
    def sizes_px(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each image, known without decoding."""
        return tuple(sample.size_px for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        return self._kept_or((index, None), lambda: self._dataset.read(self.samples[index]))

    def prepared(self, index: int, preparation: Preparation) -> Pair:
        """The image and class map after this preparation."""
        if preparation.is_identity:
            return self[index]
        # From the file, not from self[index]: the unprepared image would take the memory of another prepared one.
        return self._kept_or((index, preparation), lambda: preparation(self._dataset.read(self.samples[index])))

    def auxiliary_targets(self, index: int, framing: Framing) -> np.ndarray:
        """What heads may learn beside the framed class map, (H', W', 2) uint8, as ``cellbench.data.transforms.cell_targets`` says."""

        def make() -> tuple[np.ndarray]:
            sample = self.samples[index]
            ids = self._dataset.read_instances(sample)
            own, least = self._dataset.read_mask(sample), self._dataset.min_cell_px
            classes = framing.mask(own)
            if least is not None:  # in own pixels; a framed one may be of another size
                least = max(1, round(least * classes.size / own.size))
            return (make_targets(classes, framing.numbers(ids) if ids is not None else None, least, owners=self._dataset.owners),)

        return self._kept_or((index, framing), make)[0]

    def normaliser(self, kind: str, images: Sequence[int]) -> Normaliser | None:
        """The stain normaliser of this kind, fitted to the images with these numbers.

        None for ``none``, or where the images show no stain.
        """
        key = (kind, tuple(images))
        if key not in self._normalisers:
            some = images[:: -(-len(images) // MOST_IMAGES)]
            self._normalisers[key] = None if kind == "none" else KINDS[kind].fitted(self[index][0] for index in some)
        return self._normalisers[key]

    def _kept_or(self, key: Key, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return cast(T, self._kept[key])
        pair = make()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = pair
                self._held += _size(pair)
            while self._held > self._budget and len(self._kept) > 1:
                self._held -= _size(self._kept.popitem(last=False)[1])
        return pair


def _size(arrays: tuple[np.ndarray, ...]) -> int:
    return sum(array.nbytes for array in arrays)
