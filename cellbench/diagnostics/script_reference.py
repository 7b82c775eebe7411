"""What an expert's plain script does: features cached once, heads trained one after another in float32, the best epoch tested on whole images.

``bench`` runs it as a process of its own beside ``grid``, with the same images, backbone, heads and learning rates. It uses cellbench's images,
splits and head modules, so that both train the same networks, and nothing of its harness: no tracking, no instance scores, no figures, no report.

    python -m cellbench.diagnostics.script_reference '{"dataset": "bccd", …}'        # prints {"dice": …}
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry, load
from cellbench.data.dataset import SPLITS
from cellbench.data.loading import open_dataset
from cellbench.models.backbones.base import Backbone, Level
from cellbench.models.backbones.build import open_backbone

TILE_PX = 224
STEP_PX = 168
"""Of test tiles, which overlap by a quarter; validation tiles do not overlap."""
BATCH_SIZE = 8
Tile = tuple[np.ndarray, np.ndarray]
"""Pixels (T, T, 3) uint8, and the mask (T, T)."""
CHUNK = 64
"""Tiles that go through a network at once where nothing is trained."""


@dataclass(frozen=True, kw_only=True)
class ScriptSettings:
    """What to train, as JSON on the command line."""

    dataset: str
    """A dataset card."""
    data: str = ""
    limit: int | None = None
    draw: dict[str, Any] = dataclasses.field(default_factory=dict)
    backbone: str
    weights: str = ""
    heads: list[str]
    rates: list[float]
    epochs: int
    crops_per_image: int
    device: str = "cpu"


class Prepared(NamedTuple):
    """What is trained and tested on: tiles and their masks, and the network that describes them."""

    registry: Registry
    num_classes: int
    backbone: Backbone
    levels: tuple[Level, ...]
    """Those that any of the heads reads."""
    train: list[Tile]
    val: list[Tile]
    test: list[Tile]
    """Whole images, padded to a tile at least, and their masks."""


def prepare(settings: ScriptSettings) -> Prepared:
    """Opens images and backbone, and draws the crops."""
    registry = Registry()
    spec = DataSpec(limit=settings.limit, draw=settings.draw)
    dataset = open_dataset(registry.dataset(settings.dataset), Path(settings.data) if settings.data else None, spec)
    backbone = open_backbone(registry.backbone(settings.backbone), Path(settings.weights) if settings.weights else None)
    read = {split: [(padded(image), padded(mask)) for image, mask in map(dataset.read, getattr(dataset, split))] for split in SPLITS}
    rng = np.random.default_rng(0)
    crops = [
        (cut(image, y, x), cut(mask, y, x))
        for image, mask in read["train"]
        for y, x in zip(*(rng.integers(0, side - TILE_PX + 1, settings.crops_per_image) for side in mask.shape), strict=True)
    ]
    return Prepared(
        registry=registry,
        num_classes=len(dataset.classes),
        backbone=backbone.to(settings.device).eval(),
        levels=backbone.pick(max(registry.head(name).levels for name in settings.heads)),
        train=crops,
        val=[(cut(image, y, x), cut(mask, y, x)) for image, mask in read["val"] for y, x in corners(mask, TILE_PX)],
        test=read["test"],
    )


def run(settings: ScriptSettings) -> float:
    """Trains every head at every rate; returns the best mean Dice of the cell class over the test images."""
    device = torch.device(settings.device)
    registry, num_classes, backbone, levels, crops, tiles, images = prepare(settings)

    def features(tiles: list[np.ndarray]) -> tuple[list[Tensor], Tensor]:
        pixels_BCTT = torch.from_numpy(np.stack(tiles)).to(device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            maps = [backbone(part, tuple(level.index for level in levels)) for part in pixels_BCTT.split(CHUNK)]
        return [torch.cat(level).clone() for level in zip(*maps, strict=True)], pixels_BCTT

    train = *features([image for image, _ in crops]), torch.from_numpy(np.stack([mask for _, mask in crops])).to(device).long()
    val = *features([image for image, _ in tiles]), torch.from_numpy(np.stack([mask for _, mask in tiles])).to(device)
    test = [(*features([cut(image, y, x) for y, x in corners(mask, STEP_PX)]), mask) for image, mask in images]

    best = 0.0
    for name in settings.heads:
        card = registry.head(name)
        own = backbone.pick(card.levels)
        used = [levels.index(level) for level in own]
        for rate in settings.rates:
            torch.manual_seed(0)
            head = load(card)(own, num_classes, **card.options).to(device)
            fit(head, used, train, val, rate, settings.epochs)
            best = max(best, float(np.mean([whole_image(head, used, maps, pixels, mask) for maps, pixels, mask in test])))
    return best


def fit(head: nn.Module, used: list[int], train: Any, val: Any, rate: float, epochs: int) -> None:
    """AdamW, cross-entropy and Dice in equal parts, a cosine schedule; keeps the epoch with the best validation Dice."""
    maps, pixels, target = train
    optimiser = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=1e-4)
    steps, step, best, weights = epochs * math.ceil(len(pixels) / BATCH_SIZE), 0, -1.0, head.state_dict()
    for _ in range(epochs):
        head.train()
        for rows in torch.randperm(len(pixels)).split(BATCH_SIZE):
            rows = rows.to(pixels.device)
            for group in optimiser.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = head([maps[k][rows] for k in used], pixels[rows])
            optimiser.zero_grad()
            loss(logits, target[rows]).backward()
            optimiser.step()
            step += 1
        score = dice(scores(head, used, val[0], val[1]).argmax(1), val[2])
        if score > best:
            best, weights = score, {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(weights)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    cell, found = (target == 1).float(), logits.softmax(1)[:, 1]
    overlap = 1 - 2 * (found * cell).sum() / (found.sum() + cell.sum() + 1e-7)
    return 0.5 * F.cross_entropy(logits, target) + 0.5 * overlap


def scores(head: nn.Module, used: list[int], maps: list[Tensor], pixels: Tensor) -> Tensor:
    head.eval()
    with torch.inference_mode():
        parts = [slice(i, i + CHUNK) for i in range(0, len(pixels), CHUNK)]
        return torch.cat([head([maps[k][part] for k in used], pixels[part]).softmax(1) for part in parts])


def whole_image(head: nn.Module, used: list[int], maps: list[Tensor], pixels: Tensor, mask: np.ndarray) -> float:
    """Dice of an image whose overlapping tiles are averaged."""
    total, times = torch.zeros(2, *mask.shape, device=pixels.device), torch.zeros(mask.shape, device=pixels.device)
    for (y, x), tile in zip(corners(mask, STEP_PX), scores(head, used, maps, pixels), strict=True):
        total[:, y : y + TILE_PX, x : x + TILE_PX] += tile[:2]
        times[y : y + TILE_PX, x : x + TILE_PX] += 1
    return dice((total / times).argmax(0).cpu(), torch.from_numpy(mask))


def dice(found: Tensor, true: Tensor) -> float:
    found, true = found == 1, true == 1
    return float(2 * (found & true).sum() / (found.sum() + true.sum()).clamp_min(1))


def corners(mask: np.ndarray, step_px: int) -> list[tuple[int, int]]:
    sides = [[*range(0, side - TILE_PX, step_px), side - TILE_PX] for side in mask.shape]
    return [(y, x) for y in sides[0] for x in sides[1]]


def padded(array: np.ndarray) -> np.ndarray:
    """At least as large as a tile, by repeating the last row and column."""
    missing = [(0, max(0, TILE_PX - side)) for side in array.shape[:2]]
    return np.pad(array, [*missing, *[(0, 0)] * (array.ndim - 2)], mode="edge")


def cut(array: np.ndarray, y: int, x: int) -> np.ndarray:
    return array[y : y + TILE_PX, x : x + TILE_PX]


if __name__ == "__main__":
    print(json.dumps({"dice": run(ScriptSettings(**json.loads(sys.argv[1])))}))
