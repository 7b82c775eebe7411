"""Estimates the cost of a grid from a few tiles timed on this machine, for ``--dry-run``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.cell_targets.base import CellTarget
from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.features.extractor import Batch, CachePolicy, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.models.backbones.build import open_backbone
from cellbench.training.fit import NoRecorder
from cellbench.training.measured_cost import decode, seconds
from cellbench.training.memory_check import InsufficientMemoryError, why_frames_too_large
from cellbench.training.model import build_model, num_levels
from cellbench.training.trainer import HeadTrainer


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The expected cost of one cohort. Early stopping may make it cheaper."""

    num_runs: int
    train_tiles: int
    """Tiles through the backbone per epoch."""
    val_tiles: int
    test_tiles: int
    backbone_tiles_per_s: float
    """inf for runs that only read pixels."""
    wall_s: float
    memory_mib: float
    disk_mib: float
    source: str


def estimate_cost(
    runs: list[RunSpec], registry: Registry, dataset: Dataset, machine: Hardware, weights: Path | None, policy: CachePolicy
) -> Cost:
    """Times one chunk through the backbone and one step of each head, and extrapolates.

    Raises InsufficientMemoryError before computing anything if whole images would not fit into memory.
    """
    first = runs[0]
    backbone = open_backbone(registry.backbone(first.backbone), weights) if first.backbone else None
    frozen = FrozenBackbone(backbone, machine, [n for run in runs if (n := num_levels(registry.part(run)))], first.unfreeze)
    pixels = {split: ImageCache(dataset, split, 0) for split in SPLITS}
    plan = SamplingPlan(pixels["train"].sizes_px, first, registry, pixels["train"].boxes_px)
    features = Features(frozen, plan, pixels, policy)
    tiles = {split: sum(len(features.grid(split, i)) for i in range(len(pixels[split]))) for split in ("val", "test")}

    all_made = [build_model(run, registry.part(run), frozen, len(dataset.classes)) for run in runs]
    if reason := why_frames_too_large(runs, all_made, features):
        raise InsufficientMemoryError(reason)
    tile = torch.rand(frozen.chunk, 3, *features.tile_px["train"], device=machine.device)
    target = torch.zeros(tile.shape[0], *features.tile_px["train"], dtype=torch.long, device=machine.device)
    backbone_s = seconds(lambda: frozen.maps(tile), machine) / len(tile)
    learned: dict[str, CellTarget] = {run.targets: one for run in runs if (one := TARGETS[run.targets]) is not None}
    cell_targets = {
        name: torch.zeros(*target.shape, len(one.channels), dtype=torch.uint8, device=machine.device) for name, one in learned.items()
    }
    batch = Batch(frozen.maps(tile), tile, target, cell_targets)
    epochs = max(run.epochs for run in runs)
    again = {"val": epochs, "train": epochs}
    passes = {split: 1 if features.place[split] != "streamed" else again[split] for split in again}
    tiles["train"] = plan.num_views * (min(epochs, plan.run.repeat_views_every) if features.place["train"] != "streamed" else 1)
    orientations = max(len(made.tta_codes) for made in all_made)
    wall = backbone_s * (sum(tiles[split] * times for split, times in passes.items()) + tiles["test"] * orientations)
    disk = 0.0
    for run, made in zip(runs, all_made, strict=True):
        trainer = HeadTrainer(run=run, model=made, recorder=NoRecorder(), num_views=batch.num, registry=registry).on(features)
        step_s = seconds(functools.partial(_train_once, trainer, batch), machine) / batch.num
        made.eval()
        decode_s = seconds(functools.partial(decode, made, batch, machine), machine) / batch.num
        own_epochs = 0 if run.ensemble != "none" else run.epochs  # the members of an ensemble are runs of their own
        wall += own_epochs * (plan.num_views * step_s + tiles["val"] * decode_s) + tiles["test"] * decode_s * len(made.tta_codes)
        disk += 4 * made.num_params / 2**20 + 3  # weights and three pictures
    held = sum(p.numel() * 4 for p in backbone.parameters()) if backbone is not None else 0
    kept = sum(size for split, size in features.bytes_by_split.items() if features.place[split] == "in memory")
    disk += sum(size for split, size in features.bytes_by_split.items() if features.place[split] == "on disk") / 2**20
    decoded = sum(4 * h * w for split in pixels.values() for h, w in split.sizes_px)
    return Cost(
        num_runs=len(runs),
        train_tiles=plan.num_views,
        val_tiles=tiles["val"],
        test_tiles=tiles["test"],
        backbone_tiles_per_s=1 / backbone_s if backbone is not None else float("inf"),
        wall_s=wall / machine.lanes,
        # 700 MiB: Python with torch, MLflow and the drawing libraries loaded, measured.
        memory_mib=700 + (held + kept + min(decoded, machine.memory_bytes // 3)) / 2**20,
        disk_mib=disk,
        source=features.source,
    )


def _train_once(trainer: HeadTrainer, batch: Batch) -> None:
    trainer.start_epoch()
    trainer.train_on(batch)


def format_duration(seconds: float) -> str:
    """``95 s``, ``12 min`` or ``3.4 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
