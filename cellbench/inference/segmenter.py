"""A trained run that segments images: ``Segmenter.load("best").predict("smear.png")``.

Tiles, framing and blending are the test's, so an image gets the mask that it got in the test. Images stream through one after the other, the
tiles of small ones together in one batch; of a large TIFF only some rows are in memory.

Letters: K classes, H x W image (H' x W' framed), B tiles of T x T.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cellbench.config.cards import BackboneCard
from cellbench.config.registry import Registry, load
from cellbench.data.io.intensity import Note
from cellbench.data.io.windowed import ArraySource, ImageSource, open_source
from cellbench.data.transforms.tiling import Stitcher, TileGrid, cut_tile
from cellbench.errors import CellbenchError, one_line
from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware, detect_hardware
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.instances import Instances
from cellbench.metrics.separation import CONNECTED, SeparationParams
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import open_backbone, weights_digest
from cellbench.models.backbones.weight_files import check_types, check_values
from cellbench.parallel import WorkerPool, prefetch
from cellbench.training.model import build_model, num_levels
from cellbench.training.tiled_inference import argmax_classes, output_channels, to_uint8

Image = str | os.PathLike[str] | np.ndarray
"""A file, or (H, W, 3) or (H, W) uint8 pixels, RGB or grey."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was found in one image, at the image's own pixels."""

    classes: np.ndarray
    """(H, W) uint8: the likeliest class of each pixel; 0 is background."""
    probability: np.ndarray | None
    """(H, W) uint8: the probability of not being background, 0..255; None for a method that gives none (a threshold)."""
    names: tuple[str, ...]
    """Of the classes, by their numbers."""
    separation: SeparationParams = CONNECTED
    """How touching cells are parted: as tuned for the run."""
    relief: np.ndarray | None = None
    """(H, W) uint8: how high each pixel lies in its cell, 0..255, for a run that learned it; else None."""
    notes: tuple[Note, ...] = ()
    """What should be known about how the file's numbers were read, such as that some were clipped."""

    @cached_property
    def cells(self) -> Instances:
        """The single cells: ``.num`` of them, ``.ids`` (H, W) int32 with 0 the background, ``.areas_px`` and ``.classes`` (num + 1,)."""
        return self.separation.instances(self.classes, self.relief)

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool: what is not background."""
        return self.classes > 0

    @property
    def share(self) -> float:
        """Of the image's pixels that are not background, 0..1."""
        return float(self.mask.mean())


@dataclass(frozen=True, kw_only=True)
class MaskStrip:
    """Some rows of an answer, as soon as they are final; the bands of an image come from top to bottom."""

    number: int
    """Of the image, in the order given."""
    top: int
    classes: np.ndarray
    """(h, W) uint8."""
    probability: np.ndarray | None
    """(h, W) uint8, or None."""
    relief: np.ndarray | None
    """(h, W) uint8, or None."""
    source: ImageSource
    """Of the image's own pixels; open until its last band was taken."""
    last: bool


@dataclass(frozen=True, kw_only=True)
class FailedImage:
    """An image that could not be read, or not to its end, or whose scores are not finite."""

    number: int
    error: CellbenchError


class Segmenter:
    """A run's backbone and head on a device. Make one with :meth:`load`."""

    def __init__(self, trained: TrainedRun, registry: Registry, here: Hardware, weights: Path | None = None, download: bool = True) -> None:
        self.trained, self.machine, run = trained, here, trained.run
        self.names = trained.classes
        self._function = load(registry.baseline(run.baseline)) if run.baseline and not registry.baseline(run.baseline).trained else None
        backbone = self._backbone(registry.backbone(run.backbone), weights, download) if run.backbone else None
        num = num_levels(run, registry)
        self.trunk = FrozenBackbone(backbone, here, [num] if num else [], run.unfreeze)
        if trained.preparation.framing.whole:
            self.trunk.chunk = 1
        self.model = None
        if self._function is None:
            self.model = build_model(run, registry, self.trunk, len(trained.classes))
            built = {name: x.clone() for name, x in self.model.state_dict().items()}
            where, remedy = (
                f"'{trained.name}': its head.safetensors",
                "It is damaged: put a sound copy there, export it again, or run it again.",
            )
            check_types(trained.weights, built, where, remedy)
            check_values(trained.weights, dict(self.model.named_parameters()).keys(), where, remedy, built=built)
            try:
                self.model.load_state_dict(dict(trained.weights))
            except RuntimeError as error:
                raise CellbenchError(
                    f"'{trained.name}': its weights do not fit its head as it is built here: {one_line(error)[:300]}."
                ) from None
            self.model.eval()

    def _backbone(self, card: BackboneCard, weights: Path | None, download: bool) -> Backbone:
        """The backbone that the run learned on. Raises CellbenchError for another one under the same name: its head would find nonsense in it."""
        wanted = self.trained.backbone_digest
        if wanted and (found := weights_digest(card, weights, download)) != wanted:
            raise CellbenchError(
                f"'{self.trained.name}': the weights of {card.id} here are others ({found[:19]}…) than those that it learned on ({wanted[:19]}…). "
                "Give --weights with the folder that it was trained with."
            )
        return open_backbone(card, weights, download)

    @classmethod
    def load(
        cls,
        run: str | os.PathLike[str],
        *,
        weights: str | os.PathLike[str] | None = None,
        registry: str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> Segmenter:
        """The segmenter of a run in MLflow (a run id, a run's name, ``best``, ``best:EXPERIMENT``) or of an exported folder.

        ``weights``: a folder of backbone weights (default: ``CELLBENCH_WEIGHTS``, the hub's cache, a download); ``registry``: a folder of
        cards of your own; ``device``: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps``; ``precision``: ``auto``, ``fp32``, ``bf16``.
        Raises CellbenchError, in one line, for a run that is none, failed or lost its head, and for weights that cannot be had.
        """
        if weights is None and os.environ.get("CELLBENCH_WEIGHTS"):
            weights = os.environ["CELLBENCH_WEIGHTS"]
        folder = Path(weights) if weights is not None else None
        if folder is not None and not folder.is_dir():
            raise CellbenchError(f"--weights {folder}: there is no such folder.")
        extra = Registry(Path(registry) if registry is not None else None)
        if Path(run).is_dir():
            from cellbench.inference.export import CARDS, read_export

            trained = read_export(Path(run))
            extra, folder = Registry(Path(run) / CARDS), folder or Path(run)
        else:
            from cellbench.inference import run_lookup  # only here MLflow is needed

            tracker, stored, chosen = run_lookup.find_run(str(run))
            trained = run_lookup.open_run(tracker, stored, extra, chosen)
        return cls(trained, extra, detect_hardware(device, precision), folder)

    def predict(self, image: Image) -> Prediction:
        """One image, whole in memory. Raises CellbenchError for a file that cannot be read, or pixels of another shape or type."""
        return next(self.predict_all([image]))

    def predict_all(self, images: Iterable[Image]) -> Iterator[Prediction]:
        """Many images, in their order; faster than one by one where they are small. Raises CellbenchError at the first that cannot be read."""
        rows: list[MaskStrip] = []
        for event in self.stream(images):
            if isinstance(event, FailedImage):
                raise event.error
            rows.append(event)
            if event.last:
                cell = [row.probability for row in rows if row.probability is not None]
                relief = [row.relief for row in rows if row.relief is not None]
                yield Prediction(
                    classes=np.concatenate([row.classes for row in rows]),
                    probability=np.concatenate(cell) if cell else None,
                    names=self.names,
                    separation=self.trained.separation,
                    relief=np.concatenate(relief) if relief else None,
                    notes=event.source.notes,
                )
                rows = []

    def stream(self, images: Iterable[Image]) -> Iterator[MaskStrip | FailedImage]:
        """The answers band by band, image by image in their order; a bad image is :class:`FailedImage` and the others go on."""
        chunks = self._whole(images) if self._function is not None else self._chunks(images)
        with WorkerPool(self.machine.lanes) as lanes:
            # One lane prepares in a thread of its own anyway; for several, reading would wait until the caller asks for the next.
            ready = prefetch(chunks) if lanes.num > 1 else chunks
            with closing(ready), closing(lanes.ahead(ready, lambda chunk: chunk, self._found)) as work:
                for chunk in work:
                    for sheet, entries in itertools.groupby(chunk.entries, key=lambda entry: entry.sheet):
                        yield from sheet.take(list(entries), chunk.found)

    def _whole(self, images: Iterable[Image]) -> Iterator[_Chunk]:
        """Each image alone, for a method that is a function of the whole image."""
        for number, image in enumerate(images):
            sheet = _Sheet(number, self, image)
            yield _Chunk(entries=[_Entry(sheet=sheet, row=0, error=sheet.error)])

    def _chunks(self, images: Iterable[Image]) -> Iterator[_Chunk]:
        """Tiles of one size in batches of the machine's size, those of several images together; what could not be read where it would have come."""
        chunk = _Chunk()
        for number, image in enumerate(images):
            sheet = _Sheet(number, self, image)
            for tile in sheet.tiles():
                if isinstance(tile, CellbenchError):
                    chunk.entries.append(_Entry(sheet=sheet, row=0, error=tile))
                    continue
                if len(chunk.tiles) == self.trunk.chunk or (chunk.tiles and chunk.tiles[0].shape != tile.shape):
                    yield chunk
                    chunk = _Chunk()
                chunk.entries.append(_Entry(sheet=sheet, row=len(chunk.tiles)))
                chunk.tiles.append(tile)
        if chunk.entries:
            yield chunk

    @torch.inference_mode()
    def _found(self, chunk: _Chunk) -> _Chunk:
        """The chunk with what is found in its tiles, as :meth:`tiles` says."""
        if self._function is not None:
            entry = chunk.entries[0]
            if entry.error is None:
                image = entry.sheet.source.rows(0, entry.sheet.size_px[0])
                chunk.found = self._function(image, len(self.names), **self.trained.run.options)
            return chunk
        if chunk.tiles:
            chunk.found = self.tiles(torch.from_numpy(np.stack(chunk.tiles)))
            chunk.tiles = []
        return chunk

    @torch.inference_mode()
    def tiles(self, tiles_BTTC: Tensor) -> Tensor:
        """The probabilities (B, K-1, T, T), float32, of all classes but the background for framed tiles (B, T, T, 3) uint8; then the relief
        (B, 1, T, T) where the run learned one."""
        assert self.model is not None
        sent = tiles_BTTC.to(self.machine.device)
        pixels = sent.permute(0, 3, 1, 2).float().div_(255)
        batch = Batch(self.trunk.maps(pixels), pixels, torch.empty(0))
        start = time.perf_counter()
        with self.machine.autocast():
            logits = self.model.decode(batch)
        self.model.seconds += time.perf_counter() - start
        return output_channels(logits, self.model)


@dataclass
class _Entry:
    """A tile of an image: its row in the chunk; or what went wrong in its stead."""

    sheet: _Sheet
    row: int
    error: CellbenchError | None = None


@dataclass
class _Chunk:
    entries: list[_Entry] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)
    found: Tensor | np.ndarray | None = None
    """What :meth:`Segmenter.tiles` gives, or the (H, W) classes of one image by a method that is a function of it."""


class _Sheet:
    """One image's answer, growing band by band as its tiles come."""

    def __init__(self, number: int, segmenter: Segmenter, image: Image) -> None:
        self.number, self._image, self._segmenter, self._finite = number, image, segmenter, True
        self.error: CellbenchError | None = None
        try:
            self.source = (
                ArraySource(check_pixels(image))
                if isinstance(image, np.ndarray)
                else open_source(image, segmenter.trained.preparation.reading)
            )
        except CellbenchError as error:
            self.error = error
            return
        self.size_px = self.source.size_px
        self._stitcher: Stitcher | None = None
        self._bands: list[Tensor] = []

    def tiles(self) -> Iterator[np.ndarray | CellbenchError]:
        """The tiles of the image's grid (T, T, 3) uint8 in order; an error is the last item."""
        if self.error is not None:
            yield self.error
            return
        preparation = self._segmenter.trained.preparation
        framing, framed = preparation.framing, self.source
        tall, wide = tile_px = framing.tile_px([self.size_px])
        self.grid: TileGrid = framing.grid(self.size_px, tile_px, self._segmenter.trained.run.overlap)
        try:
            if not preparation.nothing:
                framed = ArraySource(preparation.image(self.source.rows(0, self.size_px[0])))
            for y in self.grid.ys:
                rows = framed.rows(y, y + tall)
                for x in self.grid.xs:
                    yield cut_tile(rows, 0, x, (tall, wide))
        except CellbenchError as error:
            yield error

    def take(self, entries: list[_Entry], found: Tensor | np.ndarray | None) -> Iterator[MaskStrip | FailedImage]:
        """The bands that these tiles complete."""
        if (error := entries[-1].error) is not None:
            self._close()
            yield FailedImage(number=self.number, error=error)
        elif isinstance(found, np.ndarray):
            yield MaskStrip(number=self.number, top=0, classes=found, probability=None, relief=None, source=self.source, last=True)
            self._close()
        elif found is not None:
            yield from self._stitched(found[entries[0].row : entries[-1].row + 1])

    def _stitched(self, found_BKTT: Tensor) -> Iterator[MaskStrip]:
        framing = self._segmenter.trained.preparation.framing
        if self._stitcher is None:
            self._stitcher = Stitcher(self.grid, found_BKTT.shape[1], found_BKTT.device)
        for top, band_KHW in self._stitcher.add(found_BKTT):
            last = top + band_KHW.shape[1] == self.grid.height_px
            self._finite &= bool(torch.isfinite(band_KHW).all())
            if not self._finite:
                self._bands = []
                if last:  # not before: its other tiles may still be read at this moment
                    yield FailedImage(number=self.number, error=self._unfinite())
            elif framing.exact:
                yield self._band(top, band_KHW, last)
            else:
                self._bands.append(band_KHW)  # the whole framed image is needed: a band alone would be resized without its neighbours
                if last:
                    yield self._band(0, framing.back(torch.cat(self._bands, 1), self.size_px), last)
            if last:
                self._close()

    def _unfinite(self) -> CellbenchError:
        what = self._image if isinstance(self._image, str | os.PathLike) else "an image"
        hint = " Try --precision fp32." if self._segmenter.machine.precision != torch.float32 else ""
        return CellbenchError(
            f"{what}: the scores of '{self._segmenter.trained.name}' are not finite (NaN or infinite), so they are no answer.{hint}"
        )

    def _band(self, top: int, band_KHW: Tensor, last: bool) -> MaskStrip:
        num = len(self._segmenter.names) - 1
        return MaskStrip(
            number=self.number,
            top=top,
            classes=argmax_classes(band_KHW[:num]).cpu().numpy(),
            probability=to_uint8(band_KHW[:num].sum(0)),
            relief=to_uint8(band_KHW[num]) if len(band_KHW) > num else None,
            source=self.source,
            last=last,
        )

    def _close(self) -> None:
        if self.error is None:
            self.source.close()


def check_pixels(image: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an array that is that, or grey (H, W) uint8. Raises CellbenchError for any other: floats have no known white."""
    if image.dtype != np.uint8 or not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise CellbenchError(
            f"an image here is (H, W, 3) or (H, W) uint8, RGB or grey, not {image.shape} {image.dtype}. Convert it, or give the file's path."
        )
    return np.ascontiguousarray(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))
