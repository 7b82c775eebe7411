"""What a cohort is computed from: dataset, decoded images, backbone and features. The next cohort keeps what it shares with the last."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cellbench.config.cards import HeadCard
from cellbench.config.run import NUMERICS_VERSION
from cellbench.data.dataset import Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.resources import Resources
from cellbench.features.extractor import CachePolicy, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.remote_cache import RemoteCache, shared_url
from cellbench.hardware import Hardware
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import open_backbone


@dataclass(kw_only=True)
class CohortInputs:
    """The memory of the resources is for images and features together."""

    datasets: Sequence[Dataset]
    resources: Resources
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._backbone: tuple[str, Backbone] | None = None
        self._shared = RemoteCache(url, self.say) if (url := shared_url()) else None
        self._open(self.datasets[0])

    def _open(self, dataset: Dataset) -> None:
        self.dataset = dataset
        # A third for decoded images; features get the rest. Both are upper bounds, not reservations.
        third = self.resources.machine.memory_bytes // 3
        share = {"train": 0.6, "val": 0.2, "test": 0.2}
        self.images = {split: ImageCache(dataset, split, int(third * part)) for split, part in share.items()}

    def select(self, resolved: ResolvedRun) -> None:
        """Makes the fold of a run the dataset of the cohort."""
        if (dataset := self.datasets[resolved.run.fold]) is not self.dataset:
            self._open(dataset)

    def features(self, cohort: Sequence[ResolvedRun], machine: Hardware, more: Sequence[ResolvedRun] = ()) -> Features:
        """The features of a cohort, including the levels that the runs ``more`` of the same backbone need."""
        first = cohort[0]
        self.select(first)
        levels = [one.card.levels for one in (*cohort, *more) if isinstance(one.card, HeadCard)]
        frozen = FrozenBackbone(self._open_backbone(first), machine, levels, first.run.unfreeze)
        plan = SamplingPlan(self.images["train"].sizes_px, first.run, self.resources.registry, self.images["train"].boxes_px)
        return Features(frozen, plan, self.images, self._cache_policy(first, machine), [one.run.targets for one in cohort])

    def _open_backbone(self, resolved: ResolvedRun) -> Backbone | None:
        card = resolved.backbone
        if card is None:
            return None
        if self._backbone is None or self._backbone[0] != card.id:
            self._backbone = None  # one in memory at a time: the largest take 4.5 GB
            self._backbone = card.id, open_backbone(card, self.resources.weights)
        return self._backbone[1]

    def _cache_policy(self, resolved: ResolvedRun, machine: Hardware) -> CachePolicy:
        key = ""
        if resolved.backbone is not None:
            # Another torch or timm may round differently, and cached features must equal fresh ones to the last bit.
            versions = [torch.__version__, importlib.metadata.version("timm"), NUMERICS_VERSION]
            key = json.dumps([resolved.backbone_identity, *versions, machine.device.type, machine.threads, machine.chunk])
        return CachePolicy(
            memory_bytes=machine.memory_bytes * 2 // 3,
            disk_bytes=self.resources.disk_bytes,
            prefer_disk=self.resources.prefer_disk,
            key=key,
            backbone=resolved.run.backbone or "",
            dataset=self.dataset.name,
            shared=self._shared,
            tell=self.say,
        )
