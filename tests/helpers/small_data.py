"""A drawn set small enough for every test, an experiment on it, and where the real data lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("CELLBENCH_SHARED") or ROOT.parent / "shared" / "data")

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
OWN_VIT = """# A backbone of a user, with weights
builder = "timm-vit"
weights = "https://example.org/own-vit.safetensors"
license = "MIT"
source = "made for this test"
patch_px = 16
dim = 192
depth = 1
prefix_tokens = 1
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[arch]
name = "vit_tiny_patch16_224"
depth = 1
"""
MODEL = "vit-tiny-random · detail · seed 0"


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


def write_set(folder: Path, train: Sequence[str], test: Sequence[str]) -> None:
    """Drawn images of these names, with masks, below ``smears/train`` and ``smears/test``."""
    for part, names, first in (("train", train, 0), ("test", test, 100)):
        for seed, name in enumerate(names, first):
            write_pair(folder / "smears" / part, name, seed)


def finish_grid(folder: Path, file: str, question: str, *flags: str) -> Path:
    """Runs an experiment on ``smears`` below a folder, in a store of the folder."""
    from cellbench.run import main

    (folder / file).write_text(question)
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        assert main(["grid", file, "--data", "smears", *flags]) == 0
    return folder


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Works in a folder with a store and a cache of its own."""
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    patch.setenv("CELLBENCH_CACHE", str(folder / "cache"))
