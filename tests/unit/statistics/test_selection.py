"""The corrected score of the best of many models is unbiased where the raw one is not."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.statistics.scores import ModelScores
from cellbench.statistics.selection import corrected_best, corrected_mean


def test_of_twenty_equal_models_the_corrected_best_is_unbiased_and_the_raw_one_is_not() -> None:
    """600 test sets of 20 images; every model has the true mean 0.95, images share their difficulty."""
    rng = np.random.default_rng(0)
    raw, corrected = [], []
    for k in range(600):
        scores = 0.95 + rng.normal(0, 0.01, 20) + rng.normal(0, 0.02, (20, 20))
        raw.append(scores.mean(axis=1).max())
        corrected.append(corrected_mean(scores, np.ones(20, int), resamples=200, seed=k))
    assert np.mean(raw) - 0.95 > 0.007
    assert abs(np.mean(corrected) - 0.95) < 0.001


def test_a_clear_winner_keeps_its_score_and_groups_are_left_out_whole() -> None:
    images = tuple(f"i{k}" for k in range(12))
    rng = np.random.default_rng(1)
    values = rng.normal(0, 0.001, (3, 12))
    models = [ModelScores(model=f"m{k}", images=images, values=0.8 + 0.05 * k + values[k]) for k in range(3)]
    assert corrected_best(models) == pytest.approx(models[2].mean, abs=1e-12)
    losses = [ModelScores(model=m.model, images=images, values=1 - m.values, lower_is_better=True) for m in models]
    assert corrected_best(losses) == pytest.approx(1 - models[2].mean, abs=1e-12)
    grouped = [ModelScores(model=m.model, images=images, values=m.values, groups=tuple(k // 4 for k in range(12))) for m in models]
    assert corrected_best(grouped) is None, "three groups are too few"
    assert corrected_best(models[:1]) is None
