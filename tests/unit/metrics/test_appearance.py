"""The distance of an image from the training images: 1 is usual within their set, whatever the scale of the features."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.metrics.appearance import TrainingAppearance, Trust


def rows(num: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return ((rng.normal(size=(num, 40)) + shift) * np.geomspace(1e-3, 1e3, 40)).astype(np.float32)


def test_images_of_the_same_set_are_within_the_distance_1_and_others_are_not() -> None:
    made = TrainingAppearance.of(rows(60, 0), rows(20, 1))
    assert made is not None
    same = [made.distance(row) for row in rows(200, 2)]
    assert 0.85 <= np.mean(np.array(same) <= 1) <= 1
    assert min(made.distance(row) for row in rows(50, 3, shift=5.0)) > 2


def test_the_unit_is_the_largest_of_a_few_held_out_distances() -> None:
    train, other = rows(6, 0), rows(2, 1)
    made = TrainingAppearance.of(train, other)
    assert made is not None
    scaled = (train - train.mean(0)) / np.sqrt(train.std(0) ** 2 + np.median(train.std(0)) ** 2)
    nearest = [min(np.sqrt(np.mean((a - b) ** 2)) for k, b in enumerate(scaled) if k != j) for j, a in enumerate(scaled)]
    assert made.num_held_out == 8
    assert max(made.distance(row) for row in other) <= 1 or made.unit == pytest.approx(max(nearest), rel=1e-4)
    assert made.unit >= max(nearest) - 1e-6


def test_it_is_the_same_after_a_file() -> None:
    made = TrainingAppearance.of(rows(10, 0), rows(3, 1))
    assert made is not None
    again = TrainingAppearance.from_arrays(made.to_arrays())
    for row in rows(5, 2):
        assert again.distance(row) == pytest.approx(made.distance(row), rel=1e-3)
    assert again.num_held_out == made.num_held_out


def test_two_training_images_say_nothing() -> None:
    assert TrainingAppearance.of(rows(2, 0), rows(3, 1)) is None


@pytest.mark.parametrize(
    ("distance", "word"), [(None, ""), (0.5, "like the training images"), (1.5, "unusual"), (3.0, "unlike the training images")]
)
def test_a_distance_has_a_word(distance: float | None, word: str) -> None:
    assert Trust(distance=distance).word == word
