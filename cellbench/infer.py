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

Watch = Callable[[int, Tensor, Batch], None]


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """One model's answer for one image."""

    classes: np.ndarray
    """(H, W) uint8: the likeliest class of each pixel."""
    cell: np.ndarray
    """(H, W) uint8: the probability of not being background, 0..255."""


def foreground(logits_BKHW: Tensor) -> Tensor:
    """The probabilities (B, K-1, H, W), float32, of all classes but the background, whose own is what is missing to one."""
    logits = logits_BKHW.float()
    if logits.shape[1] == 2:  # half the exponentials, and half of everything after
        return (logits[:, 1:] - logits[:, :1]).sigmoid_()
    return logits.softmax(1)[:, 1:]


def likeliest(foreground_KHW: Tensor) -> Tensor:
    """The class numbers (H, W) uint8 of blended foreground probabilities (K-1, H, W); a tie goes to the lower number."""
    if len(foreground_KHW) == 1:
        return (foreground_KHW[0] > 0.5).byte()
    return torch.cat([1 - foreground_KHW.sum(0, keepdim=True), foreground_KHW]).argmax(0).byte()


def segment(models: Sequence[Model], features: Features, split: str, image: int) -> list[Segmented]:
    """Each model's answer for one image: its tiles' probabilities blended, then the likeliest class of each pixel."""
    grid, machine = features.grid(split, image), features.trunk.machine
    shape = (grid.height_px, grid.width_px)
    out = [Segmented(classes=np.empty(shape, np.uint8), cell=np.empty(shape, np.uint8)) for _ in models]
    stitchers = [Stitcher(grid, model.head.num_classes - 1, machine.device) for model in models]
    with torch.inference_mode():
        for batch in features.tiles(split, image):
            for model, stitcher, answer in zip(models, stitchers, out, strict=True):
                start = time.perf_counter()
                with machine.autocast():
                    logits = model(batch)
                for y, band_KHW in stitcher.add(foreground(logits)):
                    rows = slice(y, y + band_KHW.shape[1])
                    answer.classes[rows] = likeliest(band_KHW).cpu().numpy()
                    answer.cell[rows] = (band_KHW.sum(0) * 255).round_().clamp_(0, 255).byte().cpu().numpy()
                model.seconds += time.perf_counter() - start
    return out


def score(models: Sequence[Model], features: Features, split: str) -> Iterator[tuple[int, list[np.ndarray], list[Segmented]]]:
    """For each image of a split: its number, each model's confusion matrix (K, K) and answer."""
    for model in models:
        model.eval()
    for image in range(len(features.pixels[split])):
        answers = segment(models, features, split, image)
        truth = features.pixels[split][image][1]
        yield image, [confusion(truth, a.classes, m.head.num_classes) for a, m in zip(answers, models, strict=True)], answers


def tile_counts(models: Sequence[Model], features: Features, split: str, watch: Watch) -> list[np.ndarray]:
    """Each model's confusion matrix (K, K) over all pixels of a split, every pixel judged once, by the tile whose middle is nearest.

    For validation, where nobody looks at a seam: without blending it costs a third of :func:`score`. ``watch`` is shown each model's
    number, logits and batch.
    """
    for model in models:
        model.eval()
    counts = [torch.zeros(model.head.num_classes**2, dtype=torch.long) for model in models]
    with torch.inference_mode():
        for image in range(len(features.pixels[split])):
            grid, done = features.grid(split, image), 0
            owned = list(grid.owned())
            for batch in features.tiles(split, image):
                for k, model in enumerate(models):
                    with features.trunk.machine.autocast():
                        logits = model(batch)
                    watch(k, logits, batch)
                    pairs_BTT = batch.target * logits.shape[1] + logits.argmax(1)
                    mine = torch.cat([pair[rows, columns].flatten() for pair, (rows, columns) in zip(pairs_BTT, owned[done:], strict=False)])
                    counts[k] += torch.bincount(mine, minlength=len(counts[k])).cpu()
                done += batch.num
    return [c.view(m.head.num_classes, m.head.num_classes).numpy() for c, m in zip(counts, models, strict=True)]
