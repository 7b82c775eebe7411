"""What is tuned for each run on its own predictions for the validation images: how it adapts, then in one pass the separation and the calibration.

Also the scores of the user's metrics on these images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cellbench.data.dataset import Dataset
from cellbench.features.extractor import Features
from cellbench.metrics.calibration import Calibration, histogram
from cellbench.metrics.catalog import Metric
from cellbench.metrics.pixel import nan_mean
from cellbench.metrics.separation import SeparationParams
from cellbench.training.adaptation import tune_edges, tune_shares
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.model import SegmentationModel
from cellbench.training.segmented_image import SegmentedImage
from cellbench.training.separation_tuning import tune_separation
from cellbench.training.tiled_inference import segment_images


def tune_on_validation(
    models: Sequence[SegmentationModel], features: Features, dataset: Dataset
) -> tuple[list[SeparationParams], list[Calibration]]:
    """The separation with the best AP50, and the calibration, of each model, which is adapted from here on."""
    shares = tune_shares(models, features)
    edges = tune_edges(models, features)
    histograms: list[list[np.ndarray]] = [[] for _ in models]

    def count(image: int, found: Sequence[SegmentedImage]) -> None:
        truth = features.pixels["val"][image][1]
        for own, one in zip(histograms, found, strict=True):
            assert one.cell is not None, "heads predict probabilities"
            own.append(histogram(truth, one.cell))

    separations = tune_separation(models, features, dataset, count)
    return separations, [
        replace(Calibration.of(own), own_share=share, edge_share=edge) for own, share, edge in zip(histograms, shares, edges, strict=True)
    ]


def score_validation(
    models: Sequence[SegmentationModel], features: Features, dataset: Dataset, metrics: Sequence[Metric]
) -> list[dict[str, float]]:
    """The mean of each of the user's metrics over the validation images, by model. A metric without any score is left out.

    Takes one pass over the validation images, or none without metrics.
    """
    if not metrics:
        return [{} for _ in models]
    with CohortEvaluator(dataset, len(models), tune_separation(models, features, dataset), metrics, "val") as evaluator:
        for image, answers in segment_images(models, features, "val"):
            evaluator.add_image(image, features.pixels["val"][image][1], answers)
    found = [{metric.key: nan_mean(evaluation.per_image()[metric.key]) for metric in metrics} for evaluation in evaluator.evaluations]
    return [{key: value for key, value in scores.items() if not math.isnan(value)} for scores in found]
