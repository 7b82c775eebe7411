"""Auxiliary targets: they equal a reference computed cell by cell, and runs with them do not change others in a cohort."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import dataset_of, features_of, run_of, same, trainers_of
from PIL import Image
from scipy import ndimage
from small_data import discs

from cellbench.config.run import RunSpec
from cellbench.data.transforms import cell_targets
from cellbench.inference.segmenter import Segmenter
from cellbench.metrics.pixel import IGNORE
from cellbench.metrics.separation import DistanceWatershed
from cellbench.parallel import WorkerPool
from cellbench.run import main
from cellbench.training import losses
from cellbench.training.fit import fit

BOTH = "cell+border+distance"


def touching(height_px: int = 90, width_px: int = 140) -> np.ndarray:
    """Numbers of cells (H, W): two that touch, one alone, one cut by the frame."""
    y, x = np.mgrid[:height_px, :width_px]
    ids = np.zeros((height_px, width_px), np.int32)
    for number, (cy, cx, radius) in enumerate(((40, 40, 20), (44, 76, 18), (20, 110, 12), (90, 120, 25)), 1):
        ids[(np.hypot(y - cy, x - cx) < radius) & (ids == 0)] = number
    return ids


def test_the_distance_is_each_cell_s_own_with_one_hill_a_cell():
    ids = touching()
    found = cell_targets.make_targets((ids > 0).astype(np.uint8), ids)[..., 1].astype(float)
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
    found = cell_targets.make_targets((ids > 0).astype(np.uint8), ids)[..., 0]
    square = np.ones((5, 5), bool)
    near = sum(ndimage.binary_dilation(ids == number, square).astype(int) for number in range(1, 5))
    assert set(np.unique(found)) == {0, 255}
    assert np.array_equal(found == 255, near > 1)


def test_an_image_without_cells_and_one_that_is_a_cell_have_targets():
    none, whole = np.zeros((9, 9), np.uint8), np.ones((9, 9), np.uint8)
    assert not cell_targets.make_targets(none, None).any()
    assert (cell_targets.make_targets(whole, whole.astype(np.int32))[..., 1] == 255).all()


def test_the_loss_is_the_cross_entropy_of_each_target():
    logits = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 256, (2, 5, 6, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    p, t = logits.double().sigmoid(), truth.double().movedim(-1, 1) / 255
    per_pixel = -(t * p.log() + (1 - t) * (1 - p).log())
    assert losses.auxiliary_loss(logits, truth, ("border", "distance")).item() == pytest.approx(
        per_pixel.mean((0, 2, 3)).sum().item(), rel=1e-5
    )
    assert losses.auxiliary_loss(logits[:, 1:], truth, ("distance",)).item() == pytest.approx(per_pixel[:, 1].mean().item(), rel=1e-5)


def test_a_learned_boundary_depth_separates_cells_that_the_mask_alone_cannot():
    mask = np.zeros((60, 120), np.uint8)
    mask[10:50, 10:110] = 1  # two square cells wall to wall: no neck at all
    ids = mask * np.where(np.arange(120) < 60, 1, 2)[None].astype(np.int32)
    border, distance = np.moveaxis(cell_targets.make_targets(mask, ids).astype(float) / 255, -1, 0)
    boundary_depth = np.rint(255 * distance * (1 - border)).astype(np.uint8)
    assert DistanceWatershed(mask).instances(0.8, 10).num == 1
    found = DistanceWatershed(mask, boundary_depth).instances(0.8, 10)
    assert found.num == 2
    assert min(np.mean(found.ids[ids == number] == np.bincount(found.ids[ids == number]).argmax()) for number in (1, 2)) > 0.95


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A folder of discs with numbered masks."""
    for part, seeds in (("train", range(4)), ("test", (100,))):
        for seed in seeds:
            image, mask = discs(seed)
            for inner in ("original", "mask"):
                (tmp_path / "cells" / part / inner).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "cells" / part / "original" / f"{seed}.png")
            Image.fromarray(ndimage.label(mask)[0].astype(np.uint16)).save(tmp_path / "cells" / part / "mask" / f"{seed}.png")
    return tmp_path / "cells"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"tile_scale": 0.5, "framing": "resize", "tile_px": 128}], ids=["tile", "resize"])
def test_auxiliary_targets_match_their_cells_in_every_view(numbered, settings):
    run = run_of(targets=BOTH, **settings)
    features = features_of(dataset_of(numbered), [run], auxiliary_targets=True)
    with WorkerPool(1) as pool:
        for batch in features.train(0, pool):
            assert torch.equal(batch.auxiliary_targets[..., 1] > 0, batch.target > 0)
            assert batch.auxiliary_targets.shape == (*batch.target.shape, 2)


@pytest.mark.slow
def test_runs_with_auxiliary_targets_do_not_change_others_in_a_cohort(numbered):
    dataset, runs = dataset_of(numbered), [run_of("bilinear"), run_of("bilinear", targets=BOTH), run_of("detail", targets="cell+distance")]

    def fitted(runs: list[RunSpec], auxiliary_targets: bool) -> list:
        features = features_of(dataset, runs, auxiliary_targets=auxiliary_targets)
        trainers = trainers_of(dataset, runs, features)
        fit(trainers, features)
        return trainers

    together = fitted(runs, True)
    assert same(together[0], fitted(runs[:1], False)[0])
    for k in (1, 2):
        assert same(together[k], fitted(runs[k : k + 1], True)[0])
    assert together[0].history != together[1].history


@pytest.mark.slow
def test_grid_prediction_and_export_use_the_learned_boundary_depth(numbered: Path, tmp_path: Path):
    (tmp_path / "more.toml").write_text(f"""experiment = "more"
dataset = "folder"
[grid]
backbone = ["vit-tiny-random"]
head = ["detail"]
[run]
tile_px = 64
epochs = 3
crops_per_image = 8
lr = 5e-3
targets = "{BOTH}"
""")
    assert main(["grid", "more.toml", "--data", str(numbered), "--device", "cpu"]) == 0
    record = json.loads(next(tmp_path.glob("mlruns/*/*/artifacts/separation.json")).read_text())
    assert record["learned"] is True
    found = Segmenter.load("best:more", device="cpu").predict(numbered / "test" / "original" / "100.png")
    assert found.boundary_depth is not None
    per_image = json.loads(next(tmp_path.glob("mlruns/*/*/artifacts/per_image.json")).read_text())
    scored = next(value for name, value in per_image.items() if name == "num_predicted" or name.endswith("/num_predicted"))
    assert found.cells.num == scored[0]
    assert main(["export", "best:more", "--out", "it", "--device", "cpu"]) == 0
    again = Segmenter.load(tmp_path / "it", device="cpu").predict(numbered / "test" / "original" / "100.png")
    assert np.array_equal(again.cells.ids, found.cells.ids)


def test_no_edge_is_where_a_cell_meets_ignored_pixels():
    ids = np.zeros((60, 60), np.int32)
    ids[20:41, 10:50] = 1
    classes = (ids > 0).astype(np.uint8)
    classes[:, 30:] = IGNORE
    found = cell_targets.make_targets(classes, ids)[..., 1]
    # A long bar, cut in the middle: at the cut it is as deep as along the rest of it, full in its middle row.
    assert found[30, 29] == 255
    assert found[20, 29] < 30
    assert not found[:, 30:].any()


def test_auxiliary_targets_leave_out_ignored_pixels():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 2, 6, 8, generator=generator), torch.randint(0, 256, (2, 6, 8, 2), generator=generator).byte()
    kept = torch.ones(2, 6, 8, dtype=torch.bool)
    kept[:, :, 5:] = False
    whole = losses.auxiliary_loss(logits, truth, cell_targets.TARGETS, kept)
    torch.testing.assert_close(whole, losses.auxiliary_loss(logits[..., :5], truth[:, :, :5], cell_targets.TARGETS))
    assert losses.auxiliary_loss(logits, truth, cell_targets.TARGETS, torch.zeros_like(kept)) == 0
