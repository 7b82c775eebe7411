"""The machine: device, precision, cores and memory that may be used."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cellbench.errors import CellbenchError, quantity
from cellbench.precision import bf16_is_faster

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Device, precision and resources. Only the precision is part of a run's identity: in one precision, numbers agree to rounding on all machines.

    Holds names, and imports torch only where its objects are asked for.
    """

    device_name: str
    """``cpu``, ``cuda``, ``cuda:1`` or ``mps``."""
    precision_name: str
    """``bf16`` or ``fp32``: of the backbone and of the heads' convolutions; weights, losses and scores stay float32."""
    memory_bytes: int
    """Limit for decoded images and features."""
    lanes: int = 1
    """Number of parallel threads (`cellbench.parallel`), each with :attr:`threads` cores."""
    threads: int = 1
    """Cores per operation: a constant, since it can change the last bit of a sum."""
    halvings: int = 0
    """Number of times :attr:`chunk` was halved after memory ran out."""

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.device_name)

    @property
    def precision(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.precision_name == "bf16" else torch.float32

    @property
    def _on_cpu(self) -> bool:
        return self.device_name == "cpu"

    @property
    def chunk(self) -> int:
        """Tiles in one batch of the backbone, at most.

        Fixed for a device, since results must not depend on the other runs of a cohort. Reduced only after memory ran out; numbers then agree
        to rounding.
        """
        return max(1, (16 if self._on_cpu else _gpu_chunk(self.device)) >> self.halvings)

    @property
    def batch_step(self) -> int:
        """Batches of the backbone are padded to a multiple of this: kernels depend on the shape and may round differently (measured with bf16)."""
        return self.chunk if self._on_cpu else min(self.chunk, 128)

    def shares(self, num: int) -> list[Hardware]:
        """This machine's cores and memory, divided among ``num`` processes, which give the same numbers as one. Raises ValueError.

        Cores per operation stay the same, so a CPU can be divided among at most :attr:`lanes` processes.
        """
        most = self.most_shares
        if not 1 <= num <= most:
            raise ValueError(f"{num} shares of a machine that has 1 to {most}")
        memory = self.memory_bytes // num
        if not self._on_cpu:
            import torch

            count = torch.cuda.device_count() if self.device.type == "cuda" and self.device.index is None else 0
            devices = [f"cuda:{k % count}" if count else self.device_name for k in range(num)]
            return [replace(self, device_name=device, memory_bytes=memory, threads=self.threads // num) for device in devices]
        lanes = [self.lanes // num + (k < self.lanes % num) for k in range(num)]
        return [replace(self, lanes=mine, memory_bytes=memory) for mine in lanes]

    def smaller(self, halvings: int) -> Hardware:
        """The same machine with :attr:`chunk` halved this number of times."""
        return replace(self, halvings=self.halvings + halvings)

    @property
    def most_shares(self) -> int:
        """Maximum number of processes that can share the machine."""
        return self.lanes if self._on_cpu else self.threads

    @property
    def cores_of_one(self) -> int:
        """Factor from CPU seconds of a thread to core seconds: an operation on a CPU occupies :attr:`threads` cores."""
        return self.threads if self._on_cpu else 1

    def wait(self) -> None:
        """Waits until the device has finished its work. Call before reading a clock."""
        if self._has_cuda:
            import torch

            torch.cuda.synchronize(self.device)

    def fits(self, num_bytes: int) -> bool:
        """Whether the device is a GPU with four times as much free memory: the rest is for networks and their gradients."""
        if not self._has_cuda:
            return False
        import torch

        return 4 * num_bytes <= torch.cuda.mem_get_info(self.device)[0]

    def autocast(self) -> torch.autocast:
        """The context in which backbone and heads compute."""
        import torch

        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    @property
    def _has_cuda(self) -> bool:
        """Whether the device is a GPU of this machine."""
        if not self.device_name.startswith("cuda"):
            return False
        import torch

        return torch.cuda.is_available()

    @property
    def name(self) -> str:
        """``cpu, 2 cores, bf16``."""
        cores = self.lanes * self.threads
        what = f"{self.device_name.partition(':')[0]}, {quantity(cores, 'core')}"
        if self._has_cuda:
            import torch

            what = torch.cuda.get_device_name(self.device)
        return f"{what}, {self.precision_name}"


def detect_hardware(
    device: str = "auto", precision: str = "auto", memory: str = "auto", *, elsewhere: bool = False, threads: int | None = None
) -> Hardware:
    """The machine by its options: ``auto``, or ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``fp32`` or ``bf16``; ``4G``. Raises CellbenchError.

    ``auto`` takes bf16 where it is faster: measured on a processor (:func:`cellbench.precision.bf16_is_faster`), by what it supports on a GPU.
    An operation on a CPU uses ``threads`` cores, by default as many as torch is set to. ``elsewhere``: the work is for other machines, which may
    have a GPU even if this one has none.
    """
    where = "cuda" if elsewhere and device == "cuda" else _device(device)
    kinds = ("fp32", "bf16")
    if precision not in (*kinds, "auto"):
        raise CellbenchError(f"--precision {precision}: expected one of {', '.join(kinds)}, auto.")
    cores = num_cores()
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    if precision == "auto":
        precision = "bf16" if _fast_bf16(where, threads) else "fp32"
    # Half of the free memory: the rest is for the network, the optimisers and other programs.
    budget = psutil.virtual_memory().available // 2 if memory == "auto" else parse_bytes(memory, "--memory")
    threads = min(threads, cores) if where == "cpu" else cores
    lanes = cores // threads if where == "cpu" else 1  # one thread for a GPU, which queues its work
    return Hardware(device_name=where, precision_name=precision, memory_bytes=budget, lanes=lanes, threads=threads)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the processor on a device; to a GPU from pinned memory, so that the copy does not wait for the GPU's earlier work."""
    import torch

    pinned = device.type == "cuda" and torch.cuda.is_available()
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


def release_memory() -> None:
    """Returns freed memory to the system. glibc keeps it, separately for each thread: 300 MB after a small cohort."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def peak_memory_mib() -> float:
    """Peak memory of this process: on the GPU where one was used, else resident memory."""
    import torch

    if peak := max((torch.cuda.max_memory_allocated(k) for k in range(torch.cuda.device_count())), default=0):
        return peak / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out: on the GPU, or in torch or Python on the processor."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def num_cores() -> int:
    """Number of cores that this process may use: its CPU affinity, or ``OMP_NUM_THREADS`` if lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdigit() and int(limit) else cores


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", re.IGNORECASE)


def is_size(text: str) -> bool:
    """Whether a text is a size like ``500M``; a bare number is not, since a folder may have such a name."""
    match = _SIZE.fullmatch(text)
    return match is not None and bool(match[2])


def parse_bytes(text: str, what: str) -> int:
    """``4G`` as bytes. Raises CellbenchError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise CellbenchError(f"{what} {text}: a size is expected, like 500M or 4G.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def on_cpu(device: str) -> bool:
    """Whether a device as in ``--device`` means the processor. Asks torch only where there may be a GPU."""
    return device == "cpu" or (device == "auto" and _device(device) == "cpu")


def _may_have_gpu() -> bool:
    """Whether torch might find a GPU: on Linux none does without a file of its driver (NVIDIA, its Jetson boards, WSL, AMD)."""
    patterns = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")
    return "torch" in sys.modules or sys.platform != "linux" or any(next(Path("/dev").glob(one), None) for one in patterns)


def _device(name: str) -> str:
    """The device of an option. Raises CellbenchError."""
    if name == "cpu" or (name == "auto" and not _may_have_gpu()):
        return "cpu"
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CellbenchError(f"--device {name}: unknown kind of device. Expected auto, cpu, cuda, cuda:N or mps.") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device.type, False)
    if not present or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise CellbenchError(f"--device {name}: not available on this machine. Leave --device out for the default.")
    return str(device)


@functools.cache
def _gpu_chunk(device: torch.device) -> int:
    import torch

    # A ViT-Ti takes 4.7 ms to launch on an H100, as long as 128 tiles compute. Graphics cards of personal computers have no memory for more.
    large = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_properties(device).total_memory >= 30 * 2**30
    return 512 if large else 128


def _fast_bf16(device: str, threads: int) -> bool:
    if device.startswith("cuda"):
        import torch

        # Without CUDA here the work is for another machine: every GPU since 2020 supports bf16.
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bf16_is_faster(threads)
