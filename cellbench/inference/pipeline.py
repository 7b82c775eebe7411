"""The stream from images to masks: images are cut into tiles, tiles of several images share a batch, masks are assembled strip by strip.

Letters: K classes, B tiles of T x T, H x W the framed image.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cellbench.data.io.images import Pixels, to_pixels
from cellbench.data.io.windowed import ArraySource, ImageSource, open_source
from cellbench.data.transforms.tiling import Stitcher, TileGrid, cut_tile
from cellbench.errors import CellbenchError
from cellbench.inference.empty_tiles import EmptyTiles
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.training_features import FAR, NOTHING_KNOWN, Trust
from cellbench.models.baselines.build import FoundClasses
from cellbench.training.tiled_inference import argmax_classes, to_uint8
from cellbench.training.training_features import tile_weights

Image = str | os.PathLike[str] | Pixels
"""A file, an array (H, W, 3) or (H, W) uint8, RGB or grey, or a Pillow image."""

MAX_ENTRIES = 8
"""Places in a batch, as a multiple of its tiles: their predictions are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class MaskStrip:
    """Some rows of a mask, as soon as they are final; the strips of an image come from top to bottom."""

    number: int
    """Of the image, in the order given."""
    top: int
    classes: np.ndarray
    """(h, W) uint8."""
    probability: np.ndarray | None
    """(h, W) uint8, or None."""
    fields: np.ndarray | None
    """(F, h, W) uint8, or None."""
    image: str | os.PathLike[str] | np.ndarray
    """The image's file, or its pixels (H, W, 3) uint8."""
    source: ImageSource
    """Of the image's pixels; closed after its last strip."""
    last: bool
    trust: Trust = NOTHING_KNOWN
    """What is known of the whole image's prediction, with its last strip."""


def join_strips(strips: Sequence[MaskStrip]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The classes, probability and fields of a whole image, as its strips have them."""
    probability = [strip.probability for strip in strips if strip.probability is not None]
    fields = [strip.fields for strip in strips if strip.fields is not None]
    return (
        np.concatenate([strip.classes for strip in strips]),
        np.concatenate(probability) if probability else None,
        np.concatenate(fields, axis=1) if fields else None,
    )


@dataclass(frozen=True, kw_only=True)
class FailedImage:
    """An image that could not be read completely, or whose scores are not finite."""

    number: int
    error: CellbenchError


@dataclass
class TileBatch:
    """Tiles (T, T, 3) uint8 of one size. An entry is a tile's image and its row in the batch, or an image and its error."""

    entries: list[tuple[ImageAssembly, int | CellbenchError]] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)
    found: Tensor | FoundClasses | None = None
    """What ``Segmenter.tiles`` returns for the tiles; or the classes (H, W) of one whole image."""
    features: dict[int, np.ndarray] | None = None
    """The mean features of each tile (``training.training_features.pooled``), where the distance of images is wanted."""

    def finished(self) -> Iterator[MaskStrip | FailedImage]:
        """The strips that these tiles complete."""
        for image, entries in itertools.groupby(self.entries, key=lambda entry: entry[0]):
            yield from image.add([row for _, row in entries], self.found, self.features)


def tile_batches(
    images: Iterable[Image], trained: TrainedRun, precision: torch.dtype, size: int, *, skip_empty: bool = False
) -> Generator[TileBatch, None, None]:
    """The tiles of all images in order, in batches of at most ``size``; errors take the place of the missing tiles.

    ``skip_empty``: a batch holds a tile without structure once, for up to ``MAX_ENTRIES * size`` places.
    """
    batch, empty = TileBatch(), EmptyTiles()
    for number, image in enumerate(images):
        assembly = ImageAssembly(number, image, trained, precision)
        for tile in assembly.tiles():
            if isinstance(tile, CellbenchError):
                batch.entries.append((assembly, tile))
                continue
            row = empty.row(tile, len(batch.tiles)) if skip_empty else len(batch.tiles)
            full = row == size or len(batch.entries) >= MAX_ENTRIES * size
            if full or (batch.tiles and batch.tiles[0].shape != tile.shape):
                yield batch
                batch, empty = TileBatch(), EmptyTiles()
                row = empty.row(tile, 0) if skip_empty else 0
            batch.entries.append((assembly, row))
            if row == len(batch.tiles):
                batch.tiles.append(tile)
    if batch.entries:
        yield batch


def whole_images(images: Iterable[Image], trained: TrainedRun, precision: torch.dtype) -> Generator[TileBatch, None, None]:
    """Each image as a batch without tiles, for a method that takes whole images."""
    for number, image in enumerate(images):
        assembly = ImageAssembly(number, image, trained, precision)
        yield TileBatch(entries=[(assembly, assembly.error or 0)])


class ImageAssembly:
    """Cuts an image into tiles and assembles its mask from their scores."""

    def __init__(self, number: int, image: Image, trained: TrainedRun, precision: torch.dtype) -> None:
        self.number, self._trained, self._precision = number, trained, precision
        self.error: CellbenchError | None = None
        try:
            if isinstance(image, str | os.PathLike):
                self._image: str | os.PathLike[str] | np.ndarray = image
                self.source: ImageSource = open_source(image, trained.preparation.reading)
            else:
                self._image = to_pixels(image)
                self.source = ArraySource(self._image)
        except CellbenchError as error:
            self.error = error
            return
        self.size_px = self.source.size_px
        self._stitcher: Stitcher | None = None
        self._strips: list[Tensor] = []
        self._finite = True
        self._described: dict[int, np.ndarray] = {}
        self._num_described = 0
        self._pixels = np.zeros(256, np.int64)  # by the probability of a cell, before its correction

    def tiles(self) -> Iterator[np.ndarray | CellbenchError]:
        """The tiles of the image's grid (T, T, 3) uint8 in order; an error is the last item."""
        if self.error is not None:
            yield self.error
            return
        preparation = self._trained.preparation
        tile_px = preparation.framing.tile_px([self.size_px])
        self.grid: TileGrid = preparation.framing.grid(self.size_px, tile_px, self._trained.run.overlap)
        try:
            framed = self.source
            if not preparation.is_identity:
                framed = ArraySource(preparation.image(self.whole()))
            for y in self.grid.ys:
                rows = framed.rows(y, y + tile_px[0])
                for x in self.grid.xs:
                    yield cut_tile(rows, 0, x, tile_px)
        except CellbenchError as error:
            yield error

    def whole(self) -> np.ndarray:
        """All pixels (H, W, 3) uint8. Raises CellbenchError."""
        return self.source.rows(0, self.size_px[0])

    def add(
        self, rows: list[int | CellbenchError], found: Tensor | FoundClasses | None, features: dict[int, np.ndarray] | None = None
    ) -> Iterator[MaskStrip | FailedImage]:
        """The strips that the image's next tiles, at ``rows`` of a batch, complete."""
        if isinstance(last := rows[-1], CellbenchError):
            if self.error is None:
                self.source.close()
            yield FailedImage(number=self.number, error=last)
        elif isinstance(found, FoundClasses):
            yield MaskStrip(
                number=self.number,
                top=0,
                classes=found.classes,
                probability=None,
                fields=found.fields,
                image=self._image,
                source=self.source,
                last=True,
            )
            self.source.close()
        elif found is not None:
            mine = [row for row in rows if isinstance(row, int)]
            if features is not None:
                self._describe({depth: means[mine] for depth, means in features.items()})
            yield from self._stitched(found[mine])

    def _describe(self, features: dict[int, np.ndarray]) -> None:
        """Adds the mean features (B, D) of the next tiles, by depth: one sum, however large the image is."""
        if not self._num_described:
            self._weights = tile_weights(self.grid)
        num = len(next(iter(features.values())))
        weights = self._weights[self._num_described : self._num_described + num]
        self._described = {depth: self._described.get(depth, 0) + weights @ means for depth, means in features.items()}
        self._num_described += num

    def _stitched(self, found_BKTT: Tensor) -> Iterator[MaskStrip | FailedImage]:
        framing = self._trained.preparation.framing
        if self._stitcher is None:
            self._stitcher = Stitcher(self.grid, found_BKTT.shape[1], found_BKTT.device)
        for top, strip_KHW in self._stitcher.add(found_BKTT):
            last = top + strip_KHW.shape[1] == self.grid.height_px
            self._finite &= bool(torch.isfinite(strip_KHW).all())
            if not self._finite:
                self._strips = []
                if last:  # not before: a thread may still read its other tiles
                    yield FailedImage(number=self.number, error=self._not_finite())
            elif framing.exact:
                yield self._strip(top, strip_KHW, last)
            else:
                self._strips.append(strip_KHW)  # resizing needs the whole framed image: a strip alone lacks its neighbours
                if last:
                    yield self._strip(0, framing.back(torch.cat(self._strips, 1), self.size_px), last)
            if last:
                self.source.close()

    def _not_finite(self) -> CellbenchError:
        what = self._image if isinstance(self._image, str | os.PathLike) else "an image"
        hint = " Try --precision fp32." if self._precision != torch.float32 else ""
        return CellbenchError(f"{what}: the scores of '{self._trained.name}' are not finite (NaN or infinite), so it has no mask.{hint}")

    def _strip(self, top: int, strip_KHW: Tensor, last: bool) -> MaskStrip:
        num = len(self._trained.classes) - 1
        probability = to_uint8(strip_KHW[:num].sum(0)).cpu().numpy()
        self._pixels += np.bincount(probability.ravel(), minlength=256)
        return MaskStrip(
            number=self.number,
            top=top,
            classes=argmax_classes(strip_KHW[:num]).cpu().numpy(),
            probability=self._trained.calibration.table[probability],
            fields=to_uint8(strip_KHW[num:]).cpu().numpy() if len(strip_KHW) > num else None,
            image=self._image,
            source=self.source,
            last=last,
            trust=self._trust() if last else NOTHING_KNOWN,
        )

    def _trust(self) -> Trust:
        described, calibration = self._trained.training_features, self._trained.calibration
        dice, distance = calibration.estimated_dice(self._pixels), None
        if described is not None:
            distance = described.distance(self._described)
        if distance is not None and distance > FAR:  # the error of the estimate was measured on images like those of the training set
            dice = None
        return Trust(
            distance=distance,
            dice=dice,
            dice_error=None if dice is None else calibration.dice_error,
            descriptor=None if distance is None else self._described,
        )
