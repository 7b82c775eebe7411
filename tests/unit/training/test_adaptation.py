"""What is tuned on validation for the use of a model (batch norms, regions at the frame): formula, choice, and one mask in test and prediction."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cohorts import FP32, REGISTRY, dataset_of, features_of, fitted, run_of, score_images, segmenter_of, trainers_of
from PIL import Image
from torch import nn
from torch.nn import functional

from cellbench.config.run import fingerprint
from cellbench.errors import CellbenchError
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.metrics.edge_regions import small_edge_regions
from cellbench.metrics.pixel import pixel_scores, pooled_classes
from cellbench.models.fused_norm import FusedBatchNorm, with_fused_norms
from cellbench.training import adaptation, model
from cellbench.training.fit import fit
from cellbench.training.segmented_image import SegmentedImage
from cellbench.training.tiled_inference import segment_images
from cellbench.training.validation_tuning import tune_on_validation


def norms() -> tuple[nn.BatchNorm2d, FusedBatchNorm]:
    """A batch norm with statistics of its own, and the fused one with the same state."""
    plain = nn.BatchNorm2d(6)
    for _ in range(3):
        plain(3 * torch.randn(4, 6, 9, 7) + torch.arange(6.0).view(1, 6, 1, 1))
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    holder = nn.Sequential(plain)
    (fused,) = with_fused_norms(holder)
    assert holder[0] is fused
    return plain.eval(), fused.eval()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_fused_norm_is_batch_norm_with_the_mean_of_both_statistics(share: float) -> None:
    plain, fused = norms()
    fused.own_share = share
    x = 2 * torch.randn(3, 6, 8, 5) - 1
    for k in range(3):
        mean, var = x[k].mean((1, 2)), x[k].var((1, 2), unbiased=False)
        both = (1 - share) * plain.running_mean + share * mean, (1 - share) * plain.running_var + share * var
        expected = functional.batch_norm(x[k : k + 1], *both, plain.weight, plain.bias)
        assert torch.allclose(fused(x)[k : k + 1], expected, atol=1e-5)


def test_the_whole_share_is_instance_norm() -> None:
    plain, fused = norms()
    fused.own_share = 1.0
    x = torch.randn(3, 6, 8, 5)
    assert torch.allclose(fused(x), functional.instance_norm(x, weight=plain.weight, bias=plain.bias), atol=1e-5)


def test_a_run_that_adapts_is_trained_as_one_that_does_not_and_only_once(small_folder, monkeypatch) -> None:
    dataset = dataset_of(small_folder)
    runs = [run_of("bilinear", "filter-bank", adapt=adapt, epochs=2) for adapt in ("none", "batchnorm")]
    features = features_of(dataset, runs)
    trainers = trainers_of(dataset, runs, features)
    monkeypatch.setattr(trainers[1], "train_on", None)  # would raise if called
    fit(trainers, features)
    alone = fitted(dataset, runs[1:])[0]
    assert trainers[0].history == trainers[1].history == alone.history
    assert all(torch.equal(x, alone.model.state_dict()[name]) for name, x in trainers[1].model.state_dict().items())


def test_the_share_with_the_best_validation_dice_is_chosen_and_used(small_folder) -> None:
    dataset = dataset_of(small_folder)
    runs = [run_of("detail", "filter-bank", adapt=adapt, epochs=4) for adapt in ("none", "batchnorm")]
    features = features_of(dataset, runs)
    plain, adapting = trainers = trainers_of(dataset, runs, features)
    fit(trainers, features)
    with torch.no_grad():  # the statistics of another stain, which no longer fit
        for module in adapting.model.modules():
            if isinstance(module, FusedBatchNorm):
                module.running_mean += 1.5 * module.running_var.sqrt()
    _, calibrations = tune_on_validation([plain.model, adapting.model], features, dataset)
    chosen = adapting.model.own_share
    assert [one.own_share for one in calibrations] == [0.0, chosen] != [0.0, 0.0]
    dices = {}
    for share in adaptation.SHARES:  # val_overlap is 0, so whole images are scored from the same tiles
        adapting.model.set_own_share(share)
        counts = np.sum([one for _, (one,), _ in score_images([adapting.model], features, "val")], axis=0)
        dices[share] = pixel_scores(counts).of(pooled_classes(counts))["dice"]
    assert dices[chosen] == pytest.approx(max(dices.values()), abs=2e-3)
    assert dices[chosen] > dices[0.0] + 0.05


def test_the_test_and_predict_give_the_same_mask(small_folder) -> None:
    dataset = dataset_of(small_folder)
    run = run_of("detail", "filter-bank", adapt="batchnorm")
    features = features_of(dataset, [run])
    (model,) = (trainer.model for trainer in trainers_of(dataset, [run], features))
    segmenter = segmenter_of(adapt="batchnorm")
    picture = np.asarray(Image.open(dataset.test[0].image).convert("RGB"))
    found = {}
    for share in (0.0, 0.4):
        model.set_own_share(share)
        segmenter.model.set_own_share(share)
        (_, (answer,)), *_ = segment_images([model], features, "test")
        found[share] = segmenter.predict(picture).probability.astype(int)
        assert np.abs(found[share] - answer.cell).max() <= 1  # other batches may round differently
    assert np.abs(found[0.0] - found[0.4]).max() > 1


def test_a_head_without_batch_norm_is_refused_in_one_line(monkeypatch) -> None:
    class Plain(nn.Conv2d):
        def __init__(self, levels: object, num_classes: int) -> None:
            super().__init__(3, num_classes, 1)
            self.num_classes = num_classes

    monkeypatch.setattr(model, "load", lambda _: Plain)
    run = run_of("bilinear", "filter-bank", adapt="batchnorm")
    with pytest.raises(CellbenchError, match="bilinear has no batch norm"):
        model.build_model(run, REGISTRY.head("bilinear"), FrozenBackbone(None, FP32, []), 2)


def test_the_fingerprint_of_a_run_that_does_not_adapt_stays_as_it_was() -> None:
    run = run_of("detail")
    assert (
        fingerprint(run, "d", "p")
        == fingerprint(run_of("detail", adapt="none"), "d", "p")
        != fingerprint(run_of("detail", adapt="batchnorm"), "d", "p")
    )


def cells(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """A class map of 100 x 120 px with a rectangle from (y, x) to (y, x) for each cell."""
    mask = np.zeros((100, 120), np.uint8)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = 1
    return mask


INSIDE = ((20, 20, 40, 40), (20, 60, 40, 80), (60, 20, 80, 41))  # 400, 400 and 420 px


def test_regions_at_the_frame_are_dropped_below_a_share_of_the_median_region_inside() -> None:
    edges = ((0, 50, 10, 70), (90, 90, 100, 102), (45, 116, 75, 120))  # 200, 120 and 120 px
    mask = cells(*INSIDE, *edges)
    assert not small_edge_regions(mask, 0.0).any()
    assert np.array_equal(small_edge_regions(mask, 0.3), np.zeros_like(mask, bool))  # 120 is not below 0.3 * 400
    assert np.array_equal(small_edge_regions(mask, 0.4), cells(*edges[1:]) > 0)
    assert np.array_equal(small_edge_regions(mask, 0.51), cells(*edges) > 0)
    for top in range(0, 99, 2):  # 50 specks inside, more than cells
        mask[top, 12] = 1
    assert np.array_equal(small_edge_regions(mask, 0.4), (cells(*edges[1:]) > 0) | (cells((0, 12, 1, 13)) > 0))
    assert not small_edge_regions(cells(*edges), 1.0).any()  # no cell inside, of unknown size
    assert not small_edge_regions(np.ones((9, 9), np.uint8), 1.0).any()


def test_the_share_of_a_cell_is_that_with_the_best_validation_dice(monkeypatch) -> None:
    found = cells(*INSIDE, (0, 50, 10, 70), (90, 90, 100, 102))  # 200 and 120 px at the frame: 0.5 and 0.3 of a cell
    truth = cells(*INSIDE, (0, 50, 10, 70))
    image = SegmentedImage(classes=found, cell=found * np.uint8(255))
    monkeypatch.setattr(adaptation, "segment_images", lambda models, *_: iter([(0, [image] * len(models))]))
    features = SimpleNamespace(pixels={"val": [(None, truth)]})
    tuned, plain = (SimpleNamespace(tunes_edges=on, edge_share=0.0, num_classes=2) for on in (True, False))
    assert adaptation.tune_edges([plain, tuned], features) == [0.0, 0.4]
    assert (plain.edge_share, tuned.edge_share) == (0.0, 0.4)
    image.classes[:] = cells(*INSIDE, (0, 50, 10, 70))
    assert adaptation.tune_edges([tuned], features) == [0.0]  # nothing to drop: the smallest share


def test_the_test_and_predict_drop_the_same_regions_at_the_frame(small_folder) -> None:
    dataset = dataset_of(small_folder)
    run = run_of("detail", "filter-bank", epochs=4)
    features = features_of(dataset, [run])
    (trainer,) = trainers_of(dataset, [run], features)
    fit([trainer], features)
    model, segmenter = trainer.model, segmenter_of()
    segmenter.model.load_state_dict(model.state_dict())
    picture = np.asarray(Image.open(dataset.test[0].image).convert("RGB"))
    masks = {}
    for share in (0.0, 20.0):
        model.edge_share = segmenter.model.edge_share = share
        (_, (answer,)), *_ = segment_images([model], features, "test", by_class=True)
        found = segmenter.predict(picture)
        masks[share] = found.classes
        assert (found.classes != answer.classes).mean() < 1e-3  # other batches may round differently
        assert not found.probability[(found.classes == 0) & (masks[0.0] > 0)].any()
        assert np.array_equal(answer.foreground[0], answer.cell)
    kept = np.where(small_edge_regions(masks[0.0], 20.0), 0, masks[0.0])
    assert np.array_equal(masks[20.0], kept)
    assert (kept != masks[0.0]).any()
