"""One backbone with its real weights, as it runs on this machine: what it is, whether it gives the known output, and what it costs.

Letters: B tiles, D features, h x w places of a map.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from cellbench.config.cards import BackboneCard
from cellbench.config.registry import load
from cellbench.diagnostics.backbone_checks import frozen
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import open_backbone

TILE_PX = 224
TOLERANCE = 1e-3
"""Of a probe, relative and absolute. Seen between one and two threads: 1e-6; with blocks or colours mixed up: 0.05 and more."""
NUM = 8


@dataclass(frozen=True, kw_only=True)
class ProbeCheck:
    """One line of a self-test. ``holds`` is None where there is nothing to compare with."""

    name: str
    told: str
    holds: bool | None


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What ``examine`` found. ``peak_mib`` is None where the system does not tell."""

    checks: tuple[ProbeCheck, ...]
    load_s: float
    tile_px: int
    batch: int
    tiles_per_s: float
    peak_mib: float | None


def test_tile(side_px: int) -> Tensor:
    """A tile (1, 3, H, W) in 0..1 by arithmetic alone, so that it is the same everywhere: ramps, waves and a disc with soft edges.

    No two quadrants and no two colours are alike.
    """
    axis = torch.arange(side_px, dtype=torch.float64) / (side_px - 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    disc = torch.sigmoid(60 * (0.25 - ((x - 0.62) ** 2 + (y - 0.35) ** 2).sqrt()))
    waves = 0.5 + 0.5 * torch.sin(40 * x + 15 * y * y)
    colours = (0.9 - 0.4 * disc - 0.2 * y, 0.8 - 0.6 * disc + 0.1 * waves * x, 0.3 + 0.4 * x + 0.25 * waves * (1 - disc))
    return torch.stack(colours)[None].float().clamp(0, 1)


def fingerprint(backbone: Backbone) -> tuple[float, ...]:
    """What stands on a card as ``probe``: means of the last map of the drawn tile, float32.

    Number i is of channel i*D/8, over the quadrant i mod 4 (top left, top right, bottom left, bottom right): a wrong weight, colour, block
    or order of places changes it.
    """
    pixels = test_tile(tile_px(backbone)).to(backbone.mean.device)
    map_Dhw = backbone(pixels, (backbone.levels[-1].index,))[0][0].float().cpu()
    quadrants = [part for half in map_Dhw.chunk(2, 1) for part in half.chunk(2, 2)]
    return tuple(round(quadrants[i % 4][i * len(map_Dhw) // NUM].mean().item(), 5) for i in range(NUM))


def tile_px(backbone: Backbone) -> int:
    """224, or the next size above it that the backbone takes."""
    return -(-TILE_PX // backbone.tile_multiple_px) * backbone.tile_multiple_px


def probe_backbone(card: BackboneCard, weights: Path | None, here: Hardware) -> ProbeReport:
    """Loads, checks and times a backbone. Downloads nothing: raises WeightsUnavailable for weights that are not on this machine."""
    load(card)  # so that the time to load is not the time to import
    if here.device.type == "cuda":
        torch.cuda.init()
    gc.collect()
    with _peak(here.device) as peak:
        start = time.perf_counter()
        trunk = FrozenBackbone(open_backbone(card, weights, download=False), here, [1])
        load_s = time.perf_counter() - start
        assert trunk.backbone is not None
        checks = tuple(_checks(card, trunk.backbone))
        batch, tiles_per_s = _speed(trunk)
    return ProbeReport(
        checks=checks, load_s=load_s, tile_px=tile_px(trunk.backbone), batch=batch, tiles_per_s=tiles_per_s, peak_mib=peak.mib
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
    told = known if card.probe else f"none on the card; here {numbers}"
    size = f"{millions:.4g} M, {card.params_m:g} M on the card"
    given, stated = tuple(maps[-1].shape[1:]), expected[1:]
    shape = f"{len(maps)} level{'s' * (len(maps) > 1)}, the last {given} for {side} x {side} px; {card.depth} and {stated} by the card"
    return [
        ProbeCheck(name="parameters", told=size, holds=abs(millions - card.params_m) <= max(0.01 * millions, 0.001)),
        ProbeCheck(
            name="shape", told=shape, holds=maps[-1].shape == expected and last.stride_px == card.patch_px and len(maps) == card.depth
        ),
        ProbeCheck(name="values", told="finite at every level" if finite else "some are not finite", holds=finite),
        ProbeCheck(name="frozen", told=trouble or "eval mode, no gradient", holds=not trouble),
        ProbeCheck(name="probe", told=told, holds=same if card.probe else None),
    ]


def _speed(trunk: FrozenBackbone) -> tuple[int, float]:
    """Tiles in a batch and tiles per second, as a cohort would run them: a second of batches, at least two; small ones where slow."""
    assert trunk.backbone is not None
    tile = test_tile(tile_px(trunk.backbone)).to(trunk.machine.device)
    one = min(_seconds(trunk, tile) for _ in range(3))
    batch = max(1, min(trunk.machine.chunk, int(5 / one)))
    tiles = tile.expand(batch, -1, -1, -1).contiguous()
    walls = [_seconds(trunk, tiles)]
    while len(walls) < 2 or (sum(walls) < 1 and len(walls) < 50):
        walls.append(_seconds(trunk, tiles))
    return batch, batch / statistics.median(walls)


def _seconds(trunk: FrozenBackbone, tiles: Tensor) -> float:
    start = time.perf_counter()
    for found in trunk.maps(tiles).values():
        found.flatten()[:1].cpu()  # on a GPU: waits for it
    return time.perf_counter() - start


class _Peak:
    mib: float | None = None


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[_Peak]:
    """The most memory that the block took: of the GPU, or of this process beyond what it held before (Linux)."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    reset = Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what an earlier backbone freed: this one would seem to need nothing
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = psutil.Process().memory_info().rss
    try:
        reset.write_text("5")  # the high-water mark starts anew from here
    except OSError:
        yield peak
        return
    yield peak
    marks = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    peak.mib = (int(marks[0].split()[1]) * 1024 - before) / 2**20
