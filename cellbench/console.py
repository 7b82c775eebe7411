"""Output to a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Prints a line without breaking a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
