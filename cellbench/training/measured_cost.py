"""What training and inference of a run took: the timers of its model, and short timings on this machine."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cellbench.data.image_cache import ImageCache
from cellbench.features.extractor import Batch, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware, peak_memory_mib
from cellbench.system_load import SystemLoad
from cellbench.training.model import SegmentationModel
from cellbench.training.tiled_inference import segment_images
from cellbench.training.trainer import HeadTrainer

MEASURED_S = 1.0
"""Shorter timings are repeated: within a few hundredths of a second, other processes dominate the result."""
MOST_PASSES = 50


def training_cost(trainer: HeadTrainer, features: Features) -> dict[str, float]:
    """What the training of a run took, as metrics."""
    frozen, cores = features.backbone, features.backbone.machine.cores_of_one
    return {
        "cost/backbone_params": sum(p.numel() for p in frozen.module.parameters()) if frozen.module is not None else 0,
        "cost/peak_mib": peak_memory_mib(),
        "cost/features_mib": features.cached_bytes / 2**20,
        "cost/train_s": trainer.train_s + trainer.trunk_s,
        "cost/train_cpu_s": (trainer.train_cpu_s + trainer.trunk_cpu_s) * cores,
        "cost/head_s": trainer.train_s,
        "cost/head_cpu_s": trainer.train_cpu_s * cores,
        "cost/trunk_s": trainer.trunk_s,
        "cost/trunk_cpu_s": trainer.trunk_cpu_s * cores,
        "cost/head_params": trainer.model.num_params,
    }


@dataclass(frozen=True, kw_only=True)
class InferenceSpeed:
    """Time of a model for one image in one thread, the backbone included."""

    wall_s: float
    cpu_s: float
    """CPU time of that thread."""


def inference_speeds(models: Sequence[SegmentationModel], features: Features) -> list[InferenceSpeed]:
    """Time per test image of each model, from the timers of the first pass over the test images since :func:`reset_timers`.

    If some model took less than ``MEASURED_S``, the pass is repeated, for as long in all, and the first, cold pass does not count. Cached features take the
    backbone no time here: its part is then that of one chunk, timed now.
    """
    frozen, num, passes = features.backbone, len(features.pixels["test"]), 1

    def shortest() -> float:
        return min(frozen.seconds + made.seconds for made in models)

    if shortest() < MEASURED_S:
        reset_timers(frozen, models)
        passes, begun = 0, time.perf_counter()
        while not passes or (shortest() < MEASURED_S and passes < MOST_PASSES and time.perf_counter() - begun < MEASURED_S):
            for _ in segment_images(models, features, "test"):
                pass
            passes += 1
    backbone_s, backbone_cpu_s = frozen.seconds / passes / num, frozen.cpu_seconds / passes / num
    if frozen.module is not None and features.place["test"] != "streamed":
        tile = torch.rand(frozen.chunk, 3, *features.tile_px["test"], device=frozen.machine.device)
        tiles = sum(len(features.grid("test", k)) for k in range(num)) / num
        backbone_s, backbone_cpu_s = (tiles * spent / frozen.chunk for spent in spent(lambda: frozen.maps(tile), frozen.machine))
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
    backbone_s = seconds(lambda: frozen.maps(tile), frozen.machine)
    for made in models:
        made.eval()
    heads_s = [seconds(functools.partial(decode, made, batch, frozen.machine), frozen.machine) for made in models]
    return [1000 * num * (backbone_s + head_s) / frozen.chunk for head_s in heads_s]


def load_metric(name: str, load: SystemLoad) -> dict[str, float]:
    """The load by other processes as a metric; empty if unknown."""
    return {} if (pct := load.others_pct()) is None else {name: pct}


@torch.no_grad()
def decode(made: Any, batch: Batch, machine: Hardware) -> None:
    with machine.autocast():
        made(batch).float().softmax(1)


def seconds(work: Callable[[], object], machine: Hardware) -> float:
    return spent(work, machine)[0]


SHORT_S, MAX_REPEATS = 0.1, 5


def spent(work: Callable[[], object], machine: Hardware) -> tuple[float, float]:
    """Wall and CPU seconds of the fastest of two calls, or up to five if they are short, after one warm-up call."""
    timings: list[tuple[float, float]] = []
    while len(timings) < 3 or (len(timings) <= MAX_REPEATS and sum(wall_s for wall_s, _ in timings[1:]) < SHORT_S):
        start, start_cpu = time.perf_counter(), time.thread_time()
        work()
        machine.wait()
        timings.append((time.perf_counter() - start, time.thread_time() - start_cpu))
    return min(timings[1:])
