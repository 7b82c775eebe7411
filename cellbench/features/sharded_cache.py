"""A pass's features in shards: files of some hundred tiles, each written whole or not at all, for processes on many machines to fill and to read.

Where `cellbench.features.disk_cache.DiskCache` grows in place, which asks that all its processes are on one machine, a shard never changes once it has its name:
that is safe on a shared file system, and lets it travel whole to machines that share none. A shard counts only where the checksum in it fits.

Letters: N rows, D features, h x w places of a map.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cellbench.features.remote_cache import RemoteCache
from cellbench.files import write_atomic

ROWS = 256
"""Tiles of a shard: 128 MB a level of a ViT-L in bf16 at 224 px. A multiple of every chunk that goes through a backbone at once."""


def num_shards(num: int) -> int:
    """Of a pass of ``num`` tiles."""
    return -(-num // ROWS)


class ShardedCache:
    """The shards of one pass of ``num`` tiles, in a folder that may lie anywhere that all can read. As `cellbench.features.memory_cache.FeatureCache` they are only read."""

    def __init__(self, folder: Path, num: int) -> None:
        self._folder, self._num = folder, num
        self._open: dict[tuple[int, int], Tensor | None] = {}

    def missing(self, indices: Iterable[int]) -> list[int]:
        """The numbers of the shards that do not hold all of these levels yet."""
        indices = list(indices)
        return [k for k in range(num_shards(self._num)) if not all(self._path(k, index).is_file() for index in indices)]

    def rows(self, number: int) -> np.ndarray:
        """The rows of the pass that a shard holds."""
        return np.arange(number * ROWS, min((number + 1) * ROWS, self._num))

    def holds(self, number: int, indices: Iterable[int]) -> bool:
        """Whether a shard holds all of these levels, undamaged: all of it is read."""
        return all(self._shard(number, index) is not None for index in indices)

    def fetch(self, number: int, indices: Iterable[int], shared: RemoteCache, facts: Mapping[str, Any]) -> bool:
        """Takes what a shard lacks of these levels from the shared cache, where it is. Says whether it now holds all of them."""
        self._describe(facts)
        lacking = [index for index in indices if self._shard(number, index) is None]
        for index in lacking:  # all, also where one is missing: what is damaged there gives way to what is computed
            self._open.pop((number, index))
            shared.fetch(self._path(number, index), lambda path: self._read(path, number) is not None)
        return self.holds(number, lacking)

    def send(self, number: int, indices: Iterable[int], shared: RemoteCache) -> None:
        """Gives a shard's levels to the shared cache."""
        for index in indices:
            shared.send(self._path(number, index))

    def write(self, number: int, maps: Mapping[int, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps the maps (N, D, h, w) of a shard's rows, by level index. Raises CellbenchError on a full disk."""
        self._describe(facts)
        for index, m in maps.items():
            self._open.pop((number, index), None)
            rows = m.to("cpu").permute(0, 2, 3, 1).contiguous()  # a gather of rows is then channels-last without a copy
            write_atomic(self._path(number, index), save({"rows": rows}, metadata={"crc": str(_crc(rows))}))

    def put(self, rows: np.ndarray, maps: Mapping[int, Tensor]) -> None:
        """Nothing: what a damaged shard held is computed again each time."""

    def get(self, rows: np.ndarray, indices: tuple[int, ...]) -> dict[int, Tensor] | None:
        """The maps of these rows on the CPU, channels-last, or None where any is missing."""
        numbers, places = rows // ROWS, torch.from_numpy(rows % ROWS)
        out = {}
        for index in indices:
            parts = {int(k): self._shard(int(k), index) for k in np.unique(numbers)}
            if any(part is None for part in parts.values()):
                return None
            some = next(iter(parts.values()))
            found = torch.empty((len(rows), *some.shape[1:]), dtype=some.dtype)
            for k, part in parts.items():
                mine = torch.from_numpy(numbers == k)
                found[mine] = part[places[mine]]
            out[index] = found.permute(0, 3, 1, 2)
        return out

    def _shard(self, number: int, index: int) -> Tensor | None:
        """The rows of a shard, mapped into memory; None where it is absent or damaged."""
        if (number, index) not in self._open:
            rows = self._open[number, index] = self._read(self._path(number, index), number)
            if rows is not None:
                with contextlib.suppress(OSError):  # a folder of somebody else's
                    os.utime(self._folder / "facts.json")  # when it was last of use, for pruning
        return self._open[number, index]

    def _read(self, path: Path, number: int) -> Tensor | None:
        try:
            with safe_open(path, "pt") as file:
                rows, crc = file.get_tensor("rows"), int((file.metadata() or {}).get("crc", -1))
        except (OSError, SafetensorError, ValueError):
            return None
        return rows if len(rows) == len(self.rows(number)) and _crc(rows) == crc else None

    def _describe(self, facts: Mapping[str, Any]) -> None:
        if not (self._folder / "facts.json").is_file():
            write_atomic(self._folder / "facts.json", json.dumps({**facts, "made": time.time()}, indent=1))

    def _path(self, number: int, index: int) -> Path:
        return self._folder / f"level-{index}.shard-{number:05}.safetensors"


def _crc(rows: Tensor) -> int:
    return zlib.crc32(rows.view(torch.uint8).numpy())
