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
from cellbench.tiles import Grid, Stitcher

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


def segment(models: Sequence[Model], features: Features, split: str) -> Iterator[tuple[int, list[Segmented]]]:
    """For each image of a split, in order: its number and each model's answer, blended from its tiles."""
    for model in models:
        model.eval()
    sheets: list[_Sheet] = []
    now, missing = -1, 0
    for batch, images in features.tiles(split):
        with torch.inference_mode(), features.trunk.machine.autocast():
            probabilities = [_timed(model, batch) for model in models]
        start = 0
        while start < len(images):
            if images[start] != now:
                now = images[start]
                grid = features.grid(split, now)
                sheets, missing = [_Sheet(grid, model, features.trunk.machine.device) for model in models], len(grid)
            end = min(start + missing, len(images))
            for sheet, found in zip(sheets, probabilities, strict=True):
                sheet.add(found[start:end])
            missing -= end - start
            start = end
            if not missing:
                yield now, [sheet.answer for sheet in sheets]


def _timed(model: Model, batch: Batch) -> Tensor:
    start = time.perf_counter()
    found = foreground(model(batch))
    model.seconds += time.perf_counter() - start
    return found


class _Sheet:
    """One model's answer for one image, growing band by band."""

    def __init__(self, grid: Grid, model: Model, device: torch.device) -> None:
        shape = (grid.height_px, grid.width_px)
        self.answer = Segmented(classes=np.empty(shape, np.uint8), cell=np.empty(shape, np.uint8))
        self._model, self._stitcher = model, Stitcher(grid, model.head.num_classes - 1, device)

    def add(self, found_BKTT: Tensor) -> None:
        start = time.perf_counter()
        for y, band_KHW in self._stitcher.add(found_BKTT):
            rows = slice(y, y + band_KHW.shape[1])
            self.answer.classes[rows] = likeliest(band_KHW).cpu().numpy()
            self.answer.cell[rows] = (band_KHW.sum(0) * 255).round_().clamp_(0, 255).byte().cpu().numpy()
        self._model.seconds += time.perf_counter() - start


def score(models: Sequence[Model], features: Features, split: str) -> Iterator[tuple[int, list[np.ndarray], list[Segmented]]]:
    """For each image of a split: its number, each model's confusion matrix (K, K) and answer."""
    for image, answers in segment(models, features, split):
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
    owned = iter([own for image in range(len(features.pixels[split])) for own in features.grid(split, image).owned()])
    with torch.inference_mode():
        for batch, images in features.tiles(split):
            mine = [next(owned) for _ in images]
            for k, model in enumerate(models):
                with features.trunk.machine.autocast():
                    logits = model(batch)
                watch(k, logits, batch)
                pairs_BTT = batch.target * logits.shape[1] + logits.argmax(1)
                judged = torch.cat([pair[rows, columns].flatten() for pair, (rows, columns) in zip(pairs_BTT, mine, strict=True)])
                counts[k] += torch.bincount(judged, minlength=len(counts[k])).cpu()
    return [c.view(m.head.num_classes, m.head.num_classes).numpy() for c, m in zip(counts, models, strict=True)]
