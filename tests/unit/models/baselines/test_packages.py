"""Baselines that other packages run: by recorded outputs in the suite, and by the packages' own networks where these are installed.

The networks have small random weights: no published weights were used.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError, WeightsUnavailable
from cellbench.metrics.separation import NUMBERS, SeparationParams
from cellbench.models.baselines import package_weights
from cellbench.models.baselines.build import FoundClasses, baseline_weights_digest, model_digest, of_numbers, open_baseline

NAMES = ("cellpose", "stardist", "instanseg")
IMAGE = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)


def recorded() -> np.ndarray:
    """Cell numbers as the packages give them: two that touch, and one with a number above two bytes."""
    ids = np.zeros((40, 50), np.int64)
    ids[4:20, 4:20], ids[4:20, 20:36], ids[25:38, 10:30] = 1, 300, 70_000
    return ids


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_weights, "_KEPT", {})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Modules in place of the packages, with the calls they get."""
    made: list[tuple[str, dict[str, Any]]] = []

    def module(name: str, **content: object) -> None:
        one = ModuleType(name)
        vars(one).update(content)
        monkeypatch.setitem(sys.modules, name, one)

    class CellposeModel:
        def __init__(self, **given: Any) -> None:
            made.append(("cellpose", given))

        def eval(self, image: np.ndarray, **given: Any) -> tuple[np.ndarray, list[Any], np.ndarray]:
            made.append(("eval", given))
            return recorded().astype(np.uint16 if recorded().max() < 65536 else np.int32), [], np.zeros(256)

    models = SimpleNamespace(MODEL_NAMES=["cyto3", "nuclei"], CellposeModel=CellposeModel)
    module("cellpose", models=models)
    module("cellpose.models", **vars(models))

    class StarDist2D:
        config = SimpleNamespace(n_channel_in=3)

        @classmethod
        def from_pretrained(cls, name: str) -> StarDist2D:
            made.append(("stardist", {"name": name}))
            return cls()

        def predict_instances(self, image: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
            made.append(("predict_instances", {"shape": image.shape, "range": (image.min(), image.max())}))
            return recorded().astype(np.int32), {}

    module("stardist", models=SimpleNamespace(StarDist2D=StarDist2D))
    module("stardist.models", StarDist2D=StarDist2D)
    module("csbdeep")
    module("csbdeep.utils", normalize=lambda image, low, high: (image - np.percentile(image, low)) / np.ptp(image))

    class InstanSeg:
        def __init__(self, model: object, **given: Any) -> None:
            made.append(("instanseg", {"model": model, **given}))

        def eval_small_image(self, image: torch.Tensor, **given: Any) -> torch.Tensor:
            made.append(("eval_small_image", {"shape": tuple(image.shape), **given}))
            return torch.from_numpy(recorded()).float()[None, None]

    module("instanseg", InstanSeg=InstanSeg)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.1.1")
    return made


def found_by(name: str, **options: object) -> FoundClasses:
    card = Registry().baseline(name)
    return open_baseline(card, Registry(), None)(IMAGE, 2, **{**card.options, **options})


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_those_that_the_package_numbers(name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    found = found_by(name)
    assert np.array_equal(found.classes, recorded() > 0)
    cells = SeparationParams(method=NUMBERS, min_area_px=10).instances(found.classes, found.fields)
    expected = np.unique(recorded(), return_inverse=True)[1].reshape(recorded().shape)
    assert np.array_equal(cells.ids, expected)  # touching cells stay apart
    assert cells.areas_px[1:].tolist() == [256, 256, 260]
    found_by(name)
    assert [kind for kind, _ in calls].count(name) == 1  # loaded once


def test_packages_are_called_as_they_are_documented(calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    found_by("cellpose", diameter=40.0)
    found_by("stardist")
    found_by("instanseg", um_per_px=0.25)
    made = dict(calls)
    assert made["cellpose"]["model_type"] == "cyto3"
    assert made["eval"] == {"diameter": 40.0, "channels": [0, 0]}
    assert made["predict_instances"]["shape"] == (40, 50, 3)
    assert made["eval_small_image"] == {"shape": (3, 40, 50), "pixel_size": 0.25, "target": "nuclei", "return_image_tensor": False}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.2.1")
    package_weights._KEPT.clear()
    calls.clear()
    found_by("cellpose")
    assert dict(calls)["eval"] == {"diameter": None}  # version 4 reads three channels
    assert dict(calls)["cellpose"]["pretrained_model"] == "cyto3"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_a_reason_to_skip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(WeightsUnavailable, match=rf"not installed: pip install 'cellbench\[{name}\]'"):
        baseline_weights_digest(Registry().baseline(name), Registry(), None)


def test_weights_that_cannot_be_had_and_unknown_names_are_reasons_too(
    calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(**given: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(sys.modules["cellpose"].models, "CellposeModel", offline)
    with pytest.raises(WeightsUnavailable, match=r"no weights 'nuclei' here .*no network.*\[baseline.cellpose\] model = \"PATH\""):
        found_by("cellpose", model="nuclei")
    with pytest.raises(WeightsUnavailable, match=r"model = 'cyto33' is no file, and no model of cellpose \(cyto3, nuclei\)"):
        found_by("cellpose", model="cyto33")
    with pytest.raises(CellbenchError, match="the data has 2 kinds"):
        open_baseline(Registry().baseline("cellpose"), Registry(), None)(IMAGE, 3)


def test_another_content_of_the_same_file_is_another_model(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "weights.h5").write_bytes(b"1")
    first = model_digest({"model": str(tmp_path / "net")})
    assert first == model_digest({"model": str(tmp_path / "net")}) != ""
    (tmp_path / "net" / "weights.h5").write_bytes(b"2")
    assert model_digest({"model": str(tmp_path / "net")}) != first
    assert model_digest({"model": "cyto3"}) == model_digest({"model": ""}) == ""


def test_numbers_survive_as_bytes() -> None:
    found = of_numbers(recorded())
    assert found.fields is not None
    assert np.array_equal(found.fields.astype(int)[0] + 256 * found.fields.astype(int)[1] + 65536 * found.fields.astype(int)[2], recorded())


# --- the packages' own networks, where they are installed -------------------------------------------------------------------------------


def sensible(ids: np.ndarray, image: np.ndarray) -> None:
    assert ids.shape == image.shape[:2]
    assert ids.dtype == np.int32
    assert ids.min() >= 0


def test_a_network_of_cellpose_3(tmp_path: Path) -> None:
    pytest.importorskip("cellpose")
    if not importlib.metadata.version("cellpose").startswith("3."):
        pytest.skip("cellpose 4 has no small network")
    from cellpose.resnet_torch import CPnet

    from cellbench.models.baselines.cellpose import cellpose

    torch.manual_seed(0)
    CPnet([2, 32, 64, 128, 256], 3, sz=3).save_model(str(tmp_path / "random"))
    sensible(cellpose(IMAGE, 2, model=str(tmp_path / "random"), diameter=30.0), IMAGE)


def test_a_network_of_stardist(tmp_path: Path) -> None:
    pytest.importorskip("stardist")
    from stardist.models import Config2D, StarDist2D

    from cellbench.models.baselines.stardist import stardist

    config = Config2D(n_rays=8, n_channel_in=3, unet_n_depth=1, unet_n_filter_base=8, net_conv_after_unet=8, grid=(2, 2))
    net = StarDist2D(config, name="random", basedir=str(tmp_path))
    net.keras_model.save_weights(str(tmp_path / "random" / "weights_best.weights.h5"))
    sensible(stardist(IMAGE, 2, model=str(tmp_path / "random")), IMAGE)


def test_a_network_of_instanseg(tmp_path: Path) -> None:
    pytest.importorskip("instanseg")
    from instanseg.utils.loss.instanseg_loss import InstanSeg, InstanSeg_Torchscript
    from instanseg.utils.models.InstanSeg_UNet import InstanSeg_UNet

    from cellbench.models.baselines.instanseg import instanseg

    torch.manual_seed(0)
    net = InstanSeg_UNet(in_channels=3, out_channels=[[2, 2, 1]], layers=[32, 16, 8])
    net = InstanSeg(n_sigma=2, device="cpu").initialize_pixel_classifier(net)
    torch.jit.script(InstanSeg_Torchscript(net, pixel_size=0.5)).save(str(tmp_path / "random.pt"))
    image = np.random.default_rng(1).integers(0, 255, (256, 256, 3), np.uint8)
    sensible(instanseg(image, 2, model=str(tmp_path / "random.pt"), target="nuclei", um_per_px=0.0), image)
