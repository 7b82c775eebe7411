"""Which precision computes faster on this processor: measured once, then remembered in the cache folder.

Having the instruction is not enough: a Xeon with avx512_bf16 and without AMX computes bf16 products at half the speed of float32, an EPYC with the
same instruction at two to three times.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cellbench.errors import CellbenchError
from cellbench.file_cache import read_cached
from cellbench.files import cache_dir, write_atomic
from cellbench.startup import torch_threads

if TYPE_CHECKING:
    import torch

WORTH_IT = 1.1
"""bf16 is taken where it is at least this many times faster: it rounds more coarsely, and a small difference may be noise."""
EMULATED = 0.0
"""Stands for the speed of bf16 on a processor without instructions for it, where it is several times slower."""


def bf16_is_faster(num_threads: int) -> bool:
    """Whether bf16 is at least :data:`WORTH_IT` times faster than float32 with this number of threads. What is remembered needs no torch."""
    path, key = cache_dir() / "precision.json", f"{cpu_name()}, torch {version('torch')}, {num_threads} threads"
    known = {name: speed for name, speed in read_cached(path).items() if isinstance(speed, int | float)}
    if key not in known:
        import torch

        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        known[key] = round(_measured(num_threads), 2) if supported else EMULATED
        with contextlib.suppress(OSError, CellbenchError):  # measured again next time
            write_atomic(path, json.dumps(known, indent=1))
    return known[key] >= WORTH_IT


def speed_of_bf16() -> float:
    """How many times faster than float32 a small backbone block and a step of a small head are in bf16; takes about half a second.

    Both are timed in turn and the fastest of some repetitions counts, so that other processes hardly matter.
    """
    import torch
    from torch import nn

    block = nn.Sequential(nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 192)).requires_grad_(False)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    head = nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).to(memory_format=torch.channels_last)
    tokens_BND = torch.rand(16, 196, 192)
    maps_BDHW = torch.rand(4, 64, 56, 56).to(memory_format=torch.channels_last)

    def work(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            block(tokens_BND)
            scores = head(maps_BDHW)
        scores.float().mean().backward()

    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(5):
        for dtype, measured in times.items():
            measured.append(_seconds(lambda: work(dtype)))  # noqa: B023  called at once
    return min(times[torch.float32][1:]) / min(times[torch.bfloat16][1:])  # the first of each prepares its kernels


@functools.cache
def _measured(num_threads: int) -> float:
    """:func:`speed_of_bf16`, once for a process, which may change its cache folder."""
    with torch_threads(num_threads):
        return speed_of_bf16()


def cpu_name() -> str:
    """The processor's name, as ``AMD EPYC 9B14``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
