"""Estimates the cost of a grid from a few tiles timed on this machine, for ``--dry-run``."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.cell_targets.base import CellTarget
from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.data.dataset import Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.features.extractor import Batch, CachePolicy, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.models.backbones.build import open_backbone
from cellbench.training.fit import NoRecorder
from cellbench.training.memory_check import InsufficientMemoryError, why_frames_too_large
from cellbench.training.model import SegmentationModel, build_model, num_levels
from cellbench.training.tiled_inference import segment_images
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
    pixels = {split: ImageCache(dataset, split, 0) for split in ("train", "val", "test")}
    plan = SamplingPlan(pixels["train"].sizes_px, first, registry, pixels["train"].boxes_px)
    features = Features(frozen, plan, pixels, policy)
    tiles = {split: sum(len(features.grid(split, i)) for i in range(len(pixels[split]))) for split in ("val", "test")}

    all_made = [build_model(run, registry.part(run), frozen, len(dataset.classes)) for run in runs]
    if reason := why_frames_too_large(runs, all_made, features):
        raise InsufficientMemoryError(reason)
    tile = torch.rand(frozen.chunk, 3, *features.tile_px["train"], device=machine.device)
    target = torch.zeros(tile.shape[0], *features.tile_px["train"], dtype=torch.long, device=machine.device)
    backbone_s = _seconds(lambda: frozen.maps(tile), machine) / len(tile)
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
        step_s = _seconds(functools.partial(_train_once, trainer, batch), machine) / batch.num
        made.eval()
        decode_s = _seconds(functools.partial(_decode, made, batch, machine), machine) / batch.num
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


MEASURED_S = 1.0
"""Shorter timings are repeated: within a few hundredths of a second, other processes dominate the result."""
MOST_PASSES = 50


@dataclass(frozen=True, kw_only=True)
class InferenceSpeed:
    """Time of a model for one image in one thread, the backbone included."""

    wall_s: float
    cpu_s: float
    """CPU time of that thread."""


def inference_speeds(models: Sequence[SegmentationModel], features: Features) -> list[InferenceSpeed]:
    """Time per test image of each model, from the timers of the first pass over the test images since :func:`reset_timers`.

    If some model took less than ``MEASURED_S``, the pass is repeated, and the first, cold pass does not count. Cached features take the
    backbone no time here: its part is then that of one chunk, timed now.
    """
    frozen, num, passes = features.backbone, len(features.pixels["test"]), 1

    def shortest() -> float:
        return min(frozen.seconds + made.seconds for made in models)

    if shortest() < MEASURED_S:
        reset_timers(frozen, models)
        passes, begun = 0, time.perf_counter()
        while not passes or (shortest() < MEASURED_S and passes < MOST_PASSES and time.perf_counter() - begun < 3 * MEASURED_S):
            for _ in segment_images(models, features, "test"):
                pass
            passes += 1
    backbone_s, backbone_cpu_s = frozen.seconds / passes / num, frozen.cpu_seconds / passes / num
    if frozen.module is not None and features.place["test"] != "streamed":
        tile = torch.rand(frozen.chunk, 3, *features.tile_px["test"], device=frozen.machine.device)
        tiles = sum(len(features.grid("test", k)) for k in range(num)) / num
        backbone_s, backbone_cpu_s = (tiles * spent / frozen.chunk for spent in _spent(lambda: frozen.maps(tile), frozen.machine))
    return [
        InferenceSpeed(wall_s=backbone_s + made.seconds / passes / num, cpu_s=backbone_cpu_s + made.cpu_seconds / passes / num)
        for made in models
    ]


def function_speed(work: Callable[[Any], object], images: ImageCache) -> InferenceSpeed:
    """As :func:`inference_speeds`, for an untrained method, after a first pass over the images: passes of ``MEASURED_S`` in total."""
    wall_s = cpu_s = 0.0
    passes = 0
    while not passes or (wall_s < MEASURED_S and passes < MOST_PASSES):
        for k in range(len(images)):
            image = images[k][0]
            start, start_cpu = time.perf_counter(), time.thread_time()
            work(image)
            wall_s, cpu_s = wall_s + time.perf_counter() - start, cpu_s + time.thread_time() - start_cpu
        passes += 1
    return InferenceSpeed(wall_s=wall_s / passes / len(images), cpu_s=cpu_s / passes / len(images))


def reset_timers(frozen: FrozenBackbone, models: Sequence[SegmentationModel]) -> None:
    """Sets the timers to zero."""
    frozen.seconds = frozen.cpu_seconds = 0.0
    for made in models:
        made.seconds = made.cpu_seconds = 0.0


def latencies_ms(models: Sequence[SegmentationModel], features: Features) -> list[float]:
    """Milliseconds of each model for the validation image of median size.

    Covers backbone and head for all its tiles at the test's overlap, extrapolated from one chunk timed now. Excludes file decoding and blending.
    """
    frozen, sizes = features.backbone, sorted(features.pixels["val"].sizes_px, key=math.prod)
    tile_px = features.tile_px["val"]
    num = len(features.framing.grid(sizes[len(sizes) // 2], tile_px, features.plan.run.overlap))
    tile = torch.rand(frozen.chunk, 3, *tile_px, device=frozen.machine.device)
    batch = Batch(frozen.maps(tile), tile, torch.zeros(frozen.chunk, *tile_px, dtype=torch.long, device=frozen.machine.device))
    backbone_s = _seconds(lambda: frozen.maps(tile), frozen.machine)
    for made in models:
        made.eval()
    heads_s = [_seconds(functools.partial(_decode, made, batch, frozen.machine), frozen.machine) for made in models]
    return [1000 * num * (backbone_s + head_s) / frozen.chunk for head_s in heads_s]


def _train_once(trainer: HeadTrainer, batch: Batch) -> None:
    trainer.start_epoch()
    trainer.train_on(batch)


@torch.no_grad()
def _decode(made: Any, batch: Batch, machine: Hardware) -> None:
    with machine.autocast():
        made(batch).float().softmax(1)


def _seconds(work: Callable[[], object], machine: Hardware) -> float:
    return _spent(work, machine)[0]


SHORT_S, MAX_REPEATS = 0.1, 5


def _spent(work: Callable[[], object], machine: Hardware) -> tuple[float, float]:
    """Wall and CPU seconds of the fastest of two calls, or up to five if they are short, after one warm-up call."""
    timings: list[tuple[float, float]] = []
    while len(timings) < 3 or (len(timings) <= MAX_REPEATS and sum(wall_s for wall_s, _ in timings[1:]) < SHORT_S):
        start, start_cpu = time.perf_counter(), time.thread_time()
        work()
        machine.wait()
        timings.append((time.perf_counter() - start, time.thread_time() - start_cpu))
    return min(timings[1:])


def format_duration(seconds: float) -> str:
    """``95 s``, ``12 min`` or ``3.4 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
