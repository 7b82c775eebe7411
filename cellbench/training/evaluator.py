"""A run's test, image by image: what is counted, what is scored, and which answers are kept to be shown.

The runs of a cohort sit the same exam: an image's truth is prepared once, and every run's answer is compared with it in a few threads
while the network is at the next image. Measured on 1600x1200 and one core: 0.06 s for the truth, 0.1 s an answer.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io.images import thumbnail
from cellbench.metrics.instance import COUNTS, SCORES, InstanceScores, ReferenceMask
from cellbench.metrics.pixel import IGNORE, per_image_scores
from cellbench.metrics.separation import CONNECTED, SeparationParams

BINS = 20
"""Of the probability of a cell, for the reliability diagram."""
CANDIDATES = 10
"""Answers held while the median is not known, twice: the nearest to it so far, and some drawn by chance."""

Prediction = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""A class map, the probability of a cell, and the relief of the cells, each (H, W) uint8 or, but for the first, what a method does not give."""




@dataclass(frozen=True, kw_only=True)
class ExamplePrediction:
    """A run's answer for one image, at the size it is shown in, compressed: some 50 kB instead of 4 MB."""

    image: int
    dice: float
    """NaN where there is no cell and none was found."""
    shape: tuple[int, int]
    packed: bytes
    packed_cell: bytes | None

    @classmethod
    def of(cls, image: int, dice: float, classes: np.ndarray, cell: np.ndarray | None) -> ExamplePrediction:
        small = thumbnail(classes)
        pack = [None if x is None else zlib.compress(np.ascontiguousarray(thumbnail(x)), 1) for x in (classes, cell)]
        return cls(image=image, dice=dice, shape=small.shape, packed=pack[0] or b"", packed_cell=pack[1])

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
        """The probability of a cell, (H, W) uint8; None for a method that has none."""
        return None if self.packed_cell is None else np.frombuffer(zlib.decompress(self.packed_cell), np.uint8).reshape(self.shape)


@dataclass
class ExampleKeeper:
    """The answers for the worst, the median and the best image, so that no image is segmented twice to be shown.

    Images without a score (no cell, none found) are kept only where there is no other. The median is known at the end only. Held are the
    answers nearest to the median so far, which nearly always hold it, and as many drawn by chance, for scores that drift with the order of
    the images. The nearest of all these is shown, under its own score.
    """

    worst: ExamplePrediction | None = None
    best: ExamplePrediction | None = None
    _empty: ExamplePrediction | None = None
    _middle: list[ExamplePrediction] = field(default_factory=list)
    _drawn: list[ExamplePrediction] = field(default_factory=list)
    _chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _dices: list[float] = field(default_factory=list)

    def offer(self, image: int, dice: float, classes: np.ndarray, cell: np.ndarray | None) -> None:
        """An image's answer; kept if it is to be."""
        if math.isnan(dice):
            self._empty = self._empty or ExamplePrediction.of(image, dice, classes, cell)
            return
        case = ExamplePrediction.of(image, dice, classes, cell)
        self._dices.append(dice)
        self._middle.append(case)
        if self.worst is None or dice < self.worst.dice:
            self.worst = case
        if self.best is None or dice > self.best.dice:
            self.best = case
        if len(self._drawn) < CANDIDATES:
            self._drawn.append(case)
        elif (place := int(self._chance.integers(len(self._dices)))) < CANDIDATES:
            self._drawn[place] = case
        if len(self._middle) > CANDIDATES:
            now = float(np.median(self._dices))
            self._middle.remove(max(self._middle, key=lambda one: abs(one.dice - now)))

    @property
    def cases(self) -> dict[str, ExamplePrediction]:
        """``worst``, ``median``, ``best``, as far as they are different images."""
        if self.worst is None or self.best is None:
            return {} if self._empty is None else {"worst": self._empty}
        # The lower of two middle ones: a median that is an image, not a mean of two.
        middle = float(np.quantile(self._dices, 0.5, method="lower"))
        all_three = {
            "worst": self.worst,
            "median": min(self._middle + self._drawn, key=lambda one: abs(one.dice - middle)),
            "best": self.best,
        }
        first = {case.image: which for which, case in reversed(all_three.items())}
        return {which: case for which, case in all_three.items() if first[case.image] == which}


@dataclass
class RunEvaluation:
    """One run's test so far, N images."""

    separation: SeparationParams = field(default_factory=SeparationParams)
    """How its cells are told apart."""
    matrices: list[np.ndarray] = field(default_factory=list)
    agreements: list[InstanceScores] = field(default_factory=list)
    connected: list[dict[str, float | int]] = field(default_factory=list)
    """The scores of single cells where nothing is cut: what the separation is worth."""
    levels: np.ndarray = field(default_factory=lambda: np.zeros((2, 256), np.int64))
    """Pixels by truth (0 background, 1 cell) and predicted probability of a cell (0..255)."""
    keep: ExampleKeeper = field(default_factory=ExampleKeeper)

    @property
    def counts(self) -> np.ndarray:
        """Confusion matrices (N, K, K)."""
        return np.stack(self.matrices)

    def shapes(self) -> dict[str, np.ndarray]:
        """Outline and cell scores by name, each (N,), NaN where there is nothing to score; and what became of the cells, ``COUNTS``."""
        return {name: np.array([getattr(one, name) for one in self.agreements]) for name in (*SCORES, *COUNTS)}

    def calibration(self) -> dict[str, list[float]] | None:
        """Probabilities against what was there, in ``BINS`` bins of equal width; None for a method that gives no probability."""
        if not self.levels.any():
            return None
        value = np.arange(256) / 255
        bins = np.minimum((value * BINS).astype(int), BINS - 1)
        pixels = np.bincount(bins, self.levels.sum(0), BINS)
        known = np.maximum(pixels, 1)
        return {
            "pixels": pixels.tolist(),
            "probability": (np.bincount(bins, self.levels.sum(0) * value, BINS) / known).round(6).tolist(),
            "share_cell": (np.bincount(bins, self.levels[1], BINS) / known).round(6).tolist(),
        }


class CohortEvaluator:
    """The exams of the runs of one cohort, taken side by side. Use in ``with``: leaving waits for the last answers."""

    def __init__(self, dataset: Dataset, num_runs: int, separations: Sequence[SeparationParams] | None = None) -> None:
        """``separations``: each run's way to tell its cells apart; None: connected regions."""
        self._dataset = dataset
        plain = replace(CONNECTED, owners=dataset.owners)
        if dataset.min_cell_px is not None:
            plain = replace(plain, min_area_px=dataset.min_cell_px)
        self.exams = [RunEvaluation(separation=one) for one in separations or [plain] * num_runs]
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "exam")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> CohortEvaluator:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def take(self, image: int, truth: np.ndarray, matrices: Sequence[np.ndarray], answers: Sequence[Prediction]) -> None:
        """An image's truth (H, W), and each run's confusion matrix and answer."""
        self._settle()  # one image is under way at a time: answers for hundreds would fill the memory
        prepared = self._pool.submit(self._truth, self._dataset.test[image], truth)
        # In the pool's order the truth comes first, so no thread waits for one that cannot start.
        self._waiting = [
            self._pool.submit(
                self._mark, exam, image, truth, prepared, counts, per_image_scores(counts[None], unused=self._dataset.unused), *answer
            )
            for exam, counts, answer in zip(self.exams, matrices, answers, strict=True)
        ]

    def _settle(self) -> None:
        for job in self._waiting:
            job.result()
        self._waiting = []

    def _truth(self, sample: Sample, classes: np.ndarray) -> ReferenceMask:
        data = self._dataset
        ids = data.read_instances(sample)
        return ReferenceMask(classes, len(data.classes), ids, owners=data.owners, unused=data.unused, min_area_px=data.min_cell_px)

    @staticmethod
    def _mark(
        exam: RunEvaluation,
        image: int,
        truth: np.ndarray,
        prepared: Future[ReferenceMask],
        counts: np.ndarray,
        scores: dict[str, np.ndarray],
        classes: np.ndarray,
        cell: np.ndarray | None,
        relief: np.ndarray | None,
    ) -> None:
        exam.matrices.append(counts)
        one, parts = prepared.result(), exam.separation.parts(classes, relief)
        exam.agreements.append(one.agreement(classes, parts.instances(exam.separation.saddle_ratio, one.min_area_px)))
        exam.connected.append(one.found(parts.instances(0.0, one.min_area_px)))
        exam.keep.offer(image, float(scores["dice"][0]), classes, cell)
        if cell is not None:
            if truth.max(initial=0) == IGNORE:
                cell, truth = cell[truth != IGNORE], truth[truth != IGNORE]
            exam.levels += np.bincount((cell + np.uint16(256) * (truth > 0)).ravel(), minlength=512).reshape(2, 256)
