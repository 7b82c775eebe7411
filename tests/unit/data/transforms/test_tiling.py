"""Tiling: joining undoes cutting for every size and overlap, and the weights of every pixel sum to one."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from cellbench.data.transforms import tiling
from cellbench.data.transforms.tiling import Stitcher, TileGrid, cut_tile, tile_origins

SIZES = [(1200, 1600), (224, 224), (65, 64), (64, 65), (1, 1000), (1000, 1), (1, 1), (50, 30), (200, 333), (223, 225)]
OVERLAPS = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9]
SEEN = np.random.default_rng(0).random((1200, 1600, 2), dtype=np.float32)  # two channels that no shift or transposition leaves alike


def stitched(image: np.ndarray, grid: TileGrid, batch: int = 5, corners: list[tuple[int, int]] | None = None) -> np.ndarray:
    """The image (H, W, C) cut into tiles and put back, as prediction does it; rows that never came stay NaN."""
    stitcher = Stitcher(grid, image.shape[2])
    out = np.full_like(image, np.nan)
    corners = corners or list(grid)
    for i in range(0, len(corners), batch):
        cuts = np.stack([cut_tile(image, y, x, grid.tile_px) for y, x in corners[i : i + batch]])
        for y, band_CHW in stitcher.add(torch.from_numpy(cuts).permute(0, 3, 1, 2)):
            assert np.isnan(out[y : y + band_CHW.shape[1]]).all(), "a row came twice"
            out[y : y + band_CHW.shape[1]] = band_CHW.permute(1, 2, 0).numpy()
    return out


def test_the_examples_in_the_documentation_hold() -> None:
    result = doctest.testmod(tiling)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("tile_px", [16, 64, 224])
@pytest.mark.parametrize("size", SIZES[1:])
def test_what_is_cut_comes_back_for_every_overlap(size: tuple[int, int], tile_px: int) -> None:
    image = SEEN[: size[0], : size[1]]
    for overlap in OVERLAPS:
        if overlap < 0.9 or tile_px == 64:  # a hundredfold coverage: enough with one size of tiles
            np.testing.assert_allclose(
                stitched(image, TileGrid.over(*size, tile_px, overlap)), image, atol=1e-5, err_msg=f"overlap {overlap}"
            )


def test_a_whole_smear_comes_back() -> None:
    np.testing.assert_allclose(stitched(SEEN, TileGrid.over(1200, 1600, 224, 0.25)), SEEN, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
def test_how_tiles_are_batched_changes_nothing(batch: int) -> None:
    image, grid = SEEN[:100, :170], TileGrid.over(100, 170, 32, 0.5)
    np.testing.assert_array_equal(stitched(image, grid, batch), stitched(image, grid, 3))


@pytest.mark.parametrize("overlap", [0.25, 0.7])
def test_tiles_are_added_exactly_as_one_after_another_in_a_whole_image(overlap: float) -> None:
    image, grid = SEEN[:100, :170], TileGrid.over(100, 170, 32, overlap)
    rows, columns = grid.weights
    whole = torch.zeros(2, 100, 170)
    for k, (y, x) in enumerate(grid):
        taper = rows[k // len(grid.xs)][:, None] * columns[k % len(grid.xs)]
        whole[:, y : y + 32, x : x + 32].addcmul_(torch.from_numpy(image[y : y + 32, x : x + 32]).permute(2, 0, 1), taper)
    np.testing.assert_array_equal(stitched(image, grid), whole.permute(1, 2, 0).numpy())


def test_a_wrong_row_major_index_would_be_seen() -> None:
    """The error that the style sheet names: tile number read as ``row * num_rows + column`` on a grid that is not square."""
    image, grid = SEEN[:100, :170], TileGrid.over(100, 170, 32, 0.25)
    assert len(grid.ys) != len(grid.xs)
    right = list(grid)
    wrong = [(grid.ys[k % len(grid.ys)], grid.xs[k // len(grid.ys)]) for k in range(len(grid))]
    assert sorted(wrong) == sorted(right)
    assert (np.abs(stitched(image, grid, corners=wrong) - image) > 0.01).mean() > 0.5


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("size", SIZES)
def test_weights_are_positive_and_sum_to_one_at_every_pixel(size: tuple[int, int], overlap: float) -> None:
    grid = TileGrid.over(*size, 64, overlap)
    for starts, weights, length in zip((grid.ys, grid.xs), grid.weights, size, strict=True):
        assert weights.min() > 0
        total = np.zeros(max(length, 64))
        for start, row in zip(starts, weights.double().numpy(), strict=True):
            total[start : start + 64] += row
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_a_tile_counts_most_in_its_middle() -> None:
    rows, _ = TileGrid.over(160, 160, 64, 0.5).weights
    assert (rows[1].diff()[:31] >= 0).all()
    assert rows[1][32] > 10 * rows[1][0]


@pytest.mark.parametrize("overlap_px", [0, 1, 13, 32, 57])
@pytest.mark.parametrize("tile_px", [64])
def test_origins_cover_reach_both_ends_overlap_enough_and_are_the_fewest(tile_px: int, overlap_px: int) -> None:
    for length in range(1, 400):
        starts = tile_origins(length, tile_px, overlap_px)
        assert starts[0] == 0
        if length <= tile_px:
            assert starts == [0]
            continue
        assert starts[-1] == length - tile_px  # the last tile ends where the image ends
        steps = np.diff(starts)
        assert steps.max() <= tile_px - overlap_px
        assert steps.max() - steps.min() <= 1  # evenly spaced: never a sliver
        one_fewer = (len(starts) - 1) * (tile_px - overlap_px) + overlap_px
        assert one_fewer < length


@pytest.mark.parametrize(("length", "tile", "overlap"), [(0, 64, 0), (10, 64, 64), (10, 64, -1), (10, 0, 0)])
def test_impossible_tilings_are_refused(length: int, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        tile_origins(length, tile, overlap)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_is_covered_and_owned_by_one_tile(size: tuple[int, int], overlap: float) -> None:
    grid = TileGrid.over(*size, 64, overlap)
    covered, owned = np.zeros(size, int), np.zeros(size, int)
    corners, mine = list(grid), list(grid.owned())
    assert len(grid) == len(corners) == len(mine)
    for (y, x), (rows, columns) in zip(corners, mine, strict=True):
        covered[y : y + 64, x : x + 64] += 1
        assert 0 <= rows.start < rows.stop <= 64
        assert 0 <= columns.start < columns.stop <= 64
        owned[y + rows.start : y + rows.stop, x + columns.start : x + columns.stop] += 1
    assert covered.min() == 1
    assert (owned == 1).all()


def test_a_pixel_is_owned_by_the_tile_whose_middle_is_nearest() -> None:
    grid = TileGrid.over(64, 1000, 64, 0.5)
    middles = np.array(grid.xs) + 31.5
    for k, (_, columns) in enumerate(grid.owned()):
        x = np.arange(columns.start, columns.stop) + grid.xs[k]
        distance = np.abs(x[:, None] - middles)
        assert (distance[:, k] <= distance.min(axis=1) + 1).all()


@pytest.mark.parametrize("size", [(5, 7), (1, 7), (40, 20)])
def test_a_tile_beyond_the_edge_is_filled_by_mirroring(size: tuple[int, int]) -> None:
    image = SEEN[: size[0], : size[1]]
    tile = cut_tile(image, 0, 0, 32)
    assert tile.shape == (32, 32, 2)
    ys, xs = (np.r_[np.arange(n), np.arange(n)[::-1]] for n in size)  # edge pixels repeated, then back
    np.testing.assert_array_equal(tile, image[np.resize(ys, 32)][:, np.resize(xs, 32)])


def test_cutting_keeps_the_type_and_works_on_masks() -> None:
    mask = np.arange(200, dtype=np.uint8).reshape(10, 20)
    assert cut_tile(mask, 0, 4, 16).dtype == np.uint8
    np.testing.assert_array_equal(cut_tile(mask, 0, 4, 16)[:10], mask[:, 4:])


def test_memory_grows_with_the_width_and_not_with_the_area() -> None:
    bands = []
    grid = TileGrid.over(4000, 64, 32, 0.5)
    stitcher = Stitcher(grid, 1)
    for _ in range(len(grid)):
        bands += [band.shape[1] for _, band in stitcher.add(torch.zeros(1, 1, 32, 32))]
    assert sum(bands) == 4000
    assert max(bands) <= 32
