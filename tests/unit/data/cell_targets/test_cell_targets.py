"""Cell targets in runs: they match their cells in every view, do not change other runs of a cohort, and prediction and export find the same cells."""

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
from cellbench.data.cell_targets.base import ChannelTurns
from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.data.transforms.augmentation import rotate_flip
from cellbench.data.transforms.tiling import Stitcher, TileGrid
from cellbench.features.tile_cutting import cut_truth
from cellbench.inference.onnx import write_onnx
from cellbench.inference.segmenter import Segmenter
from cellbench.metrics.instances import numbered_instances
from cellbench.metrics.separation import METHODS
from cellbench.parallel import WorkerPool
from cellbench.run import main
from cellbench.training.fit import fit

LEARNED = [name for name, target in TARGETS.items() if target is not None]


def touching(height_px: int = 90, width_px: int = 140) -> np.ndarray:
    """Numbers of cells (H, W): two that touch, a bent one, one cut by the frame."""
    y, x = np.mgrid[:height_px, :width_px]
    ids = np.zeros((height_px, width_px), np.int32)
    for number, (cy, cx, radius) in enumerate(((40, 40, 20), (44, 76, 18), (20, 110, 14), (90, 120, 25)), 1):
        ids[(np.hypot(y - cy, x - cx) < radius) & (ids == 0)] = number
    ids[(ids == 3) & (np.hypot(y - 12, x - 116) < 9)] = 0
    return ids


def encoded(name: str, ids: np.ndarray, scale: tuple[float, float] = (1, 1)) -> np.ndarray:
    target = TARGETS[name]
    assert target is not None
    return target.encode(numbered_instances(ids, (ids > 0).astype(np.uint8)), scale)


# --- turning ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", range(8))
@pytest.mark.parametrize("name", LEARNED)
def test_the_truth_of_a_turned_image_is_the_turned_truth(name, code):
    ids = touching()
    # The middle of an even number of pixels and the blocks of a large cell are rounded one way, so both may lie a pixel further after a turn.
    found = TARGETS[name].turns.turn_truth(rotate_flip(encoded(name, ids), code), code).astype(int)
    expected = encoded(name, np.ascontiguousarray(rotate_flip(ids, code))).astype(int)
    inner = ndimage.binary_erosion(rotate_flip(ids, code) > 0, iterations=2)
    assert np.abs(found - expected)[inner].mean() < 6
    assert np.quantile(np.abs(found - expected)[inner], 0.95) <= 20


@pytest.mark.parametrize("name", ["flows", "stars"])
def test_tiles_on_a_device_and_fields_turn_as_one_tile_does(name):
    turns = TARGETS[name].turns
    truth = torch.randint(0, 256, (8, 5, 6, turns.source.shape[1]), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    each = np.stack([turns.turn_truth(tile.numpy(), code) for code, tile in enumerate(truth)])
    assert np.array_equal(turns.turn_tiles(truth, torch.arange(8)).numpy(), each)
    for code in range(8):
        fields = truth[code : code + 1].movedim(-1, 1).float() / 255
        assert np.allclose(turns.turn_fields(fields, code)[0].movedim(0, -1).numpy() * 255, each[code], atol=1e-4)


def test_a_vector_turns_as_the_arrow_between_two_pixels():
    down_right = np.zeros((9, 9), np.float32)
    down_right[4, 4], down_right[5, 7] = 1, 2  # an arrow one down and three to the right
    for code in range(8):
        turned = rotate_flip(down_right, code)
        arrow = np.argwhere(turned == 2)[0] - np.argwhere(turned == 1)[0]
        stored = ChannelTurns.of_vector().turn_truth(np.array([[[1, 3]]], np.uint8) + np.uint8(127), code)[0, 0] / 255
        assert np.sign(stored - 0.5 - 1e-6).tolist() == np.sign(arrow).tolist()
        assert (np.abs(stored - 0.5) > 0.005).tolist() == (np.abs(arrow) == 3).tolist()


@pytest.mark.parametrize("name", ["flows", "hv", "stars"])
def test_directions_beyond_the_edge_of_an_image_are_those_of_its_mirror_image(name):
    ids = touching(40, 50)
    found = cut_truth(encoded(name, ids), 10, 20, (90, 70), TARGETS[name].turns)
    truth = np.tile(np.concatenate([encoded(name, ids)[10:], TARGETS[name].turns.turn_truth(encoded(name, ids)[10:][::-1], 6)]), (2, 1, 1))
    right = TARGETS[name].turns.turn_truth(truth[:, 20:][:, ::-1], 4)
    assert np.array_equal(found, np.concatenate([truth[:, 20:], right, truth[:, 20:]], axis=1)[:90, :70])


# --- decoding of the whole image --------------------------------------------------------------------------------------------------------


def decoded(name: str, ids: np.ndarray, truth: np.ndarray) -> np.ndarray:
    finder = METHODS[TARGETS[name].method]
    setting = finder.SETTINGS[len(finder.SETTINGS) // 2]
    return finder((ids > 0).astype(np.uint8), np.moveaxis(truth, -1, 0)).instances(1, **setting).ids


def same_partition(found: np.ndarray, ids: np.ndarray, at_least: float = 0.97) -> bool:
    """Whether there are as many cells, each nearly that of the truth."""
    overlap = [max(np.mean((found == k) == (ids == number)) for k in np.unique(found[ids == number])) for number in np.unique(ids[ids > 0])]
    return len(np.unique(found[found > 0])) == len(overlap) and min(overlap) >= at_least


@pytest.mark.parametrize("name", ["flows", "hv", "stars"])
def test_the_cells_of_the_truth_are_found_in_it(name):
    assert same_partition(decoded(name, touching(), encoded(name, touching())), touching())


@pytest.mark.parametrize("name", ["flows", "hv", "stars"])
def test_a_cell_that_crosses_seams_is_one_cell(name):
    ids = touching(90, 140)
    grid, truth = TileGrid.over(90, 140, 32, 0.25), encoded(name, ids)  # every cell but one is larger than a tile
    stitcher = Stitcher(grid, truth.shape[-1])
    tiles = torch.stack([torch.from_numpy(truth[y : y + 32, x : x + 32]).movedim(-1, 0).float() / 255 for y, x in grid])
    joined = np.concatenate([(band.numpy() * 255).round().astype(np.uint8) for _, band in stitcher.add(tiles)], axis=1)
    assert same_partition(decoded(name, ids, np.moveaxis(joined, 0, -1)), ids)


@pytest.mark.parametrize("name", ["flows", "stars"])
def test_more_cells_than_sixteen_bits_can_number(name):
    ids = np.zeros((1040, 1300), np.int32)
    rows, columns = np.arange(260) * 4, np.arange(260) * 5
    for k in range(3):
        for m in range(3):
            ids[rows[:, None] + k, columns + m] = np.arange(1, 67601).reshape(260, 260)
    one = encoded(name, ids[:4, :5])
    found = decoded(name, ids, np.tile(one, (260, 260, 1)))
    assert found.max() == 67600
    assert len(np.unique(found[ids > 0] * 100000 + ids[ids > 0])) == 67600


@pytest.mark.parametrize("name", LEARNED)
def test_images_without_cells_and_of_one_cell_have_targets_and_cells(name):
    for ids, num in ((np.zeros((9, 13), np.int32), 0), (np.ones((9, 13), np.int32), 1), (np.ones((1, 1), np.int32), 1)):
        assert decoded(name, ids, encoded(name, ids)[..., -1:] if name.startswith("cell") else encoded(name, ids)).max() == num


# --- in runs ----------------------------------------------------------------------------------------------------------------------------


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
def test_cell_targets_match_their_cells_in_every_view(numbered, settings):
    runs = [run_of(targets=name, **settings) for name in LEARNED]
    features = features_of(dataset_of(numbered), runs)
    with WorkerPool(1) as pool:
        for batch in features.train(0, pool):
            assert {name: x.shape[-1] for name, x in batch.cell_targets.items()} == {name: len(TARGETS[name].channels) for name in LEARNED}
            assert torch.equal(batch.cell_targets["cell+border+distance"][..., 1] > 0, batch.target > 0)
            assert torch.equal((batch.cell_targets["stars"][..., 1:] > 0).all(-1), batch.target > 0)
            flows = batch.cell_targets["flows"].float() / 127.5 - 1
            assert torch.equal(flows.norm(dim=-1) > 0.1, batch.target > 0)


@pytest.mark.slow
def test_runs_with_cell_targets_do_not_change_others_in_a_cohort(numbered):
    dataset, runs = (
        dataset_of(numbered),
        [run_of("bilinear"), run_of("bilinear", targets="flows"), run_of("detail", targets="cell+distance")],
    )

    def fitted(runs: list[RunSpec]) -> list:
        features = features_of(dataset, runs)
        trainers = trainers_of(dataset, runs, features)
        fit(trainers, features)
        return trainers

    together = fitted(runs)
    assert same(together[0], fitted(runs[:1])[0])
    for k in (1, 2):
        assert same(together[k], fitted(runs[k : k + 1])[0])
    assert together[0].history != together[1].history


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["cell+border+distance", "flows"])
def test_grid_prediction_and_export_find_the_same_cells(numbered: Path, tmp_path: Path, targets: str):
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
targets = "{targets}"
""")
    assert main(["grid", "more.toml", "--data", str(numbered), "--device", "cpu"]) == 0
    record = json.loads(next(tmp_path.glob("mlruns/*/*/artifacts/separation.json")).read_text())
    assert record["learned"] is True
    assert record["method"] == TARGETS[targets].method
    found = Segmenter.load("best:more", device="cpu").predict(numbered / "test" / "original" / "100.png")
    assert found.fields is not None
    per_image = json.loads(next(tmp_path.glob("mlruns/*/*/artifacts/per_image.json")).read_text())
    scored = next(value for name, value in per_image.items() if name == "num_predicted" or name.endswith("/num_predicted"))
    assert found.cells.num == scored[0]
    assert main(["export", "best:more", "--out", "it", "--device", "cpu"]) == 0
    again = Segmenter.load(tmp_path / "it", device="cpu").predict(numbered / "test" / "original" / "100.png")
    assert np.array_equal(again.cells.ids, found.cells.ids)
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    segmenter = Segmenter.load("best:more", device="cpu", precision="fp32")
    tiles = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = segmenter.tiles(tiles).numpy()
    write_onnx(tmp_path / "m.onnx", segmenter)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    probabilities, fields = session.run(["probabilities", "fields"], {"pixels": tiles.permute(0, 3, 1, 2).float().div(255).numpy()})
    assert np.abs(np.concatenate([probabilities[:, 1:], fields], 1) - expected).max() <= 1e-3
