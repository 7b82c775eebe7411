"""What is tuned for each run on its own predictions for the validation images: how it adapts, then in one pass the separation and the calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cellbench.data.dataset import Dataset
from cellbench.features.extractor import Features
from cellbench.metrics.calibration import Calibration, histogram
from cellbench.metrics.separation import SeparationParams
from cellbench.training.adaptation import tune_edges, tune_shares
from cellbench.training.model import SegmentationModel
from cellbench.training.separation_tuning import tune_separation
from cellbench.training.tiled_inference import SegmentedImage


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
            own.append(histogram(truth, one.cell))

    separations = tune_separation(models, features, dataset, count)
    return separations, [
        replace(Calibration.of(own), own_share=share, edge_share=edge) for own, share, edge in zip(histograms, shares, edges, strict=True)
    ]
