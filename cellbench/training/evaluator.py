"""Evaluates runs on the test set, image by image: pixel counts, scores, and example predictions.

An image's reference mask is prepared once for all runs of a cohort. Predictions are scored in a few threads while the network computes the next
image. On 1600x1200 and one core: 0.02 s for the reference's cells, 0.08 s for a prediction's scores.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io.images import thumbnail
from cellbench.data.regions import regions_of
from cellbench.errors import blaming
from cellbench.metrics import catalog
from cellbench.metrics.calibration import Calibration, histogram, true_dice
from cellbench.metrics.catalog import Metric, ScoredImage
from cellbench.metrics.cell_classes import cell_confusion, part_confusion
from cellbench.metrics.counting import CountRow, PlacedCells, count_rows
from cellbench.metrics.instance import COUNTS, CellOutcomes, CellPairs, InstanceScores, ReferenceMask, scores_of_pairs
from cellbench.metrics.instances import reference_instances
from cellbench.metrics.measurements import part_classes
from cellbench.metrics.pixel import confusion_matrix, per_image_scores
from cellbench.metrics.separation import CONNECTED, SeparationParams
from cellbench.training.segmented_image import SegmentedImage

BINS = 20
"""Bins of the reliability diagram."""
CANDIDATES = 10
"""Number of predictions held until the median is known: this number nearest to it so far, and as many at random."""


@dataclass(frozen=True, kw_only=True)
class ExamplePrediction:
    """A run's prediction for one image, at display size and compressed: about 50 kB instead of 4 MB."""

    image: int
    dice: float
    """NaN where there is no cell and none was found."""
    shape: tuple[int, int]
    packed: bytes
    packed_cell: bytes | None
    packed_ids: tuple[bytes, ...] = ()
    """Cell numbers of truth and prediction; empty where single cells are not known."""
    outcomes: np.ndarray | None = None
    matched: np.ndarray | None = None

    @classmethod
    def of(
        cls, image: int, dice: float, classes: np.ndarray, cell: np.ndarray | None, cells: CellOutcomes | None = None
    ) -> ExamplePrediction:
        small = thumbnail(classes)
        pack = [None if x is None else zlib.compress(thumbnail(x).tobytes(), 1) for x in (classes, cell)]
        case = cls(image=image, dice=dice, shape=small.shape, packed=pack[0] or b"", packed_cell=pack[1])
        if cells is None:
            return case
        ids = tuple(zlib.compress(thumbnail(x).astype(np.int32).tobytes(), 1) for x in (cells.true_ids, cells.found_ids))
        return replace(case, packed_ids=ids, outcomes=cells.outcomes, matched=cells.matched)

    @property
    def score(self) -> str:
        """For titles."""
        return "no cell, none found" if math.isnan(self.dice) else f"Dice {self.dice:.4f}"

    @property
    def classes(self) -> np.ndarray:
        """(H, W) uint8, as :func:`thumbnail` gives it."""
        return np.frombuffer(zlib.decompress(self.packed), np.uint8).reshape(self.shape)

    @property
    def cell(self) -> np.ndarray | None:
        """The probability of a cell, (H, W) uint8; None for a method without probabilities."""
        return None if self.packed_cell is None else np.frombuffer(zlib.decompress(self.packed_cell), np.uint8).reshape(self.shape)

    @property
    def cells(self) -> CellOutcomes | None:
        """What became of the single cells, their numbers as :func:`thumbnail` gives them; None where they are not known."""
        if self.outcomes is None or self.matched is None:
            return None
        true, found = (np.frombuffer(zlib.decompress(ids), np.int32).reshape(self.shape) for ids in self.packed_ids)
        return CellOutcomes(true_ids=true, outcomes=self.outcomes, found_ids=found, matched=self.matched)


@dataclass
class ExampleKeeper:
    """Keeps the predictions of the worst, the median and the best image, so that no image is segmented twice.

    Images without a score (no cell, none found) are kept only if there is no other. The median is known only at the end. So the predictions
    nearest to the median so far are held, which nearly always include it, and an equally large random sample in case scores drift with the
    order of the images. The one nearest to the final median is shown, with its own score.
    """

    num_worst: int = 0
    """How many of the worst images are kept in ``lowest`` as well."""
    lowest: list[ExamplePrediction] = field(default_factory=list)
    """The worst first; images without a score last."""
    worst: ExamplePrediction | None = None
    best: ExamplePrediction | None = None
    _empty: ExamplePrediction | None = None
    _middle: list[ExamplePrediction] = field(default_factory=list)
    _drawn: list[ExamplePrediction] = field(default_factory=list)
    _chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _dices: list[float] = field(default_factory=list)

    def offer(self, image: int, dice: float, classes: np.ndarray, cell: np.ndarray | None, cells: CellOutcomes | None = None) -> None:
        """Keeps the prediction of an image if it may become one of the three, or one of the ``num_worst``."""
        if math.isnan(dice) and self._empty is not None and not self.num_worst:
            return
        packed = functools.cache(lambda: ExamplePrediction.of(image, dice, classes, cell, cells))  # most are not kept
        if len(self.lowest) < self.num_worst or (self.num_worst and _rank(dice) < _rank(self.lowest[-1].dice)):
            self.lowest = sorted([*self.lowest, packed()], key=lambda one: _rank(one.dice))[: self.num_worst]
        if math.isnan(dice):
            self._empty = self._empty or packed()
            return
        self._dices.append(dice)
        if self.worst is None or dice < self.worst.dice:
            self.worst = packed()
        if self.best is None or dice > self.best.dice:
            self.best = packed()
        if len(self._drawn) < CANDIDATES:
            self._drawn.append(packed())
        elif (place := int(self._chance.integers(len(self._dices)))) < CANDIDATES:
            self._drawn[place] = packed()
        if len(self._middle) < CANDIDATES:
            self._middle.append(packed())
            return
        now = float(np.median(self._dices))
        farthest = max(self._middle, key=lambda one: abs(one.dice - now))
        if abs(dice - now) <= abs(farthest.dice - now):
            self._middle.remove(farthest)
            self._middle.append(packed())

    @property
    def cases(self) -> dict[str, ExamplePrediction]:
        """``worst``, ``median``, ``best``, as far as they are different images."""
        if self.worst is None or self.best is None:
            return {} if self._empty is None else {"worst": self._empty}
        # The lower of the two middle ones: the median must be an image, not a mean of two.
        middle = float(np.quantile(self._dices, 0.5, method="lower"))
        all_three = {
            "worst": self.worst,
            "median": min(self._middle + self._drawn, key=lambda one: abs(one.dice - middle)),
            "best": self.best,
        }
        first = {case.image: which for which, case in reversed(all_three.items())}
        return {which: case for which, case in all_three.items() if first[case.image] == which}


def _rank(dice: float) -> float:
    """Puts images without a score last."""
    return math.inf if math.isnan(dice) else dice


@dataclass
class RunEvaluation:
    """The evaluation of one run so far, over N images."""

    separation: SeparationParams = field(default_factory=SeparationParams)
    """How touching cells are separated."""
    own_metrics: Sequence[Metric] = ()
    """The user's metrics."""
    matrices: list[np.ndarray] = field(default_factory=list)
    agreements: list[InstanceScores] = field(default_factory=list)
    connected: list[dict[str, float | int]] = field(default_factory=list)
    """The scores of single cells without separation."""
    cell_matrices: list[np.ndarray] = field(default_factory=list)
    """For each image the classes of its cells, as :func:`cell_confusion` counts them; empty for a single class of cells."""
    scores: list[dict[str, float]] = field(default_factory=list)
    """For each image, every per-image metric of the catalog, then the user's metrics."""
    calibrated: Calibration = field(default_factory=Calibration)
    """How its probabilities are corrected where they are shown."""
    histograms: list[np.ndarray] = field(default_factory=list)
    """For each image, pixel counts by truth (0 background, 1 cell) and predicted probability of a cell (0..255), before correction."""
    examples: ExampleKeeper = field(default_factory=ExampleKeeper)
    cells: list[CountRow] = field(default_factory=list)
    """The number of cells by image, region and class; only where the evaluator counts them."""

    @property
    def counts(self) -> np.ndarray:
        """Confusion matrices (N, K, K)."""
        return np.stack(self.matrices)

    def per_image(self) -> dict[str, np.ndarray]:
        """The scores by metric, each (N,), NaN where there is nothing to score."""
        return {key: np.array([scores[key] for scores in self.scores]) for key in self.scores[0]} if self.scores else {}

    def outcomes(self) -> dict[str, np.ndarray]:
        """The outcomes of the cells, ``COUNTS``, each (N,)."""
        return {name: np.array([getattr(one, name) for one in self.agreements]) for name in COUNTS}

    def calibration(self, *, corrected: bool = False) -> dict[str, list[float]] | None:
        """Predicted probabilities against observed shares, in ``BINS`` bins of equal width; None for a method without probabilities.

        ``corrected``: after the correction that was fitted in validation.
        """
        if not self.histograms:
            return None
        levels = np.sum(self.histograms, axis=0)
        if corrected:
            levels = self.calibrated.corrected(levels)
        value = np.arange(256) / 255
        bins = np.minimum((value * BINS).astype(int), BINS - 1)
        pixels = np.bincount(bins, levels.sum(0), BINS)
        known = np.maximum(pixels, 1)
        return {
            "pixels": pixels.tolist(),
            "probability": (np.bincount(bins, levels.sum(0) * value, BINS) / known).round(6).tolist(),
            "share_cell": (np.bincount(bins, levels[1], BINS) / known).round(6).tolist(),
        }

    def dice_estimates(self) -> list[tuple[float, float]]:
        """The estimated and the true Dice of each image with an estimate and a cell."""
        each = [(self.calibrated.estimated_dice(one.sum(0)), true_dice(one)) for one in self.histograms if one[1].any()]
        return [(estimated, true) for estimated, true in each if estimated is not None]


class CohortEvaluator:
    """Evaluates the runs of one cohort in parallel. Use as a context manager: leaving it waits for the last predictions."""

    def __init__(
        self,
        dataset: Dataset,
        num_runs: int,
        separations: Sequence[SeparationParams] | None = None,
        own_metrics: Sequence[Metric] = (),
        split: str = "test",
        calibrations: Sequence[Calibration] = (),
        count_cells: bool = False,
    ) -> None:
        """``separations``: how each run separates touching cells; None: connected regions. ``own_metrics``: the user's metrics, with their code.

        ``calibrations``: how the probabilities of each run are corrected; empty: not at all. ``count_cells``: by class and region, too.
        """
        self._dataset, self._samples, self._count_cells = dataset, dataset.samples(split), count_cells
        plain = replace(CONNECTED, owners=dataset.owners)
        if dataset.min_cell_px is not None:
            plain = replace(plain, min_area_px=dataset.min_cell_px)
        self.evaluations = [RunEvaluation(separation=one, own_metrics=own_metrics) for one in separations or [plain] * num_runs]
        for evaluation, calibration in zip(self.evaluations, calibrations, strict=False):
            evaluation.calibrated = calibration
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "evaluate")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> CohortEvaluator:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add_image(
        self,
        image: int,
        truth: np.ndarray,
        predictions: Sequence[SegmentedImage],
        numbers: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        """Adds an image: its truth (H, W), and each run's prediction. ``numbers``: cell numbers (H, W) that are predicted, too."""
        self._settle()  # one image at a time: hundreds of predictions would fill the memory
        prepared = self._pool.submit(self._truth, self._samples[image], truth)
        # In the pool's order the truth comes first, so no thread waits for one that cannot start.
        self._waiting = [
            self._pool.submit(self._score, evaluation, image, truth, prepared, found, ids)
            for evaluation, found, ids in zip(self.evaluations, predictions, numbers or [None] * len(predictions), strict=True)
        ]

    def _settle(self) -> None:
        for job in self._waiting:
            job.result()
        self._waiting = []

    def _truth(self, sample: Sample, classes: np.ndarray) -> ReferenceMask:
        data = self._dataset
        ids = data.read_instances(sample)
        return ReferenceMask(classes, len(data.classes), ids, owners=data.owners, unused=data.unused, min_area_px=data.min_cell_px)

    def _score(
        self,
        evaluation: RunEvaluation,
        image: int,
        truth: np.ndarray,
        prepared: Future[ReferenceMask],
        found: SegmentedImage,
        ids: np.ndarray | None,
    ) -> None:
        reference, classes, cell, num_classes = prepared.result(), found.classes, found.cell, len(self._dataset.classes)
        with blaming(evaluation):
            counts = confusion_matrix(truth, classes, num_classes)
            evaluation.matrices.append(counts)
            separation = evaluation.separation
            if ids is None:
                cells, regions = separation.instances_and_regions(classes, found.fields, cell, reference.min_area_px)
            else:
                cells, _ = reference_instances(classes, ids, reference.min_area_px, owners=self._dataset.owners)
                regions = separation.connected(classes, reference.min_area_px)
            pairs = CellPairs.of(reference.cells, cells)
            evaluation.agreements.append(reference.agreement(classes, pairs))
            if num_classes > 2:
                parts = part_confusion(truth, classes, self._dataset.owners, num_classes, reference.min_area_px)
                evaluation.cell_matrices.append(cell_confusion(pairs, num_classes) + parts)
            if self._count_cells:
                evaluation.cells += self._counted(self._samples[image], pairs)
            evaluation.connected.append(scores_of_pairs(pairs) if regions is cells else reference.found(regions))
            scored = ScoredImage(
                truth=truth,
                prediction=classes,
                probability=cell,
                classes=self._dataset.classes,
                true_cells=reference.cells,
                found_cells=cells,
                pixels={name: float(one[0]) for name, one in per_image_scores(counts[None], unused=self._dataset.unused).items()},
                instances=evaluation.agreements[-1],
            )
            evaluation.scores.append(catalog.score(scored, evaluation.own_metrics))
            evaluation.examples.offer(image, evaluation.scores[-1]["dice"], classes, cell, CellOutcomes.of(pairs))
            if cell is not None:
                evaluation.histograms.append(histogram(truth, cell))

    def _counted(self, sample: Sample, pairs: CellPairs) -> list[CountRow]:
        data = self._dataset
        parts = part_classes(data.owners)
        names = {k: name for k, name in enumerate(data.classes) if k and k not in parts and k not in data.unused}
        there, predicted = PlacedCells.of(pairs.truth), PlacedCells.of(pairs.found)
        return count_rows(sample.name, there, predicted, names, regions_of(sample.regions))
