"""``bench --scale``: cost grows linearly with images, and with runs only by their heads, while memory stays flat.

One epoch each: cohorts of 1 to 27 runs on the same images, then three runs on the same images repeated up to a hundred times and decoded
again at each use, as a dataset larger than memory would be. Then the search for near-duplicates among up to 10,000 images.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cellbench.config.run import RunSpec
from cellbench.console import format_table, number_columns
from cellbench.data.audit.keypoint_matching import find_shared_regions, keypoints
from cellbench.data.audit.perceptual_hash import find_near_pairs, mean_pool, to_grey
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.diagnostics.benchmark_setup import BenchmarkSetup
from cellbench.diagnostics.peak_memory import watch_memory
from cellbench.errors import quantity

NUM_RUNS = (1, 3, 9, 27)
REPEATS = (1, 10, 100)
NUM_COMPARED = (100, 1000, 10_000)
MEASURED = 100
"""Images at most whose features are detected; the others' are made from theirs."""
PIXELS_BYTES = 2**28
"""Memory for decoded images: about 25 images of 1600x1200, far fewer than the largest dataset has."""


@dataclass(frozen=True, kw_only=True)
class CohortCost:
    """The size of a cohort and what it cost."""

    num_runs: int
    num_images: int
    num_tiles: int
    wall_s: float
    head_s: float
    """Time in heads, summed over lanes."""
    trunk_s: float
    """Time in the backbone, summed over lanes."""
    peak_mib: float
    """Largest resident memory of the process."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesCost:
    """What the search for near-duplicates cost among so many images, in processor time."""

    num_images: int
    num_features: int
    detect_s: float
    """To find the features of the images, extrapolated from those that were measured."""
    compare_s: float
    """To compare them all."""
    peak_mib: float

    @property
    def ms_an_image(self) -> float:
        return 1000 * (self.detect_s + self.compare_s) / self.num_images


@dataclass
class ScalingResult:
    """The measurements, by what was varied."""

    machine: str
    backbone: str
    runs: list[CohortCost] = field(default_factory=list)
    images: list[CohortCost] = field(default_factory=list)
    duplicates: list[DuplicatesCost] = field(default_factory=list)


def measure(setup: BenchmarkSetup) -> ScalingResult:
    """Both tables. Trains on all images of the setup and validates on one."""
    out = ScalingResult(machine=setup.machine.name, backbone=setup.backbone)
    given = setup.dataset
    small = _repeated(given, 1)
    _cost(setup, small, _runs(setup, 1, crops=1))  # warms up
    for num in NUM_RUNS:
        setup.say(f"measuring {quantity(num, 'run')} …")
        out.runs.append(_cost(setup, small, _runs(setup, num, crops=4)))
    for times in REPEATS:
        more = _repeated(given, times)
        setup.say(f"measuring {len(more.train)} images …")
        out.images.append(_cost(setup, more, _runs(setup, 3, crops=1)))
    greys = [to_grey(given.read(sample)[0]) for sample in (*given.train, *given.val, *given.test)[:MEASURED]]
    for num in NUM_COMPARED:
        setup.say(f"comparing {num:,} images …")
        out.duplicates.append(cost_of_duplicates(greys, num))
    return out


def cost_of_duplicates(greys: Sequence[np.ndarray], num: int) -> DuplicatesCost:
    """Compares ``num`` different images with the features of ``greys``, grey pictures, as `check` and a split by near-duplicates do.

    Each but the first has the features of two of them, half of each, and noise: so many real images are not at hand, and copies are no work.
    """
    start = time.process_time()
    measured = [keypoints(grey) for grey in greys]
    detect_s = (time.process_time() - start) * num / len(greys)
    rng = np.random.default_rng(0)
    small = [mean_pool(grey) for grey in greys]
    made, thumbnails = list(measured[:num]), list(small[:num])
    while len(made) < num:
        one, other = rng.choice(len(measured), 2, replace=len(measured) < 2)
        made.append(replace(measured[one], descriptors=_mixed(rng, measured[one].descriptors, measured[other].descriptors)))
        thumbnails.append(small[one][:, rng.permutation(64)])
    with watch_memory() as memory:
        start = time.process_time()
        find_near_pairs(thumbnails)
        find_shared_regions(made)
        compare_s = time.process_time() - start
    num_features = sum(len(one.places) for one in made)
    return DuplicatesCost(num_images=num, num_features=num_features, detect_s=detect_s, compare_s=compare_s, peak_mib=memory.peak_mib)


def _mixed(rng: np.random.Generator, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    if not len(one) or not len(other):
        return one
    mixed = 0.6 * one[rng.permutation(len(one))] + 0.6 * other[rng.integers(0, len(other), len(one))] + rng.normal(0, 12, one.shape)
    return mixed.clip(0, 255).astype(np.uint8)


def _runs(setup: BenchmarkSetup, num: int, crops: int) -> list[RunSpec]:
    """Each head equally often, each run at its own learning rate."""
    heads = itertools.islice(itertools.cycle(setup.heads), num)
    return [setup.run(head, 1e-3 * (1 + k / 100), epochs=1, crops_per_image=crops) for k, head in enumerate(heads)]


def _repeated(dataset: Dataset, times: int) -> Dataset:
    """All images, repeated, to train on; one to validate on."""
    every = [*dataset.train, *dataset.val, *dataset.test]
    train = tuple(replace(sample, name=f"{n}-{k}-{sample.name}") for n in range(times) for k, sample in enumerate(every))
    return replace(dataset, train=train, val=dataset.val[:1], test=dataset.test[:1])


def _cost(setup: BenchmarkSetup, dataset: Dataset, runs: list[RunSpec]) -> CohortCost:
    setup.dataset, setup.pixels = dataset, {split: ImageCache(dataset, split, PIXELS_BYTES) for split in SPLITS}
    with watch_memory() as memory:
        wall_s, trainers = setup.fitted(runs)
    return CohortCost(
        num_runs=len(runs),
        num_images=len(dataset.train),
        num_tiles=len(dataset.train) * runs[0].crops_per_image,
        wall_s=wall_s,
        head_s=sum(trainer.train_s for trainer in trainers),
        trunk_s=setup.trunk_s,
        peak_mib=memory.peak_mib,
    )


def table(found: ScalingResult) -> str:
    """The measurements as text."""
    first = found.runs[0]
    runs = [
        (
            str(p.num_runs), f"{p.wall_s:.1f}", f"{p.wall_s / first.wall_s:.1f} x", f"{p.wall_s / p.num_runs:.2f}", f"{p.trunk_s:.1f}",
            f"{p.peak_mib:,.0f}",
        )
        for p in found.runs
    ]  # fmt: skip
    images = [(str(p.num_images), f"{p.wall_s:.1f}", f"{1000 * p.wall_s / p.num_images:.0f}", f"{p.peak_mib:,.0f}") for p in found.images]
    duplicates = [
        (
            f"{p.num_images:,}",
            f"{p.num_features:,}",
            f"{p.detect_s:.1f}",
            f"{p.compare_s:.1f}",
            f"{p.ms_an_image:.0f}",
            f"{p.peak_mib:,.0f}",
        )
        for p in found.duplicates
    ]
    by_runs, by_images, by_compared = (
        format_table(number_columns(*headings), rows)
        for headings, rows in (
            (("runs", "wall s", "against one run", "s a run", "backbone s", "peak MiB"), runs),
            (("images", "wall s", "ms an image", "peak MiB"), images),
            (("images compared", "features", "detect s", "compare s", "ms an image", "peak MiB"), duplicates),
        )
    )
    compared = ["", "Near-duplicates, processor seconds:", "", *by_compared] if duplicates else []
    return "\n".join([f"{found.backbone} on {found.machine}, one epoch each", "", *by_runs, "", *by_images, *compared])
