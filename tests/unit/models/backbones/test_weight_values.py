"""Weights that no training leaves behind are refused by the tensor's name, and scores that are not finite are no answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import parts
import pytest
import torch
from cohorts import REGISTRY, dataset_of, features_of, run_of, trainers_of
from PIL import Image
from safetensors.torch import load_file, save_file
from small_data import MODEL, write_pair
from torch import Tensor, nn

from cellbench.config.cards import BackboneCard
from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError, WeightsUnavailable
from cellbench.inference.segmenter import Segmenter
from cellbench.models.backbones.build import open_backbone, truncate_card
from cellbench.models.backbones.weight_files import check_values
from cellbench.run import main
from cellbench.training.tiled_inference import segment_images

MATRIX = "blocks.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def sound() -> dict[str, Tensor]:
    """A vision transformer's tensors as a file holds them, two blocks."""
    net = open_backbone(truncate_card(REGISTRY.backbone("vit-tiny-random"))).net
    return {name: x.clone() for name, x in net.state_dict().items()}


def card() -> BackboneCard:
    it = truncate_card(REGISTRY.backbone("vit-tiny-random"))
    return it.model_copy(update={"id": "mine", "weights": "https://example.org/mine.safetensors"})


def opened(state: dict[str, Tensor], folder: Path) -> object:
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "mine.safetensors")
    return open_backbone(card(), folder, download=False)


def changed(state: dict[str, Tensor], name: str, make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {key: make(x) if key == name or not name else x for key, x in state.items()}


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def make(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[-1] = value
        return x

    return make


BAD = {
    "a NaN": (MATRIX, with_one(float("nan")), "1 of .* not finite"),
    "an infinity": ("norm.bias", with_one(float("-inf")), "1 of .* not finite"),
    "a half-precision overflow": (MATRIX, lambda x: (x * 1e9).half(), "not finite"),
    "a matrix of zeros": (MATRIX, torch.zeros_like, "only zeros"),
    "int8 without scales": (MATRIX, lambda x: (x * 100).to(torch.int8), "int8 numbers"),
    "int64": (MATRIX, lambda x: (x * 100).to(torch.int64), "int64 numbers"),
    "fp8 without scales": (MATRIX, lambda x: (x * 100).to(torch.float8_e4m3fn), "float8_e4m3fn numbers"),
    "int8 kept as floats": (MATRIX, lambda x: (x * 1000).round(), "only integers"),
    "a vector of int32": ("norm.bias", lambda x: x.to(torch.int32), "int32 numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_tensor_of_no_trained_values_is_refused_by_name(what: str, sound: dict[str, Tensor], tmp_path: Path) -> None:
    name, make, words = BAD[what]
    with pytest.raises(WeightsUnavailable, match=f"mine.*: {name} .*{words}"):
        opened(changed(sound, name, make), tmp_path)


def test_a_network_of_one_value_a_matrix_is_refused(sound: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="one value each"):
        opened(changed(sound, "", lambda x: torch.full_like(x, 0.02)), tmp_path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_formats_are_read(kind: torch.dtype, sound: dict[str, Tensor], tmp_path: Path) -> None:
    opened({name: x.to(kind) for name, x in sound.items()}, tmp_path)


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "blocks.0.mlp.fc1.bias", "norm.bias"])
def test_tokens_positions_and_biases_may_be_zero(name: str, sound: dict[str, Tensor], tmp_path: Path) -> None:
    opened(changed(sound, name, torch.zeros_like), tmp_path)


def test_a_builder_of_ones_own_that_copies_whole_numbers_is_refused(tmp_path: Path) -> None:
    own = Registry(parts.backbone(tmp_path / "mine", weights="https://example.org/mine.safetensors")).backbone("my-backbone")
    weight = torch.randint(-128, 127, (24, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    (tmp_path / "weights").mkdir()
    for kind in (torch.int8, torch.int32):
        save_file({"project.weight": weight.to(kind), "project.bias": torch.ones(24)}, tmp_path / "weights" / "my-backbone.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CELLBENCH_CACHE", str(tmp_path / str(kind)))
            with pytest.raises(WeightsUnavailable, match=r"project\.weight"):
                open_backbone(own, tmp_path / "weights", download=False)


def test_a_matrix_that_is_built_as_zeros_and_a_mask_of_infinities_are_sound() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    nn.init.zeros_(net[1].weight)  # a gate that opens in training, or never
    net.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    built = {name: x.clone() for name, x in net.state_dict().items()}
    parameters = dict(net.named_parameters()).keys()
    check_values(net.state_dict(), parameters, "it", built=built)
    with pytest.raises(WeightsUnavailable, match=r"0\.weight holds only zeros"):
        check_values({**net.state_dict(), "0.weight": torch.zeros(4, 3)}, parameters, "it", built=built)


@pytest.mark.slow
def test_a_grid_skips_the_backbone_and_names_the_tensor(sound: dict[str, Tensor], small_folder: Path, tmp_path: Path, capsys) -> None:
    state = {"project.weight": torch.zeros(24, 3, 8, 8), "project.bias": torch.ones(24)}
    parts.backbone(tmp_path / "mine", weights="https://example.org/mine.safetensors")
    save_file(state, tmp_path / "my-backbone.safetensors")
    grid = 'experiment = "zeros"\ndataset = "folder"\n[grid]\nbackbone = ["my-backbone"]\nhead = ["bilinear"]\n[run]\ntile_px = 64\nepochs = 1\n'
    (tmp_path / "q.toml").write_text(grid)
    asked = ["grid", "q.toml", "--data", str(small_folder), "--registry", "mine", "--weights", str(tmp_path), "--device", "cpu"]
    assert main(asked) == 0  # as for weights that are not here
    printed = capsys.readouterr().out
    assert "skipped my-backbone · bilinear · seed 0" in printed
    assert "project.weight holds only zeros" in printed


# --- learned weights --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(there: Path, tmp_path: Path) -> Path:
    assert main(["export", MODEL, "--out", str(tmp_path / "it"), "--device", "cpu"]) == 0
    return tmp_path / "it"


def _damage(folder: Path, make: Callable[[str, Tensor], Tensor]) -> None:
    path = folder / "head.safetensors"
    save_file({name: make(name, x) for name, x in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x * float("nan"), "not finite"),
        (torch.zeros_like, "only zeros"),
        (lambda x: (x * 100).to(torch.int8), "int8 numbers"),
    ],
)
def test_trained_weights_with_impossible_values_are_refused_when_loaded(exported: Path, make, words: str) -> None:
    _damage(exported, lambda _, x: make(x) if x.is_floating_point() else x)
    with pytest.raises(CellbenchError, match=rf"head\.\S+ holds {words}|head\.\S+ holds .*{words}"):
        Segmenter.load(exported, device="cpu")


def test_an_image_whose_scores_are_not_finite_is_skipped_and_not_counted(exported: Path, tmp_path: Path, capsys) -> None:
    # Sound numbers, each for itself; together they overflow.
    _damage(exported, lambda _, x: x * 1e30 if x.is_floating_point() and x.dim() > 1 else x)
    image = "smears/test/original/t0.png"
    assert main(["predict", str(exported), image, "--out", str(tmp_path / "out"), "--instances", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "t0.png: the scores of" in printed.err
    assert "not finite" in printed.err
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CellbenchError, match="not finite"):
        Segmenter.load(exported, device="cpu").predict(image)


@pytest.mark.slow
def test_an_infinite_score_is_no_prediction_though_its_probability_is_finite(small_folder: Path) -> None:
    dataset, run = dataset_of(small_folder), run_of()
    features = features_of(dataset, [run])
    made = trainers_of(dataset, [run], features)[0].model
    assert all(answers[0].finite for _, answers in segment_images([made], features, "test"))

    class Sure(type(made.head)):
        def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
            out = super().forward(maps, pixels_BCHW).clone()
            out[:, 1, 0, 0] = torch.inf
            return out

    made.head.__class__ = Sure
    assert not any(answers[0].finite for _, answers in segment_images([made], features, "test"))


@pytest.mark.slow
def test_a_run_whose_test_scores_are_not_finite_fails_with_that_reason(tmp_path: Path, capsys) -> None:
    for seed, name in enumerate(("a0.png", "a1.png", "a2.png", "a3.png")):
        write_pair(tmp_path / "smears" / "train", name, seed)
    write_pair(tmp_path / "smears" / "test", "t0.png", 9)
    Image.new("RGB", (64, 64)).save(tmp_path / "smears" / "test" / "original" / "black.png")
    Image.new("L", (64, 64)).save(tmp_path / "smears" / "test" / "mask" / "black.png")
    own = parts.head(tmp_path / "mine", "Dark", pixels=True)
    more = "\n\nclass Dark(Sound):\n    def forward(self, maps, pixels_BCHW):\n"
    more += "        return super().forward(maps, pixels_BCHW) / pixels_BCHW.amax((1, 2, 3), True)\n"
    path = own / "heads" / "my_head.py"
    path.write_text(path.read_text() + more)
    grid = 'experiment = "dark"\ndataset = "folder"\n[grid]\nbackbone = ["vit-tiny-random"]\nhead = ["my-head", "bilinear"]\n'
    (tmp_path / "q.toml").write_text(grid + "[run]\ntile_px = 64\nepochs = 1\ncrops_per_image = 2\n")
    assert main(["grid", "q.toml", "--data", "smears", "--registry", "mine", "--device", "cpu"]) == 1
    failed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("failed"))
    assert failed == "failed vit-tiny-random · my-head · seed 0: its scores for the test image 'black.png' are not finite (NaN or infinite)"
    finished = [json.loads(path.read_text())["images"] for path in tmp_path.glob("mlruns/dark/*/artifacts/per_image.json")]
    assert finished == [["black.png", "t0.png"]]  # the other head's
