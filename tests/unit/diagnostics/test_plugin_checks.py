"""Every shipped part keeps its contracts, each contract can be broken, and a user's own parts work without a change to the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import parts
import pytest
import torch
from safetensors.torch import save_file
from small_heads import one_a_builder
from torch._subclasses.fake_tensor import FakeTensorMode

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.diagnostics.backbone_checks import BACKBONE, agrees_with_card, frozen, small_backbone
from cellbench.diagnostics.head_checks import HEAD
from cellbench.diagnostics.plugin_checks import verdicts
from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.models.backbones.base import Backbone, Level
from cellbench.models.backbones.build import open_backbone
from cellbench.run import main
from cellbench.training.model import build_model

CARDS = {name: Registry().backbone(name) for name in Registry().names("backbones")}
HEADS = one_a_builder()
# Cards of one network (DinoBloom-S and RedDino-S) differ in weights and colours only: the first of them stands for all in the slow checks.
NETWORKS = {json.dumps([it.builder, it.arch], sort_keys=True): name for name, it in sorted(CARDS.items(), reverse=True)}


# --- the shipped cards


@pytest.fixture(scope="module", params=sorted(NETWORKS.values()))
def built(request: pytest.FixtureRequest) -> tuple[str, Backbone]:
    return request.param, small_backbone(CARDS[request.param])


@pytest.mark.slow
@pytest.mark.parametrize("contract", BACKBONE)
def test_every_shipped_network_keeps(contract: str, built: tuple[str, Backbone]) -> None:
    name, backbone = built
    assert BACKBONE[contract](CARDS[name], backbone) == ""


@pytest.mark.parametrize("name", sorted(CARDS.keys() - NETWORKS.values()))
def test_every_other_card_of_a_network_agrees_with_it(name: str) -> None:
    it = CARDS[name]
    first = CARDS[NETWORKS[json.dumps([it.builder, it.arch], sort_keys=True)]]
    facts = ("dim", "depth", "patch_px", "prefix_tokens")
    assert {key: getattr(it, key) for key in facts} == {key: getattr(first, key) for key in facts}
    assert it.params_m == pytest.approx(first.params_m, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("contract", HEAD)
@pytest.mark.parametrize("name", HEADS)
def test_every_shipped_head_keeps(contract: str, name: str) -> None:
    assert HEAD[contract](HEADS[name]) == ""


# --- each contract can be broken


def broken(registry: Path, kind: str) -> dict[str, str]:
    card = Registry(registry).card(kind, f"my-{kind[:-1]}")
    return {verdict.contract: verdict.reason for verdict in verdicts(card) if verdict.reason}


@pytest.mark.slow
def test_sound_user_parts_keep_every_contract(tmp_path: Path) -> None:
    assert broken(parts.head(tmp_path), "heads") == {}
    assert broken(parts.head(tmp_path, "WithDropout"), "heads") == {}
    assert broken(parts.backbone(tmp_path), "backbones") == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "breaks", "says"),
    [
        ("WrongShape", {"shape"}, "not (2, 1, 56, 56)"),
        ("WrongClasses", {"shape"}, "(2, 2, 56, 56)"),
        ("TurnedGrid", {"grid order"}, "another corner"),
        ("UpsideDown", {"grid order"}, "another corner"),
        ("SharedStatistics", {"batch independence"}, "with the others of its batch"),
        ("UnusedLayer", {"gradient"}, "no gradient reaches forgotten.weight, forgotten.bias"),
        ("Detached", {"gradient"}, "no gradient reaches hidden.0.0.weight"),
        ("LastLevelOnly", {"gradient"}, "levels 0 of 2 are not read"),
        ("SecretPixels", {"pixels as on its card"}, "but it reads them"),
        ("OptionNotOnCard", {"options on its card"}, "lacks depth"),
        ("AnyOption", {"options on its card"}, "**kwargs"),
        ("ThroughNumpy", {"half precision"}, "BFloat16"),
        ("OwnDice", {"seed"}, "score.bias"),
        ("NumpyNoise", {"repeatable"}, "draw with torch's functions"),
        ("OwnGenerator", {"repeatable"}, "keep no state outside of state_dict()"),
        ("AlwaysDropping", {"batch independence", "pixels as on its card"}, "with the others of its batch"),
        ("NoSuchImport", set(HEAD) - {"options on its card"}, "einops"),
    ],
)
def test_a_broken_head_fails_the_contract_that_it_breaks(tmp_path: Path, name: str, breaks: set[str], says: str) -> None:
    found = broken(parts.head(tmp_path, name), "heads")
    assert set(found) == breaks
    assert says in "\n".join(found.values())


def test_a_head_card_that_promises_too_much_fails(tmp_path: Path) -> None:
    assert "has colour, which Sound does not take" in broken(parts.head(tmp_path, more='colour = "red"'), "heads")["options on its card"]
    assert set(broken(parts.head(tmp_path, pixels=True), "heads")) == {"pixels as on its card"}
    assert "cannot be imported" in broken(parts.head(tmp_path, "Nothing"), "heads")["shape"]


@pytest.mark.parametrize(
    ("name", "breaks", "says"),
    [
        ("scrambled", {"grid order"}, "corner of level 0 changes most where a square is lit at the"),
        ("mirrored", {"grid order"}, "the top left corner of level 0 changes most where a square is lit at the top right"),
        ("centred", {"batch independence"}, "with the others of its batch"),
        ("learning", {"frozen"}, "2 parameters require a gradient after freeze(), first project.weight"),
        ("training", {"frozen"}, "into training mode"),
        ("half", {"shape"}, "bfloat16"),
        ("narrow", {"shape"}, "(2, 20, 1, 1)"),
        ("one_too_many", {"shape", "grid order", "batch independence"}, "1 levels were requested, 2 maps returned"),
        ("drawn_anew", {"repeatable"}, "project.weight"),
        ("raises", {"can be built"}, "ZeroDivisionError: no patches"),
        ("missing", {"can be built"}, "cannot be imported"),
    ],
)
def test_a_broken_backbone_fails_the_contract_that_it_breaks(tmp_path: Path, name: str, breaks: set[str], says: str) -> None:
    found = broken(parts.backbone(tmp_path, name), "backbones")
    assert set(found) == breaks
    assert says in "\n".join(found.values())


@pytest.mark.parametrize(
    ("facts", "says"), [({"params_m": 1.0}, "params_m = 1 on the card, the network has 0.00463"), ({"depth": 2}, "depth = 2")]
)
def test_a_backbone_card_of_wrong_facts_fails(tmp_path: Path, facts: dict[str, float], says: str) -> None:
    found = broken(parts.backbone(tmp_path, **facts), "backbones")
    assert set(found) == {"agrees with its card"}
    assert says in found["agrees with its card"]


def test_a_shipped_card_of_wrong_facts_fails_at_full_depth() -> None:
    it = CARDS["dinobloom-s"]
    for wrong in ({"params_m": 22.6}, {"arch": {**it.arch, "depth": 11}, "depth": 11}):
        changed = it.model_copy(update=wrong)
        assert "params_m" in agrees_with_card(changed, small_backbone(changed))


# --- a user's own parts, used


def test_a_head_and_a_backbone_beside_their_cards_are_found_built_and_joined(tmp_path: Path) -> None:
    folder = parts.backbone(parts.head(tmp_path / "mine"))
    registry = Registry(folder)
    assert {"my-head", "fpn"} <= set(registry.names("heads"))
    assert {"my-backbone", "uni"} <= set(registry.names("backbones"))
    run = registry.complete(RunSpec(backbone="my-backbone", head="my-head", tile_px=64))
    assert run.options == {"width": 16}
    here = Hardware(device_name="cpu", precision_name="fp32", memory_bytes=2**28)
    frozen = FrozenBackbone(open_backbone(registry.backbone("my-backbone")), here, [2])
    made = build_model(run, registry.part(run), frozen, 3)
    maps = frozen.maps(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 24, 8, 12)]
    assert made(Batch(maps, torch.rand(2, 3, 64, 96), torch.zeros(2, 64, 96))).shape == (2, 3, 64, 96)


def test_a_backbone_of_the_user_reads_its_weights_from_the_folder(tmp_path: Path) -> None:
    card = Registry(parts.backbone(tmp_path, weights="https://example.org/mine.safetensors")).backbone("my-backbone")
    state = {"project.weight": torch.full((24, 3, 8, 8), 0.5), "project.bias": torch.ones(24)}
    (tmp_path / "weights").mkdir()
    save_file(state, tmp_path / "weights" / "my-backbone.safetensors")
    backbone = open_backbone(card, tmp_path / "weights", download=False)
    assert torch.equal(backbone.project.weight, state["project.weight"])


def test_a_part_of_the_user_replaces_a_shipped_one_of_its_name(tmp_path: Path) -> None:
    folder = parts.head(tmp_path)
    (folder / "heads" / "my-head.toml").rename(folder / "heads" / "bilinear.toml")
    assert Registry(folder).head("bilinear").builder == "my_head.py:Sound"


@pytest.mark.slow
def test_grid_trains_a_head_of_the_user_on_a_backbone_of_the_user(
    tmp_path: Path, small_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parts.backbone(parts.head(tmp_path / "mine"))
    (tmp_path / "mine.toml").write_text(
        'experiment = "mine"\ndataset = "folder"\n[grid]\nbackbone = ["my-backbone"]\nhead = ["my-head"]\nseed = [0]\n'
        "[run]\nepochs = 1\ntile_px = 64\noverlap = 0.25\n",
        encoding="utf-8",
    )
    call = ["grid", str(tmp_path / "mine.toml"), "--data", str(small_folder), "--registry", str(folder), "--device", "cpu"]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "my-backbone · my-head" in printed
    assert "skipped" not in printed


# --- the command


@pytest.mark.slow
def test_the_contracts_of_the_user_folder_are_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = parts.backbone(parts.head(tmp_path, "SharedStatistics"))
    assert main(["doctor", "--contracts", "--registry", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(BACKBONE) + 1 + len(HEAD) + 2
    (failed,) = [line for line in lines if line.startswith("FAIL")]
    assert failed.startswith("FAIL  heads/my-head  batch independence: ")
    assert lines[-1].startswith(f"2 cards, {len(BACKBONE) + 1 + len(HEAD)} contracts, 1 broken")
    assert main(["doctor", "my-backbone", "--contracts", "--registry", str(folder)]) == 0
    assert "heads/my-head" not in capsys.readouterr().out


def test_contracts_of_shipped_parts_are_run_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--contracts", "bilinear", "filter-bank"]) == 0
    printed = capsys.readouterr().out
    assert "ok    heads/bilinear  gradient" in printed
    assert "ok    backbones/filter-bank  frozen" in printed
    assert main(["doctor", "--contracts", "bilinaer"]) == 2
    assert "no component called 'bilinaer'. Did you mean 'bilinear'?" in capsys.readouterr().err


def test_a_folder_without_parts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heads").mkdir()
    assert main(["doctor", "--contracts", "--registry", str(tmp_path)]) == 2
    assert "holds nothing to check" in capsys.readouterr().err


@pytest.mark.slow
def test_code_of_two_folders_with_one_file_name_does_not_meet(tmp_path: Path) -> None:
    first, second = (Registry(parts.head(tmp_path / name)).head("my-head") for name in ("a", "b"))
    assert [verdict.reason for card in (first, second, first) for verdict in verdicts(card) if verdict.contract == "seed"] == ["", "", ""]
    assert len([name for name in sys.modules if name.startswith("cellbench_user_my_head_")]) >= 2


class PixelsThemselves(Backbone):
    """Its one map is the tile."""

    levels = (Level(index=0, dim=3, stride_px=1),)
    tile_multiple_px = 1

    def maps(self, x_BCHW, indices):
        return [x_BCHW for _ in indices]


def test_the_checks_compute_where_the_backbone_lies():
    with FakeTensorMode():  # claims to be a GPU, and refuses to mix it with the processor
        backbone = PixelsThemselves((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).freeze().to("cuda")
        assert frozen(CARDS["filter-bank"], backbone) == ""
