"""Tiles without structure share one prediction; any tile with a cell keeps its own."""

from __future__ import annotations

import numpy as np

from cellbench.inference.empty_tiles import EmptyTiles


def rows_of(tiles: np.ndarray) -> list[int]:
    empty, rows = EmptyTiles(), []
    for tile in tiles:
        rows.append(empty.row(tile, len(set(rows))))
    return rows


def test_noise_is_no_structure_and_a_pale_cell_is() -> None:
    dice = np.random.default_rng(0)
    tiles = np.clip(dice.normal(230, 4, (6, 50, 70, 3)), 0, 255).astype(np.uint8)
    tiles[1, 20:34, 30:44, 2] -= 15
    tiles[4] = 20
    tiles[5] = 21
    assert rows_of(tiles) == [0, 1, 0, 0, 2, 2]


def test_a_slow_change_of_colour_is_cut_into_steps_of_which_none_stands_for_a_far_one() -> None:
    tiles = np.repeat(np.arange(100, 140, 3, dtype=np.uint8)[:, None, None, None], 3, 3) + np.zeros((1, 16, 16, 1), np.uint8)
    assert rows_of(tiles) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
