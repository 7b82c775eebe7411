"""Where a pass's features wait until they are asked for again: in memory, or in a file that outlives the process.

A pass is a fixed list of tiles; a row is one tile's map at one level. A row on disk counts only when its checksum, written after it, fits:
a process killed in between, a flipped bit or a foreign file costs the row's second computation, never a wrong number.

Letters: N rows, D features, h x w places of a map.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellbench.files import write_atomic


class DiskCache:
    """Rows in a folder, one file a level and one of checksums beside it. Raises ``OSError`` on a full disk, before anything is half-kept."""

    def __init__(self, folder: Path, num: int, facts: Mapping[str, Any]) -> None:
        self._folder, self._num = folder, num
        self._levels: dict[int, _LevelFile] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "facts.json").is_file():
            write_atomic(folder / "facts.json", json.dumps({**facts, "made": time.time()}, indent=1))
        os.utime(folder / "facts.json")  # when it was last of use, for pruning

    def put(self, rows: np.ndarray, maps: Mapping[int, Tensor]) -> None:
        for i, m in maps.items():
            self._level(i, (m.shape[2], m.shape[3], m.shape[1]), m.dtype, make=True).write(rows, m.permute(0, 2, 3, 1))

    def get(self, rows: np.ndarray, indices: tuple[int, ...]) -> dict[int, Tensor] | None:
        out = {}
        for i in indices:
            level = self._level(i)
            found = level.read(rows) if level is not None else None
            if found is None:
                return None
            out[i] = found.permute(0, 3, 1, 2)
        return out

    def _level(self, index: int, shape: tuple[int, ...] = (), dtype: torch.dtype | None = None, make: bool = False) -> Any:
        if index not in self._levels:
            level = (
                _LevelFile.open(self._folder / f"level-{index}", self._num, shape, dtype)
                if make
                else _LevelFile.found(self._folder / f"level-{index}", self._num)
            )
            if level is None:
                return None
            self._levels[index] = level
        return self._levels[index]


class _LevelFile:
    """N rows of one shape in ``*.bin``, their checksums (0: not there yet) in ``*.crc``, shape and precision in ``*.json``."""

    def __init__(self, stem: Path, num: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._row_bytes = int(np.prod(shape)) * dtype.itemsize
        self._bin = os.open(f"{stem}.bin", os.O_RDWR)
        self._data = np.memmap(f"{stem}.bin", np.uint8, "r", shape=(num, self._row_bytes))
        self._crc = np.memmap(f"{stem}.crc", np.uint32, "r+", shape=(num,))
        self._trusted = np.zeros(num, bool)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._bin)

    @classmethod
    def found(cls, stem: Path, num: int) -> _LevelFile | None:
        try:
            facts = json.loads(Path(f"{stem}.json").read_text())
            shape, dtype = tuple(int(n) for n in facts["shape"]), {"bf16": torch.bfloat16, "fp32": torch.float32}[facts["dtype"]]
            size = num * int(np.prod(shape)) * dtype.itemsize
            if os.path.getsize(f"{stem}.bin") != size or os.path.getsize(f"{stem}.crc") != 4 * num:
                return None
            return cls(stem, num, shape, dtype)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or not ours: made anew

    @classmethod
    def open(cls, stem: Path, num: int, shape: tuple[int, ...], dtype: torch.dtype) -> _LevelFile:
        found = cls.found(stem, num)
        if found is not None and (found._shape, found._dtype) == (shape, dtype):
            return found
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{stem}.json")
        for suffix, size in ((".bin", num * int(np.prod(shape)) * dtype.itemsize), (".crc", 4 * num)):
            # A new file, never a changed one: another process may have the old one mapped. The space is reserved now, because a full
            # disk would otherwise kill the process at a later write.
            temporary = f"{stem}{suffix}.{os.getpid()}"
            try:
                with open(temporary, "wb") as file:
                    _reserve(file.fileno(), stem.parent, size)
                os.replace(temporary, f"{stem}{suffix}")
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        write_atomic(Path(f"{stem}.json"), json.dumps({"shape": shape, "dtype": "bf16" if dtype == torch.bfloat16 else "fp32"}))
        return cls(stem, num, shape, dtype)

    def write(self, rows: np.ndarray, maps_BhwD: Tensor) -> None:
        array = maps_BhwD.to("cpu").contiguous().view(torch.uint8).numpy().reshape(len(rows), -1)
        for row, data in zip(rows.tolist(), array, strict=True):
            block = data.tobytes()
            os.pwrite(self._bin, block, row * self._row_bytes)
            self._crc[row] = zlib.crc32(block) or 1
            self._trusted[row] = True

    def read(self, rows: np.ndarray) -> Tensor | None:
        array = self._data[rows]
        for row, data in zip(rows.tolist(), array, strict=True):
            if not self._trusted[row]:
                if self._crc[row] == 0 or (zlib.crc32(data) or 1) != self._crc[row]:
                    return None
                self._trusted[row] = True
        return torch.from_numpy(array).view(self._dtype).view(len(rows), *self._shape)


def _reserve(handle: int, folder: Path, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot reserve
                raise
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(handle, size)


# --- what lies in the cache folder -----------------------------------------------------------------------------------------------------








