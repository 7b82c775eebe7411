"""What a head costs on this machine: its parameters, and the time of a training step and of scoring, without backbone, loss and optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cellbench.config.cards import HeadCard
from cellbench.config.registry import load
from cellbench.hardware import Hardware
from cellbench.models.backbones.base import Backbone, Level

TILE_PX, BATCH, NUM_CLASSES = 224, 8, 2
DEPTH, DIM, STRIDE_PX = 12, 192, 16
"""The levels of a ViT-Ti/16."""
MEASURED_S = 1.0
"""Steps are repeated for this time, at least three."""


@dataclass(frozen=True, kw_only=True)
class HeadCost:
    """Milliseconds a tile of 224 px with the maps of a ViT-Ti/16, two classes, in mini-batches of eight: processor time, or of a GPU wall time."""

    params: int
    train_ms: float
    score_ms: float


def head_cost(card: HeadCard, here: Hardware) -> HeadCost:
    """Builds the head with the options of its card and times it."""
    backbone = Backbone((0.5,) * 3, (0.5,) * 3)
    backbone.levels = tuple(Level(index=i, dim=DIM, stride_px=STRIDE_PX) for i in range(DEPTH))
    levels = backbone.pick(card.levels)
    head = load(card)(levels, NUM_CLASSES, **card.options).to(here.device).to(memory_format=torch.channels_last)
    places = TILE_PX // STRIDE_PX
    maps = [torch.randn(BATCH, level.dim, places, places, device=here.device, dtype=here.precision) for level in levels]
    maps = [m.to(memory_format=torch.channels_last) for m in maps]
    pixels = torch.rand(BATCH, 3, TILE_PX, TILE_PX, device=here.device)

    def train() -> None:
        head.zero_grad(set_to_none=True)
        with here.autocast():
            scores = head(maps, pixels)
        scores.float().square().mean().backward()

    @torch.no_grad()
    def score() -> None:
        with here.autocast():
            head(maps, pixels)

    head.train()
    train_ms = _ms(train, here)
    head.eval()
    return HeadCost(params=sum(p.numel() for p in head.parameters()), train_ms=train_ms, score_ms=_ms(score, here))


def _ms(step: Callable[[], None], here: Hardware) -> float:
    """Milliseconds a tile of the fastest step, after one to warm up."""
    clock = time.process_time if here.device.type == "cpu" else time.perf_counter
    spent: list[float] = []
    while len(spent) < 4 or (sum(spent) < MEASURED_S and len(spent) < 50):
        start = clock()
        step()
        here.wait()
        spent.append(clock() - start)
    return 1000 * min(spent[1:]) / BATCH
