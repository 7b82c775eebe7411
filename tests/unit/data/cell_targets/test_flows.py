"""Flows and offsets: as computed cell by cell and pixel by pixel, and as by Cellpose where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cellbench.data.cell_targets.flows import CentreOffsets, Flows
from cellbench.metrics.flow_basins import FlowBasins
from cellbench.metrics.instance import instance_scores
from cellbench.metrics.instances import Instances, numbered_instances


def cells() -> Instances:
    """A disc, a ring sector that a straight line to its middle would leave, and an ellipse that touches it."""
    y, x = np.mgrid[:70, :90]
    ids = np.zeros((70, 90), np.int32)
    ids[np.hypot(y - 15, x - 15) < 11] = 1
    radius = np.hypot(y - 60, x - 45)
    ids[(radius > 22) & (radius < 31) & (y < 62)] = 2
    ids[(np.hypot((y - 18) / 0.6, x - 60) < 18) & (ids == 0)] = 3
    return numbered_instances(ids, (ids > 0).astype(np.uint8))


def spread(mask: np.ndarray) -> np.ndarray:
    """The unit vectors (H, W, 2) of one cell: heat from its middle, pixel by pixel as in the paper."""
    inside = [tuple(place) for place in np.argwhere(mask)]
    middle = min(
        inside, key=lambda place: (place[0] - np.median(np.nonzero(mask)[0])) ** 2 + (place[1] - np.median(np.nonzero(mask)[1])) ** 2
    )
    heat = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2))
    for _ in range(400):
        heat[middle[0] + 1, middle[1] + 1] += 1
        new = sum(heat[1 + dy : heat.shape[0] - 1 + dy, 1 + dx : heat.shape[1] - 1 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 9
        heat[1:-1, 1:-1] = new * mask
    flow = np.stack([heat[2:, 1:-1] - heat[:-2, 1:-1], heat[1:-1, 2:] - heat[1:-1, :-2]], axis=-1)
    return flow / np.maximum(np.linalg.norm(flow, axis=2, keepdims=True), 1e-60)


def test_flows_are_those_of_heat_in_each_cell_alone():
    one = cells()
    found = Flows().vectors(one)
    assert np.allclose(np.linalg.norm(found, axis=2)[one.ids > 0], 1, atol=1e-3)
    for number, least in ((1, 0.999), (2, 0.95), (3, 0.95)):  # larger ones are computed on blocks
        mask = one.ids == number
        assert (found * spread(mask)).sum(2)[mask].mean() > least


@pytest.mark.parametrize(("slope", "half_width_px"), [(0.0, 5), (0.0, 3), (1.0, 4)])
def test_long_and_narrow_cells_side_by_side_keep_flows_to_their_middle_lines(slope, half_width_px):
    y, x = np.mgrid[:170, :160]
    across = (y - slope * x - 5 * half_width_px) / math.hypot(1, slope)
    ids = (np.abs(across) < half_width_px).astype(np.int32) + 2 * ((across >= half_width_px) & (across < 3 * half_width_px))
    one = numbered_instances(ids, (ids > 0).astype(np.uint8))
    found = Flows().vectors(one)
    for number in (1, 2):
        mask = ids == number
        assert (found * spread(mask)).sum(2)[mask].mean() > 0.97
    fields = np.rint((np.moveaxis(found, -1, 0) + 1) * 127.5).astype(np.uint8)
    assert instance_scores(one, FlowBasins((ids > 0).astype(np.uint8), fields).instances(10, min_parting=0.1))["ap50"] == 1


def test_flows_are_cellpose_s():
    dynamics = pytest.importorskip("cellpose.dynamics")
    one = cells()
    theirs = dynamics.masks_to_flows(one.ids, device=torch.device("cpu"))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert (np.moveaxis(Flows().vectors(one), -1, 0) * theirs).sum(0)[one.ids > 0].mean() > 0.97


def test_offsets_are_from_the_centre_of_mass_and_reach_one_on_each_side():
    one = cells()
    found = CentreOffsets().vectors(one)
    for number in (1, 2, 3):
        places = np.argwhere(one.ids == number)
        offsets = places - places.mean(0)
        expected = np.where(offsets < 0, offsets / -offsets.min(0), offsets / offsets.max(0))
        assert np.allclose(found[one.ids == number], expected, atol=1e-5)
    assert not found[one.ids == 0].any()


def test_the_loss_is_the_cross_entropy_of_the_pixels_of_cells():
    target, one = Flows(), cells()
    truth = torch.from_numpy(target.encode(one, (1, 1)))[None]
    logits = torch.randn(1, 2, 70, 90, generator=torch.Generator().manual_seed(0))
    probability, share = logits.double().sigmoid(), truth.double().movedim(-1, 1) / 255
    each = -(share * probability.log() + (1 - share) * (1 - probability).log()).sum(1)[0]
    inside = torch.from_numpy(one.ids > 0)
    assert target.loss(logits, truth, None).item() == pytest.approx(each[inside].mean().item(), rel=1e-4)
    kept = torch.zeros(1, 70, 90, dtype=torch.bool)
    kept[:, :, :30] = True
    assert target.loss(logits, truth, kept).item() == pytest.approx(each[inside & kept[0]].mean().item(), rel=1e-4)
    assert target.loss(logits, truth, torch.zeros_like(kept)) == 0
    assert math.isfinite(target.loss(logits, torch.full_like(truth, 128), None).item())
