"""Calibration: do predicted probabilities agree with observed shares?"""

from __future__ import annotations

import numpy as np


def expected_calibration_error(calibration: dict[str, list[float]]) -> float:
    """Expected calibration error, 0..1: mean difference of probability and observed share over bins, weighted by pixels (Naeini et al. 2015)."""
    pixels, predicted, observed = (np.array(calibration[key]) for key in ("pixels", "probability", "share_cell"))
    return float((pixels * np.abs(predicted - observed)).sum() / pixels.sum())
