"""Misplaced masks are found, with the correct placement; correct masks are not reported, even with low contrast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import discs, write_pair

from cellbench.cli.check import check_folder
from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.audit.mask_placement import Placement, PlacementFeatures, check_placement, describe
from cellbench.data.audit.perceptual_hash import eight_orientations
from cellbench.data.audit.quick_check import require_fit
from cellbench.data.loading import open_dataset

NUM = 9


@pytest.fixture(scope="module")
def right() -> list[PlacementFeatures]:
    found = []
    for seed in range(NUM):
        image, mask = discs(seed, 120, 120)
        found.append(describe(image, mask > 0, image[..., 1] < 150))
    return found


def with_masks(all_maps: list[PlacementFeatures], masks: list[np.ndarray]) -> Placement:
    return check_placement([replace(one, mask=mask) for one, mask in zip(all_maps, masks, strict=True)], [0.9] * len(all_maps))


def test_right_masks_fit(right: list[PlacementFeatures]) -> None:
    assert check_placement(right, [0.9] * NUM) == Placement(message="", wrong=(), most=False)


@pytest.mark.parametrize(
    ("way", "said"),
    [(1, "turned by 90 degrees to the right"), (2, "turned by 180 degrees"), (5, "mirrored upside down"), (7, "mirrored left to right")],
)
def test_turned_masks_are_wrong_and_the_way_back_is_named(right: list[PlacementFeatures], way: int, said: str) -> None:
    found = with_masks(right, [eight_orientations(one.mask)[way] for one in right])
    assert (found.most, found.wrong) == (True, tuple(range(NUM)))
    assert found.message == f"they fit when {said}"


@pytest.mark.parametrize(("step", "said"), [(1, "next one"), (-1, "one before")])
def test_masks_of_the_neighbour_are_wrong_and_the_neighbour_is_named(right: list[PlacementFeatures], step: int, said: str) -> None:
    masks = [one.mask for one in right]
    found = with_masks(right, [masks[(k + step) % NUM] for k in range(NUM)])
    assert found.most
    assert said in found.message


def test_exchanged_moved_and_foreign_masks_are_wrong(right: list[PlacementFeatures]) -> None:
    masks = [one.mask for one in right]
    exchanged = with_masks(right, [masks[k] for k in (4, 7, 1, 8, 2, 0, 3, 5, 6)])
    assert exchanged.most
    assert "another image" in exchanged.message
    moved = with_masks(right, [np.roll(mask, (8, -4), (0, 1)) for mask in masks])
    assert (moved.most, moved.message) == (True, "they fit when moved by 12% of the height up and 6% of the width to the right")
    foreign = with_masks(right, [describe(*_shape(100 + k)).mask for k in range(NUM)])
    assert (foreign.most, "no better than others" in foreign.message) == (True, True)


def _shape(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image, mask = discs(seed, 120, 120)
    return image, mask > 0, mask > 0


def test_cells_that_hardly_show_are_not_called_misplaced() -> None:
    rng = np.random.default_rng(0)
    found = []
    for seed in range(NUM):
        cell = discs(seed, 120, 120)[1] > 0
        image = np.repeat((rng.normal(128, 10, (120, 120)) + 4 * cell).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        found.append(describe(image, cell, image[..., 0] > 128))
    assert not check_placement(found, [0.63] * NUM).wrong


@pytest.mark.slow
def test_check_and_grid_say_that_all_masks_are_turned_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    for part, num in (("train", 8), ("test", 3)):
        for k in range(num):
            name = f"{part}{k}.jpg"
            write_pair(tmp_path / "own" / part, name, k + 50 * (part == "test"), height_px=120, width_px=120)
            place = tmp_path / "own" / part / "original" / name
            Image.open(place).save(place, quality=95, exif=exif)
    lines: list[str] = []
    assert check_folder(tmp_path / "own", out=tmp_path / "out", say=lines.append) == 1
    (said,) = (line for line in lines if "severe  misplaced" in line)
    assert "they fit when turned by 90 degrees to the right. The images carry an EXIF orientation" in said
    card, spec = Registry().dataset("folder"), DataSpec()
    for _ in range(2):  # found, and remembered
        warnings: list[str] = []
        require_fit(open_dataset(card, tmp_path / "own", spec), True, warnings.append)
        (warning,) = warnings
        assert "NOT FIT to train on: misplaced (11, such as " in warning
        assert "turned by 90 degrees to the right" in warning
