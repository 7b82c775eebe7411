"""Setup that the benchmarks share: the machine, the data and the backbone, and timed training of a cohort."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.features.extractor import CachePolicy, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.models.backbones.build import open_backbone
from cellbench.startup import restored_environment
from cellbench.training.fit import NoRecorder, fit
from cellbench.training.model import build_model, num_levels
from cellbench.training.trainer import HeadTrainer


@dataclass(kw_only=True)
class BenchmarkSetup:
    """The inputs of all measurements. ``quick`` measures fewer runs and epochs of equal work, and multiplies."""

    registry: Registry
    dataset: Dataset
    machine: Hardware
    backbone: str
    weights: Path | None
    data: Path | None = None
    """The folder of the data set; None for synthetic data."""
    card: str = ""
    """The data set's card, for processes that open it themselves; empty: none are started."""
    spec: DataSpec = field(default_factory=DataSpec)
    precision: str = "auto"
    """As asked for, for processes that choose themselves."""
    peer: str = ""
    """Another tool that executes the same runs; empty: none."""
    epochs: int
    crops: int
    quick: bool = False
    say: Callable[[str], None] = print
    heads: tuple[str, ...] = ("bilinear", "transposed-conv", "fpn")
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Learning rates; each head is trained at each."""

    def __post_init__(self) -> None:
        self.frozen = open_backbone(self.registry.backbone(self.backbone), self.weights)
        self.pixels = {split: ImageCache(self.dataset, split, 2**31) for split in SPLITS}
        self.runs = [self.run(head, rate) for head in self.heads for rate in self.rates]
        self.trunk_s = 0.0
        """Seconds in the backbone during the last :meth:`fitted`."""

    @property
    def tolerance(self) -> float:
        """Allowed relative difference between equal results: 0 on a CPU."""
        return 0.0 if self.machine.device.type == "cpu" else 0.02

    @property
    def run_settings(self) -> dict[str, Any]:
        """Settings that all runs share."""
        return {"epochs": self.epochs, "crops_per_image": self.crops, "patience": 0, "overlap": 0.25}

    def run(self, head: str, rate: float, **more: Any) -> RunSpec:
        """A complete run of the benchmark's backbone; ``more`` overrides the shared settings."""
        return self.registry.complete(RunSpec(backbone=self.backbone, head=head, lr=rate, **{**self.run_settings, **more}))

    def features(self, runs: list[RunSpec], memory_bytes: int = 2**33) -> Features:
        """The feature pass of a cohort."""
        frozen = FrozenBackbone(self.frozen, self.machine, [num_levels(self.registry.part(run)) for run in runs])
        return Features(frozen, SamplingPlan(self.pixels["train"].sizes_px, runs[0]), self.pixels, CachePolicy(memory_bytes=memory_bytes))

    def trainer(self, run: RunSpec, features: Features, num_views: int, *, capture: bool = True) -> HeadTrainer:
        """The trainer of a run, which logs nothing. ``capture``: whether its steps on a GPU may be CUDA graphs."""
        model = build_model(run, self.registry.part(run), features.backbone, len(self.dataset.classes))
        return HeadTrainer(run=run, model=model, recorder=NoRecorder(), num_views=num_views, capture=capture).on(features)

    def fitted(self, runs: list[RunSpec], memory_bytes: int = 2**33) -> tuple[float, list[HeadTrainer]]:
        """Trains a cohort; returns the seconds of ``fit`` and the trainers."""
        features = self.features(runs, memory_bytes)
        trainers = [self.trainer(run, features, features.plan.num_views) for run in runs]
        wall_s = seconds(lambda: fit(trainers, features))
        self.trunk_s = features.backbone.seconds
        return wall_s, trainers


@contextlib.contextmanager
def store_in(folder: Path) -> Iterator[None]:
    """Inside ``with``, MLflow's store is the one of this folder."""
    with restored_environment("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        yield


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
