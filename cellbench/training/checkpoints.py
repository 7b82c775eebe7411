"""Where an interrupted run is resumed: one file a run in the cache folder, whole or absent, removed when the run is finished.

The cache folder is shared by all projects of a person, and two of them may ask for the same run, one after the other or side by side. So a file
belongs to one run in one store, which alone writes and removes it. Other runs of the same fingerprint may read it: the numbers would be the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from cellbench.files import cache_dir, write_atomic

EVERY_S = 30.0
"""What a lost process may have to do again."""


def checkpoint_path(fingerprint: str, run: str) -> Path:
    """The file of a run: ``run`` names it and the store that it is in. Neither can be read in the name, which may hold a password."""
    return cache_dir() / "checkpoints" / f"{fingerprint}-{hashlib.sha256(run.encode()).hexdigest()[:16]}.pt"


def write_checkpoint(place: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers and strings. Raises CellbenchError where the disk is full."""
    write_atomic(place, functools.partial(torch.save, state))


def read_checkpoint(place: Path) -> dict[str, Any] | None:
    """The state of a run, on the CPU, or None where there is none that can be read, or its weights are NaN: the run then starts anew."""
    state = _read(place)
    if state is None:  # a damaged file costs the epochs it held
        delete_checkpoint(place)
    return state


def read_other_store(place: Path) -> dict[str, Any] | None:
    """The state of the run of the same fingerprint that has come furthest, which another store may hold; None where there is none.

    A run that was pruned is not one of them: that was the decision of another search.
    """
    fingerprint, _, _ = place.stem.rpartition("-")
    states = [state for other in sorted(place.parent.glob(f"{fingerprint}-*.pt")) if other != place and (state := _read(other)) is not None]
    states = [state for state in states if state["progress"]["ended"] != "pruned"]
    return max(states, key=lambda state: state["progress"]["epoch"], default=None)


def _read(place: Path) -> dict[str, Any] | None:
    if not place.is_file():
        return None
    try:
        state = torch.load(place, map_location="cpu", weights_only=True)
        finite = not any(bool(x.isnan().any()) for x in state.get("model", {}).values() if x.is_floating_point())
    except (OSError, RuntimeError, EOFError, ValueError, KeyError):
        return None
    return state if finite else None


def delete_checkpoint(place: Path) -> None:
    """Removes the file of a finished run."""
    with contextlib.suppress(FileNotFoundError):
        place.unlink()
