"""Whole images through several models at once: tiles decoded by every run, blended, scored. The trunk runs once for all.

Scores of framed images are brought to the images' own pixels before a class is chosen: what is judged is always the mask as it is.

Letters: K classes, H x W image (H' x W' framed), B tiles of T x T.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellbench.features import Batch, Features
from cellbench.framing import Framing
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
                grid, size_px = features.grid(split, now), features.pixels[split].sizes_px[now]
                sheets, missing = [_Sheet(grid, features.framing, size_px, model, features.trunk.machine.device) for model in models], len(grid)
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
    """One model's answer for one image of ``size_px``, growing band by band."""

    def __init__(self, grid: Grid, framing: Framing, size_px: tuple[int, int], model: Model, device: torch.device) -> None:
        self.answer = Segmented(classes=np.empty(size_px, np.uint8), cell=np.empty(size_px, np.uint8))
        self._grid, self._framing, self._size_px = grid, framing, size_px
        self._model, self._stitcher = model, Stitcher(grid, model.head.num_classes - 1, device)
        self._bands: list[Tensor] = []

    def add(self, found_BKTT: Tensor) -> None:
        start = time.perf_counter()
        for y, band_KHW in self._stitcher.add(found_BKTT):
            if self._framing.exact:
                self._write(y, band_KHW)
                continue
            self._bands.append(band_KHW)  # the whole framed image is needed: a band alone would be resized without its neighbours
            if y + band_KHW.shape[1] == self._grid.height_px:
                self._write(0, self._framing.back(torch.cat(self._bands, 1), self._size_px))
                self._bands = []
        self._model.seconds += time.perf_counter() - start

    def _write(self, y: int, band_KHW: Tensor) -> None:
        rows = slice(y, y + band_KHW.shape[1])
        self.answer.classes[rows] = likeliest(band_KHW).cpu().numpy()
        self.answer.cell[rows] = (band_KHW.sum(0) * 255).round_().clamp_(0, 255).byte().cpu().numpy()


def score(models: Sequence[Model], features: Features, split: str) -> Iterator[tuple[int, list[np.ndarray], list[Segmented]]]:
    """For each image of a split: its number, each model's confusion matrix (K, K) and answer."""
    for image, answers in segment(models, features, split):
        truth = features.pixels[split][image][1]
        yield image, [confusion(truth, a.classes, m.head.num_classes) for a, m in zip(answers, models, strict=True)], answers


def tile_counts(models: Sequence[Model], features: Features, split: str, watch: Watch) -> list[np.ndarray]:
    """Each model's confusion matrix (K, K) over all pixels of a split, every pixel judged once, by the tile whose middle is nearest.

    For validation, where nobody looks at a seam: without blending it costs a third of :func:`score`. Where framed pixels are not the
    image's own, its scores are put together, unblended, and judged at its own pixels, so that framings can be compared. ``watch`` is
    shown each model's number, logits and batch.
    """
    for model in models:
        model.eval()
    if not features.framing.exact:
        return _framed_counts(models, features, split, watch)
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


def _framed_counts(models: Sequence[Model], features: Features, split: str, watch: Watch) -> list[np.ndarray]:
    counts = [np.zeros((model.head.num_classes,) * 2, np.int64) for model in models]
    sheets: list[Tensor] = []
    left = 0
    corners = ((image, *place) for image in range(len(features.pixels[split])) for place in _places(features.grid(split, image)))
    with torch.inference_mode():
        for batch, images in features.tiles(split):
            mine = [next(corners) for _ in images]
            found = []
            for k, model in enumerate(models):
                with features.trunk.machine.autocast():
                    logits = model(batch)
                watch(k, logits, batch)
                found.append(foreground(logits))
            for row, (image, (y, x), own) in enumerate(mine):
                if not left:
                    grid = features.grid(split, image)
                    left = len(grid)
                    sheets = [f.new_empty(f.shape[1], grid.height_px, grid.width_px) for f in found]
                for sheet_KHW, found_BKTT in zip(sheets, found, strict=True):
                    sheet_KHW[:, y + own[0].start : y + own[0].stop, x + own[1].start : x + own[1].stop] = found_BKTT[row][:, *own]
                left -= 1
                if not left:
                    truth = features.pixels[split][image][1]
                    for k, sheet_KHW in enumerate(sheets):
                        classes = likeliest(features.framing.back(sheet_KHW, truth.shape)).cpu().numpy()
                        counts[k] += confusion(truth, classes, models[k].head.num_classes)
    return counts


def _places(grid: Grid) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    return zip(grid, grid.owned(), strict=True)
