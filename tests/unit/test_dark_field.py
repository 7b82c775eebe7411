"""Bright cells on black are told from dark cells on white."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.dark_field import is_dark_field


@pytest.mark.parametrize("level", [15, 120, 240])
def test_an_empty_field_is_dark_only_if_it_is_black(level: float) -> None:
    noise = np.random.default_rng(0).normal(level, 2, (200, 300))
    assert is_dark_field(noise, level) is (level == 15)
