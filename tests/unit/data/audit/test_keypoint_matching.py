"""Pictures that share a layout and no pixel are different pictures; a part of one is known again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cellbench.data.audit.keypoint_matching import find_same_images, find_shared_regions, keypoints
from cellbench.data.audit.perceptual_hash import mean_pool, to_grey

FIVE = ((35, 35), (35, 120), (80, 78), (125, 35), (125, 120))


def discs_at(
    rng: np.random.Generator, places: np.ndarray, radius_px: tuple[float, float], side_px: int = 160, nucleus: bool = False
) -> np.ndarray:
    """Discs on a pale ground (S, S, 3) uint8, each picture with its own noise."""
    y, x = np.mgrid[:side_px, :side_px]
    picture = rng.normal(235, 2, (side_px, side_px, 3))
    for cy, cx in places:
        far, radius = np.hypot(y - cy, x - cx), rng.uniform(*radius_px)
        picture[far < radius] = (170, 150, 190)
        if nucleus:
            picture[far < radius / 2] = (90, 40, 130)
    return (picture + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8)


def chip(rng: np.random.Generator) -> np.ndarray:
    return discs_at(rng, np.array(FIVE) + rng.uniform(-8, 8, (5, 2)), (14, 22))


def nuclei(rng: np.random.Generator) -> np.ndarray:
    return discs_at(rng, np.array(FIVE) + rng.uniform(-8, 8, (5, 2)), (22, 22), nucleus=True)


def single(rng: np.random.Generator) -> np.ndarray:
    return discs_at(rng, rng.uniform(40, 88, (1, 2)), (20, 30), 128, nucleus=True)


def array(rng: np.random.Generator) -> np.ndarray:
    places = np.stack(np.meshgrid(*[np.arange(30, 300, 48)] * 2), -1).reshape(-1, 2)
    return discs_at(rng, places + rng.uniform(-2, 2, places.shape), (14, 14), 300)


def dish(rng: np.random.Generator) -> np.ndarray:
    picture = discs_at(rng, rng.uniform(60, 196, (6, 2)), (7, 12), 256).astype(float)
    far = np.hypot(*(np.indices((256, 256)) - 128))
    picture[np.abs(far - 110) < 4] = 90
    picture[far > 114] = 60
    return (picture + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8)


def lines(rng: np.random.Generator) -> np.ndarray:
    picture = discs_at(rng, rng.uniform(20, 180, (6, 2)), (10, 16), 200).astype(float)
    for k in range(25, 200, 50):
        picture[k : k + 3] = picture[:, k : k + 3] = 120
    return (picture + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [chip, nuclei, single, array, dish, lines], ids=lambda drawn: drawn.__name__)
def test_pictures_of_one_layout_are_different_pictures(drawn: Callable[[np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(28)
    pictures = [drawn(rng) for _ in range(6)]
    all_marks = [keypoints(to_grey(picture)) for picture in pictures]
    assert find_shared_regions(all_marks) == []
    assert find_same_images(all_marks, [mean_pool(to_grey(picture)) for picture in pictures]) == []


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [chip, array, dish], ids=lambda drawn: drawn.__name__)
def test_a_crop_of_one_picture_of_a_layout_is_found_among_the_others(drawn: Callable[[np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(28)
    pictures = [drawn(rng) for _ in range(5)]
    side = len(pictures[2])
    pictures.append(np.rot90(pictures[2][side // 8 :, : side - side // 8]).astype(np.uint8))
    found = find_shared_regions([keypoints(to_grey(np.ascontiguousarray(picture))) for picture in pictures])
    assert [(pair.first, pair.second) for pair in found] == [(2, 5)]


def test_two_photographs_of_one_empty_plate_are_not_one_picture() -> None:
    rng = np.random.default_rng(0)
    shade = 200 - 40 * np.hypot(*(np.indices((128, 128)) - 64))[..., None] / 90
    pictures = [(shade + rng.normal(0, 3, (128, 128, 3))).clip(0, 255).astype(np.uint8) for _ in range(3)]
    pictures.append(np.ascontiguousarray(pictures[0][::-1]))
    small = [mean_pool(to_grey(picture)) for picture in pictures]
    assert find_same_images([keypoints(to_grey(picture)) for picture in pictures], small) == [(0, 3)]
