"""Whether an image has bright cells on black, as in fluorescence, or dark ones on white."""

from __future__ import annotations

import numpy as np

BLACK = 20, 64
"""Grey levels of 255 up to which a background is that of dark field, and from which it is not."""


def is_dark_field(grey_hw: np.ndarray, threshold: float) -> bool:
    """Whether the background is the darker side of ``threshold``. Grey levels 0 to 255.

    The background is the larger side, and the one with the smaller spread: a vote each, where the sides differ by half. The darker side is black in
    dark field, and cells in bright field are not: two votes. A tie is decided by the median level of all.
    """
    bright, dark = grey_hw[grey_hw > threshold], grey_hw[grey_hw <= threshold]
    spreads = [float(np.median(np.abs(side - np.median(side)))) + 0.5 for side in (bright, dark)]
    votes = sum((ratio > 3 / 2) - (ratio < 2 / 3) for ratio in (dark.size / max(bright.size, 1), spreads[0] / spreads[1]))
    black = float(np.median(dark))
    votes += 2 * ((black < BLACK[0]) - (black > BLACK[1]))
    return bool(votes > 0) if votes else bool(np.median(grey_hw) < BLACK[1])
