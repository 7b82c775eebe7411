"""Similar descriptors are found among many, as a comparison of all finds them."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.data.audit import visual_words
from cellbench.data.audit.keypoint_matching import _MIRRORED
from cellbench.data.audit.visual_words import Descriptors, Words, find_matches


def random_descriptors(num: int, seed: int) -> np.ndarray:
    """Sparse and uneven, as those of SIFT are."""
    return np.random.default_rng(seed).exponential(20, (num, 128)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("flat", [512, 0], ids=["all words", "in cells"])
def test_planted_matches_are_found_as_they_are_and_mirrored(monkeypatch, flat):
    monkeypatch.setattr(visual_words, "FLAT", flat)
    rng = np.random.default_rng(5)
    first = random_descriptors(6000, 1)
    other = random_descriptors(400, 2)
    noise = lambda rows: (rows + rng.normal(0, 2, rows.shape)).clip(0, 255).astype(np.uint8)  # noqa: E731
    other[:100] = noise(first[50:150].astype(float))
    other[100:200] = noise(first[1000:1100, np.argsort(_MIRRORED)].astype(float))
    images = np.repeat(np.arange(31), [*[200] * 30, 400])
    found = {tuple(row) for row in find_matches(np.concatenate([first, other]), images, _MIRRORED, 0.9).tolist()}
    plain = {(0, 50 + k, 6000 + k) for k in range(100)}
    mirrored = {(1, 1000 + k, 6100 + k) for k in range(100)}
    unit = Descriptors(values=np.concatenate([first, other])).rows(slice(None))
    assert len(plain & found) >= 95
    assert len(mirrored & found) >= 95
    for turned, i, j in found:
        assert images[i] < images[j]
        pair = (unit[i], unit[j][_MIRRORED]) if turned else (unit[i], unit[j])
        assert max(pair[0] @ pair[1], (unit[i][_MIRRORED] @ unit[j]) if turned else 0) >= 0.9 - 1e-6


def test_the_nearest_words_are_those_of_a_comparison_with_all(monkeypatch):
    descriptors = Descriptors(values=random_descriptors(3000, 3))
    words = Words(descriptors)
    rows = descriptors.rows(slice(None))
    expected = np.argsort(-(rows @ words.words_WD.T), axis=1)[:, :2]
    assert (words.nearest(descriptors) == expected).all()
