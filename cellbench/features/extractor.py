"""The one frozen pass: tiles in, a backbone's maps out, once for all runs of a cohort.

``Features.train(epoch)`` and ``Features.tiles(split)`` give batches that every run of the cohort learns from or decodes.
Maps are computed as they are needed (streamed) or, where views repeat and memory allows, kept from their first use. Either way the numbers
are the same, to the last bit on a CPU.

Letters: B tiles, D features, h x w places of a map, T x T a tile (which need not be square), H x W pixels of an image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.augmentation import apply_all, rotate_flip
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.sampling import SamplingPlan, TileSample
from cellbench.data.transforms.tiling import TileGrid, cut_tile
from cellbench.errors import CellbenchError, one_line
from cellbench.features.cache_admin import features_dir
from cellbench.features.disk_cache import DiskCache
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.memory_cache import FeatureCache, MemoryCache
from cellbench.features.remote_cache import RemoteCache
from cellbench.features.sharded_cache import ShardedCache, num_shards
from cellbench.metrics.pixel import IGNORE
from cellbench.parallel import WorkerPool


class Batch(NamedTuple):
    """What runs learn from. Maps (B, D, h, w) by level index; pixels (B, 3, T, T) float32 in 0..1; target (B, T, T) int64; auxiliary_targets (B, T, T, 2)
    uint8, where a run of the cohort learns them (``cellbench.data.transforms.cell_targets``); ``ignoring``: whether some of the target is ``metrics.IGNORE``."""

    maps: dict[int, Tensor]
    pixels: Tensor
    target: Tensor
    auxiliary_targets: Tensor | None = None
    ignoring: bool = False

    def __getitem__(self, rows: slice) -> Batch:  # type: ignore[override]
        auxiliary_targets = self.auxiliary_targets[rows] if self.auxiliary_targets is not None else None
        return Batch({index: x[rows] for index, x in self.maps.items()}, self.pixels[rows], self.target[rows], auxiliary_targets, self.ignoring)

    @property
    def num(self) -> int:
        return len(self.pixels)


def non_finite_reason(features: Features) -> str:
    """What is wrong where the backbone's maps hold values that are not finite: no head can learn from them. Empty where nothing is.

    Looks through the validation tiles and an epoch of training views, so it is for runs that failed.
    """
    if features.trunk.backbone is None:
        return ""
    with WorkerPool(features.trunk.machine.lanes) as lanes:
        for batch in itertools.chain((batch for batch, _ in features.tiles("val", lanes)), features.train(0, lanes)):
            if not all(bool(torch.isfinite(x).all()) for x in batch.maps.values()):
                hint = "" if features.trunk.machine.precision == torch.float32 else " Try --precision fp32."
                return f"the backbone's features are not finite (NaN or infinite).{hint}"
    return ""


class _Cut(NamedTuple):
    """Rows of a pass, and their tiles (B, T, T, 3), masks (B, T, T) and auxiliary targets (B, T, T, 2), uint8."""

    rows: np.ndarray
    tiles: np.ndarray
    masks: np.ndarray
    auxiliary_targets: np.ndarray | None = None


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """Where features may be kept, how much of it, and what tells these features from all others."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    prefer_disk: bool = False
    """Keep on disk also what would fit into memory, for later calls."""
    key: str = ""
    """Stands for backbone, weights and versions; empty: nothing is kept on disk."""
    backbone: str = ""
    dataset: str = ""
    shared: RemoteCache | None = None
    """Where machines without a folder in common find each other's features; passes on disk are then kept in shards."""
    tell: Callable[[str], None] = print
    """Told where something could not be kept."""


@dataclass(frozen=True, kw_only=True)
class FeaturePass:
    """A fixed list of tiles that go through a trunk, and the folder where their features are kept."""

    split: str
    number: int
    """Of training, which cycle of views."""
    num: int
    folder: str


class Features:
    """The batches of one cohort. ``pixels`` are the decoded images by split; with ``auxiliary_targets`` the batches of training and validation hold them."""

    def __init__(
        self, trunk: FrozenBackbone, plan: SamplingPlan, pixels: dict[str, ImageCache], keeping: CachePolicy, auxiliary_targets: bool = False
    ) -> None:
        self.trunk, self.plan, self.pixels, self._keeping, self._auxiliary_targets = trunk, plan, pixels, keeping, auxiliary_targets
        self.framing = plan.framing
        self.tile_px = {split: self.framing.tile_px(pixels[split].sizes_px) for split in pixels} | {"train": plan.tile_px}
        """Height and width of the tiles of each split."""
        if self.framing.whole:
            trunk.chunk = 1  # whole images: one of 1600x1200 has the tokens of 40 tiles
        self._passes: dict[tuple[str, int], FeatureCache | None] = {}
        sizes = {
            split: trunk.map_bytes(self.tile_px[split]) * sum(len(self.grid(split, i)) for i in range(len(pixels[split])))
            for split in ("val", "test")
        }
        sizes["train"] = trunk.map_bytes(self.tile_px["train"]) * plan.num_views * plan.run.repeat_views_every
        self._keeping_lock = threading.Lock()
        self.bytes_by_split = sizes
        self.place = self._places(sizes) if any(sizes.values()) else dict.fromkeys(sizes, "streamed")

    @cached_property
    def preparation(self) -> Preparation:
        """What is done to every image before it is cut. A normaliser is fitted to the training images that are learned from, at first use."""
        train = self.pixels["train"]
        normaliser = train.normaliser(self.plan.run.normalise, self.plan.seen)
        return Preparation(framing=self.framing, normaliser=normaliser, reading=train.reading, um_per_px=train.um_per_px)

    def _places(self, sizes: dict[str, int]) -> dict[str, str]:
        """Where each split's features are kept. Validation first: it comes again every epoch."""
        keeping, place = self._keeping, {}
        memory, disk = keeping.memory_bytes, keeping.disk_bytes if keeping.key else 0
        for split in ("val", "train", "test"):
            size, again = sizes[split], split == "val" or (split == "train" and self.plan.repeats)
            # Test tiles are seen once a call: worth a file for the next call, never memory.
            on_disk = size <= disk and (again or (split == "test" and keeping.prefer_disk))
            in_memory = size <= memory and again
            place[split] = "on disk" if on_disk and (keeping.prefer_disk or not in_memory) else "in memory" if in_memory else "streamed"
            memory -= size if place[split] == "in memory" else 0
            disk -= size if place[split] == "on disk" else 0
        return place

    @property
    def source(self) -> str:
        """Where features come from, for people."""
        if self.trunk.backbone is None:
            return "pixels only"
        told = {
            split: place if place == "streamed" else f"kept {place} ({self.bytes_by_split[split] / 2**20:,.0f} MiB)"
            for split, place in self.place.items()
        }
        return f"features: training {told['train']}, validation {told['val']}, test {told['test']}"

    @property
    def kept_bytes(self) -> int:
        """Of features kept in memory or on disk for this cohort, all splits together; 0 where all are streamed."""
        return sum(self.bytes_by_split[split] for split, place in self.place.items() if place != "streamed")

    def grid(self, split: str, image: int) -> TileGrid:
        """Where the tiles of an image lie in validation or test, in framed pixels."""
        overlap = self.plan.run.val_overlap if split == "val" else self.plan.run.overlap
        return self.framing.grid(self.pixels[split].sizes_px[image], self.tile_px[split], overlap)

    def train(self, epoch: int, lanes: WorkerPool) -> Iterator[Batch]:
        """The training views of an epoch in its order, in chunks of the machine's size, made ahead in ``lanes``."""
        cycle = self.plan.cycle(epoch)
        views, order = self.plan.views(cycle), self.plan.order(epoch)
        yield from self._seen(views, _chunks(order, self._chunk), self._pass("train", cycle, views, lanes), lanes)

    def _seen(self, views: list[TileSample], chunks: list[np.ndarray], kept: FeatureCache | None, lanes: WorkerPool) -> Iterator[Batch]:
        def cut_out(rows: np.ndarray) -> _Cut:
            return _Cut(rows, *self._cut_views([views[k] for k in rows]))

        def mapped(one: _Cut) -> Batch:
            pixels = apply_all(self.plan.augmentations, self._pixels(one.tiles), [views[k].draws for k in one.rows])
            return self._batch("train", kept, one, pixels)

        return lanes.ahead(chunks, cut_out, mapped)

    def tiles(self, split: str, lanes: WorkerPool) -> Iterator[tuple[Batch, list[int]]]:
        """All tiles of all images of ``val`` or ``test``, image by image in the order of each grid, and which image each is of."""
        corners = self._corners(split)
        chunks = _chunks(np.arange(len(corners)), self._chunk)
        for rows, batch in zip(chunks, self._laid(split, corners, chunks, self._pass(split, 0, corners, lanes), lanes), strict=True):
            yield batch, [corners[k][0] for k in rows]

    def _corners(self, split: str) -> list[tuple[int, int, int]]:
        return [(image, y, x) for image in range(len(self.pixels[split])) for y, x in self.grid(split, image)]

    def _laid(
        self, split: str, corners: list[tuple[int, int, int]], chunks: list[np.ndarray], kept: FeatureCache | None, lanes: WorkerPool
    ) -> Iterator[Batch]:
        def cut_out(rows: np.ndarray) -> _Cut:
            return _Cut(rows, *self._cut_corners(split, [corners[k] for k in rows]))

        def mapped(one: _Cut) -> Batch:
            return self._batch(split, kept, one, self._pixels(one.tiles))

        return lanes.ahead(chunks, cut_out, mapped)

    # --- passes in shards -----------------------------------------------------------------------------------------------------------

    def passes(self, epochs: int) -> list[FeaturePass]:
        """What this cohort will keep on disk in so many epochs."""
        cycles = range(min(epochs, self.plan.run.repeat_views_every))
        keys = [("val", 0), *(("train", cycle) for cycle in cycles), ("test", 0)]
        return [self._pass_of(*key) for key in keys if self.place[key[0]] == "on disk"]

    def _pass_of(self, split: str, number: int) -> FeaturePass:
        tiles = self._tiles_of(split, number)
        return FeaturePass(split=split, number=number, num=len(tiles), folder=str(self._folder(split, tiles)))

    def fill(self, one: FeaturePass, shard: int, lanes: WorkerPool) -> bool:
        """Sees to it that a shard of a pass is there, with all levels of this trunk: found here, else in the shared cache, else computed and sent
        there. Says whether it was computed. Raises CellbenchError."""
        return self._fill(one, ShardedCache(Path(one.folder), one.num), shard, lanes) == "computed"

    def _fill(self, one: FeaturePass, shards: ShardedCache, number: int, lanes: WorkerPool) -> str:
        keys, shared, facts = self.trunk.keys, self._keeping.shared, self._facts(one.split, one.num)
        if shards.holds(number, keys):
            return "here"
        if shared is not None and shards.fetch(number, keys, shared, facts):
            return "fetched"
        tiles, chunks = self._tiles_of(one.split, one.number), _chunks(shards.rows(number), self._chunk)
        made = self._seen(tiles, chunks, None, lanes) if one.split == "train" else self._laid(one.split, tiles, chunks, None, lanes)
        maps = [batch.maps for batch in made]
        shards.write(number, {i: torch.cat([m[i] for m in maps]) for i in keys}, facts)
        if shared is not None:
            shards.send(number, keys, shared)
        return "computed"

    def _filled(self, one: FeaturePass, shared: RemoteCache, lanes: WorkerPool) -> ShardedCache:
        """All shards of a pass. Raises CellbenchError."""
        shards, num = ShardedCache(Path(one.folder), one.num), num_shards(one.num)
        first = random.SystemRandom().randrange(num) if num else 0  # machines that begin at once begin elsewhere, and meet what others made
        did = Counter(self._fill(one, shards, (first + k) % num, lanes) for k in range(num))
        self._keeping.tell(
            f"{one.split} features, in shards: {did['here']} here, {did['fetched']} from {shared.shown}, {did['computed']} computed."
        )
        return shards

    def _tiles_of(self, split: str, number: int) -> list[Any]:
        return self.plan.views(number) if split == "train" else self._corners(split)

    @property
    def _chunk(self) -> int:
        return self.trunk.chunk

    def _pass(self, split: str, number: int, tiles: Sequence[object], lanes: WorkerPool) -> FeatureCache | None:
        """Where the features of a pass are kept, opened at its first use."""
        if (split, number) not in self._passes:
            self._passes[split, number] = self._open(split, number, tiles, lanes)
        return self._passes[split, number]

    def _folder(self, split: str, tiles: Sequence[object]) -> Path:
        """Named by everything that a pass's features hang on."""
        keeping, images = self._keeping, [sample.digest for sample in self.pixels[split].samples]
        made = [keeping.key, str(self.trunk.machine.precision), self.tile_px[split], self.trunk.unfreeze, self.preparation.told(), *self.plan.own_code]
        return features_dir() / keeping.backbone / hashlib.sha256(json.dumps([*made, images, tiles]).encode()).hexdigest()[:24]

    def _facts(self, split: str, num: int) -> dict[str, Any]:
        keeping = self._keeping
        return {"backbone": keeping.backbone, "dataset": keeping.dataset, "what": split, "num": num, "tile_px": self.tile_px[split]}

    def _open(self, split: str, number: int, tiles: Sequence[object], lanes: WorkerPool) -> FeatureCache | None:
        num = len(tiles)
        if self.place[split] == "on disk":
            folder = self._folder(split, tiles)
            try:
                if self._keeping.shared is not None:
                    return self._filled(FeaturePass(split=split, number=number, num=num, folder=str(folder)), self._keeping.shared, lanes)
                shards = ShardedCache(folder, num)
                if not shards.missing(self.trunk.keys):
                    return shards
                return DiskCache(folder, num, self._facts(split, num))
            except (OSError, CellbenchError) as error:
                self._give_up(split, error)
        return MemoryCache(num) if self.place[split] == "in memory" else None

    def _give_up(self, split: str, error: Exception) -> None:
        self.place[split] = "streamed"
        for key in [key for key in self._passes if key[0] == split]:
            self._passes[key] = None
        self._keeping.tell(f"{split} features cannot be kept on disk ({one_line(error)}) and are streamed.")

    def _maps(self, split: str, kept: FeatureCache | None, rows: np.ndarray, pixels: Tensor) -> dict[int, Tensor]:
        found = kept.get(rows, self.trunk.keys) if kept is not None else None
        if found is not None:
            return {i: m.to(pixels.device, non_blocking=True) for i, m in found.items()}
        maps = self.trunk.maps(pixels)
        if kept is not None and maps:
            with self._keeping_lock:  # lanes compute side by side; what is kept is laid out by whoever comes first
                if self.place[split] != "streamed":
                    try:
                        kept.put(rows, maps)
                    except (OSError, CellbenchError) as error:
                        self._give_up(split, error)
        return maps

    def _batch(self, split: str, kept: FeatureCache | None, one: _Cut, pixels: Tensor) -> Batch:
        auxiliary_targets = self._sent(one.auxiliary_targets) if one.auxiliary_targets is not None else None
        ignoring = bool(one.masks.max() == IGNORE)  # here, where the masks are bytes in memory: a GPU would have to be waited for
        return Batch(self._maps(split, kept, one.rows, pixels), pixels, self._sent(one.masks).long(), auxiliary_targets, ignoring)

    def _cut_views(self, views: list[TileSample]) -> list[np.ndarray]:
        tiles = []
        for view in views:
            framed = self._framed("train", view.image)
            tiles.append([rotate_flip(cut_tile(array, view.y, view.x, self.tile_px["train"]), view.turn) for array in framed])
        return [np.stack(alike) for alike in zip(*tiles, strict=True)]

    def _cut_corners(self, split: str, corners: list[tuple[int, int, int]]) -> list[np.ndarray]:
        tiles = [[cut_tile(array, y, x, self.tile_px[split]) for array in self._framed(split, index)] for index, y, x in corners]
        return [np.stack(alike) for alike in zip(*tiles, strict=True)]

    def _framed(self, split: str, image: int) -> tuple[np.ndarray, ...]:
        """The framed image and class map, and its auxiliary targets where somebody learns them: the test's are nobody's."""
        pixels = self.pixels[split]
        pair = pixels.prepared(image, self.preparation)
        return (*pair, pixels.auxiliary_targets(image, self.framing)) if self._auxiliary_targets and split != "test" else pair

    def _pixels(self, tiles_BTTC: np.ndarray) -> Tensor:
        return self._sent(tiles_BTTC).permute(0, 3, 1, 2).float().div_(255)

    def _sent(self, array: np.ndarray) -> Tensor:
        """On the device; to a GPU as bytes, from pinned memory, so that the copy does not hold up the computation."""
        tensor, device = torch.from_numpy(array), self.trunk.machine.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
