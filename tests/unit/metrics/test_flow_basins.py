"""Basins of flows: as by following every pixel step by step, and as Cellpose's where it is installed; of offsets: as by HoVer-Net's watershed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.segmentation import watershed

from cellbench.data.cell_targets.flows import CentreOffsets, Flows
from cellbench.metrics.flow_basins import FlowBasins, OffsetBasins
from cellbench.metrics.instance import instance_scores
from cellbench.metrics.instances import Instances, numbered_instances


def noisy(seed: int, target: type[Flows | CentreOffsets] = Flows) -> tuple[np.ndarray, np.ndarray]:
    """A class map (H, W) of discs that touch, and their vectors (2, H, W) uint8, blurred and with noise as predictions are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :170]
    ids = np.zeros((120, 170), np.int32)
    for number, (row, column) in enumerate(((r, c) for r in range(20, 110, 24) for c in range(20, 160, 24)), 1):
        ids[(np.hypot(y - row - rng.normal(0, 2), x - column - rng.normal(0, 2)) < rng.uniform(9, 14)) & (ids == 0)] = number
    classes = (ids > 0).astype(np.uint8)
    flows = np.moveaxis(target().vectors(numbered_instances(ids, classes)), -1, 0)
    blurred = ndimage.gaussian_filter(flows, (0, 1.5, 1.5)) + rng.normal(0, 0.1, flows.shape)
    return classes, np.clip(np.rint((blurred + 1) * 127.5), 0, 255).astype(np.uint8)


def followed(classes: np.ndarray, fields: np.ndarray) -> Instances:
    """Cells by 300 steps of one pixel from every pixel, and the connected places where they end."""
    vectors = (fields / 127.5 - 1) * (classes > 0)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-3)
    places = np.argwhere(classes > 0).T.astype(float)
    for _ in range(300):
        step = np.stack([ndimage.map_coordinates(one, places, order=1, mode="nearest") for one in vectors])
        places = np.clip(places + step, 0, np.array(classes.shape)[:, None] - 1)
    ends = np.rint(places).astype(int)
    hit = np.zeros(classes.shape, bool)
    hit[tuple(ends)] = True
    near, _ = ndimage.label(ndimage.binary_dilation(hit, np.ones((3, 3))), np.ones((3, 3)))
    ids = np.zeros(classes.shape, np.int32)
    ids[classes > 0] = near[tuple(ends)]
    return numbered_instances(ids, classes, 10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_basins_are_those_of_paths_that_are_followed_step_by_step(seed):
    classes, fields = noisy(seed)
    scores = instance_scores(followed(classes, fields), FlowBasins(classes, fields).instances(10, min_parting=-1))
    assert scores["ap50"] > 0.95


def test_cells_are_those_of_cellpose():
    dynamics = pytest.importorskip("cellpose.dynamics")
    classes, fields = noisy(0)
    found = dynamics.resize_and_compute_masks(
        (fields.astype(np.float32) / 127.5 - 1) * 5, np.where(classes > 0, 5.0, -5.0).astype(np.float32),
        niter=200, flow_threshold=0.0, min_size=10, device=torch.device("cpu"),
    )  # fmt: skip
    theirs = numbered_instances(np.asarray(found[0] if isinstance(found, tuple) else found).astype(np.int32), classes, 10)
    assert instance_scores(theirs, FlowBasins(classes, fields).instances(10, min_parting=0.05))["ap50"] > 0.95


def watershed_of_edges(classes: np.ndarray, fields: np.ndarray) -> Instances:
    """Cells as HoVer-Net describes them: where the offsets jump back is an edge, what is left are markers, and a watershed grows them."""
    mask = classes > 0
    falls = [-cv2.Sobel(fields[axis] / 255, cv2.CV_64F, axis, 1 - axis, ksize=21) for axis in (0, 1)]
    edges = np.max([(one - one.min()) / np.ptp(one) for one in falls], axis=0)
    markers, _ = ndimage.label(ndimage.binary_opening(ndimage.binary_fill_holes(mask & (edges < 0.5)), iterations=2))
    return numbered_instances(watershed(edges, markers, mask=mask).astype(np.int32), classes, 10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cells_of_offsets_are_those_of_hover_net_s_watershed(seed):
    classes, fields = noisy(seed, CentreOffsets)
    scores = instance_scores(watershed_of_edges(classes, fields), OffsetBasins(classes, fields).instances(10, min_parting=0.1))
    assert scores["ap50"] > 0.95


def test_parts_of_a_cell_are_joined_and_neighbours_are_not():
    classes = np.zeros((40, 90), np.uint8)
    classes[5:35, 5:85] = 1
    y, x = np.indices(classes.shape)
    middle = np.select([x < 25, x < 45, True], [15.0, 35.0, 65.0])  # two places of one cell, side by side, and another cell
    down, right = np.sign(20 - y) * 1.0, np.sign(middle - x) * 1.0
    right[(x >= 15) & (x < 35)] *= 0.02  # between the two the flow runs almost side by side
    fields = np.clip(np.rint((np.stack([down, right]) + 1) * 127.5), 0, 255).astype(np.uint8)
    basins = FlowBasins(classes, fields)
    assert [basins.instances(10, min_parting=value).num for value in (-1.0, 0.2, 1.0)] == [3, 2, 1]
