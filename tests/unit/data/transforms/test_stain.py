"""Stains: augmentation agrees with skimage, Macenko's method finds planted stains, and normalisers are fitted to training images only."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from cohorts import dataset_of, features_of, fitted, run_of, same
from PIL import Image
from skimage.color import hed2rgb, rgb2hed, rgb2lab
from small_data import write_set

from cellbench.config.run import RunSpec
from cellbench.data.transforms.augmentation import ReferenceStains, StainJitter
from cellbench.data.transforms.background_normalisation import WHITE
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.data.transforms.stain import KINDS, Macenko, Reinhard

AZURE, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.33, 0.85, 0.42])  # dense enough in each channel to count as stained
LILAC, ROSE = np.array([0.55, 0.75, 0.36]), np.array([0.40, 0.70, 0.59])


def slide(seed: int, stains: tuple[np.ndarray, np.ndarray] = (AZURE, EOSIN), strength: float = 1.0, size: int = 120) -> np.ndarray:
    """(H, W, 3) uint8: pale glass, a third stained mostly by the one stain, a third mostly by the other."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(3, size=(size, size))
    amounts = rng.uniform(0.8, 1.6, (size, size, 2)) * np.array([[0, 0], [1, 0.02], [0.02, 1]])[kinds] * strength
    vectors = np.stack([stain / np.linalg.norm(stain) for stain in stains])
    return (240 * np.exp(-amounts @ vectors) - 1).clip(0, 255).round().astype(np.uint8)


def test_varied_stains_are_skimages() -> None:
    amounts = np.random.default_rng(0).uniform(
        0.005, 0.04, (9, 8, 3)
    )  # in skimage's unit, 13.8 of optical density; none is cut off at zero
    factors, shifts = np.array([1.15, 0.9, 1.05]), np.array([0.02, 0.0, 0.05])
    expected = hed2rgb(amounts * factors + shifts / -np.log(1e-6))
    tile = torch.from_numpy(hed2rgb(amounts)).permute(2, 0, 1)[None]
    np.testing.assert_allclose(rgb2hed(hed2rgb(amounts)), amounts, atol=1e-6)
    out = StainJitter().apply(torch.cat([tile, tile]), [StainJitter.NEUTRAL, (*factors, *shifts)])
    np.testing.assert_allclose(out[1].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(out[0].numpy(), tile[0].numpy(), atol=1e-6)


def test_reference_stains_multiply_optical_density_below_white() -> None:
    density = np.random.default_rng(0).uniform(-0.08, 2, (2, 3, 4, 5))  # what is lighter than white stays lighter
    factors = np.array([[0.5, 1.0, 2.0], [1.3, 1.1, 0.7]])
    tiles = torch.from_numpy(WHITE / 255 * np.exp(-density))
    before = tiles.clone()
    out = ReferenceStains().apply(tiles, [tuple(row) for row in factors])
    np.testing.assert_allclose(out.numpy(), (WHITE / 255 * np.exp(-density * factors[..., None, None])).clip(0, 1), atol=1e-6)
    assert torch.equal(tiles, before)
    assert ReferenceStains().apply(tiles, [ReferenceStains.NEUTRAL] * 2) is tiles


def test_views_have_reference_stains_within_their_reach_and_other_draws_stay() -> None:
    def draws(**settings: float) -> list[tuple]:
        plan = SamplingPlan(((64, 64),), RunSpec(backbone="uni", head="fpn", tile_px=64, **settings))
        return [next(iter(plan.views(cycle))).draws for cycle in range(300)]

    varied = draws(reference_stains=0.4, hed=0.1)
    assert [one[1:] for one in varied] == [one[1:] for one in draws(hed=0.1)]
    logs = np.log([one[0] for one in varied])
    assert 0.6 < np.abs(logs).max() <= 0.8
    assert 0.4 < np.corrcoef(logs.T)[0, 1] < 0.6  # half of the variance is common to the channels


def test_unstained_tiles_are_the_very_same_and_given_ones_are_not_changed() -> None:
    tiles = torch.rand(2, 3, 4, 5)
    before = tiles.clone()
    assert StainJitter().apply(tiles, [StainJitter.NEUTRAL] * 2) is tiles
    out = StainJitter().apply(tiles, [(2.0, 0.1, 1.0, 3.0, 0.0, -3.0)] * 2)
    assert torch.equal(tiles, before)
    assert 0 <= out.min() <= out.max() <= 1


def test_views_vary_in_stain_within_hed_only() -> None:
    def stains(hed: float) -> np.ndarray:
        plan = SamplingPlan(((64, 64),) * 5, RunSpec(backbone="uni", head="fpn", tile_px=64, crops_per_image=80, hed=hed))
        return np.array([view.draws[1] for view in plan.views(0)])

    assert (stains(0.0) == StainJitter.NEUTRAL).all()
    varied = stains(0.2)
    assert 0.15 < np.abs(varied[:, :3] - 1).max() <= 0.2
    assert 0.04 < np.abs(varied[:, 3:]).max() <= 0.05


def test_macenko_finds_planted_stains_and_replaces_them() -> None:
    target = Macenko.fitted([slide(0), slide(1)])
    assert target is not None
    for found, planted in zip(target.stains, (AZURE, EOSIN), strict=True):
        assert np.dot(found, planted / np.linalg.norm(planted)) > 0.995
    out = Macenko.fitted([target.image(slide(5, (LILAC, ROSE), 0.7))])
    assert out is not None
    for found, wanted in zip(out.stains, target.stains, strict=True):
        assert np.dot(found, wanted) > 0.997
    assert out.most == pytest.approx(target.most, rel=0.05)


def test_normalising_to_itself_changes_nothing_to_speak_of() -> None:
    image = slide(3)
    for kind in (Reinhard, Macenko):
        assert np.abs(kind.fitted([image]).image(image).astype(int) - image).mean() < 1.5


def test_reinhard_brings_each_channel_to_the_training_images_mean_and_deviation() -> None:
    target = Reinhard.fitted([slide(0), slide(1)])
    out = rgb2lab(target.image(slide(2, (LILAC, ROSE), 0.6))).reshape(-1, 3)
    # What no screen can show is cut off, and so is a part of the glass here.
    np.testing.assert_allclose(out.mean(0), target.mean, atol=1.5)
    np.testing.assert_allclose(out.std(0), target.deviation, atol=2)


BLANKS = {
    "white": np.full((40, 50, 3), 255, np.uint8),
    "black": np.zeros((40, 50, 3), np.uint8),
    "rose": np.full((40, 50, 3), (200, 90, 130), np.uint8),
}


@pytest.mark.parametrize("name", BLANKS)
def test_images_without_stain_pass_without_a_warning(name: str) -> None:
    blank = BLANKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = Macenko.fitted([slide(0)])
        assert target is not None
        assert np.array_equal(target.image(blank), blank)
        assert Macenko.fitted([blank]) is None
        assert Reinhard.fitted([slide(0)]).image(blank).shape == blank.shape


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_preparation_comes_back_from_its_file(kind: str) -> None:
    normaliser = KINDS[kind].fitted([slide(0)]) if kind != "none" else None
    one = Preparation(framing=Framing(kind="tile", side_px=64, scale=2.0), normaliser=normaliser)
    again = Preparation.of(json.loads(json.dumps(one.to_dict())))
    assert again == one
    assert np.array_equal(again.image(slide(7)), one.image(slide(7)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_normaliser_is_fitted_to_the_training_images_alone(small_folder, kind: str) -> None:
    before = features_of(dataset_of(small_folder), [run_of(normalise=kind)]).preparation
    dataset = dataset_of(small_folder)
    for sample in (*dataset.val, *dataset.test):
        Image.fromarray(slide(9, (LILAC, ROSE), size=160)[:120]).save(sample.image)
    assert features_of(dataset_of(small_folder), [run_of(normalise=kind)]).preparation == before
    Image.fromarray(slide(9, (LILAC, ROSE), size=160)[:120]).save(dataset.train[0].image)
    assert features_of(dataset_of(small_folder), [run_of(normalise=kind)]).preparation != before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reinhard", "macenko"])
def test_a_normaliser_is_not_fitted_to_training_images_beyond_the_runs_fraction(small_folder, kind: str) -> None:
    dataset = dataset_of(small_folder)
    half = features_of(dataset, [run_of(normalise=kind, fraction=0.5)])
    seen = half.plan.used_images
    assert 0 < len(seen) < len(dataset.train)
    fitted_to = KINDS[kind].fitted(dataset.read(dataset.train[k])[0] for k in seen)
    assert half.preparation.normaliser == fitted_to
    # The same images held in memory serve runs of several fractions.
    whole = half.pixels["train"].normaliser(kind, range(len(dataset.train)))
    assert whole != fitted_to
    for k in set(range(len(dataset.train))) - set(seen):
        Image.fromarray(slide(9, (LILAC, ROSE), size=160)[:120]).save(dataset.train[k].image)
    assert features_of(dataset_of(small_folder), [run_of(normalise=kind, fraction=0.5)]).preparation == half.preparation


@pytest.mark.slow
@pytest.mark.parametrize("way", [{"hed": 0.2}, {"normalise": "background"}, {"normalise": "reinhard", "tile_scale": 0.5}], ids=str)
def test_cached_features_equal_streamed_ones_and_cohorts_change_nothing(tmp_path, way) -> None:
    write_set(tmp_path, ["a0.png", "a1.png", "a2.png", "a3.png"], ["t0.png"])
    dataset = dataset_of(tmp_path / "smears")
    runs = [run_of("bilinear", epochs=2, repeat_views_every=1, **way), run_of("detail", epochs=2, repeat_views_every=1, **way)]
    streamed = fitted(dataset, runs, memory_bytes=0)
    assert same(streamed[1], fitted(dataset, runs[1:])[0])
    disk = {"memory_bytes": 0, "disk_bytes": 2**30, "key": "test", "backbone": "vit-tiny-random"}
    for _ in range(2):
        assert all(same(a, b) for a, b in zip(streamed, fitted(dataset, runs, **disk), strict=True))
    plain = fitted(dataset, [run_of("bilinear", epochs=2, repeat_views_every=1)], **disk)  # beside the others' files
    assert not same(plain[0], streamed[0])
