"""Where an interrupted run goes on: one file a run in the cache folder, whole or absent, gone when the run is finished."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch

from cellbench.files import cache_dir, write_atomic

EVERY_S = 30.0
"""What a lost process may have to do again."""


def path(fingerprint: str) -> Path:
    """The file of a run."""
    return cache_dir() / "checkpoints" / f"{fingerprint}.pt"


def write(place: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers and strings. Raises CellbenchError where the disk is full."""
    write_atomic(place, functools.partial(torch.save, state))


def read(place: Path) -> dict[str, Any] | None:
    """The state, on the CPU, or None where there is none that can be read, or its weights are NaN: the run then starts anew."""
    if not place.is_file():
        return None
    try:
        state = torch.load(place, map_location="cpu", weights_only=True)
        if not any(bool(x.isnan().any()) for x in state["model"].values() if x.is_floating_point()):
            return state
    except (OSError, RuntimeError, EOFError, ValueError, KeyError):  # a damaged file costs the epochs it held
        pass
    forget(place)
    return None


def forget(place: Path) -> None:
    """Removes the file of a finished run."""
    with contextlib.suppress(FileNotFoundError):
        place.unlink()
