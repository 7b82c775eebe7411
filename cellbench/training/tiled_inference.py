"""Segments whole images with several models at once: each decodes the tiles, blends them and is scored. The backbone runs once for all models.

Scores of framed images are resized to the image before the class is chosen, so the mask is always scored at its own size.

Letters: K classes, H x W image (H' x W' framed), B tiles of T x T.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellbench.data.transforms.tiling import Stitcher
from cellbench.features.extractor import Batch, Features
from cellbench.features.frozen_backbone import Spent
from cellbench.hardware import to_device
from cellbench.metrics.edge_regions import small_edge_regions
from cellbench.metrics.pixel import IGNORE, confusion_matrix
from cellbench.parallel import WorkerPool
from cellbench.training.model import SegmentationModel
from cellbench.training.segmented_image import SegmentedImage
from cellbench.training.test_time import inverse, turn_back, turned_batches

ValidationCallback = Callable[[int, Tensor, Batch], None]
GROUP_BYTES = 2**21
"""Of the predictions for one tile by all models that are joined together, at most: ten of two classes on 224 px. Large GPUs have 512 tiles at once."""


def foreground_probabilities(logits_BKHW: Tensor) -> Tensor:
    """The probabilities (B, K-1, H, W), float32, of all classes except the background. The background has the rest to 1."""
    logits = logits_BKHW.float()
    if logits.shape[1] == 2:  # half the exponentials, and half of everything after
        return (logits[:, 1:] - logits[:, :1]).sigmoid_()
    return logits.softmax(1)[:, 1:]


def output_channels(logits_BCTT: Tensor, model: SegmentationModel, code: int = 0) -> Tensor:
    """The channels of a model's output that are blended: foreground probabilities (B, K-1, T, T), then the fields of its cell target (B, F, T, T).

    Tiles in the pose ``code`` are taken back, and with them the directions of fields. NaN at each pixel with a non-finite score; a softmax
    would turn such a score into a probability of 0 or 1.
    """
    found = foreground_probabilities(logits_BCTT[:, : model.num_classes])
    if model.cell_target is not None:
        fields = model.cell_target.fields(logits_BCTT[:, model.num_classes :])
        found = torch.cat([found, model.cell_target.field_turns.turn_fields(fields, inverse(code))], 1)
    return turn_back(found + mark_non_finite(logits_BCTT), code, model.patch_px)


def mark_non_finite(logits_BCHW: Tensor) -> Tensor:
    """Zeros (B, 1, H, W) float32, with NaN at each pixel with a non-finite score."""
    return (logits_BCHW.float() * 0).sum(1, keepdim=True)


def to_uint8(share_HW: Tensor) -> Tensor:
    """Numbers from 0 to 1 as (H, W) uint8, 0..255."""
    return (share_HW * 255).round_().clamp_(0, 255).byte()


def argmax_classes(foreground_KHW: Tensor) -> Tensor:
    """The class numbers (..., H, W) uint8 of blended foreground probabilities (..., K-1, H, W); a tie goes to the lower number."""
    if foreground_KHW.shape[-3] == 1:
        return (foreground_KHW[..., 0, :, :] > 0.5).byte()
    return torch.cat([1 - foreground_KHW.sum(-3, keepdim=True), foreground_KHW], -3).argmax(-3).byte()


def segment_images(
    models: Sequence[SegmentationModel], features: Features, split: str, *, by_class: bool = False
) -> Generator[tuple[int, list[SegmentedImage]], None, None]:
    """For each image of a split, in order: its number and each model's prediction, blended from its tiles.

    ``by_class``: with the probability of each class.
    """
    with WorkerPool(features.backbone.machine.lanes) as pool:
        stitchers = [_ImageStitcher(group, features, split, by_class=by_class) for group in _groups(models, features, split)]
        codes = tuple(sorted({code for model in models for code in model.tta_codes}))
        done, missing = 0, len(features.grid(split, 0))
        for batch, images in features.tiles(split, pool):
            for code, turned, spent in turned_batches(batch, features.backbone, codes, pool):
                users = [one for one in stitchers if code in one.codes]
                pool.run_all([functools.partial(one.add, turned, images, code, spent) for one in users], [one.seconds for one in users])
            missing -= len(images)
            while missing <= 0 and done < len(features.pixels[split]):
                found = {id(model): answer for one in stitchers for model, answer in one.finished.popleft()}
                yield done, [found[id(model)] for model in models]
                done += 1
                missing += len(features.grid(split, done)) if done < len(features.pixels[split]) else 0


def _groups(models: Sequence[SegmentationModel], features: Features, split: str) -> list[list[SegmentationModel]]:
    """Models whose predictions are joined together, because for a GPU each operation costs the same for one model or ten.

    Where several threads compute, each joins those of one model.
    """
    by_shape: dict[tuple[Any, ...], list[SegmentationModel]] = {}
    for k, model in enumerate(models):
        alone = k if features.backbone.machine.lanes > 1 else -1
        by_shape.setdefault((alone, model.num_classes, model.num_fields, model.tta_codes), []).append(model)
    tall, wide = features.tile_px[split]
    groups = []
    for (_, num_classes, num_fields, _), alike in by_shape.items():
        most = max(1, GROUP_BYTES // (4 * (num_classes - 1 + num_fields) * tall * wide))
        groups += [alike[k : k + most] for k in range(0, len(alike), most)]
    return groups


class _ImageStitcher:
    """Builds the predictions of models of one shape, image by image, from bands that are completed as their tiles arrive. M models."""

    def __init__(self, models: Sequence[SegmentationModel], features: Features, split: str, *, by_class: bool = False) -> None:
        self._models, self._features, self._split, self._by_class = [model.eval() for model in models], features, split, by_class
        self.codes, self._num, self._num_fields = models[0].tta_codes, models[0].num_classes - 1, models[0].num_fields
        self.finished: deque[list[tuple[SegmentationModel, SegmentedImage]]] = deque()
        """The predictions of complete images, in order."""
        self._now = -1
        self._sum_BKTT = torch.empty(0)  # of the poses so far

    @property
    def seconds(self) -> float:
        return sum(model.seconds for model in self._models)

    def add(self, batch: Batch, images: list[int], code: int, spent: Spent) -> None:
        """Adds the next tiles in one of the models' poses, with the image number of each. ``spent``: the time of the pose's maps."""
        with torch.inference_mode():
            found = [self._decoded(model, batch, code, spent) for model in self._models]
            start, start_cpu = time.perf_counter(), time.thread_time()
            found_BKTT = found[0] if len(found) == 1 else torch.cat(found, 1)
            self._sum_BKTT = found_BKTT if code == 0 else self._sum_BKTT + found_BKTT
            for image in dict.fromkeys(images) if code == self.codes[-1] else ():
                if image != self._now:
                    self._begin(image)
                mine = [k for k, other in enumerate(images) if other == image]
                self._draw(self._sum_BKTT[mine[0] : mine[-1] + 1])
                if not self._missing:
                    self.finished.append(self._answers())
        for model in self._models:
            model.seconds += (time.perf_counter() - start) / len(self._models)
            model.cpu_seconds += (time.thread_time() - start_cpu) / len(self._models)

    def _decoded(self, model: SegmentationModel, batch: Batch, code: int, spent: Spent) -> Tensor:
        start, start_cpu = time.perf_counter(), time.thread_time()
        with self._features.backbone.machine.autocast():
            logits_BKTT = model.decode(batch)
        found_BKTT = output_channels(logits_BKTT, model, code) / len(self.codes)
        model.seconds += time.perf_counter() - start + spent.wall_s
        model.cpu_seconds += time.thread_time() - start_cpu + spent.cpu_s
        return found_BKTT

    def _begin(self, image: int) -> None:
        self._grid, self._size_px = self._features.grid(self._split, image), self._features.pixels[self._split].sizes_px[image]
        self._now, self._missing = image, len(self._grid)
        device, num_models = self._features.backbone.machine.device, len(self._models)
        # On the device until the image is complete: one copy per image.
        channels = 2 + self._num_fields + (self._num if self._by_class else 0)
        self._maps_MKHW = torch.empty(num_models, channels, *self._size_px, dtype=torch.uint8, device=device)
        self._finite_M = torch.ones(num_models, dtype=torch.bool, device=device)
        self._stitcher = Stitcher(self._grid, num_models * (self._num + self._num_fields), device)
        self._bands: list[Tensor] = []

    def _draw(self, found_BKTT: Tensor) -> None:
        self._missing -= len(found_BKTT)
        for y, band_KHW in self._stitcher.add(found_BKTT):
            if self._features.framing.exact:
                self._write(y, band_KHW)
                continue
            self._bands.append(band_KHW)  # resizing a band alone would ignore its neighbours
            if y + band_KHW.shape[1] == self._grid.height_px:
                self._write(0, self._features.framing.back(torch.cat(self._bands, 1), self._size_px))
                self._bands = []

    def _write(self, y: int, band_KHW: Tensor) -> None:
        rows = slice(y, y + band_KHW.shape[1])
        band_MKHW = band_KHW.unflatten(0, (len(self._models), -1))
        foreground, maps = band_MKHW[:, : self._num], self._maps_MKHW
        self._finite_M &= torch.isfinite(band_MKHW).flatten(1).all(1)
        maps[:, 0, rows] = argmax_classes(foreground)
        maps[:, 1, rows] = to_uint8(foreground.sum(1))
        rest = band_MKHW[:, self._num :] if not self._by_class else torch.cat([band_MKHW[:, self._num :], foreground], 1)
        if rest.shape[1]:
            maps[:, 2:, rows] = to_uint8(rest)

    def _answers(self) -> list[tuple[SegmentationModel, SegmentedImage]]:
        maps_MKHW, finite_M, out = self._maps_MKHW.cpu().numpy(), self._finite_M.tolist(), []
        for model, maps, finite in zip(self._models, maps_MKHW, finite_M, strict=True):
            fields, foreground = maps[2 : 2 + self._num_fields], maps[2 + self._num_fields :]
            if model.edge_share:
                dropped = small_edge_regions(maps[0], model.edge_share)
                maps[:2, dropped], foreground[:, dropped] = 0, 0
            answer = SegmentedImage(
                classes=maps[0],
                cell=maps[1],
                fields=fields if self._num_fields else None,
                foreground=foreground if self._by_class else None,
                finite=finite,
            )
            out.append((model, answer))
        return out


def score_tiles(
    models: Sequence[SegmentationModel], features: Features, split: str, watch: ValidationCallback, pool: WorkerPool
) -> list[np.ndarray]:
    """Each model's confusion matrix (K, K) over all pixels of a split. Each pixel is scored once, from the tile with the nearest centre.

    For validation, where seams do not matter: without blending it costs a third of :func:`segment_images`. If the framing changes the
    image size, scores are joined without blending and resized to the image, so that framings can be compared. ``watch`` is called
    with each model's number, logits and batch, in a thread of the ``pool``.
    """
    kind = _TileScorer if features.framing.exact else _FramedTileScorer
    scorers = [kind(model.eval(), features, split, functools.partial(watch, k)) for k, model in enumerate(models)]
    places = (
        _TilePlace(image, y, x, *own)
        for image in range(len(features.pixels[split]))
        for grid in [features.grid(split, image)]
        for (y, x), own in zip(grid, grid.owned(), strict=True)
    )
    for batch, images in features.tiles(split, pool):
        mine = [next(places) for _ in images]
        own_BTT = _scored_pixels(batch, mine)
        pool.run_all([functools.partial(scorer.add, batch, mine, own_BTT) for scorer in scorers], [model.seconds for model in models])
    return [scorer.counts.cpu().numpy() for scorer in scorers]


class _TilePlace(NamedTuple):
    """The position of a tile, and the rows and columns that are scored from it."""

    image: int
    y: int
    x: int
    rows: slice
    columns: slice


def _scored_pixels(batch: Batch, places: Sequence[_TilePlace]) -> Tensor:
    """Which pixels (B, T, T) of a batch are scored, on its device."""
    ends = [(place.rows.start, place.rows.stop, place.columns.start, place.columns.stop) for place in places]
    top, bottom, left, right = to_device(torch.tensor(ends), batch.target.device)[..., None].unbind(1)
    y, x = (torch.arange(side, device=batch.target.device) for side in batch.target.shape[1:])
    own_BTT = ((y >= top) & (y < bottom)).unsqueeze(2) & ((x >= left) & (x < right)).unsqueeze(1)
    return own_BTT & (batch.target != IGNORE) if batch.ignoring else own_BTT


class _TileScorer:
    """Adds up one model's confusion matrix tile by tile, at the pixels of the tiles."""

    def __init__(self, model: SegmentationModel, features: Features, split: str, watch: Callable[[Tensor, Batch], None]) -> None:
        self._model, self._features, self._split, self._watch = model, features, split, watch
        num = model.num_classes
        self.counts = torch.zeros(num, num, dtype=torch.int64, device=features.backbone.machine.device)
        """On the device, to avoid waiting for the GPU after each batch."""

    def add(self, batch: Batch, places: Sequence[_TilePlace], own_BTT: Tensor) -> None:
        """Scores the pixels ``own_BTT`` of a batch whose tiles lie at ``places``."""
        start = time.perf_counter()
        with torch.inference_mode():
            with self._features.backbone.machine.autocast():
                logits = self._model.decode(batch)
            self._watch(logits, batch)
            self._score(logits[:, : len(self.counts)], batch, places, own_BTT)
        self._model.seconds += time.perf_counter() - start

    def _score(self, logits_BKTT: Tensor, batch: Batch, places: Sequence[_TilePlace], own_BTT: Tensor) -> None:
        self.counts += masked_confusion(logits_BKTT, batch.target, own_BTT)


class _FramedTileScorer(_TileScorer):
    """The same for framings that change the image size: scores are joined first, then resized to the image."""

    _left = 0

    def _score(self, logits_BKTT: Tensor, batch: Batch, places: Sequence[_TilePlace], own_BTT: Tensor) -> None:
        found_BKTT = foreground_probabilities(logits_BKTT)
        for found_KTT, place in zip(found_BKTT, places, strict=True):
            if not self._left:
                grid = self._features.grid(self._split, place.image)
                self._left = len(grid)
                self._canvas_KHW = found_KTT.new_empty(len(found_KTT), grid.height_px, grid.width_px)
            down, right = (slice(at + own.start, at + own.stop) for at, own in ((place.y, place.rows), (place.x, place.columns)))
            self._canvas_KHW[:, down, right] = found_KTT[:, place.rows, place.columns]
            self._left -= 1
            if not self._left:
                truth = self._features.pixels[self._split][place.image][1]
                classes = argmax_classes(self._features.framing.back(self._canvas_KHW, truth.shape)).cpu().numpy()
                self.counts += torch.from_numpy(confusion_matrix(truth, classes, len(self.counts))).to(self.counts.device)


def masked_confusion(logits_BKHW: Tensor, target_BHW: Tensor, where_BHW: Tensor) -> Tensor:
    """The confusion matrix (K, K) int64 of the most probable classes over the pixels ``where_BHW``, on their device; a tie goes to the lower number."""
    num = logits_BKHW.shape[1]
    if num == 2:  # sums of bytes, a quarter of the cost of counting pairs of numbers
        found, true = (logits_BKHW[:, 1] > logits_BKHW[:, 0]) & where_BHW, (target_BHW == 1) & where_BHW
        both, positive, cell, pixels = (x.sum() for x in (found & true, found, true, where_BHW))
        return torch.stack([pixels - positive - cell + both, positive - both, cell - both, both]).view(2, 2)
    pairs = (target_BHW * num + logits_BKHW.argmax(1))[where_BHW]
    return torch.bincount(pairs, minlength=num * num).view(num, num)
