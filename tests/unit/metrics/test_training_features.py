"""The distance of an image from the training images: 1 is usual within their set, whatever the scale of the features."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.metrics.training_features import TrainingFeatures, Trust


def rows(num: int, seed: int, shift: float = 0.0) -> dict[int, np.ndarray]:
    """Descriptors at two depths; ``shift`` is seen at the second only."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1e-3, 1e3, 40)
    return {0: rng.normal(size=(num, 8)), 3: (rng.normal(size=(num, 40)) + shift) * scales}


def each(descriptors: dict[int, np.ndarray]) -> list[dict[int, np.ndarray]]:
    return [{depth: array[k] for depth, array in descriptors.items()} for k in range(len(descriptors[0]))]


def test_images_of_the_same_set_are_within_the_distance_1_and_others_are_not() -> None:
    made = TrainingFeatures.of(rows(60, 0), rows(20, 1))
    assert made is not None
    same = [made.distance(one) for one in each(rows(200, 2))]
    assert 0.85 <= np.mean([distance <= 1 for distance in same if distance is not None]) <= 1
    assert min(made.distance(one) or 0 for one in each(rows(50, 3, shift=5.0))) > 2
    assert max(made.distance({0: one[0]}) or 9 for one in each(rows(50, 2, shift=5.0))) < 2


def test_the_largest_of_a_few_held_out_distances_is_1() -> None:
    train, other = {0: np.array([[0.0], [1.0], [3.0]])}, {0: np.array([[4.5], [0.5]])}
    made = TrainingFeatures.of(train, other)
    assert made is not None
    assert made.distance({0: np.array([3.0 + 2.0])}) == pytest.approx(1.0)  # 2 is the distance of 3 from the others
    assert made.distance({0: np.array([3.0 + 5.0])}) == pytest.approx(2.5)
    assert made.distance({0: np.array([1.0])}) == 0
    assert made.distance({7: np.array([1.0])}) is None


def test_it_is_the_same_after_a_file() -> None:
    made = TrainingFeatures.of(rows(10, 0), rows(3, 1))
    assert made is not None
    again = TrainingFeatures.from_arrays(made.to_arrays())
    for one in each(rows(5, 2)):
        assert again.distance(one) == pytest.approx(made.distance(one), rel=1e-2)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    made = TrainingFeatures.of(rows(10, 0), rows(3, 1))
    assert made is not None
    with pytest.raises(ValueError, match="depth 3"):
        TrainingFeatures.from_arrays(made.to_arrays() | {"centre.3": np.zeros(39)})


def test_two_training_images_say_nothing() -> None:
    assert TrainingFeatures.of(rows(2, 0), rows(3, 1)) is None


@pytest.mark.parametrize(
    ("distance", "word"), [(None, ""), (0.5, "like the training images"), (1.5, "unusual"), (3.0, "unlike the training images")]
)
def test_a_distance_has_a_word(distance: float | None, word: str) -> None:
    assert Trust(distance=distance).word == word
