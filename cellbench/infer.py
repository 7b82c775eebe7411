"""Whole images through several models at once: tiles decoded by every run, blended, scored. The trunk runs once for all.

Letters: K classes, H x W image, B tiles of T x T.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellbench.features import Batch, Features
from cellbench.metrics import confusion
from cellbench.model import Model
from cellbench.tiles import Stitcher


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """One model's answer for one image."""

    classes: np.ndarray
    """(H, W) uint8: the likeliest class of each pixel."""
    cell: np.ndarray
    """(H, W) uint8: the probability of not being background, 0..255."""


def segment(
    models: Sequence[Model], features: Features, split: str, image: int, watch: Callable[[int, Tensor, Batch], None] | None = None
) -> list[Segmented]:
    """Each model's answer for one image. ``watch`` is shown each model's number, logits and batch as they come."""
    grid, machine = features.grid(split, image), features.trunk.machine
    out = [Segmented(classes=np.empty((grid.height_px, grid.width_px), np.uint8), cell=np.empty((grid.height_px, grid.width_px), np.uint8)) for _ in models]
    stitchers = [Stitcher(grid, model.head.num_classes, machine.device) for model in models]
    with torch.inference_mode():
        for batch in features.tiles(split, image):
            for k, (model, stitcher, answer) in enumerate(zip(models, stitchers, out, strict=True)):
                start = time.perf_counter()
                with machine.autocast():
                    logits = model(batch)
                if watch is not None:
                    watch(k, logits, batch)
                for y, band_KHW in stitcher.add(logits.float().softmax(1)):
                    rows = slice(y, y + band_KHW.shape[1])
                    answer.classes[rows] = band_KHW.argmax(0).byte().cpu().numpy()
                    answer.cell[rows] = ((1 - band_KHW[0]).clamp(0, 1) * 255).round().byte().cpu().numpy()
                model.seconds += time.perf_counter() - start
    return out


def score(
    models: Sequence[Model], features: Features, split: str, watch: Callable[[int, Tensor, Batch], None] | None = None
) -> Iterator[tuple[int, list[np.ndarray], list[Segmented]]]:
    """For each image of a split: its number, each model's confusion matrix (K, K) and answer."""
    for model in models:
        model.eval()
    for image in range(len(features.pixels[split])):
        answers = segment(models, features, split, image, watch)
        truth = features.pixels[split][image][1]
        yield image, [confusion(truth, a.classes, m.head.num_classes) for a, m in zip(answers, models, strict=True)], answers
