"""The interface of a feature cache, and the cache in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cellbench.hardware import to_device


class FeatureCache(Protocol):
    """The cached features of one pass."""

    def put(self, rows: np.ndarray, maps: Mapping[int, Tensor]) -> None:
        """Stores the maps (B, D, h, w) of these rows, by level index."""

    def get(self, rows: np.ndarray, indices: tuple[int, ...]) -> dict[int, Tensor] | None:
        """The maps of these rows, on the cache's device, channels-last, or None where any is missing."""


@dataclass
class MemoryCache:
    """A cache in the memory of a device, filled as rows are computed."""

    num: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    maps: dict[int, Tensor] = field(default_factory=dict)
    filled: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def put(self, rows: np.ndarray, maps: Mapping[int, Tensor]) -> None:
        if not len(self.filled):
            self.filled = np.zeros(self.num, bool)
            # Rows of (h, w, D): a gather of rows is then channels-last without a copy.
            self.maps = {i: torch.empty((self.num, *m.shape[2:], m.shape[1]), dtype=m.dtype, device=self.device) for i, m in maps.items()}
        index = to_device(torch.from_numpy(rows), self.device)
        for i, m in maps.items():
            self.maps[i][index] = m.permute(0, 2, 3, 1).to(self.device)
        self.filled[rows] = True

    def get(self, rows: np.ndarray, indices: tuple[int, ...]) -> dict[int, Tensor] | None:
        if not len(self.filled) or not self.filled[rows].all():
            return None
        index = to_device(torch.from_numpy(rows), self.device)
        return {i: self.maps[i][index].permute(0, 3, 1, 2) for i in indices}
