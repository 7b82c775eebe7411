"""Depth and borders: they equal a reference computed cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from cellbench.data.cell_targets.depth import Depth
from cellbench.metrics.distance_watershed import DistanceWatershed
from cellbench.metrics.instances import numbered_instances
from cellbench.metrics.pixel import IGNORE

BOTH = Depth(border=True)


def encoded(classes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return BOTH.encode(numbered_instances(ids, classes), (1, 1))


def touching(height_px: int = 90, width_px: int = 140) -> np.ndarray:
    """Numbers of cells (H, W): two that touch, one alone, one cut by the frame."""
    y, x = np.mgrid[:height_px, :width_px]
    ids = np.zeros((height_px, width_px), np.int32)
    for number, (cy, cx, radius) in enumerate(((40, 40, 20), (44, 76, 18), (20, 110, 12), (90, 120, 25)), 1):
        ids[(np.hypot(y - cy, x - cx) < radius) & (ids == 0)] = number
    return ids


def test_the_distance_is_each_cell_s_own_with_one_hill_a_cell():
    ids = touching()
    found = encoded((ids > 0).astype(np.uint8), ids)[..., 1].astype(float)
    for number in range(1, 5):
        # Alone on a sheet that goes on beyond the frame, as if mirrored, a cell has only its own edges.
        alone = np.pad(ids == number, 60, mode="symmetric")
        deep = ndimage.distance_transform_edt(alone)[60:-60, 60:-60] - 0.5
        mine = ids == number
        assert found[mine].max() == 255
        assert np.abs(found[mine] / 255 - deep[mine] / deep[mine].max()).max() < 0.05
    assert (found[ids == 0] == 0).all()


def test_the_border_is_what_is_near_two_cells():
    ids = touching()
    found = encoded((ids > 0).astype(np.uint8), ids)[..., 0]
    square = np.ones((5, 5), bool)
    near = sum(ndimage.binary_dilation(ids == number, square).astype(int) for number in range(1, 5))
    assert set(np.unique(found)) == {0, 255}
    assert np.array_equal(found == 255, near > 1)


def test_an_image_without_cells_and_one_that_is_a_cell_have_targets():
    none, whole = np.zeros((9, 9), np.uint8), np.ones((9, 9), np.uint8)
    assert not encoded(none, none.astype(np.int32)).any()
    assert (encoded(whole, whole.astype(np.int32))[..., 1] == 255).all()


def test_the_loss_is_the_cross_entropy_of_each_target():
    logits = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 256, (2, 5, 6, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    p, t = logits.double().sigmoid(), truth.double().movedim(-1, 1) / 255
    per_pixel = -(t * p.log() + (1 - t) * (1 - p).log())
    assert BOTH.loss(logits, truth, None).item() == pytest.approx(per_pixel.mean((0, 2, 3)).sum().item(), rel=1e-5)
    assert Depth(border=False).loss(logits[:, 1:], truth[..., 1:], None).item() == pytest.approx(per_pixel[:, 1].mean().item(), rel=1e-5)


def test_a_learned_boundary_depth_separates_cells_that_the_mask_alone_cannot():
    mask = np.zeros((60, 120), np.uint8)
    mask[10:50, 10:110] = 1  # two square cells wall to wall: no neck at all
    ids = mask * np.where(np.arange(120) < 60, 1, 2)[None].astype(np.int32)
    border, distance = np.moveaxis(encoded(mask, ids).astype(float) / 255, -1, 0)
    boundary_depth = np.rint(255 * distance * (1 - border)).astype(np.uint8)
    assert DistanceWatershed(mask).instances(10, saddle_ratio=0.8).num == 1
    found = DistanceWatershed(mask, boundary_depth[None]).instances(10, saddle_ratio=0.8)
    assert found.num == 2
    assert min(np.mean(found.ids[ids == number] == np.bincount(found.ids[ids == number]).argmax()) for number in (1, 2)) > 0.95


def test_a_learned_boundary_depth_separates_cells_that_fill_the_image():
    classes, ids = np.ones((60, 120), np.uint8), np.where(np.arange(120) < 60, 1, 2)[None].repeat(60, 0).astype(np.int32)
    depth = encoded(classes, ids)[..., 1:]
    found = DistanceWatershed(classes, np.moveaxis(depth, -1, 0)).instances(10, saddle_ratio=0.8)
    assert found.num == 2
    assert min(np.mean(found.ids[ids == number] == np.bincount(found.ids[ids == number]).argmax()) for number in (1, 2)) > 0.95


def test_no_edge_is_where_a_cell_meets_ignored_pixels():
    ids = np.zeros((60, 60), np.int32)
    ids[20:41, 10:50] = 1
    classes = (ids > 0).astype(np.uint8)
    classes[:, 30:] = IGNORE
    found = encoded(classes, ids)[..., 1]
    # A long bar, cut in the middle: at the cut it is as deep as along the rest of it, full in its middle row.
    assert found[30, 29] == 255
    assert found[20, 29] < 30
    assert not found[:, 30:].any()


def test_auxiliary_targets_leave_out_ignored_pixels():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 2, 6, 8, generator=generator), torch.randint(0, 256, (2, 6, 8, 2), generator=generator).byte()
    kept = torch.ones(2, 6, 8, dtype=torch.bool)
    kept[:, :, 5:] = False
    whole = BOTH.loss(logits, truth, kept)
    torch.testing.assert_close(whole, BOTH.loss(logits[..., :5], truth[:, :, :5], None))
    assert BOTH.loss(logits, truth, torch.zeros_like(kept)) == 0
