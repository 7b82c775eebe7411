"""Otsu's thresholds: exact for any number of classes, and fast."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from skimage.filters import threshold_multiotsu

from cellbench.models.baselines.otsu import multi_level_thresholds, otsu


def variance_within(grey: np.ndarray, thresholds: tuple[int, ...]) -> float:
    """The sum of squared distances of all pixels to the mean of their class, by its definition."""
    classes = np.digitize(grey, thresholds, right=True)
    return sum(((part - part.mean()) ** 2).sum() for k in np.unique(classes) if len(part := grey[classes == k].astype(float)))


@pytest.mark.parametrize("num_classes", [4, 5, 6])
def test_thresholds_are_the_best_of_all(num_classes: int) -> None:
    grey = np.random.default_rng(num_classes).choice([3, 9, 10, 40, 41, 90, 120, 121, 200, 250], 400).astype(np.uint8)
    levels = np.unique(grey)[:-1].tolist()
    best = min(variance_within(grey, some) for some in itertools.combinations(levels, num_classes - 1))
    found = multi_level_thresholds(grey, num_classes)
    assert variance_within(grey, tuple(found)) == pytest.approx(best, rel=1e-12)


def test_thresholds_equal_those_of_skimage_where_it_is_fast() -> None:
    rng = np.random.default_rng(0)
    grey = np.concatenate([rng.normal(mean, 6, 2000) for mean in (40, 90, 150, 220)]).clip(0, 255).astype(np.uint8)
    assert multi_level_thresholds(grey, 4) == pytest.approx(threshold_multiotsu(grey, classes=4), abs=1)  # it rounds to single precision


@pytest.mark.parametrize("num_classes", [7, 30, 255])
def test_many_classes_take_less_than_a_second(num_classes: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    start = time.process_time()
    classes = otsu(image, num_classes, cells="dark")
    assert time.process_time() - start < 1
    assert len(np.unique(classes)) == num_classes


def test_as_many_classes_as_grey_levels_are_one_each() -> None:
    image = np.repeat(np.arange(0, 250, 50, dtype=np.uint8).reshape(1, 5, 1), 3, axis=2)
    assert otsu(image, 5, cells="bright").tolist() == [[0, 1, 2, 3, 4]]
    assert otsu(image, 6, cells="bright").tolist() == [[0] * 5]


def discs() -> tuple[np.ndarray, np.ndarray]:
    """Three discs, on 6 % of an image, and grey levels of the noise around level 0."""
    y, x = np.mgrid[:120, :160]
    truth = np.zeros((120, 160), bool)
    for cy, cx in ((30, 30), (70, 90), (40, 130)):
        truth |= (y - cy) ** 2 + (x - cx) ** 2 <= 11**2
    return truth, np.random.default_rng(0).normal(0, 2, truth.shape)


@pytest.mark.parametrize("channels", [(1, 1, 1), (0, 0, 1), (1, 0, 0)])
def test_by_itself_it_finds_bright_cells_on_black_in_any_colour(channels: tuple[int, int, int]) -> None:
    truth, noise = discs()
    image = ((np.where(truth, 90, 8) + noise).clip(0, 255)[..., None] * channels).astype(np.uint8)
    np.testing.assert_array_equal(otsu(image, 2, cells="auto"), truth)


def test_by_itself_it_finds_dark_cells_on_white_in_the_green_channel() -> None:
    truth, noise = discs()
    image = (np.where(truth[..., None], (200, 110, 190), (235, 230, 235)) + noise[..., None]).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(otsu(image, 2, cells="auto"), truth)
    np.testing.assert_array_equal(otsu(image, 3, cells="auto"), otsu(image, 3, cells="dark"))


def test_of_an_image_of_one_colour_nothing_is_found() -> None:
    assert not otsu(np.full((20, 30, 3), 7, np.uint8), 2, cells="auto").any()
