"""What all tests share: a folder, a cache and an MLflow store of their own, one thread, the real data where it lies, a small drawn set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from cellbench.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CELLBENCH_SHARED") or ROOT.parent / "shared" / "data")
MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")
SETTINGS = ("CELLBENCH_CACHE_URL", "CELLBENCH_WEIGHTS", "CELLBENCH_MAX_PIXELS", *MLFLOW)


LONGEST = (
    *("on_ray", "notebook", "workers", "grid", "check", "golden", "away", "shards", "bench", "contracts", "search", "fit", "folds", "export"),
    *("planted", "predict", "lanes", "randomness", "weight_values", "checkpoints", "masks", "report", "commands", "crops", "intensity"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: begun last, one of them keeps a single core busy for two minutes."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors, and a machine that others use too: beside a busy process test_heads.py took 87 s with two threads, 17 s with one."""
    import torch

    from cellbench.training import cost_estimate

    torch.set_num_threads(1)
    cost_estimate.MEASURED_S = 0.0  # what is timed here need not be exact: a second for each cohort would be minutes


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the repository, the home folder or another test's store, and no setting of the caller's shell reaches one."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CELLBENCH_CACHE", str(caches / tmp_path.name))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shared() -> Path:
    """The folder of real data: ``bccd/``, ``wbc/``, ``dsb2018/`` and ``weights/``."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at {SHARED}; CELLBENCH_SHARED may name it")
    return SHARED


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Tracker]:
    """For all tests of a module a store of its own, in it the experiment that the module names as ``EXPERIMENT``."""
    import mlflow

    from cellbench.tracking.tracker import Tracker

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("tracker")
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        yield Tracker(request.module.EXPERIMENT)
    mlflow.set_tracking_uri(None)


def discs(seed: int, height_px: int = 120, width_px: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 of dark discs on a pale ground, and its mask (H, W) uint8 of 0 and 255."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height_px, :width_px]
    cell = np.zeros((height_px, width_px), bool)
    for _ in range(7):
        y, x, radius = rng.uniform(0, height_px), rng.uniform(0, width_px), rng.uniform(9, 20)
        cell |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    image = np.where(cell[..., None], (170, 90, 130), (225, 215, 220)) + rng.normal(0, 5, (height_px, width_px, 3))
    return image.clip(0, 255).astype(np.uint8), np.where(cell, 255, 0).astype(np.uint8)


def write_pair(folder: Path, name: str, seed: int, image: str = "original", mask: str = "mask", **size_px: int) -> None:
    """``original/NAME`` and its RGB mask ``mask/STEM.png`` below ``folder``; JPEG where the name says so."""
    pixels, labels = discs(seed, **size_px)
    for inner in (image, mask):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / image / name, quality=95)
    Image.fromarray(np.repeat(labels[..., None], 3, axis=2)).save(folder / mask / f"{Path(name).stem}.png")


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """Drawn images in BCCD's layout: 6 to train and 2 to test, 160 x 120 px, PNG and JPEG originals mixed, RGB masks."""
    folder = tmp_path / "smears"
    for seed, name in enumerate(("a0.png", "a1.jpg", "b 2.png", "b3.jpeg", "zelle-ä.png", "c5.JPG")):
        write_pair(folder / "train", name, seed)
    for seed, name in enumerate(("t0.png", "t1.jpg"), 100):
        write_pair(folder / "test", name, seed)
    return folder


QUESTION = """# A small question
experiment = "small"
dataset    = "folder"
baselines  = ["otsu"]
[grid]
backbone = ["vit-tiny-random"]
head     = ["detail"]
[run]
tile_px = 64
epochs  = 2
crops_per_image = 8
lr = 5e-3
normalise = "reinhard"
"""
MODEL = "vit-tiny-random · detail · seed 0"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished grid, made once for all who use a run; they may add to its store, and put back what they break."""
    folder = tmp_path_factory.mktemp("trained")
    for seed, name in enumerate(("a0.png", "a1.jpg", "b 2.png", "b3.jpeg")):
        write_pair(folder / "smears" / "train", name, seed)
    for seed, name in enumerate(("t0.png", "t1.jpg"), 100):
        write_pair(folder / "smears" / "test", name, seed)
    (folder / "small.toml").write_text(QUESTION)
    from cellbench.run import main

    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        assert main(["grid", "small.toml", "--data", "smears", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(trained, monkeypatch)
    return trained


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Works in a folder with a store and a cache of its own."""
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    patch.setenv("CELLBENCH_CACHE", str(folder / "cache"))
