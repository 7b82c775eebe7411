"""A trained run that segments images: ``Segmenter.load("best").predict("smear.png")``.

Tiles, framing and blending are those of testing, so an image gets the same mask as in the test. Images are processed as a stream, the tiles of
small ones in a common batch; of a large TIFF only some rows are in memory.

Letters: K classes, H x W pixels of an image, B tiles of T x T.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellbench import startup
from cellbench.config.cards import BackboneCard
from cellbench.config.registry import Registry
from cellbench.config.trust import require_trust
from cellbench.data.io.images import jpeg_bytes, read_image, read_pixel_size
from cellbench.data.io.intensity import IntensityScaling, Note
from cellbench.data.io.overlay import draw_instances
from cellbench.errors import CellbenchError, one_line
from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.tile_cutting import as_pixels
from cellbench.hardware import Hardware, detect_hardware, to_device
from cellbench.inference.pipeline import FailedImage, Image, MaskStrip, TileBatch, join_strips, tile_batches, whole_images
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.edge_regions import small_edge_regions
from cellbench.metrics.instances import Instances
from cellbench.metrics.measurements import measure_cells
from cellbench.metrics.separation import CONNECTED, SeparationParams
from cellbench.metrics.training_features import NOTHING_KNOWN, Trust
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import open_backbone, weights_digest
from cellbench.models.backbones.weight_files import check_types, check_values
from cellbench.models.baselines.build import open_baseline
from cellbench.parallel import WorkerPool, prefetch
from cellbench.training.model import build_model, num_levels
from cellbench.training.test_time import turn
from cellbench.training.tiled_inference import output_channels
from cellbench.training.training_features import pooled

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Prediction:
    """What a run found in one image of H x W pixels, at the image's own pixels, row 0 at the top."""

    classes: np.ndarray
    """(H, W) uint8: the most probable class of each pixel; 0 is background."""
    probability: np.ndarray | None
    """(H, W) uint8: the probability of not being background, as 0..255; None for a method without probabilities (a threshold)."""
    class_names: tuple[str, ...]
    """By class number, the background first."""
    separation: SeparationParams = CONNECTED
    """How touching cells are separated, as tuned for the run."""
    fields: np.ndarray | None = None
    """(F, H, W) uint8, 0..255: what the run predicts to find cells, such as the depth of each pixel in its cell; None where it learned the classes alone."""
    notes: tuple[Note, ...] = ()
    """Remarks on how the file's values were read, such as that some were clipped."""
    source: str | os.PathLike[str] | np.ndarray
    """The file, or the pixels (H, W, 3) uint8."""
    reading: IntensityScaling
    """How the file's values are read as 0..255."""

    trust: Trust = NOTHING_KNOWN
    """What is known of the prediction without its truth."""

    @property
    def distance(self) -> float | None:
        """How far the image looks from the training images: up to 1 is usual for their set, above 2 it is unlike them; None if unknown."""
        return self.trust.distance

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool: True where it is not background."""
        return self.classes > 0

    @property
    def share(self) -> float:
        """The share of pixels that are not background, 0..1."""
        return float(self.mask.mean())

    @cached_property
    def cells(self) -> Instances:
        """The single cells with their areas and classes, touching ones separated."""
        return self.separation.instances(self.classes, self.fields, self.probability)

    @property
    def num_cells(self) -> int:
        """Number of single cells."""
        return self.cells.num

    @property
    def instances(self) -> np.ndarray:
        """(H, W) int32: the number of each pixel's cell, 1 to :attr:`num_cells`; 0 is background. Regions too small to be cells are left out."""
        return self.cells.ids

    @cached_property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8: the image's pixels as the run saw them. Raises CellbenchError where the file has gone."""
        return self.source if isinstance(self.source, np.ndarray) else read_image(self.source, self.reading)

    def table(self, um_per_px: float | None = None) -> pd.DataFrame:
        """One row a cell, as ``cellbench predict --instances`` writes it.

        Args:
            um_per_px: side of a pixel in micrometres; by default as stated in the file. If it is not known, lengths and areas are in pixels.

        Returns:
            Columns ``cell`` (its number in :attr:`instances`), ``class`` (name), ``x_px`` and ``y_px`` (centroid, from the upper left),
            ``area_px`` or ``area_um2``, ``diameter_px`` or ``diameter_um`` (of a disc of the same area), ``eccentricity`` (0: a disc, towards
            1: a line), ``at_edge`` (whether the image's frame may cut the cell), ``red``, ``green`` and ``blue`` (mean colour, 0..255), and
            for each class that is a part of others, such as a nucleus, its area in the cell.

        """
        import pandas as pd  # a fifth of a second, for tables alone

        if um_per_px is None and not isinstance(self.source, np.ndarray) and (stated := read_pixel_size(self.source)) is not None:
            um_per_px = round(stated.side_um, 6)
        made = measure_cells(self.cells, self.image, self.class_names, um_per_px, self.classes, self.separation.owners)
        return pd.DataFrame([list(row) for row in made.rows], columns=list(made.columns)).astype({"at_edge": bool})

    def overlay(self) -> np.ndarray:
        """(h, w, 3) uint8: the image, each cell in its own colour with its number in :attr:`instances`; a small image is drawn larger."""
        return draw_instances(self.image, self.cells.ids, self.cells.num)

    def __repr__(self) -> str:
        height, width = self.classes.shape
        return f"<Prediction of {width} x {height} px: {', '.join(self.class_names)}; {self.share:.0%} not background>"

    def _repr_jpeg_(self) -> bytes:
        return jpeg_bytes(self.overlay())


class Segmenter:
    """A trained run, ready to segment images. Make one with :meth:`load`.

    >>> segmenter = cellbench.Segmenter.load("best")  # doctest: +SKIP
    >>> found = segmenter.predict("smear.png")  # doctest: +SKIP
    >>> found.num_cells, found.table()["area_px"].median()  # doctest: +SKIP
    (41, 7650.0)
    """

    def __init__(
        self,
        trained: TrainedRun,
        registry: Registry,
        here: Hardware,
        weights: Path | None = None,
        download: bool = True,
        *,
        skip_empty: bool = False,
    ) -> None:
        self.trained, self.machine, self.skip_empty, run = trained, here, skip_empty, trained.run
        self.class_names = trained.classes
        baseline = registry.baseline(run.baseline) if run.baseline else None
        self._function = open_baseline(baseline, registry, weights, download) if baseline is not None and not baseline.trained else None
        backbone = self._backbone(registry.backbone(run.backbone), weights, download) if run.backbone else None
        num = num_levels(registry.part(run))
        self.backbone = FrozenBackbone(backbone, here, [num] if num else [], run.unfreeze)
        if trained.preparation.framing.whole:
            self.backbone.chunk = 1
        self.model = None
        if self._function is None:
            self.model = build_model(run, registry.part(run), self.backbone, len(trained.classes))
            built = {name: x.clone() for name, x in self.model.state_dict().items()}
            where, remedy = (
                f"'{trained.name}': its head.safetensors",
                "It is damaged: replace it by a good copy, export it again, or run it again.",
            )
            check_types(trained.weights, built, where, remedy)
            check_values(trained.weights, dict(self.model.named_parameters()).keys(), where, remedy, built=built)
            try:
                self.model.load_state_dict(dict(trained.weights))
            except RuntimeError as error:
                raise CellbenchError(
                    f"'{trained.name}': its weights do not fit its head as it is built here: {one_line(error)[:300]}."
                ) from None
            self.model.adapt_as(trained.calibration)
            self.model.eval()

    def _backbone(self, card: BackboneCard, weights: Path | None, download: bool) -> Backbone:
        """The backbone that the run was trained on. Raises CellbenchError where its weights are different ones: the mask would be nonsense."""
        wanted = self.trained.backbone_digest
        if wanted and (found := weights_digest(card, weights, download)) != wanted:
            raise CellbenchError(
                f"'{self.trained.name}': the weights of {card.id} here ({found[:19]}…) are not those that it was trained on ({wanted[:19]}…). "
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
        trust: bool = False,
        skip_empty: bool = False,
    ) -> Segmenter:
        """The segmenter of a run in MLflow or of an exported folder.

        Args:
            run: a run id, a run's name, ``best``, ``best:EXPERIMENT``, or an exported folder.
            weights: a folder of backbone weights; default: ``CELLBENCH_WEIGHTS``, earlier downloads, a download.
            registry: a folder of your own cards.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
            precision: ``auto``, ``fp32`` or ``bf16``.
            trust: whether Python code in an exported folder may run that this user did not export.
            skip_empty: whether tiles without structure share the prediction of one of them (:mod:`cellbench.inference.empty_tiles`).

        Raises CellbenchError for a run that does not exist, failed or lost its head, and for unavailable weights.

        """
        startup.set_environment()
        if weights is None and os.environ.get("CELLBENCH_WEIGHTS"):
            weights = os.environ["CELLBENCH_WEIGHTS"]
        folder = Path(weights) if weights is not None else None
        if folder is not None and not folder.is_dir():
            raise CellbenchError(f"--weights {folder}: there is no such folder.")
        extra = Registry(Path(registry) if registry is not None else None)
        if os.path.isdir(run):
            from cellbench.inference.export import CARDS, read_export

            trained = read_export(Path(run))
            extra, folder = Registry(Path(run) / CARDS), folder or Path(run)
            require_trust(extra, Path(run) / CARDS, trust)
        else:
            from cellbench.inference import run_lookup  # MLflow is needed only here

            tracker, stored, chosen = run_lookup.find_run(str(run))
            trained = run_lookup.open_run(tracker, stored, extra, chosen)
        with startup.threads_for(device):
            here = detect_hardware(device, precision)
        return cls(trained, extra, here, folder, skip_empty=skip_empty)

    @property
    def name(self) -> str:
        """The run's name: backbone, head, seed."""
        return self.trained.name

    def __repr__(self) -> str:
        return f"<Segmenter '{self.name}' on {self.machine.name}: {', '.join(self.class_names)}>"

    def predict(self, image: Image) -> Prediction:
        """The cells of one image, the same as in the test.

        Args:
            image: a file (PNG, JPEG, TIFF, BMP, WebP, …), an array (H, W, 3) or (H, W) uint8, RGB or grey, or a Pillow image.

        Raises CellbenchError for an unreadable file, and for pixels of another shape or type.

        """
        (found,) = self.predict_all([image])
        return found

    def predict_all(self, images: Iterable[Image]) -> Iterator[Prediction]:
        """The cells of many images, in their order; faster than one by one for small ones. Raises CellbenchError at the first unreadable one.

        Until the last image is done, torch has the number of threads that the run's machine has.
        """
        if isinstance(images, str | os.PathLike | np.ndarray):
            raise CellbenchError("predict_all takes several images, in a list for example. predict takes one.")
        with startup.torch_threads(self.machine.threads):
            for found in self.predict_each(images):
                if isinstance(found, CellbenchError):
                    raise found
                yield found

    def predict_each(self, images: Iterable[Image]) -> Iterator[Prediction | CellbenchError]:
        """The same, with the error in place of an image that cannot be read, and with torch's threads as they are."""
        strips: list[MaskStrip] = []
        for event in self.stream(images):
            if isinstance(event, FailedImage):
                strips = []
                yield event.error
                continue
            strips.append(event)
            if event.last:
                classes, probability, fields = join_strips(strips)
                yield Prediction(
                    classes=classes,
                    probability=probability,
                    class_names=self.class_names,
                    separation=self.trained.separation,
                    fields=fields,
                    notes=event.source.notes,
                    source=event.image,
                    reading=self.trained.preparation.reading,
                    trust=event.trust,
                )
                strips = []

    def stream(self, images: Iterable[Image]) -> Iterator[MaskStrip | FailedImage]:
        """The masks strip by strip, image by image in their order; a bad image is a :class:`FailedImage` and does not stop the others."""
        if self._function is not None:
            batches = whole_images(images, self.trained, self.machine.precision)
        else:
            batches = tile_batches(images, self.trained, self.machine.precision, self.backbone.chunk, skip_empty=self.skip_empty)
        held: list[MaskStrip] = []  # of an image that is not complete
        with WorkerPool(self.machine.lanes) as pool:
            # A single lane prepares batches in its own thread; with several, reading would wait for the caller's next request.
            ready = prefetch(batches) if pool.num > 1 else batches
            with closing(ready), closing(pool.prefetch(ready, lambda batch: batch, self._segmented)) as done:
                for batch in done:
                    yield from self._finished(batch, held)

    def _finished(self, batch: TileBatch, held: list[MaskStrip]) -> Iterator[MaskStrip | FailedImage]:
        """The strips that a batch completes; of a run that drops regions at the frame, those of whole images, since only these show them."""
        if self.model is None or not self.model.edge_share:
            yield from batch.finished()
            return
        for event in batch.finished():
            if isinstance(event, FailedImage):
                held.clear()
                yield event
                continue
            held.append(event)
            if event.last:
                dropped = small_edge_regions(np.concatenate([strip.classes for strip in held]), self.model.edge_share)
                for strip in held:
                    here = dropped[strip.top : strip.top + len(strip.classes)]
                    probability = None if strip.probability is None else np.where(here, np.uint8(0), strip.probability)
                    yield replace(strip, classes=np.where(here, np.uint8(0), strip.classes), probability=probability)
                held.clear()

    def _segmented(self, batch: TileBatch) -> TileBatch:
        """The batch with ``found`` filled in."""
        image, row = batch.entries[0]
        if self._function is None:
            if batch.tiles:
                batch.found, batch.features = self._tiles(torch.from_numpy(np.stack(batch.tiles)))
                batch.tiles = []
        elif not isinstance(row, CellbenchError):
            batch.found = self._function(image.whole(), len(self.class_names), **self.trained.run.options)
        return batch

    def tiles(self, tiles_BTTC: Tensor) -> Tensor:
        """Probabilities (B, K-1, T, T) float32 of all classes but the background, for framed tiles (B, T, T, 3) uint8.

        Followed by the fields (B, F, T, T) of the run's cell target, if it has one.
        """
        return self._tiles(tiles_BTTC)[0]

    @torch.inference_mode()
    def _tiles(self, tiles_BTTC: Tensor) -> tuple[Tensor, dict[int, np.ndarray] | None]:
        """Likewise, with the mean features of the tiles where the features of the training images are known."""
        assert self.model is not None
        pixels = as_pixels(to_device(tiles_BTTC, self.machine.device))
        found, codes, features = torch.zeros(()), self.model.tta_codes, None
        for code in codes:
            turned = turn(pixels, code, self.backbone.patch_px)
            batch = Batch(self.backbone.maps(turned), turned, torch.empty(0))
            if code == 0 and self.trained.training_features is not None:
                features = pooled(batch.maps)
            start = time.perf_counter()
            with self.machine.autocast():
                logits = self.model.decode(batch)
            self.model.seconds += time.perf_counter() - start
            one = output_channels(logits, self.model, code) / len(codes)
            found = found + one if code else one
        return found, features
