"""The feature pass: tiles in, a backbone's maps out, once for all runs of a cohort.

``Features.train(epoch)`` and ``Features.tiles(split)`` yield the batches that all runs of the cohort train on or decode. Maps are computed when
needed (streamed), or cached if views repeat and space allows. The numbers are the same, to the last bit on a CPU.

Letters: B tiles, D features, h x w places of a map, T x T a tile (which need not be square).
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.augmentation import Draws, apply_all
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.sampling import SamplingPlan, TileSamples
from cellbench.data.transforms.tiling import TileGrid
from cellbench.errors import CellbenchError, one_line
from cellbench.features.cache_admin import features_dir
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.memory_cache import FeatureCache, MemoryCache
from cellbench.features.remote_cache import RemoteCache
from cellbench.features.sharded_cache import ShardedCache, num_shards
from cellbench.features.tile_cutting import DeviceCutter, HostCutter, TileCutter, Tiles
from cellbench.files import text_digest
from cellbench.parallel import WorkerPool


class Batch(NamedTuple):
    """Tiles, their maps and their targets."""

    maps: dict[int, Tensor]
    """(B, D, h, w) by level index."""
    pixels: Tensor
    """(B, 3, T, T) float32, 0..1."""
    target: Tensor
    """(B, T, T) int64."""
    cell_targets: dict[str, Tensor] = {}  # noqa: RUF012  never changed
    """(B, T, T, A) uint8, by the names of the targets that runs of the cohort train on (``cellbench.data.cell_targets``)."""
    ignoring: bool = False
    """Whether any pixel of the target is ``metrics.pixel.IGNORE``."""

    def __getitem__(self, rows: slice) -> Batch:  # type: ignore[override]
        maps = {index: x[rows] for index, x in self.maps.items()}
        cell_targets = {name: x[rows] for name, x in self.cell_targets.items()}
        return Batch(maps, self.pixels[rows], self.target[rows], cell_targets, self.ignoring)

    @property
    def num(self) -> int:
        return len(self.pixels)


def non_finite_reason(features: Features) -> str:
    """A sentence if the backbone's maps contain non-finite values, else an empty string.

    Computes the validation tiles and an epoch of training views; use it for failed runs only.
    """
    if features.backbone.module is None:
        return ""
    with WorkerPool(features.backbone.machine.lanes) as pool:
        for batch in itertools.chain((batch for batch, _ in features.tiles("val", pool)), features.train(0, pool)):
            if not all(bool(torch.isfinite(x).all()) for x in batch.maps.values()):
                hint = "" if features.backbone.machine.precision == torch.float32 else " Try --precision fp32."
                return f"the backbone's features are not finite (NaN or infinite).{hint}"
    return ""


@functools.cache
def _planner() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "planner")


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """Where features may be cached, how many bytes, and under which key."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    prefer_disk: bool = False
    """Whether to cache on disk even what would fit into memory, for later calls."""
    key: str = ""
    """Identifies backbone, weights and versions; empty: no disk cache."""
    backbone: str = ""
    dataset: str = ""
    shared: RemoteCache | None = None
    """The shared cache for machines without a common folder."""
    tell: Callable[[str], None] = print
    """Called with messages about the cache."""


@dataclass(frozen=True, kw_only=True)
class FeaturePass:
    """A fixed list of tiles that pass through a backbone, and the folder of their cached features."""

    split: str
    number: int
    """Number of the cycle of training views; 0 for other splits."""
    num: int
    """Tiles."""
    folder: str


class Features:
    """The batches of one cohort. ``pixels``: decoded images by split; ``cell_targets``: the names of those in training and validation batches."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        plan: SamplingPlan,
        pixels: dict[str, ImageCache],
        policy: CachePolicy,
        cell_targets: Sequence[str] = (),
    ) -> None:
        self.backbone, self.plan, self.pixels, self._policy = backbone, plan, pixels, policy
        self._cell_targets = {name: target for name in sorted(set(cell_targets)) if (target := TARGETS[name]) is not None}
        self.framing = plan.framing
        self.tile_px = {split: self.framing.tile_px(pixels[split].sizes_px) for split in pixels} | {"train": plan.tile_px}
        """Height and width of the tiles of each split."""
        if self.framing.whole:
            backbone.chunk = 1  # whole images: one of 1600x1200 has the tokens of 40 tiles
        self._passes: dict[tuple[str, int], FeatureCache | None] = {}
        self._cutters: dict[str, TileCutter] = {}
        self._planned: dict[int, Future[TileSamples]] = {}
        sizes = {
            split: backbone.map_bytes(self.tile_px[split]) * sum(len(self.grid(split, i)) for i in range(len(pixels[split])))
            for split in ("val", "test")
        }
        sizes["train"] = backbone.map_bytes(self.tile_px["train"]) * plan.num_views * plan.run.repeat_views_every
        self._cache_lock = threading.Lock()
        self.bytes_by_split = sizes
        self.place = self._places(sizes) if any(sizes.values()) else dict.fromkeys(sizes, "streamed")

    @cached_property
    def preparation(self) -> Preparation:
        """The preparation of every image. A stain normaliser is fitted to the used training images at the first access."""
        train = self.pixels["train"]
        normaliser = train.normaliser(self.plan.run.normalise, self.plan.used_images)
        return Preparation(framing=self.framing, normaliser=normaliser, reading=train.reading, um_per_px=train.um_per_px)

    def _places(self, sizes: dict[str, int]) -> dict[str, str]:
        """Where each split's features are cached. Validation comes first: it is used in every epoch."""
        policy, place = self._policy, {}
        memory, disk = policy.memory_bytes, policy.disk_bytes if policy.key else 0
        for split in ("val", "train", "test"):
            size, again = sizes[split], split == "val" or (split == "train" and self.plan.repeats)
            # Test tiles are used once per call: cached on disk for the next call, never in memory.
            on_disk = size <= disk and (again or (split == "test" and policy.prefer_disk))
            in_memory = size <= memory and again
            place[split] = "on disk" if on_disk and (policy.prefer_disk or not in_memory) else "in memory" if in_memory else "streamed"
            memory -= size if place[split] == "in memory" else 0
            disk -= size if place[split] == "on disk" else 0
        return place

    @property
    def source(self) -> str:
        """A description of where features come from."""
        if self.backbone.module is None:
            return "pixels only"
        words = {
            split: place if place == "streamed" else f"cached {place} ({self.bytes_by_split[split] / 2**20:,.0f} MiB)"
            for split, place in self.place.items()
        }
        return f"features: training {words['train']}, validation {words['val']}, test {words['test']}"

    @property
    def cached_bytes(self) -> int:
        """Bytes of features cached in memory or on disk for this cohort, over all splits."""
        return sum(self.bytes_by_split[split] for split, place in self.place.items() if place != "streamed")

    def on(self, split: str, images: ImageCache) -> Features:
        """The features of other images in place of a split's: prepared in the same way, not cached, without auxiliary targets."""
        other = Features(self.backbone, self.plan, {**self.pixels, split: images}, CachePolicy())
        other.preparation = self.preparation
        return other

    def grid(self, split: str, image: int) -> TileGrid:
        """The tiles of an image in validation or test, in framed pixels."""
        overlap = self.plan.run.overlap if split == "test" else self.plan.run.val_overlap
        return self.framing.grid(self.pixels[split].sizes_px[image], self.tile_px[split], overlap)

    def train(self, epoch: int, pool: WorkerPool) -> Iterator[Batch]:
        """The training views of an epoch in its order, in batches of the machine's size, computed in advance in ``pool``."""
        cycle = self.plan.cycle(epoch)
        views, order = self._views(cycle), self.plan.order(epoch)
        if self.backbone.machine.device.type == "cuda" and epoch + 1 < self.plan.run.epochs:
            self._plan_ahead(self.plan.cycle(epoch + 1))  # while the GPU computes: planning takes a third of a ViT-Ti's time
        yield from self._train_batches(views, _chunks(order, self._chunk), self._pass("train", cycle, views, pool), pool)

    def _views(self, cycle: int) -> TileSamples:
        planned = self._planned.pop(cycle, None)
        return self.plan.views(cycle) if planned is None else planned.result()

    def _plan_ahead(self, cycle: int) -> None:
        if cycle not in self._planned:
            self._planned[cycle] = _planner().submit(self.plan.views, cycle)

    def _train_batches(self, views: TileSamples, chunks: list[np.ndarray], cache: FeatureCache | None, pool: WorkerPool) -> Iterator[Batch]:
        cutter = self._cutter("train")

        def prepared(rows: np.ndarray) -> tuple[np.ndarray, Sequence[Draws], Any]:
            mine = views.take(rows)
            return rows, mine.draws, cutter.prepare(mine.places_B5)

        def mapped(one: tuple[np.ndarray, Sequence[Draws], Any]) -> Batch:
            rows, draws, ready = one
            tiles = cutter.cut(ready)
            return self._batch(cache, rows, tiles._replace(pixels=apply_all(self.plan.augmentations, tiles.pixels, draws)))

        return pool.prefetch(chunks, prepared, mapped)

    def tiles(self, split: str, pool: WorkerPool, images: Sequence[int] | None = None) -> Iterator[tuple[Batch, list[int]]]:
        """All tiles of ``val`` or ``test``, image by image in the order of each grid, and the number of each tile's image.

        ``images``: those of some images instead, also of ``train``, unchanged; their features are not cached.
        """
        corners = self._corners(split, images)
        chunks = _chunks(np.arange(len(corners)), self._chunk)
        cache = self._pass(split, 0, corners, pool) if images is None else None
        for rows, batch in zip(chunks, self._tile_batches(split, corners, chunks, cache, pool), strict=True):
            yield batch, [corners[k][0] for k in rows]

    def _corners(self, split: str, images: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
        numbers = range(len(self.pixels[split])) if images is None else images
        return [(image, y, x) for image in numbers for y, x in self.grid(split, image)]

    def _tile_batches(
        self, split: str, corners: list[tuple[int, int, int]], chunks: list[np.ndarray], cache: FeatureCache | None, pool: WorkerPool
    ) -> Iterator[Batch]:
        cutter, places_B5 = self._cutter(split), np.array([(*corner, 0, 0) for corner in corners], np.int64).reshape(-1, 5)

        def prepared(rows: np.ndarray) -> tuple[np.ndarray, Any]:
            return rows, cutter.prepare(places_B5[rows])

        def mapped(one: tuple[np.ndarray, Any]) -> Batch:
            return self._batch(cache, one[0], cutter.cut(one[1]))

        return pool.prefetch(chunks, prepared, mapped)

    # --- passes in shards -----------------------------------------------------------------------------------------------------------

    def passes(self, epochs: int) -> list[FeaturePass]:
        """The passes that this cohort caches on disk within this number of epochs."""
        cycles = range(min(epochs, self.plan.run.repeat_views_every))
        keys = [("val", 0), *(("train", cycle) for cycle in cycles), ("test", 0)]
        return [self._pass_of(*key) for key in keys if self.place[key[0]] == "on disk"]

    def _pass_of(self, split: str, number: int) -> FeaturePass:
        tiles = self._tiles_of(split, number)
        return FeaturePass(split=split, number=number, num=len(tiles), folder=str(self._folder(split, tiles)))

    def fill(self, one: FeaturePass, shard: int, pool: WorkerPool) -> bool:
        """Provides a shard of a pass with all levels of this backbone: from the local or the shared cache, else computed and uploaded.

        Returns whether it was computed. Raises CellbenchError.
        """
        return self._fill(one, ShardedCache(Path(one.folder), one.num), shard, pool) == "computed"

    def _fill(self, one: FeaturePass, shards: ShardedCache, number: int, pool: WorkerPool) -> str:
        keys, shared, facts = self.backbone.keys, self._policy.shared, self._facts(one.split, one.num)
        if shards.holds(number, keys):
            return "here"
        if shared is not None and shards.fetch(number, keys, shared, facts):
            return "fetched"
        tiles, chunks = self._tiles_of(one.split, one.number), _chunks(shards.rows(number), self._chunk)
        make = self._train_batches if one.split == "train" else functools.partial(self._tile_batches, one.split)
        maps = [batch.maps for batch in make(tiles, chunks, None, pool)]
        shards.write(number, {i: torch.cat([m[i] for m in maps]) for i in keys}, facts)
        if shared is not None:
            shards.send(number, keys, shared)
        return "computed"

    def _filled(self, one: FeaturePass, pool: WorkerPool) -> ShardedCache:
        """All shards of a pass. Raises CellbenchError, and OSError before computing anything if the disk is too small."""
        shards, num, shared = ShardedCache(Path(one.folder), one.num), num_shards(one.num), self._policy.shared
        missing = shards.missing(self.backbone.keys)
        if shared is None and not missing:
            return shards
        shards.check_space(len(missing), self.backbone.map_bytes(self.tile_px[one.split]))
        first = random.SystemRandom().randrange(num) if num else 0  # machines that start at the same time begin with different shards
        did = Counter(self._fill(one, shards, (first + k) % num, pool) for k in range(num))
        if shared is not None:
            self._policy.tell(
                f"{one.split} features, in shards: {did['here']} here, {did['fetched']} from {shared.shown}, {did['computed']} computed."
            )
        return shards

    def _tiles_of(self, split: str, number: int) -> Any:
        return self.plan.views(number) if split == "train" else self._corners(split)

    @property
    def _chunk(self) -> int:
        return self.backbone.chunk

    def _pass(self, split: str, number: int, tiles: Any, pool: WorkerPool) -> FeatureCache | None:
        """The cache of a pass, opened at its first use."""
        if (split, number) not in self._passes:
            self._passes[split, number] = self._open(split, number, tiles, pool)
        return self._passes[split, number]

    def _folder(self, split: str, tiles: Iterable[Any]) -> Path:
        """The folder of a pass, named by a hash of everything that its features depend on."""
        policy, images = self._policy, [sample.digest for sample in self.pixels[split].samples]
        made = [
            policy.key,
            str(self.backbone.machine.precision),
            self.tile_px[split],
            self.backbone.unfreeze,
            self.preparation.to_dict(),
            *self.plan.own_code,
        ]
        named = [tile if self.plan.run.zoom else tile[:5] for tile in tiles]  # without zoom, as before there was any
        return features_dir() / policy.backbone / text_digest(json.dumps([*made, images, named]), 24)

    def _facts(self, split: str, num: int) -> dict[str, Any]:
        policy = self._policy
        return {"backbone": policy.backbone, "dataset": policy.dataset, "what": split, "num": num, "tile_px": self.tile_px[split]}

    def _open(self, split: str, number: int, tiles: Any, pool: WorkerPool) -> FeatureCache | None:
        if self.place[split] == "on disk":
            one = FeaturePass(split=split, number=number, num=len(tiles), folder=str(self._folder(split, tiles)))
            try:
                return self._filled(one, pool)
            except (OSError, CellbenchError) as error:
                self.place[split] = "streamed"
                self._policy.tell(f"{split} features cannot be cached on disk ({one_line(error)}) and are streamed.")
        if self.place[split] != "in memory":
            return None
        machine = self.backbone.machine
        return MemoryCache(len(tiles), machine.device if machine.fits(self.bytes_by_split[split]) else torch.device("cpu"))

    def _maps(self, cache: FeatureCache | None, rows: np.ndarray, pixels: Tensor) -> dict[int, Tensor]:
        found = cache.get(rows, self.backbone.keys) if cache is not None else None
        if found is not None:
            return {i: m.to(pixels.device, non_blocking=True) for i, m in found.items()}
        maps = self.backbone.maps(pixels)
        if cache is not None and maps:
            with self._cache_lock:  # threads compute in parallel, and the first one allocates the cache
                cache.put(rows, maps)
        return maps

    def _batch(self, cache: FeatureCache | None, rows: np.ndarray, tiles: Tiles) -> Batch:
        cell_targets = dict(zip(self._cell_targets, tiles.cell_targets, strict=False))
        return Batch(self._maps(cache, rows, tiles.pixels), tiles.pixels, tiles.target, cell_targets, tiles.ignoring)

    def _cutter(self, split: str) -> TileCutter:
        """How tiles of a split are cut: on the GPU if its images fit there."""
        if split not in self._cutters:
            images = self.plan.used_images if split == "train" else range(len(self.pixels[split]))
            sizes = [self.framing.framed_px(self.pixels[split].sizes_px[image]) for image in images]
            device, framed = self.backbone.machine.device, functools.partial(self._framed, split)
            cell_targets = tuple(self._cell_targets.values()) if split != "test" else ()
            if images and self.backbone.machine.fits(DeviceCutter.bytes_of(sizes, cell_targets)):
                largest_px = self.plan.largest_crop_px if split == "train" else self.tile_px[split]
                self._cutters[split] = DeviceCutter(framed, images, self.tile_px[split], device, cell_targets, largest_px)
            else:
                self._cutters[split] = HostCutter(framed, self.tile_px[split], device, cell_targets)
        return self._cutters[split]

    def _framed(self, split: str, image: int) -> tuple[np.ndarray, ...]:
        """The framed image and class map, then the cell targets that runs train on; these never for the test."""
        pixels = self.pixels[split]
        pair = pixels.prepared(image, self.preparation)
        return pair if split == "test" else (*pair, *(pixels.cell_target(image, self.framing, name) for name in self._cell_targets))
