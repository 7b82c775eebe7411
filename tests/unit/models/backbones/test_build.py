"""Building backbones: cards name their source; random and missing weights, real weights, and the cost of loading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbone_cards import built, card
from dinov2_weights import published_state
from small_data import SHARED

from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError, WeightsUnavailable
from cellbench.models.backbones.build import open_backbone, weights_digest
from cellbench.models.backbones.timm_pyramid import TimmPyramid

CARDS = {name: Registry().backbone(name) for name in Registry().names("backbones")}
VIT_TINY = SHARED / "weights" / "vit_tiny_patch16_224.safetensors"


# --- cards; what every backbone must keep is in test_contracts.py


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_whose_it_is_and_where_to_get_it(name: str) -> None:
    it = CARDS[name]
    assert it.title
    assert it.license
    assert it.source
    assert it.weights == "none" or it.page.startswith("https://")
    assert it.weights == "none" or it.sha256 or "hash" in it.notes


# --- floors, missing weights, real weights, cost


def test_random_weights_follow_from_the_seed_and_disturb_nothing() -> None:
    it = card("vit-tiny-random")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = open_backbone(it), open_backbone(it)
    assert torch.equal(torch.get_rng_state(), before)
    other = built(it.model_copy(update={"arch": {**it.arch, "seed": 1}}))
    x = torch.rand(1, 3, 32, 48)
    assert torch.equal(first(x, (11,))[0], second(x, (11,))[0])
    assert not torch.equal(first(x, (11,))[0], other(x, (11,))[0])
    assert weights_digest(it) == weights_digest(card("vit-tiny-random"))
    assert weights_digest(it) != weights_digest(it.model_copy(update={"arch": {**it.arch, "seed": 1}}))


def test_missing_weights_are_never_replaced_by_random_ones(tmp_path: Path) -> None:
    for name in ("dinobloom-s", "uni", "convnext-tiny"):
        with pytest.raises(WeightsUnavailable, match=f"^{name}: its weights are not on this machine"):
            open_backbone(card(name), tmp_path, download=False)


# Channels 0 to 3 at row 5, column 9 after blocks 2 and 11 (from 0), measured with torch 2.14.1 and timm 1.0.31 on a CPU.
KNOWN = {2: [-5.200766, 2.666546, -1.763876, 0.587318], 11: [-1.141544, -0.744552, -1.737767, -1.552484]}


@pytest.mark.slow
@pytest.mark.skipif(not VIT_TINY.is_file(), reason=f"no real weights at {VIT_TINY}")
def test_the_real_vit_tiny_gives_timms_features_and_the_known_numbers() -> None:
    import timm
    from safetensors.torch import load_file

    it = card("vit-tiny-in1k")
    backbone = open_backbone(it, VIT_TINY.parent, download=False)
    ramp = torch.arange(224.0) / 223
    x = torch.stack([ramp.expand(224, 224), ramp.expand(224, 224).T, torch.full((224, 224), 0.5)])[None]
    plain = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    plain.load_state_dict(load_file(VIT_TINY))
    with torch.no_grad():
        tokens = plain.forward_features((x - 0.5) / 0.5)[:, 1:]
    found = backbone(x, (11,))[0]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, rtol=1e-5, atol=1e-5)
    for index, known in KNOWN.items():
        torch.testing.assert_close(backbone(x, (index,))[0][0, :4, 5, 9], torch.tensor(known), rtol=1e-3, atol=1e-3)
    assert weights_digest(it, VIT_TINY.parent) == "sha256:3f1f07da5e1337265ac1eb0234d13841467caf730b3c4240bd3f98c49bc16a92"


def normed(map_BDhw: torch.Tensor) -> torch.Tensor:
    return (map_BDhw - map_BDhw.mean(1, keepdim=True)) / (map_BDhw.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()


LITE = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"


def test_the_packaged_efficientnet_loads_offline_with_the_hash_on_its_card() -> None:
    it = card("efficientnet-lite0")
    backbone = open_backbone(it, download=False)
    assert [(level.dim, level.stride_px) for level in backbone.levels] == [(16, 2), (24, 4), (40, 8), (112, 16), (320, 32)]
    assert weights_digest(it, download=False) == f"sha256:{it.sha256}"


@pytest.mark.skipif(not LITE.is_file(), reason=f"no real weights at {LITE}")
def test_the_packaged_efficientnet_gives_timms_own_features_of_an_independent_copy(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file

    plain = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    plain.load_state_dict(load_file(LITE))
    x = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = plain.forward_intermediates((x - 0.5) / 0.5, intermediates_only=True)
    for folder, name in ((None, "package"), (tmp_path, "timm's names")):
        (tmp_path / "efficientnet-lite0.safetensors").write_bytes(LITE.read_bytes())
        found = open_backbone(card("efficientnet-lite0"), folder, download=False)(x, (0, 1, 2, 3, 4))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, normed(theirs), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("name", "num_trained"), [*(("efficientnet-lite0", num) for num in (1, 2, 3, 4)), *(("convnext-tiny", num) for num in (1, 2, 3))]
)
def test_a_pyramid_cut_before_any_stage_gives_timms_maps_of_the_whole_network(name: str, num_trained: int) -> None:
    backbone = open_backbone(card(name), download=False) if name == "efficientnet-lite0" else built(card(name))
    x = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(4))
    num, indices = len(backbone.levels), tuple(range(len(backbone.levels)))
    with torch.no_grad():
        wanted = [normed(one) for one in backbone.net.forward_intermediates(x, intermediates_only=True, norm=False)]
        frozen, tokens_BND = backbone.begin(x, indices[: num - num_trained], num - num_trained)
        trained = backbone.tail(num_trained)(tokens_BND, indices[num - num_trained :], (3, 2))
    for ours, theirs in zip([*frozen, *trained], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_trained_stages_of_a_pyramid_give_a_tile_the_same_maps_in_any_batch() -> None:
    tail = open_backbone(card("efficientnet-lite0"), download=False).tail(2).train()
    x = torch.rand(3, 16, 40, generator=torch.Generator().manual_seed(4))
    before = {key: value.clone() for key, value in tail.named_buffers()}
    (alone,), (together,) = tail(x[:1], (4,), (1, 1)), tail(x, (4,), (1, 1))
    torch.testing.assert_close(alone, together[:1], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in tail.named_buffers())


def test_a_pyramid_that_cannot_be_cut_is_refused_and_so_are_all_its_stages() -> None:
    import timm

    resnet = TimmPyramid(timm.create_model("resnet10t", pretrained=False), card("efficientnet-lite0"))
    with pytest.raises(CellbenchError, match="ResNet cannot be cut between two stages"):
        resnet.tail(1)
    with pytest.raises(CellbenchError, match="unfreeze = 5: the backbone has 5 stages, and at least the first must stay frozen"):
        open_backbone(card("efficientnet-lite0"), download=False).tail(5)


COST = """
import sys
from pathlib import Path
import torch, cellbench.models.backbones.timm_vit
from cellbench.models.backbones.build import open_backbone
from cellbench.config.registry import Registry
card = Registry().backbone("dinobloom-s").model_copy(update={"sha256": ""})
def peak(): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
backbone = open_backbone(card, Path(sys.argv[1]))
print((peak() - before) / sum(p.numel() * 4 for p in backbone.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_dinobloom_s_takes_little_more_memory_than_twice_its_weights(tmp_path: Path) -> None:
    # As large as the published file, whose two heads are twice the size of the network.
    heads = {"dino_head.last_layer.weight_v": torch.zeros(22_000_000), "ibot_head.last_layer.weight_v": torch.zeros(22_000_000)}
    state = {f"backbone.{key}": value for key, value in published_state(384, 12).items()}
    torch.save({"teacher": state | heads}, tmp_path / "dinobloom-s.pth")
    done = subprocess.run([sys.executable, "-c", COST, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.2
