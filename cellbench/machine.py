"""What this machine can do: where to compute, in which precision, and how much memory may be used."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from cellbench.errors import CellbenchError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how the tensors live. None of it belongs to a run's identity: numbers agree to rounding on all machines."""

    device: torch.device
    precision: torch.dtype
    """Of the backbone and of the heads' convolutions; weights, losses and scores stay float32."""
    memory_bytes: int
    """How much may be spent on decoded images and features."""

    @property
    def chunk(self) -> int:
        """Tiles that go through the backbone at once. Fixed for a device, since results must not hang on who else is in a cohort."""
        return 16 if self.device.type == "cpu" else 128

    def autocast(self) -> torch.autocast:
        """The context in which backbone and heads compute."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    @property
    def name(self) -> str:
        """For people: ``cpu, 2 threads, bf16``."""
        what = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{self.device.type}, {torch.get_num_threads()} threads"
        return f"{what}, {'bf16' if self.precision == torch.bfloat16 else 'fp32'}"


def machine(device: str = "auto", precision: str = "auto", memory: str = "auto") -> Machine:
    """The machine as asked for: ``auto``, or ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``fp32`` or ``bf16``; ``4G``. Raises CellbenchError."""
    where = _device(device)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if _fast_bf16(where) else torch.float32}
    if precision not in kinds:
        raise CellbenchError(f"--precision {precision}: expected one of {', '.join(kinds)}.")
    # Half of what is free: the rest is for the network, the optimisers and whatever else the person runs.
    budget = psutil.virtual_memory().available // 2 if memory == "auto" else num_bytes(memory, "--memory")
    return Machine(device=where, precision=kinds[precision], memory_bytes=budget)


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", re.IGNORECASE)


def is_size(text: str) -> bool:
    """Whether a text is a size like ``500M``; a bare number is not, since a folder may be called so."""
    match = _SIZE.fullmatch(text)
    return match is not None and bool(match[2])


def num_bytes(text: str, what: str) -> int:
    """``4G`` as bytes. Raises CellbenchError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise CellbenchError(f"{what} {text}: a size is expected, like 500M or 4G.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CellbenchError(f"--device {name}: there is no such kind of device. Expected auto, cpu, cuda, cuda:N or mps.") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device.type, False)
    if not present or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise CellbenchError(f"--device {name}: this machine has none. Leave --device out to use what there is.")
    return device


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bf16 is emulated, several times slower than fp32.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
