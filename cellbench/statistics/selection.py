"""The price of choosing: the score of the best of many models, corrected for having been chosen by the same images.

Bootstrap bias correction (Tsamardinos, Greasidou and Borboudakis 2018): choose on a resample of the images, score the chosen one on the images that
the resample left out, and average. The images that score a model then have no part in choosing it. For 20 equal models the raw score of the best is
too high and the corrected one unbiased within 0.001 (``tests/unit/statistics/test_selection.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellbench.statistics.bootstrap import FEWEST, draw_units
from cellbench.statistics.comparison import align_images
from cellbench.statistics.scores import ModelScores

RESAMPLES = 2000


def corrected_best(models: Sequence[ModelScores], *, resamples: int = RESAMPLES, seed: int = 0) -> float | None:
    """The mean score to expect of the best of these models on new images. None for one model, or fewer than ``FEWEST`` images (groups of images)."""
    here = align_images(models)
    counts_U = np.bincount(here.unit_I)
    if len(models) < 2 or len(counts_U) < FEWEST:
        return None
    sums_MU = here.units_MU * counts_U
    return corrected_mean(-sums_MU if models[0].lower_is_better else sums_MU, counts_U, resamples, seed) * (
        -1 if models[0].lower_is_better else 1
    )


def corrected_mean(sums_MU: np.ndarray, counts_U: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """The same of sums of scores, higher being better, by model and unit, and the number of images of each unit."""
    weights_BU = draw_units(len(counts_U), resamples, seed)
    weights_BU = weights_BU[(weights_BU == 0).any(axis=1)].astype(np.int64)
    chosen_B = ((sums_MU @ weights_BU.T) / (counts_U @ weights_BU.T)).argmax(axis=0)
    left_BU = weights_BU == 0
    totals_M = sums_MU.sum(axis=1)
    best = totals_M.argmax()
    # What the chosen models lack to the best one on the same left-out images: a best one that is always chosen keeps its mean to the last digit.
    lacking_BU = (sums_MU[best] - sums_MU[chosen_B]) * left_BU
    return float(totals_M[best] / counts_U.sum() - (lacking_BU.sum(axis=1) / (left_BU @ counts_U)).mean())
