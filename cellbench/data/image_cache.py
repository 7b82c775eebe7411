"""Caches decoded images while memory allows: decoding a PNG takes longer than cutting its tiles."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from cellbench.data.dataset import Dataset
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.regions import regions_of
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.stain import KINDS, MOST_IMAGES, Normaliser
from cellbench.metrics.instances import reference_instances

if TYPE_CHECKING:
    from cellbench.data.transforms.sampling import Box

T = TypeVar("T", bound=tuple[np.ndarray, ...])

Pair = tuple[np.ndarray, np.ndarray]
Key = tuple[int, Preparation | tuple[Framing, str] | None]
"""An image's number and what is cached: image and class map, raw or prepared, or a cell target in a framing."""


class ImageCache:
    """Images (H, W, 3) uint8 and class maps (H, W) uint8 of one split, as read and as prepared.

    Keeps the most recently used ones within ``budget_bytes``.

    Thread-safe.
    """

    def __init__(self, dataset: Dataset, split: str, budget_bytes: int) -> None:
        self._dataset, self.samples = dataset, dataset.samples(split)
        self._budget, self._held = budget_bytes, 0
        self._kept: OrderedDict[Key, tuple[np.ndarray, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._normalisers: dict[tuple[str, tuple[int, ...]], Normaliser | None] = {}

    @property
    def reading(self) -> IntensityScaling:
        """Intensity scaling with which the images are read."""
        return self._dataset.reading

    @property
    def um_per_px(self) -> float | None:
        """Side of a pixel, if known and the same in all images of the data set."""
        return self._dataset.um_per_px

    @property
    def sizes_px(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each image, known without decoding."""
        return tuple(sample.size_px for sample in self.samples)

    @property
    def boxes_px(self) -> tuple[tuple[Box, ...], ...]:
        """The boxes of the regions of interest of each image; empty where no image has any."""
        if all(sample.regions is None for sample in self.samples):
            return ()
        return tuple(tuple(region.box_px for region in regions_of(sample.regions)) for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        return self._kept_or((index, None), lambda: self._dataset.read(self.samples[index]))

    def prepared(self, index: int, preparation: Preparation) -> Pair:
        """The image and class map after this preparation."""
        if preparation.is_identity:
            return self[index]
        # From the file, not from self[index]: caching the raw image would displace another prepared one.
        return self._kept_or((index, preparation), lambda: preparation(self._dataset.read(self.samples[index])))

    def cell_target(self, index: int, framing: Framing, name: str) -> np.ndarray:
        """A cell target of the framed image, (H', W', A) uint8, by its name in ``cellbench.data.cell_targets.catalog``."""
        from cellbench.data.cell_targets.catalog import TARGETS  # imports torch, for their losses

        target = TARGETS[name]
        assert target is not None
        encode = target.encode

        def make() -> tuple[np.ndarray]:
            sample = self.samples[index]
            own, ids = self._dataset.read_truth(sample)
            least = self._dataset.min_cell_px
            classes = framing.mask(own)
            if least is not None:  # in pixels of the image; framing may change the size
                least = max(1, round(least * classes.size / own.size))
            numbers = framing.numbers(ids) if ids is not None else None
            cells = reference_instances(classes, numbers, least, owners=self._dataset.owners)[0]
            scale = classes.shape[0] / own.shape[0], classes.shape[1] / own.shape[1]
            return (encode(cells, scale),)

        return self._kept_or((index, (framing, name)), make)[0]

    def normaliser(self, kind: str, images: Sequence[int]) -> Normaliser | None:
        """The stain normaliser of this kind, fitted to the images with these numbers.

        None for ``none``, or if the images show no stain.
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
