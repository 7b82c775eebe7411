"""Features on disk in shards: files of a few hundred tiles, each written atomically.

A shard never changes once it has its name. So processes on many machines can fill and read one folder, and a shard can be copied to machines
without a common folder. A shard is used only if its checksum is right; a damaged one is computed again.

Letters: N rows (tiles of a pass), D features, h x w places of a map.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
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
from cellbench.files import make_folder, write_atomic

ROWS = 256
"""Tiles of a shard: 128 MB for a level of a ViT-L in bf16 at 224 px. A multiple of every batch size of a backbone."""


def num_shards(num: int) -> int:
    """The shards of a pass of ``num`` tiles."""
    return -(-num // ROWS)


class ShardedCache:
    """The shards of one pass of ``num`` tiles in a folder. As a ``FeatureCache`` they are only read."""

    def __init__(self, folder: Path, num: int) -> None:
        self._folder, self._num = folder, num
        self._open: dict[tuple[int, int], Tensor | None] = {}

    def missing(self, indices: Iterable[int]) -> list[int]:
        """The shards that lack a file of any of these levels."""
        indices = list(indices)
        return [k for k in range(num_shards(self._num)) if not all(self._path(k, index).is_file() for index in indices)]

    def rows(self, number: int) -> np.ndarray:
        """The rows of the pass in a shard."""
        return np.arange(number * ROWS, min((number + 1) * ROWS, self._num))

    def check_space(self, num: int, row_bytes: int) -> None:
        """Raises OSError if ``num`` more shards would fill the disk."""
        size = min(num * ROWS, self._num) * row_bytes
        if size and shutil.disk_usage(make_folder(self._folder)).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def holds(self, number: int, indices: Iterable[int]) -> bool:
        """Whether a shard has all of these levels, undamaged. Reads the files."""
        return all(self._shard(number, index) is not None for index in indices)

    def fetch(self, number: int, indices: Iterable[int], shared: RemoteCache, facts: Mapping[str, Any]) -> bool:
        """Downloads the levels that a shard lacks from the shared cache; returns whether it now holds all of them."""
        self._describe(facts)
        lacking = [index for index in indices if self._shard(number, index) is None]
        for index in lacking:  # all of them, since this also removes damaged files at the URL
            self._open.pop((number, index))
            shared.fetch(self._path(number, index), lambda path: self._read(path, number) is not None)
        return self.holds(number, lacking)

    def send(self, number: int, indices: Iterable[int], shared: RemoteCache) -> None:
        """Uploads a shard's levels to the shared cache."""
        for index in indices:
            shared.send(self._path(number, index))

    def write(self, number: int, maps: Mapping[int, Tensor], facts: Mapping[str, Any]) -> None:
        """Writes the maps (N, D, h, w) of a shard's rows, by level index. Raises CellbenchError on a full disk."""
        self._describe(facts)
        for index, m in maps.items():
            self._open.pop((number, index), None)
            rows = m.to("cpu").permute(0, 2, 3, 1).contiguous()  # a gather of rows is then channels-last without a copy
            write_atomic(self._path(number, index), save({"rows": rows}, metadata={"crc": str(_crc(rows))}))

    def put(self, rows: np.ndarray, maps: Mapping[int, Tensor]) -> None:
        """Does nothing: rows of a damaged shard are computed at each use."""

    def get(self, rows: np.ndarray, indices: tuple[int, ...]) -> dict[int, Tensor] | None:
        """The maps of these rows on the CPU, channels-last, or None where any is missing."""
        numbers, places = rows // ROWS, torch.from_numpy(rows % ROWS)
        out = {}
        for index in indices:
            found: Tensor | None = None
            for k in np.unique(numbers).tolist():
                shard = self._shard(k, index)
                if shard is None:
                    return None
                if found is None:
                    found = torch.empty((len(rows), *shard.shape[1:]), dtype=shard.dtype)
                mine = torch.from_numpy(numbers == k)
                found[mine] = shard[places[mine]]
            if found is not None:
                out[index] = found.permute(0, 3, 1, 2)
        return out

    def _shard(self, number: int, index: int) -> Tensor | None:
        """The rows of a shard, memory-mapped; None if it is missing or damaged."""
        if (number, index) not in self._open:
            rows = self._open[number, index] = self._read(self._path(number, index), number)
            if rows is not None:
                with contextlib.suppress(OSError):  # the folder belongs to another user
                    os.utime(self._folder / "facts.json")  # time of the last use, for pruning
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
    return zlib.crc32(rows.view(torch.uint8).numpy().data)
