"""Calibration: how far predicted probabilities and observed shares lie apart."""

from __future__ import annotations

import numpy as np


def expected_calibration_error(calibration: dict[str, list[float]]) -> float:
    """Expected calibration error, 0..1: how far probability and truth lie apart in each bin, weighed by its pixels (Naeini et al. 2015)."""
    pixels, said, was = (np.array(calibration[key]) for key in ("pixels", "probability", "share_cell"))
    return float((pixels * np.abs(said - was)).sum() / pixels.sum())
