"""``bench --scale``: cost grows linearly with images, and with runs only by their heads, while memory stays flat.

One epoch each: cohorts of 1 to 27 runs on the same images, then three runs on the same images repeated up to a hundred times, decoded
again each time they are needed, as a set larger than memory would be.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import psutil

from cellbench.config.run import RunSpec
from cellbench.data.dataset import Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.diagnostics.speed import HEADS, BenchmarkSetup

NUM_RUNS = (1, 3, 9, 27)
REPEATS = (1, 10, 100)
PIXELS_BYTES = 2**28
"""For decoded images: some 25 of 1600x1200, far fewer than the largest set has."""


@dataclass(frozen=True, kw_only=True)
class CohortCost:
    """One cohort: what it was, and what it cost."""

    num_runs: int
    num_images: int
    num_tiles: int
    wall_s: float
    head_s: float
    """Of all lanes together, spent in heads."""
    trunk_s: float
    peak_mib: float
    """Resident memory of the process while it ran, at most."""


@dataclass
class ScalingResult:
    """What was measured, by what was varied."""

    machine: str
    backbone: str
    runs: list[CohortCost] = field(default_factory=list)
    images: list[CohortCost] = field(default_factory=list)


def measure(world: BenchmarkSetup, say: Callable[[str], None]) -> ScalingResult:
    """Both tables; ``world`` gives the machine, the backbone and the images, all of which are trained on but one to validate."""
    out = ScalingResult(machine=world.machine.name, backbone=world.backbone)
    given = world.dataset
    small = _repeated(given, 1)
    _point(world, small, _runs(world, 1, crops=1))  # warms up
    for num in NUM_RUNS:
        say(f"measuring {num} run{'s' * (num > 1)} …")
        out.runs.append(_point(world, small, _runs(world, num, crops=4)))
    for times in REPEATS:
        more = _repeated(given, times)
        say(f"measuring {len(more.train)} images …")
        out.images.append(_point(world, more, _runs(world, 3, crops=1)))
    return out


def _runs(world: BenchmarkSetup, num: int, crops: int) -> list[RunSpec]:
    """Every head as often as the others, at rates of their own."""
    heads = itertools.islice(itertools.cycle(HEADS), num)
    return [world.run(head, 1e-3 * (1 + k / 100), epochs=1, crops_per_image=crops) for k, head in enumerate(heads)]


def _repeated(dataset: Dataset, times: int) -> Dataset:
    """All images, so many times over, to train on; one to validate on."""
    every = [*dataset.train, *dataset.val, *dataset.test]
    train = tuple(replace(sample, name=f"{n}-{k}-{sample.name}") for n in range(times) for k, sample in enumerate(every))
    return replace(dataset, train=train, val=dataset.val[:1], test=dataset.test[:1])


def _point(world: BenchmarkSetup, dataset: Dataset, runs: list[RunSpec]) -> CohortCost:
    world.dataset, world.pixels = dataset, {split: ImageCache(dataset, split, PIXELS_BYTES) for split in ("train", "val", "test")}
    with _peak() as peak:
        wall_s, learners = world.fitted(runs)
    num_tiles = len(dataset.train) * runs[0].crops_per_image
    return CohortCost(
        num_runs=len(runs),
        num_images=len(dataset.train),
        num_tiles=num_tiles,
        wall_s=wall_s,
        head_s=sum(learner.train_s for learner in learners),
        trunk_s=world.trunk_s,
        peak_mib=peak[0],
    )


@contextlib.contextmanager
def _peak() -> Iterator[list[float]]:
    """The most resident memory, MiB, seen within the block, looked at ten times a second."""
    process, over, seen = psutil.Process(), threading.Event(), [0.0]

    def look() -> None:
        while not over.wait(0.1):
            seen[0] = max(seen[0], process.memory_info().rss / 2**20)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen[0] = max(seen[0], process.memory_info().rss / 2**20)


def table(found: ScalingResult) -> str:
    """The measurements as text."""
    lines = [f"{found.backbone} on {found.machine}, one epoch each", ""]
    first = found.runs[0]
    lines.append("runs  wall s  against one run  s a run  trunk s  peak MiB")
    lines += [
        f"{p.num_runs:4}  {p.wall_s:6.1f}  {p.wall_s / first.wall_s:13.1f} x  {p.wall_s / p.num_runs:7.2f}  {p.trunk_s:7.1f}  {p.peak_mib:8,.0f}"
        for p in found.runs
    ]
    lines += ["", "images  wall s  ms an image  peak MiB"]
    lines += [f"{p.num_images:6}  {p.wall_s:6.1f}  {1000 * p.wall_s / p.num_images:11.0f}  {p.peak_mib:8,.0f}" for p in found.images]
    return "\n".join(lines)


def as_json(found: ScalingResult) -> str:
    """The measurements for a machine."""
    return json.dumps(asdict(found), indent=1)
