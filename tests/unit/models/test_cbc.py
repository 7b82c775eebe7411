"""The U-Nets of cbc: their geometry with random weights, their weights from Keras' names, and real cells where the converted files lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import SHARED
from torch import Tensor, nn

from cellbench.config.registry import Registry
from cellbench.data.io.images import read_image, read_labels
from cellbench.errors import CellbenchError, WeightsUnavailable
from cellbench.models.backbones.build import open_backbone
from cellbench.models.backbones.cbc_unet import CbcUNet, cbc_unet, load_unet
from cellbench.models.baselines.build import baseline_weights_digest, open_baseline
from cellbench.models.baselines.cbc import cbc


def keras_state(net: CbcUNet) -> dict[str, Tensor]:
    """The weights of a network under the names and layouts of the published file."""
    state: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def name(kind: str) -> str:
        counts[kind] = counts.get(kind, -1) + 1
        return f"{kind}_{counts[kind]}" if counts[kind] else kind

    for layer in (*net.encoder, *net.decoder):
        conv, norm = name("conv2d_transpose" if isinstance(layer.conv, nn.ConvTranspose2d) else "conv2d"), name("batch_normalization")
        state |= {f"{conv}.kernel": layer.conv.weight.permute(2, 3, 1, 0), f"{conv}.bias": layer.conv.bias}
        state |= {f"{norm}.gamma": layer.norm.weight, f"{norm}.beta": layer.norm.bias}
        state |= {f"{norm}.moving_mean": layer.norm.running_mean, f"{norm}.moving_variance": layer.norm.running_var}
    return state | {"mask.kernel": net.mask.weight.permute(2, 3, 1, 0), "mask.bias": net.mask.bias}


@pytest.fixture(scope="module")
def net() -> CbcUNet:
    torch.manual_seed(0)
    return CbcUNet().eval()


def test_n_pixels_give_n_minus_88_and_the_names_of_keras_are_taken(net: CbcUNet) -> None:
    tile = torch.rand(1, 3, 196, 188)
    with torch.inference_mode():
        scores = net(tile)
        assert scores.shape == (1, 1, 108, 100)
        torch.testing.assert_close(load_unet(keras_state(net), "x")(tile), scores)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1.94e6, rel=0.01)
    with pytest.raises(CellbenchError, match=r"not those of a U-Net of cbc 1\.1\.0"):
        load_unet({"mask.bias": torch.zeros(1)}, "x")


def test_an_image_wider_than_a_tile_is_segmented_whole(net: CbcUNet) -> None:
    image = np.random.default_rng(0).integers(0, 255, (60, 450, 3), dtype=np.uint8)
    found = cbc([keras_state(net)])(image, 2, threshold=0.5)
    assert found.shape == (60, 450)
    assert cbc([keras_state(net)])(image, 2, threshold=0.0).all(), "every pixel has a probability"
    with pytest.raises(CellbenchError, match="finds cells without their kinds"):
        cbc([keras_state(net)])(image, 3, threshold=0.5)


def test_the_encoder_is_a_backbone_of_four_strides(net: CbcUNet) -> None:
    backbone = cbc_unet(Registry().backbone("cbc-rbc"), keras_state(net)).freeze()
    maps = backbone(torch.rand(2, 3, 64, 48), (0, 1, 2, 3))
    assert [tuple(one.shape) for one in maps] == [(2, 32, 64, 48), (2, 64, 32, 24), (2, 128, 16, 12), (2, 256, 8, 6)]


def test_without_its_weights_it_is_unavailable_and_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELLBENCH_WEIGHTS", raising=False)
    registry = Registry()
    with pytest.raises(
        WeightsUnavailable, match=r"cbc-rbc: its weights are not on this machine. Put cbc_rbc.safetensors at .*docs/backbones.md"
    ):
        baseline_weights_digest(registry.baseline("cbc"), registry, None)
    with pytest.raises(WeightsUnavailable):
        open_baseline(registry.baseline("cbc"), registry, tmp_path)


@pytest.mark.skipif(not (SHARED / "weights" / "cbc_rbc.safetensors").is_file(), reason="the converted weights of cbc are not here")
def test_real_red_cells_are_found() -> None:
    """A corner of a BCCD smear, of which the network has seen nothing."""
    registry, weights = Registry(), SHARED / "weights"
    open_backbone(registry.backbone("cbc-wbc"), weights)
    picture = sorted((SHARED / "bccd" / "test" / "original").iterdir())[0]
    truth = read_labels(SHARED / "bccd" / "test" / "mask" / f"{picture.stem}.png")[:420, :420] > 127
    found = open_baseline(registry.baseline("cbc"), registry, weights)(read_image(picture)[:420, :420], 2, threshold=0.5).classes > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.9
