"""Decoded images, kept while memory allows: decoding a PNG costs more than looking at its tiles."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from cellbench.data.dataset import Dataset


class Pixels:
    """Images (H, W, 3) uint8 and class maps (H, W) uint8 of one split, the most recently used within ``budget_bytes``.

    May be asked from several threads.
    """

    def __init__(self, dataset: Dataset, split: str, budget_bytes: int) -> None:
        self._dataset, self.samples = dataset, dataset.samples(split)
        self._budget, self._held = budget_bytes, 0
        self._kept: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sizes_px(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each image, known without decoding."""
        return tuple(sample.size_px for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        pair = self._dataset.read(self.samples[index])
        with self._lock:
            if index not in self._kept:
                self._kept[index] = pair
                self._held += _size(pair)
            while self._held > self._budget and len(self._kept) > 1:
                self._held -= _size(self._kept.popitem(last=False)[1])
        return pair


def _size(pair: tuple[np.ndarray, np.ndarray]) -> int:
    return sum(array.nbytes for array in pair)
