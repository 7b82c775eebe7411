"""Every published layout loads to the numbers it was saved with, and nothing that does not fit exactly loads at all.

The files are written here in the published names with random values; what must come out is computed by ``dinov2.py``, without timm.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbone_cards import built, card
from dinov2_weights import as_transformers, patch_tokens, published_state
from safetensors.torch import save_file
from torch import Tensor

from cellbench.errors import CellbenchError
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import open_backbone, truncate_card
from cellbench.models.backbones.state_dict import to_timm_names

DINOBLOOM_HEADS = {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.last_layer.weight_g": torch.ones(3, 1)}


def same_maps(backbone: Backbone, state: dict[str, Tensor], heads: int, tile: tuple[int, int], eps: float = 1e-6) -> None:
    x = torch.rand(1, 3, *tile, generator=torch.Generator().manual_seed(2))
    indices = tuple(level.index for level in backbone.levels)
    with torch.no_grad():
        wanted = patch_tokens(state, (x - backbone.mean) / backbone.std, heads, eps)
    for found, expected in zip(backbone(x, indices), wanted, strict=True):
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def dinobloom_file(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()} | DINOBLOOM_HEADS}, path)


WHOLE_OR_SHORTER = [("dinobloom-s", 6, 12), ("dinobloom-b", 12, 2), ("dinobloom-l", 16, 2), ("dinobloom-g", 24, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "heads", "depth"), WHOLE_OR_SHORTER)
def test_dinobloom_as_published_gives_the_numbers_of_an_independent_forward(name: str, heads: int, depth: int, tmp_path: Path) -> None:
    it = truncate_card(card(name, sha256=""), depth)
    state = published_state(it.dim, depth, swiglu=4096 if name == "dinobloom-g" else 0)
    dinobloom_file(tmp_path / f"{name}.pth", state)
    backbone = open_backbone(it, tmp_path, download=False)
    same_maps(backbone, state, heads, (224, 224))
    same_maps(backbone, state, heads, (224, 336) if depth < 12 else (56, 84))


def test_dinobloom_in_the_layouts_of_its_ports(tmp_path: Path) -> None:
    it = truncate_card(card("dinobloom-s", sha256=""))
    state = published_state(384, 2)
    torch.save(state, tmp_path / "dinobloom-s.bin")  # MarrLab/DinoBloom: flat
    same_maps(open_backbone(it, tmp_path), state, 6, (28, 42))
    save_file({key: value for key, value in state.items() if key != "mask_token"}, tmp_path / "dinobloom-s.safetensors")  # 1aurent's: timm
    same_maps(open_backbone(it, tmp_path), state, 6, (28, 42))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "heads", "options", "eps"),
    [
        ("phikon", 12, {"patch_px": 16, "scaled": False, "side": 14}, 1e-12),
        ("phikon-v2", 16, {"patch_px": 16, "side": 14}, 1e-6),
        ("midnight", 24, {"swiglu": 4096, "side": 37}, 1e-6),
        ("midnight", 24, {"swiglu": 4096, "side": 16}, 1e-6),  # the card does not say which: the file does
        ("hibou-b", 12, {"swiglu": 2048, "registers": 4}, 1e-6),
        ("hibou-l", 16, {"swiglu": 2736, "registers": 4}, 1e-6),
    ],
)
def test_transformers_layouts_load_to_the_same_numbers(name: str, heads: int, options: dict[str, int], eps: float, tmp_path: Path) -> None:
    it = truncate_card(card(name), 1)
    state = published_state(it.dim, 1, **options)
    save_file(as_transformers(state, vit=name == "phikon"), tmp_path / f"{name}.safetensors")
    backbone = open_backbone(it, tmp_path)
    same_maps(backbone, state, heads, (2 * it.patch_px, 3 * it.patch_px))
    same_maps(backbone, state, heads, (224, 224), eps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2-small", "dinov2-small-reg"])
def test_positions_of_518_px_are_kept_and_resampled_once(name: str, tmp_path: Path) -> None:
    it = truncate_card(card(name))
    state = published_state(384, 2, side=37, registers=4 if name.endswith("reg") else 0)
    torch.save(state, tmp_path / f"{name}.pth")
    backbone = open_backbone(it, tmp_path)
    for tile in ((518, 518), (224, 224), (224, 336)):
        same_maps(backbone, state, 6, tile)


def test_a_position_grid_of_another_size_than_the_card_states_is_refused(tmp_path: Path) -> None:
    torch.save(published_state(384, 2, side=37), tmp_path / "dinobloom-s.pth")
    with pytest.raises(CellbenchError, match=r"has another shape: 1 key \(pos_embed \(1, 1370, 384\) for \(1, 257, 384\)\)"):
        open_backbone(truncate_card(card("dinobloom-s", sha256="")), tmp_path)


def test_timm_layouts_load_to_timms_own_numbers(tmp_path: Path) -> None:
    import timm

    for name, arch in (("dinov3-small", "vit_small_patch16_dinov3"), ("convnext-tiny", "convnext_tiny")):
        it = truncate_card(card(name))
        torch.manual_seed(3)
        net = timm.create_model(arch, pretrained=False, **({"depth": 2} if name == "dinov3-small" else {})).eval()
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
        backbone = open_backbone(it, tmp_path)
        x = torch.rand(1, 3, 64, 96)
        with torch.no_grad():
            wanted = net.forward_intermediates((x - backbone.mean) / backbone.std, norm=name == "dinov3-small", intermediates_only=True)
        if name == "convnext-tiny":
            wanted = [(m - m.mean(1, keepdim=True)) / (m.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt() for m in wanted]
        for found, expected in zip(backbone(x, tuple(range(len(wanted)))), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_efficientnet_pytorch_are_numbered_by_stage() -> None:
    widths = [16, 24, 24, 40]
    state = {"_conv_stem.weight": torch.zeros(32, 3, 3, 3), "_bn0.bias": torch.zeros(32), "_fc.bias": torch.zeros(9)}
    for index, (width, entering) in enumerate(zip(widths, [32, *widths], strict=False)):
        state[f"_blocks.{index}._project_conv.weight"] = torch.zeros(width, 6 * entering, 1, 1)
        state[f"_blocks.{index}._bn2.bias"] = torch.zeros(width)
        if index:
            state[f"_blocks.{index}._expand_conv.weight"] = torch.zeros(6 * entering, entering, 1, 1)
    assert list(to_timm_names(state, "x")) == [
        "conv_stem.weight", "bn1.bias", "blocks.0.0.conv_pw.weight", "blocks.0.0.bn2.bias",
        "blocks.1.0.conv_pwl.weight", "blocks.1.0.bn3.bias", "blocks.1.0.conv_pw.weight",
        "blocks.1.1.conv_pwl.weight", "blocks.1.1.bn3.bias", "blocks.1.1.conv_pw.weight",
        "blocks.2.0.conv_pwl.weight", "blocks.2.0.bn3.bias", "blocks.2.0.conv_pw.weight",
    ]  # fmt: skip


# --- strictness


def test_a_key_too_many_and_a_key_too_few_are_listed(tmp_path: Path) -> None:
    it, state = truncate_card(card("dinobloom-s", sha256="")), published_state(384, 2)
    lost = [key for key in state if key.startswith("blocks.1.mlp") or key == "norm.weight"]
    for key in lost:
        del state[key]
    state["blocks.7.extra"] = torch.zeros(1)
    dinobloom_file(tmp_path / "dinobloom-s.pth", state)
    with pytest.raises(CellbenchError) as caught:
        open_backbone(it, tmp_path)
    line = str(caught.value)
    assert line.startswith("dinobloom-s: does not fit the network")
    assert "lacks 5 keys (blocks.1.mlp.fc1.weight," in line
    assert "has too many: 1 key (blocks.7.extra)" in line


def test_one_key_too_many_alone_is_refused() -> None:
    with pytest.raises(CellbenchError, match=r"the card describes: has too many: 1 key \(blocks.2.norm1.bias\)"):
        built(truncate_card(card("dinobloom-s")), published_state(384, 2) | {"blocks.2.norm1.bias": torch.zeros(384)})


def test_weights_of_another_network_or_of_none_are_refused() -> None:
    it = truncate_card(card("dinobloom-s"))
    with pytest.raises(CellbenchError, match="has another shape"):
        built(it, published_state(768, 2))
    with pytest.raises(CellbenchError, match="holds no known vision network"):
        built(it, {"encoder.weight": torch.zeros(1)})
    with pytest.raises(CellbenchError, match="beside the network 'backbone"):
        built(it, {f"backbone.{k}": v for k, v in published_state(384, 2).items()} | {"decoder.weight": torch.zeros(1)})


def test_of_student_and_teacher_the_teacher_is_taken() -> None:
    teacher, student = published_state(384, 1, seed=1), published_state(384, 1, seed=2)
    both = {f"student.backbone.{k}": v for k, v in student.items()} | {f"teacher.backbone.{k}": v for k, v in teacher.items()}
    assert torch.equal(to_timm_names(both, "x")["norm.bias"], teacher["norm.bias"])


def test_a_card_that_contradicts_its_network_is_refused() -> None:
    with pytest.raises(CellbenchError, match="prefix_tokens = 5, the network has 1"):
        built(truncate_card(card("dinobloom-s", prefix_tokens=5)), None)
    with pytest.raises(CellbenchError, match=r"no setting called 'patchsize'. Did you mean 'patch_size'"):
        built(card("dinobloom-s", arch={"name": "vit_small_patch14_dinov2", "patchsize": 14}))
    with pytest.raises(CellbenchError, match=r"timm .* has no such model"):
        built(card("dinobloom-s", arch={"name": "vit_smal_patch14_dinov2"}))


def test_sizes_and_levels_that_do_not_exist_are_refused() -> None:
    backbone = built(truncate_card(card("dinobloom-s")))
    with pytest.raises(ValueError, match="multiples of 14 px"):
        backbone(torch.rand(1, 3, 224, 230), (0,))
    with pytest.raises(ValueError, match="there are 0 to 1"):
        backbone(torch.rand(1, 3, 28, 28), (2,))
