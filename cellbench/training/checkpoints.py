"""Checkpoints from which interrupted runs are resumed: one file per run in the cache folder, written atomically, removed when the run is finished.

All projects of a user share the cache folder, and two of them may execute the same run. So a file belongs to one run in one store, and only that
run writes and removes it. Other runs with the same fingerprint may read it, since their numbers would be the same.

Checkpoints of runs that fail or are interrupted stay for ``KEEP_DAYS``, so that the same command resumes them.
"""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Any

from cellbench.files import cache_dir, remove_half_written, text_digest, write_atomic

EVERY_S = 30.0
"""Work that is lost at most when a process is killed."""


KEEP_DAYS = 30
"""A checkpoint that was not written for this time is removed by the next grid or search: its run starts from the beginning."""


def remove_old() -> int:
    """Removes checkpoints that nobody resumed for ``KEEP_DAYS``, and what killed processes left half-written in the cache folder; returns their number."""
    folder, oldest_s = cache_dir() / "checkpoints", time.time() - KEEP_DAYS * 86_400
    num = remove_half_written(cache_dir()) + remove_half_written(folder)
    for path in folder.glob("*.pt"):
        with contextlib.suppress(OSError):  # another process was faster
            if path.stat().st_mtime < oldest_s:
                path.unlink()
                num += 1
    return num


def checkpoint_path(fingerprint: str, run: str) -> Path:
    """The file of a run, named by a hash of ``run``, which identifies run and store and may contain a password."""
    return cache_dir() / "checkpoints" / f"{fingerprint}-{text_digest(run)}.pt"


def write_checkpoint(place: Path, state: dict[str, Any]) -> None:
    """Saves a state of tensors, numbers and strings. Raises CellbenchError if the disk is full."""
    import torch

    write_atomic(place, functools.partial(torch.save, state))


def read_checkpoint(place: Path) -> dict[str, Any] | None:
    """The state of a run, on the CPU; None if there is no readable one or its weights are NaN. The run then starts from the beginning."""
    state = _read(place)
    if state is None:  # damaged: its epochs are trained again
        delete_checkpoint(place)
    return state


def read_other_store(place: Path) -> dict[str, Any] | None:
    """The most advanced state of all runs with the same fingerprint, in any store; None if there is none.

    Pruned runs do not count: pruning was the decision of another search.
    """
    fingerprint, _, _ = place.stem.rpartition("-")
    states = [state for other in sorted(place.parent.glob(f"{fingerprint}-*.pt")) if other != place and (state := _read(other)) is not None]
    states = [state for state in states if state["progress"]["ended"] != "pruned"]
    return max(states, key=lambda state: state["progress"]["epoch"], default=None)


def _read(place: Path) -> dict[str, Any] | None:
    if not place.is_file():
        return None
    import torch

    try:
        state = torch.load(place, map_location="cpu", weights_only=True)
        finite = not any(bool(x.isnan().any()) for x in state.get("model", {}).values() if x.is_floating_point())
    except (OSError, RuntimeError, EOFError, ValueError, KeyError):
        return None
    return state if finite else None


def delete_checkpoint(place: Path) -> None:
    """Removes the checkpoint of a finished run."""
    with contextlib.suppress(FileNotFoundError):
        place.unlink()
