"""A finished run for inference, read from MLflow or from an exported folder: settings, weights and preparation of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cellbench.config.run import RunSpec
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.metrics.calibration import Calibration
from cellbench.metrics.separation import CONNECTED, SeparationParams
from cellbench.metrics.training_features import TrainingFeatures


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One run."""

    name: str
    run: RunSpec
    classes: tuple[str, ...]
    """By class number, the background first."""
    preparation: Preparation
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Of head and tail, by name; empty for a method without training."""
    separation: SeparationParams = CONNECTED
    """How touching cells are separated."""
    training_features: TrainingFeatures | None = None
    """How its training images look to the backbone; None without one, or for a run of an older version."""
    calibration: Calibration = field(default_factory=Calibration)
    """How its probabilities are corrected."""
    fingerprint: str = ""
    dataset_digest: str = ""
    """Of its training data."""
    backbone_digest: str = ""
    """Of the backbone's weights in training; empty where not recorded."""
    run_id: str = ""
    """In MLflow."""
    experiment: str = ""
    seen: Mapping[str, Any] | None = None
    """The record of its training and validation images (``data.audit.seen_images``); None for a run of an older version."""
    config: str = ""
    """An experiment file that repeats the run."""
    data: str = ""
    """Its training, validation and test data, in words."""
    data_folder: str = ""
    """Where its data lay when it was trained."""
    chosen: str = ""
    """How it was chosen among several runs, in words."""

    @property
    def origin(self) -> list[str]:
        """The run, its experiment and data and how it was chosen, in sentences."""
        if not self.run_id:
            return []
        data = f", on {self.data}" if self.data else ""
        return [
            f"Model: {self.name}, of the experiment '{self.experiment}'{data} (run {self.run_id[:8]}).",
            *([self.chosen] if self.chosen else []),
        ]
