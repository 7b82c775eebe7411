"""A run's trainable part, made from its cards: which levels of the trunk it reads, and its head with seeded weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellbench.features import Batch, Trunk
from cellbench.heads.base import Head
from cellbench.registry import BaselineCard, HeadCard, Registry, load
from cellbench.spec import RunSpec


class Model(nn.Module):
    """A head and the indices of the levels that it reads from a cohort's batches."""

    def __init__(self, head: Head, indices: tuple[int, ...]) -> None:
        super().__init__()
        self.head, self.indices = head, indices
        self.seconds = 0.0
        """Spent by this model alone in segmenting whole images so far."""

    def forward(self, batch: Batch) -> Tensor:
        """Class scores (B, K, T, T) before softmax, for every pixel of the batch's tiles."""
        return self.head([batch.maps[index] for index in self.indices], batch.pixels)

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.head.parameters())


def num_levels(run: RunSpec, registry: Registry) -> int:
    """How many depths of the backbone a run reads; 0 for a baseline."""
    return 0 if run.baseline else registry.head(run.head or "").levels


def model(run: RunSpec, registry: Registry, trunk: Trunk, num_classes: int) -> Model:
    """The run's trainable part, with weights that depend on its seed alone, on the trunk's device."""
    card: HeadCard | BaselineCard = registry.baseline(run.baseline) if run.baseline else registry.head(run.head or "")
    levels = trunk.levels(num_levels(run, registry)) if not run.baseline else ()
    build = load(card)
    with torch.random.fork_rng(devices=[]):  # nobody else's random numbers depend on how many heads were made
        torch.manual_seed(run.seed)
        head = build(levels, num_classes, **run.options)
    made = Model(head, tuple(level.index for level in levels))
    return made.to(trunk.machine.device, memory_format=torch.channels_last)
