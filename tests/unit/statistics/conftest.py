"""Scores that several tests of statistics use."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def dice(rng):
    """(36, 159): models that share easy and hard images, as on BCCD."""
    return rng.beta(20, 2, 159) - 0.001 * np.arange(36)[:, None] + rng.normal(0, 0.01, (36, 159))
