"""Measures the peak memory of a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import torch

from cellbench.parallel import repeating

EVERY_S = 0.01


class PeakMemory:
    """Peak memory in MiB: of the GPU for CUDA, else the resident memory of this process. Valid after the block of ``watch_memory``."""

    def __init__(self, start_mib: float) -> None:
        self.start_mib = self.peak_mib = start_mib

    @property
    def grown_mib(self) -> float:
        """Peak memory minus the memory before the block."""
        return self.peak_mib - self.start_mib


@contextlib.contextmanager
def watch_memory(device: torch.device | None = None) -> Iterator[PeakMemory]:
    """Measures the block. Resident memory is sampled every 10 ms: Linux alone has a high-water mark that can be reset."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = PeakMemory(torch.cuda.memory_allocated(device) / 2**20)
        yield peak
        peak.peak_mib = torch.cuda.max_memory_allocated(device) / 2**20
        return
    process = psutil.Process()
    peak = PeakMemory(process.memory_info().rss / 2**20)

    def sample() -> None:
        peak.peak_mib = max(peak.peak_mib, process.memory_info().rss / 2**20)

    try:
        with repeating(sample, EVERY_S):
            yield peak
    finally:
        sample()
