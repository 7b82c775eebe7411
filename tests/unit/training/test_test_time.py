"""Test-time augmentation and ensembles: predictions turn with the image, members are averaged, and nothing is trained twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbone_cards import built, card
from cohorts import FP32, REGISTRY, dataset_of, features_of, fitted, run_of, segmenter_of, trainers_of
from PIL import Image

from cellbench.config.registry import load
from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.data.transforms.augmentation import rotate_flip
from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.models.backbones.base import Level
from cellbench.models.heads.ensemble import Ensemble
from cellbench.parallel import WorkerPool
from cellbench.training.fit import fit
from cellbench.training.model import build_model
from cellbench.training.test_time import CODES, inverse, turn, turn_back, turned_batches
from cellbench.training.tiled_inference import segment_images


@pytest.mark.parametrize("code", CODES["d4"])
def test_a_batch_is_turned_as_a_training_tile_is_and_back(code: int) -> None:
    tile = np.random.default_rng(0).random((30, 40))
    turned = turn(torch.from_numpy(tile)[None, None], code, 16)
    assert np.array_equal(turned[0, 0].numpy(), rotate_flip(tile, code))
    assert np.array_equal(turn_back(turned, code, 16)[0, 0].numpy(), tile)


@pytest.mark.parametrize("code", CODES["d4"])
def test_a_turn_by_the_inverse_code_is_a_turn_back(code: int) -> None:
    tile = torch.rand(1, 1, 30, 40)
    assert torch.equal(turn(turn(tile, code, 16), inverse(code), 16), tile)


@pytest.mark.parametrize("patch_px", [8, 14, 7])
def test_the_tokens_of_a_shifted_tile_lie_half_a_patch_before_its_own(patch_px: int) -> None:
    tile = torch.rand(1, 1, 4 * patch_px, 6 * patch_px)
    half_px = patch_px // 2
    for code, (down, right) in {8: (1, 0), 9: (0, 1), 10: (1, 1)}.items():
        shifted = turn(tile, code, patch_px)
        assert all(length % patch_px == 0 for length in shifted.shape[-2:])
        assert torch.equal(turn_back(shifted, code, patch_px), tile)
        y, x = (half_px * moves for moves in (down, right))
        assert torch.equal(shifted[..., patch_px:, patch_px:][..., :8, :8], tile[..., patch_px - y :, patch_px - x :][..., :8, :8])


def test_with_shifts_a_prediction_is_the_mean_over_tiles_that_begin_half_a_patch_earlier() -> None:
    segmenter = segmenter_of("bilinear", tta="shifts")
    pixels, patch = torch.randint(0, 256, (1, 96, 96, 3), dtype=torch.uint8), segmenter.backbone.patch_px
    plain, half = segmenter_of("bilinear"), patch // 2
    expected = plain.tiles(pixels).clone()
    for down, right in ((1, 0), (0, 1), (1, 1)):
        margins = ((half * down, (patch - half) * down), (half * right, (patch - half) * right), (0, 0))
        moved = torch.from_numpy(np.pad(pixels[0].numpy(), margins, mode="reflect")[None])
        expected += plain.tiles(moved)[..., half * down :, half * right :][..., :96, :96]
    assert torch.allclose(segmenter.tiles(pixels), expected / 4, atol=1e-6)


# Sizes whose tiles, and whose padding, are the same from every side.
@pytest.mark.parametrize(
    ("size", "settings"),
    [((112, 160), {}), ((128, 192), {"framing": "pad"}), ((300, 400), {"framing": "resize"}), ((56, 80), {"tile_scale": 2.0})],
    ids=str,
)
def test_with_d4_a_prediction_turns_with_the_image(size: tuple[int, int], settings: dict[str, object]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    turned = np.ascontiguousarray(rotate_flip(image, 5))
    found, plain = ([segmenter_of(tta=tta, **settings).predict(one).probability for one in (image, turned)] for tta in ("d4", "none"))
    assert np.abs(rotate_flip(found[0], 5).astype(int) - found[1]).max() <= 1
    assert np.abs(rotate_flip(plain[0], 5).astype(int) - plain[1]).max() > 1


@pytest.mark.parametrize("targets", ["cell+border+distance", "flows", "stars"])
def test_with_d4_the_fields_of_a_cell_target_turn_with_the_image(targets: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (112, 160, 3), np.uint8)
    segmenter, turns = segmenter_of(tta="d4", targets=targets), TARGETS[targets].field_turns
    found, turned = (segmenter.predict(np.ascontiguousarray(one)).fields for one in (image, rotate_flip(image, 5)))
    expected = turns.turn_truth(rotate_flip(np.moveaxis(found, 0, -1), 5), 5)
    assert np.abs(expected.astype(int) - np.moveaxis(turned, 0, -1)).max() <= 1


def test_a_backbone_with_patches_of_14_px_reads_turned_tiles() -> None:
    small = card(
        "vit-tiny-random", patch_px=14, arch={"name": "vit_tiny_patch16_224", "img_size": 56, "patch_size": 14, "depth": 2}, depth=2
    )
    backbone = FrozenBackbone(built(small), FP32, [2])
    run = run_of("fpn", tile_px=56, tta="d4")
    model = build_model(run, REGISTRY.head("fpn"), backbone, 2).eval()
    pixels = torch.rand(2, 3, 56, 84)
    with WorkerPool(1) as pool, torch.inference_mode():
        batch = Batch(backbone.maps(pixels), pixels, torch.empty(0))
        shapes = [turn_back(model.decode(one), code, 14).shape for code, one, _ in turned_batches(batch, backbone, CODES["d4"], pool)]
    assert shapes == [(2, 2, 56, 84)] * 8


@pytest.mark.parametrize("way", ["d4", "shifts"])
def test_the_test_and_predict_give_the_same_mask_of_an_image_of_any_size(small_folder, way: str) -> None:
    dataset = dataset_of(small_folder)
    runs = [run_of("detail", "filter-bank", tta=tta) for tta in (way, "none")]
    features = features_of(dataset, runs)
    models = [trainer.model for trainer in trainers_of(dataset, runs, features)]
    (_, answers), *_ = segment_images(models, features, "test")
    picture = np.asarray(Image.open(dataset.test[0].image).convert("RGB"))
    for run, answer in zip(runs, answers, strict=True):
        found = segmenter_of(tta=run.tta).predict(picture)
        assert np.abs(found.probability.astype(int) - answer.cell).max() <= 1  # other batches may round differently
    assert np.abs(answers[0].cell.astype(int) - answers[1].cell).max() > 1


def test_runs_that_differ_in_tta_only_are_trained_once(small_folder, monkeypatch) -> None:
    dataset = dataset_of(small_folder)
    runs = [run_of("bilinear", "filter-bank", tta=tta, epochs=2) for tta in CODES]
    features = features_of(dataset, runs)
    trainers = trainers_of(dataset, runs, features)
    for twin in trainers[1:]:
        monkeypatch.setattr(twin, "train_on", None)  # would raise if called
    fit(trainers, features)
    alone = fitted(dataset, runs[2:])[0]
    for trainer in trainers:
        assert trainer.history == trainer.recorder.rows == alone.history
        assert all(torch.equal(x, alone.model.state_dict()[name]) for name, x in trainer.model.state_dict().items())


def test_the_probabilities_of_an_ensemble_are_the_mean_of_its_members() -> None:
    levels = (Level(index=0, dim=4, stride_px=8),)
    made = [REGISTRY.head("bilinear") for _ in range(3)]
    heads = [load(one)(levels, 5, **one.options).eval() for one in made]
    maps, pixels = [40 * torch.randn(2, 4, 3, 5)], torch.rand(2, 3, 24, 40)
    with torch.inference_mode():
        scores, each = Ensemble(heads, 2)(maps, pixels), torch.stack([head(maps, pixels) for head in heads])
    assert torch.allclose(scores[:, :3].softmax(1), each[:, :, :3].softmax(2).mean(0), atol=1e-6)
    assert torch.allclose(scores[:, 3:], each[:, :, 3:].mean(0), rtol=1e-5)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("others", [(0, 1), (0,), ()], ids=str)
def test_an_ensemble_has_the_weights_of_its_members_whether_they_are_runs_or_not(small_folder, others: tuple[int, ...]) -> None:
    dataset = dataset_of(small_folder)
    *_, ensemble = fitted(
        dataset,
        [
            *(run_of("bilinear", "filter-bank", seed=seed, epochs=2) for seed in others),
            run_of("bilinear", "filter-bank", ensemble="0, 1", epochs=2),
        ],
    )
    for k, alone in enumerate(fitted(dataset, [run_of("bilinear", "filter-bank", seed=seed, epochs=2) for seed in (0, 1)])):
        for name, x in alone.model.head.state_dict().items():
            assert torch.equal(ensemble.model.head.members[k].state_dict()[name], x)
    assert ensemble.ended == "done"
    assert len(ensemble.history) == len(ensemble.recorder.rows) == 1
    assert 0 < ensemble.history[0]["val/dice"] <= 1
