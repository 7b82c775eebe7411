"""Imports without a search for garbage: what they make stays."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def no_gc_during_import() -> Iterator[None]:
    """For imports inside: torch and MLflow make so many objects that looking for garbage among them takes a fifth of the time of importing
    them, and half a second every time from then on. Afterwards nobody looks there again."""
    was, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # else a caller's own garbage would be kept, for nothing
            gc.freeze()
        if was:
            gc.enable()
