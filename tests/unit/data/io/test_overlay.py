"""Outlines have a bright core inside the region and a dark rim, and touching cells stay apart."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.data.io.overlay import CYAN, RIM, YELLOW, draw_outlines

GREY = np.full((40, 60, 3), 128, np.uint8)


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour, np.uint8)).all(-1)


def test_the_line_lies_inside_the_region_with_a_dark_rim_on_both_sides() -> None:
    region = np.zeros((40, 60), bool)
    region[10:30, 10:30] = True
    drawn = draw_outlines(GREY, region)
    assert is_colour(drawn[20], YELLOW).nonzero()[0].tolist() == [10, 29]
    assert is_colour(drawn[20], RIM).nonzero()[0].tolist() == [9, 11, 28, 30]
    assert (GREY == 128).all()
    assert (drawn[15, 20] == 128).all()


def test_touching_cells_keep_a_dark_line_between_their_own_colours() -> None:
    ids = np.zeros((40, 60), np.int32)
    ids[5:35, 5:30], ids[5:35, 30:55] = 1, 70_000  # more numbers than 16 bits hold
    palette = np.zeros((70_001, 3), np.uint8)
    palette[1], palette[70_000] = YELLOW, CYAN
    row = draw_outlines(GREY, ids, palette)[20]
    assert [tuple(pixel) for pixel in row[28:31].tolist()] == [YELLOW, RIM, CYAN]


@pytest.mark.parametrize("width_px", [1, 2, 3])
def test_a_line_is_as_wide_as_asked(width_px: int) -> None:
    region = np.zeros((40, 60), np.uint8)
    region[10:30, 10:40] = 1
    assert is_colour(draw_outlines(GREY, region, width_px=width_px), YELLOW)[20].sum() == 2 * width_px


def test_a_region_at_the_frame_has_no_line_along_it() -> None:
    region = np.zeros((40, 60), np.uint8)
    region[:, :20] = 1
    drawn = draw_outlines(GREY, region)
    assert is_colour(drawn, YELLOW)[:, 19].all()
    assert not is_colour(drawn, YELLOW)[:, :19].any()
