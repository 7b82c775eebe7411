"""Small cohorts for tests: a synthetic dataset, a backbone with random weights, and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.dataset import Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.loading import open_dataset
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.features.extractor import CachePolicy, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.pixel import confusion_matrix
from cellbench.models.backbones.build import open_backbone
from cellbench.training.fit import fit
from cellbench.training.model import build_model, num_levels
from cellbench.training.tiled_inference import segment_images
from cellbench.training.trainer import HeadTrainer

REGISTRY = Registry()
FP32 = Hardware(device_name="cpu", precision_name="fp32", memory_bytes=2**30)
SMALL = {"tile_px": 64, "epochs": 2, "crops_per_image": 3, "batch_size": 4, "overlap": 0.25, "lr": 5e-3, "patience": 0}


def run_of(head: str = "bilinear", backbone: str = "vit-tiny-random", **settings: Any) -> RunSpec:
    """A complete run on small tiles."""
    return REGISTRY.complete(RunSpec(backbone=backbone, head=head, **{**SMALL, **settings}))


def baseline_of(name: str, options: dict[str, Any], **settings: Any) -> RunSpec:
    return REGISTRY.complete(RunSpec(baseline=name, options=options, **{**SMALL, **settings}))


def dataset_of(folder: Path) -> Dataset:
    return open_dataset(REGISTRY.dataset("folder"), folder, DataSpec())


class Listener:
    """A recorder that stores metrics and states, and prunes after ``most`` epochs."""

    def __init__(self, most: int = 10**6) -> None:
        self.rows: list[dict[str, float]] = []
        self.states: list[dict[str, Any]] = []
        self._most = most

    def epoch(self, epoch: int, metrics: dict[str, float]) -> bool:
        self.rows.append(metrics)
        return len(self.rows) < self._most

    def checkpoint(self, state: dict[str, Any]) -> None:
        self.states.append(torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state))


def segmenter_of(head: str = "detail", backbone: str = "filter-bank", **settings: object) -> Segmenter:
    """A segmenter with random weights."""
    run = run_of(head, backbone, **settings)
    frozen = FrozenBackbone(open_backbone(REGISTRY.backbone(backbone)), FP32, [REGISTRY.head(head).levels])
    weights = build_model(run, REGISTRY.head(head), frozen, 2).state_dict()
    trained = TrainedRun(
        name="r", run=run, classes=("background", "cell"), preparation=Preparation(framing=Framing.of(run)), weights=weights
    )
    return Segmenter(trained, REGISTRY, FP32)


def features_of(dataset: Dataset, runs: list[RunSpec], machine: Hardware = FP32, **settings: Any) -> Features:
    """The features of a cohort."""
    first = runs[0]
    backbone = open_backbone(REGISTRY.backbone(first.backbone)) if first.backbone else None
    frozen = FrozenBackbone(backbone, machine, [n for run in runs if (n := num_levels(REGISTRY.part(run)))], first.unfreeze)
    pixels = {split: ImageCache(dataset, split, 2**28) for split in ("train", "val", "test")}
    policy = CachePolicy(**{"memory_bytes": machine.memory_bytes, **settings})
    return Features(frozen, SamplingPlan(pixels["train"].sizes_px, first), pixels, policy, [run.targets for run in runs])


def trainers_of(dataset: Dataset, runs: list[RunSpec], features: Features, most: dict[int, int] | None = None) -> list[HeadTrainer]:
    """New trainers; ``most``: epochs after which a run is pruned, by index."""
    return [
        HeadTrainer(
            run=run,
            model=build_model(run, REGISTRY.part(run), features.backbone, len(dataset.classes)),
            recorder=Listener((most or {}).get(k, 10**6)),
            num_views=features.plan.num_views,
        )
        for k, run in enumerate(runs)
    ]


def fitted(dataset: Dataset, runs: list[RunSpec], most: dict[int, int] | None = None, **settings: Any) -> list[HeadTrainer]:
    """Trainers after ``fit``."""
    features = features_of(dataset, runs, **settings)
    trainers = trainers_of(dataset, runs, features, most)
    fit(trainers, features)
    return trainers


def same(a: HeadTrainer, b: HeadTrainer) -> bool:
    """Whether two trainers have bit-identical history and weights."""
    weights_a, weights_b = a.model.state_dict(), b.model.state_dict()
    return a.history == b.history and all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


def score_images(models, features, split):
    """For each image of a split: its number, each model's confusion matrix (K, K) and prediction."""
    for image, found in segment_images(models, features, split):
        truth = features.pixels[split][image][1]
        yield image, [confusion_matrix(truth, one.classes, model.num_classes) for one, model in zip(found, models, strict=True)], found
