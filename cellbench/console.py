"""Output to a terminal: lines and progress bars, which :func:`silent` turns off."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_silent = False


def say(text: str) -> None:
    """Prints a line without breaking a progress bar."""
    if not _silent:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class ProgressBar(tqdm):
    """tqdm's bar; not shown inside :func:`silent`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named | ({"disable": True} if _silent else {}))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No line and no progress bar of this process is shown inside ``with``."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before
