"""Masks that part touching cells by a line: the line belongs to the cells, narrow joints part them, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.config.cards import DatasetCard
from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.io import images
from cellbench.data.loading import open_dataset
from cellbench.data.parted_masks import parted_cells
from cellbench.errors import CellbenchError
from cellbench.metrics.pixel import IGNORE


def two_cells(line_px: int, joint_px: int = 0) -> np.ndarray:
    """A class map (H, W): two halves of a wide cell with a line between them, bridged over ``joint_px`` rows, and another cell far away."""
    mask = np.zeros((60, 120), np.uint8)
    mask[10:50, 10:70] = 1
    mask[10:50, 40 : 40 + line_px] = 0
    mask[30 : 30 + joint_px, 40 : 40 + line_px] = 1
    mask[20:40, 90:110] = 1
    return mask


@pytest.mark.parametrize("line_px", [1, 2, 3])
def test_a_line_between_two_cells_belongs_to_them(line_px):
    found = parted_cells(two_cells(line_px), 3, 20)
    assert found.max() == 3
    assert (found[10:50, 10:70] > 0).all()
    assert not found[:10].any()
    left, right = (set(np.unique(part)) for part in (found[10:50, 10:40], found[10:50, 40 + line_px : 70]))
    assert len(left) == len(right) == 1
    assert left != right


@pytest.mark.parametrize(("line_px", "joint_px", "num"), [(3, 3, 3), (3, 12, 2), (5, 0, 3)])
def test_narrow_joints_part_cells_and_wide_ones_do_not(line_px, joint_px, num):
    found = parted_cells(two_cells(line_px, joint_px), 3, 20)
    assert found.max() == num
    assert (found[12:20, 41] > 0).all() == (line_px <= 3 and num == 3)  # a wide line, or one within a cell, stays background


def test_gaps_at_the_frame_and_regions_of_a_pixel_keep_their_cells():
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :18] = mask[:, 21:] = 1  # a line from frame to frame
    assert (parted_cells(mask, 3, 20) > 0).all()
    mask[:] = 0
    mask[::4, ::4] = 1
    assert parted_cells(mask, 3, 20).max() == 100
    assert parted_cells(np.zeros((5, 7), np.uint8), 3, 20).max() == 0


def test_without_touching_cells_the_cells_are_the_connected_regions_of_each_class():
    y, x = np.mgrid[:80, :100]
    classes = (np.hypot(y - 20, x - 20) < 15).astype(np.uint8) + 2 * (np.hypot(y - 50, x - 70) < 20).astype(np.uint8)
    classes[60:, :10] = IGNORE
    found = parted_cells(classes, 3, 20)
    assert np.array_equal(found > 0, (classes > 0) & (classes != IGNORE))
    assert {(int(a), int(b)) for a, b in zip(classes[found > 0], found[found > 0], strict=True)} == {(1, 1), (2, 2)}


def folder_of(root: Path, card: str) -> Path:
    for name in "abcde":
        for kind, array in (("original", np.full((60, 120, 3), ord(name), np.uint8)), ("mask", 255 * two_cells(2))):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{name}.png")
    (root / "dataset.toml").write_text(card)
    return root


def test_a_card_with_a_cut_gives_cells_and_leaves_the_class_map_as_it_is(tmp_path):
    plain, cut = (
        open_dataset(Registry().dataset("folder"), folder_of(tmp_path / str(px), f"values = [0, 255]\ncut_px = {px}"), DataSpec())
        for px in (0, 3)
    )
    assert plain.read_instances(plain.train[0]) is None
    ids = cut.read_instances(cut.train[0])
    assert ids.max() == 3
    assert np.array_equal(cut.read_mask(cut.train[0]), plain.read_mask(plain.train[0]))
    assert cut.digest != plain.digest
    assert plain.digest == replace(plain, cut_px=0).digest


def test_the_truth_is_decoded_once(tmp_path, monkeypatch):
    data = open_dataset(Registry().dataset("folder"), folder_of(tmp_path, "values = [0, 255]\ncut_px = 3"), DataSpec())
    expected, decoded, read = (data.read_mask(data.train[0]), data.read_instances(data.train[0])), [], images.read_labels
    monkeypatch.setattr(images, "read_labels", lambda path: decoded.append(path) or read(path))
    found = data.read_truth(data.train[0])
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert decoded == [data.train[0].mask]


def test_a_cut_is_refused_for_masks_that_number_their_cells(tmp_path):
    folder = folder_of(tmp_path, 'masks = "cells"\ncut_px = 3')
    with pytest.raises(CellbenchError, match="cut_px is for masks without cell numbers"):
        open_dataset(Registry().dataset("folder"), folder, DataSpec())


def test_bccd_has_a_cut_and_other_cards_have_none():
    registry = Registry()
    assert registry.dataset("bccd").cut_px == 3
    assert DatasetCard.model_fields["cut_px"].default == registry.dataset("dsb2018").cut_px == 0
