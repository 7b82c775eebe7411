"""Outlines have a bright core inside the region and a dark rim, and touching cells stay apart."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.data.io.overlay import CYAN, INSTANCE_COLOURS, RIM, WHITE, YELLOW, draw_instances, draw_outlines

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


def grid_of_cells(side_px: int, num: int, gap_px: int = 0) -> np.ndarray:
    """(H, W) int32: num x num square cells."""
    ids = np.zeros((num * side_px, num * side_px), np.int32)
    for k in range(num * num):
        y, x = k // num * side_px, k % num * side_px
        ids[y : y + side_px - gap_px, x : x + side_px - gap_px] = k + 1
    return ids


def outline_colour(picture: np.ndarray, inside: np.ndarray) -> tuple[int, int, int]:
    """The one colour of ``INSTANCE_COLOURS`` that occurs in a cell; white numbers aside, there must be one."""
    found = {colour for colour in INSTANCE_COLOURS if is_colour(picture, colour)[inside].sum() >= 20}
    assert len(found - {WHITE}) <= 1
    return next(iter(found - {WHITE}), WHITE)


@pytest.mark.parametrize("gap_px", [0, 6])
def test_cells_beside_each_other_have_different_colours(gap_px: int) -> None:
    ids = grid_of_cells(60, 5, gap_px)
    picture = draw_instances(np.full((*ids.shape, 3), 90, np.uint8), ids, 25)
    assert picture.shape[:2] == ids.shape  # large enough to be read as they are
    colours = np.array([hash(outline_colour(picture, ids == cell)) for cell in range(1, 26)]).reshape(5, 5)
    assert (colours[:, 1:] != colours[:, :-1]).all()
    assert (colours[1:] != colours[:-1]).all()


def test_a_cell_is_tinted_and_carries_its_number() -> None:
    ids = np.zeros((100, 100), np.int32)
    ids[20:80, 20:80] = 1
    picture = draw_instances(np.full((100, 100, 3), 90, np.uint8), ids, 1)
    assert (picture[:10] == 90).all()
    assert (picture[25, 25] != 90).any()
    assert is_colour(picture[35:65, 35:65], WHITE).any()


def test_an_image_with_small_cells_is_drawn_larger_so_that_its_numbers_can_be_read() -> None:
    ids = grid_of_cells(14, 5, 3)
    picture = draw_instances(np.full((*ids.shape, 3), 90, np.uint8), ids, 25)
    assert picture.shape in ((210, 210, 3), (280, 280, 3))


def test_a_number_that_would_cover_its_cell_is_left_out() -> None:
    ids = np.zeros((2000, 2000), np.int32)
    ids[10:14, 10:14], ids[100:160, 100:160] = 1, 2
    picture = draw_instances(np.full((2000, 2000, 3), 90, np.uint8), ids, 2)
    assert not is_colour(picture[:40, :40], WHITE).any()
    assert is_colour(picture[115:145, 115:145], WHITE).any()


def test_an_image_without_cells_stays_as_it_is() -> None:
    assert (draw_instances(GREY, np.zeros((40, 60), np.int32), 0)[:40, :60] == 128).all()
