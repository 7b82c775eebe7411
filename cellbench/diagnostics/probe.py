"""A self-test of one backbone with its real weights on this machine: its facts, its known output and its cost.

Letters: B tiles, D features, h x w places of a map.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cellbench.config.cards import BackboneCard
from cellbench.config.registry import load
from cellbench.diagnostics.backbone_checks import frozen
from cellbench.diagnostics.peak_memory import watch_memory
from cellbench.errors import quantity
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware, release_memory
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import open_backbone

TILE_PX = 224
TOLERANCE = 1e-3
"""Of a probe, relative and absolute. Between one and two threads: 1e-6; with blocks or colours mixed up: 0.05 and more."""
NUM = 8
"""Numbers in a probe."""


@dataclass(frozen=True, kw_only=True)
class ProbeCheck:
    """One line of a self-test. ``holds`` is None where there is nothing to compare with."""

    name: str
    finding: str
    holds: bool | None


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """The results of ``probe_backbone``. ``peak_mib``: memory taken while loading and running."""

    checks: tuple[ProbeCheck, ...]
    load_s: float
    tile_px: int
    batch: int
    tiles_per_s: float
    peak_mib: float


def test_tile(side_px: int) -> Tensor:
    """A tile (1, 3, H, W) in 0..1, the same on every machine: ramps, waves and a disc with soft edges, by arithmetic alone.

    All quadrants and all colours differ.
    """
    axis = torch.arange(side_px, dtype=torch.float64) / (side_px - 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    disc = torch.sigmoid(60 * (0.25 - ((x - 0.62) ** 2 + (y - 0.35) ** 2).sqrt()))
    waves = 0.5 + 0.5 * torch.sin(40 * x + 15 * y * y)
    colours = (0.9 - 0.4 * disc - 0.2 * y, 0.8 - 0.6 * disc + 0.1 * waves * x, 0.3 + 0.4 * x + 0.25 * waves * (1 - disc))
    return torch.stack(colours)[None].float().clamp(0, 1)


def fingerprint(backbone: Backbone) -> tuple[float, ...]:
    """The ``probe`` of a card: means of the last map of ``test_tile``, float32.

    Number i is the mean of channel i*D/8 over the quadrant i mod 4 (top left, top right, bottom left, bottom right): a wrong weight, colour,
    block or order of places changes it.
    """
    pixels = test_tile(tile_px(backbone)).to(backbone.mean.device)
    map_Dhw = backbone(pixels, (backbone.levels[-1].index,))[0][0].float().cpu()
    quadrants = [part for half in map_Dhw.chunk(2, 1) for part in half.chunk(2, 2)]
    return tuple(round(quadrants[i % 4][i * len(map_Dhw) // NUM].mean().item(), 5) for i in range(NUM))


def tile_px(backbone: Backbone) -> int:
    """224, or the next larger size that the backbone takes."""
    return -(-TILE_PX // backbone.tile_multiple_px) * backbone.tile_multiple_px


def probe_backbone(card: BackboneCard, weights: Path | None, here: Hardware) -> ProbeReport:
    """Loads, checks and times a backbone. Downloads nothing: raises WeightsUnavailable for weights that are not on this machine."""
    load(card)  # imports are not part of the loading time
    if here.device.type == "cuda":
        torch.cuda.init()
    release_memory()
    with watch_memory(here.device) as memory:
        start = time.perf_counter()
        frozen = FrozenBackbone(open_backbone(card, weights, download=False), here, [1])
        load_s = time.perf_counter() - start
        assert frozen.module is not None
        checks = tuple(_checks(card, frozen.module))
        batch, tiles_per_s = _speed(frozen)
    return ProbeReport(
        checks=checks, load_s=load_s, tile_px=tile_px(frozen.module), batch=batch, tiles_per_s=tiles_per_s, peak_mib=memory.grown_mib
    )


def _checks(card: BackboneCard, backbone: Backbone) -> list[ProbeCheck]:
    side, last = tile_px(backbone), backbone.levels[-1]
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    maps = backbone(test_tile(side).to(backbone.mean.device), tuple(level.index for level in backbone.levels))
    expected = (1, card.dim, side // card.patch_px, side // card.patch_px)
    finite = all(bool(found.isfinite().all()) for found in maps)
    trouble = frozen(card, backbone)
    found = fingerprint(backbone)
    off = max((abs(a - b) for a, b in zip(found, card.probe, strict=False)), default=0.0)
    same = len(found) == len(card.probe) and all(abs(a - b) <= TOLERANCE * (1 + abs(b)) for a, b in zip(found, card.probe, strict=True))
    numbers = f"[{', '.join(f'{number:.5g}' for number in found)}]"
    known = f"the output on the card, off by {off:.1g}" if same else f"not the card's, off by {off:.2g}: {numbers}"
    output = known if card.probe else f"none on the card; here {numbers}"
    size = f"{millions:.4g} M, {card.params_m:g} M on the card"
    given, stated = tuple(maps[-1].shape[1:]), expected[1:]
    shape = f"{quantity(len(maps), 'level')}, the last {given} for {side} x {side} px; {card.depth} and {stated} by the card"
    return [
        ProbeCheck(name="parameters", finding=size, holds=abs(millions - card.params_m) <= max(0.01 * millions, 0.001)),
        ProbeCheck(
            name="shape", finding=shape, holds=maps[-1].shape == expected and last.stride_px == card.patch_px and len(maps) == card.depth
        ),
        ProbeCheck(name="values", finding="finite at every level" if finite else "some are not finite", holds=finite),
        ProbeCheck(name="frozen", finding=trouble or "eval mode, no gradient", holds=not trouble),
        ProbeCheck(name="probe", finding=output, holds=same if card.probe else None),
    ]


def _speed(frozen: FrozenBackbone) -> tuple[int, float]:
    """Batch size and tiles per second in a cohort's batches: a second of batches, at least two; smaller ones on a slow machine."""
    assert frozen.module is not None
    tile = test_tile(tile_px(frozen.module)).to(frozen.machine.device)
    one = min(_seconds(frozen, tile) for _ in range(3))
    batch = max(1, min(frozen.machine.chunk, int(5 / one)))
    tiles = tile.expand(batch, -1, -1, -1).contiguous()
    walls = [_seconds(frozen, tiles)]
    while len(walls) < 2 or (sum(walls) < 1 and len(walls) < 50):
        walls.append(_seconds(frozen, tiles))
    return batch, batch / statistics.median(walls)


def _seconds(frozen: FrozenBackbone, tiles: Tensor) -> float:
    start = time.perf_counter()
    for found in frozen.maps(tiles).values():
        found.flatten()[:1].cpu()  # waits for a GPU
    return time.perf_counter() - start
