"""Every framing covers the whole image, and its scores are mapped back to the right pixels of the image, whatever its shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cohorts import dataset_of, features_of, fitted, run_of, same, score_images, trainers_of
from small_data import write_pair

from cellbench.config.run import RunSpec
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.data.transforms.tiling import Stitcher, cut_tile
from cellbench.parallel import WorkerPool
from cellbench.training.tiled_inference import score_tiles

FRAMINGS = [
    ("tile", 0.5),
    ("tile", 1.0),
    ("tile", 2.0),
    ("tile", 0.7),
    ("pad", 0.5),
    ("pad", 1.0),
    ("pad", 2.0),
    ("resize", 1.0),
    ("resize", 2.0),
]
SIZES = [(1200, 1600), (333, 200), (64, 64), (50, 30)]


def framing(kind: str, scale: float, tile_px: int = 64) -> Framing:
    return Framing.of(RunSpec(backbone="uni", head="fpn", framing=kind, tile_scale=scale, tile_px=tile_px))


def through(image_HWC: np.ndarray, way: Framing, overlap: float = 0.25) -> np.ndarray:
    """An image framed, cut, put together and brought back, as prediction does it with scores."""
    size = image_HWC.shape[:2]
    framed, tile_px = way.image(image_HWC), way.tile_px([size])
    grid = way.grid(size, tile_px, overlap)
    assert framed.shape[:2] == (grid.height_px, grid.width_px)
    stitcher, bands = Stitcher(grid, image_HWC.shape[2]), []
    for y, x in grid:
        tile = torch.from_numpy(np.ascontiguousarray(cut_tile(framed, y, x, tile_px))).permute(2, 0, 1).float()
        bands += [band for _, band in stitcher.add(tile[None])]
    return way.back(torch.cat(bands, 1), size).permute(1, 2, 0).numpy()


def ramps(height_px: int, width_px: int) -> np.ndarray:
    """(H, W, 3) uint8: brighter downwards, brighter to the right, and one colour: linear, so that a resize keeps them and a shift shows."""
    y, x = np.linspace(20, 230, height_px)[:, None], np.linspace(230, 20, width_px)[None]
    return np.stack(np.broadcast_arrays(y, x, np.full((1, 1), 77.0)), -1).round().astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "scale"), [("tile", 1.0), ("pad", 1.0)])
def test_unscaled_framings_give_back_every_pixel(kind: str, scale: float, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    way = framing(kind, scale)
    assert way.exact
    assert way.image(image) is image
    np.testing.assert_allclose(through(image, way), image, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "scale"), FRAMINGS)
def test_scores_come_back_to_where_they_were(kind: str, scale: float, size: tuple[int, int]) -> None:
    way, image = framing(kind, scale), ramps(*size)
    out = through(image, way)
    assert out.shape == image.shape
    step = max(210 / (n - 1) for n in size) * max(1.0, max(size) / min(way.framed_px(size)))
    inner = (slice(size[0] // 8, -size[0] // 8), slice(size[1] // 8, -size[1] // 8))  # at the very edge a resize has no neighbours
    # Half a framed pixel of shift would be half a step and more; rounding to uint8 costs half a level.
    assert np.abs(out - image)[inner].max() < 0.25 * step + 1


@pytest.mark.parametrize(("kind", "scale"), FRAMINGS)
def test_masks_are_framed_as_images_are(kind: str, scale: float) -> None:
    way = framing(kind, scale)
    y, x = np.mgrid[:120, :170]
    mask = ((y - 40) ** 2 + (x - 110) ** 2 < 30**2).astype(np.uint8)
    framed = way.mask(mask)
    assert framed.dtype == np.uint8
    assert set(np.unique(framed)) == {0, 1}
    bright = way.image(np.repeat(mask[..., None] * 255, 3, 2))[..., 0] > 127
    assert (bright != framed).mean() < 0.02
    back = way.back(torch.from_numpy(framed)[None].float(), (120, 170))[0].numpy() > 0.5
    assert (back != mask).mean() < 0.02


def test_frame_sizes_are_as_documented() -> None:
    assert framing("tile", 0.5, 224).framed_px((1200, 1600)) == (600, 800)
    assert framing("pad", 1.0, 224).tile_px([(1200, 1600)]) == (1344, 1792)
    assert framing("pad", 0.5, 224).tile_px([(1200, 1600), (1600, 900)]) == (896, 896)
    assert framing("resize", 1.0, 224).framed_px((1200, 1600)) == (224, 224)
    assert framing("resize", 2.0, 224).tile_px([(1200, 1600)]) == (448, 448)
    assert len(framing("pad", 1.0).grid((120, 160), (128, 192), 0.5)) == 1


def test_a_frame_that_is_not_square_is_never_turned_on_its_side() -> None:
    def turns(size: tuple[int, int]) -> set[int]:
        plan = SamplingPlan((size,) * 3, RunSpec(backbone="uni", head="fpn", framing="pad", tile_px=64, crops_per_image=40))
        return {view.turn for view in plan.views(0)}

    assert turns((120, 60)) == {0, 2, 4, 6}
    assert turns((60, 60)) == set(range(8))


@pytest.fixture
def dataset(tmp_path):
    """Two sizes, so that frames and batches must agree on one."""
    for seed, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
        write_pair(tmp_path / "set" / "train", name, seed, height_px=(120, 100)[seed % 2], width_px=(160, 170)[seed % 2])
    for seed, name in enumerate(("t.png", "u.png"), 100):
        write_pair(tmp_path / "set" / "test", name, seed, height_px=(120, 90)[seed % 2], width_px=160)
    return dataset_of(tmp_path / "set")


WAYS = [{"framing": "pad"}, {"framing": "pad", "tile_scale": 0.5}, {"framing": "resize"}, {"tile_scale": 0.5}, {"tile_scale": 2.0}]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_run_trains_the_same_alone_in_a_cohort_and_from_cached_features(dataset, way) -> None:
    runs = [
        run_of("bilinear", epochs=2, repeat_views_every=1, crops_per_image=2, **way),
        run_of("fpn", epochs=2, repeat_views_every=1, crops_per_image=2, batch_size=3, **way),
    ]
    streamed = fitted(dataset, runs, memory_bytes=0)
    assert same(streamed[1], fitted(dataset, runs[1:])[0])
    disk = {"memory_bytes": 0, "disk_bytes": 2**30, "key": "test", "backbone": "vit-tiny-random"}
    for _ in range(2):
        assert all(same(a, b) for a, b in zip(streamed, fitted(dataset, runs, **disk), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_pixel_of_the_image_is_scored_once_in_validation_and_test(dataset, way) -> None:
    run = run_of("bilinear", **way)
    features = features_of(dataset, [run])
    model = trainers_of(dataset, [run], features)[0].model
    for split in ("val", "test"):
        pixels = sum(h * w for h, w in features.pixels[split].sizes_px)
        cells = sum(int(features.pixels[split][k][1].sum()) for k in range(len(features.pixels[split])))
        (counts,) = score_tiles([model], features, split, lambda *_: None, WorkerPool(1))
        tested = sum(matrices[0] for _, matrices, _ in score_images([model], features, split))
        for found in (counts, tested):
            assert found.sum() == pixels
            assert found[1].sum() == cells


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_head_that_reads_the_colour_finds_the_cells_in_their_own_place(dataset, way) -> None:
    """A model that knows the answer: dark is cell. What it loses is what the framing loses."""
    run = run_of("bilinear", **way)
    features = features_of(dataset, [run])
    model = trainers_of(dataset, [run], features)[0].model

    def seen(batch):
        cell = (190 / 255 - batch.pixels.mean(1, keepdim=True)) * 50
        return torch.cat([-cell, cell], 1)

    model.forward = seen
    (counts,) = score_tiles([model], features, "val", lambda *_: None, WorkerPool(1))
    tested = sum(matrices[0] for _, matrices, _ in score_images([model], features, "test"))
    for found in (counts, tested):
        assert 2 * found[1, 1] / (found[1].sum() + found[:, 1].sum()) > (0.93 if "resize" in str(way) else 0.97)
