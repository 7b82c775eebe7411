"""The one frozen pass: tiles in, a backbone's maps out, once for all runs of a cohort.

``Features.train(epoch)`` and ``Features.tiles(split, image)`` give batches that every run of the cohort learns from or decodes.
Maps are computed as they are needed (streamed) or, where views repeat and memory allows, kept from their first use. Either way the numbers
are the same, to the last bit on a CPU.

Letters: B tiles, D features, h x w places of a map, T tile side, H x W pixels of an image.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cellbench.backbones.base import Backbone, Level
from cellbench.data.augment import recolour, turn
from cellbench.data.pixels import Pixels
from cellbench.machine import Machine
from cellbench.plan import Plan, View
from cellbench.tiles import Grid, cut

T = TypeVar("T")


class Batch(NamedTuple):
    """What runs learn from. Maps (B, D, h, w) by level index; pixels (B, 3, T, T) float32 in 0..1; target (B, T, T) int64."""

    maps: dict[int, Tensor]
    pixels: Tensor
    target: Tensor

    def __getitem__(self, rows: slice) -> Batch:  # type: ignore[override]
        return Batch({index: x[rows] for index, x in self.maps.items()}, self.pixels[rows], self.target[rows])

    @property
    def num(self) -> int:
        return len(self.pixels)


class Trunk:
    """A frozen backbone on a device, and the levels that a cohort's heads read. ``backbone`` is None for runs that read pixels only."""

    def __init__(self, backbone: Backbone | None, machine: Machine, num_levels: Iterable[int]) -> None:
        self.machine = machine
        self.backbone = backbone.freeze().to(machine.device) if backbone is not None else None
        picked = {level.index: level for num in num_levels for level in self.levels(num)}
        self.indices = tuple(sorted(picked))
        self.picked = tuple(picked[index] for index in self.indices)
        self.seconds = 0.0
        """Spent in the backbone so far. On a GPU this is the time to hand the work over, unless something waits for it."""

    def levels(self, num: int) -> tuple[Level, ...]:
        """The levels that a head which reads ``num`` of them is given."""
        return self.backbone.pick(num) if self.backbone is not None else ()

    @torch.no_grad()
    def maps(self, pixels_BCTT: Tensor) -> dict[int, Tensor]:
        """The maps of tiles, by level index, in the machine's precision and channels-last."""
        if self.backbone is None:
            return {}
        start = time.perf_counter()
        with self.machine.autocast():
            maps = self.backbone(pixels_BCTT, self.indices)
        # A copy, because a head cannot learn from the tensors of inference mode; it changes precision and layout on the way.
        kept = self.machine.precision
        copies = {
            i: torch.empty_like(m, dtype=kept, memory_format=torch.channels_last).copy_(m) for i, m in zip(self.indices, maps, strict=True)
        }
        self.seconds += time.perf_counter() - start
        return copies

    def map_bytes(self, tile_px: int) -> int:
        """Bytes of the maps of one tile."""
        size = 2 if self.machine.precision == torch.bfloat16 else 4
        return sum(size * level.dim * (tile_px // level.stride_px) ** 2 for level in self.picked)


@dataclass
class _Kept:
    """The maps of one pass over a fixed list of tiles, filled in as they are first computed."""

    num: int
    maps: dict[int, Tensor] = field(default_factory=dict)
    filled: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def put(self, rows: np.ndarray, maps: dict[int, Tensor]) -> None:
        if not len(self.filled):
            self.filled = np.zeros(self.num, bool)
            # Rows of (h, w, D): a gather of rows is then channels-last without a copy.
            self.maps = {i: torch.empty((self.num, *m.shape[2:], m.shape[1]), dtype=m.dtype) for i, m in maps.items()}
        for i, m in maps.items():
            self.maps[i][torch.from_numpy(rows)] = m.permute(0, 2, 3, 1).to("cpu")
        self.filled[rows] = True

    def get(self, rows: np.ndarray, device: torch.device) -> dict[int, Tensor] | None:
        if not len(self.filled) or not self.filled[rows].all():
            return None
        index = torch.from_numpy(rows)
        return {i: m[index].permute(0, 3, 1, 2).to(device, non_blocking=True) for i, m in self.maps.items()}


class Features:
    """The batches of one cohort. ``pixels`` are the decoded images by split; ``memory_bytes`` is what may be spent on kept maps."""

    def __init__(self, trunk: Trunk, plan: Plan, pixels: dict[str, Pixels], memory_bytes: int) -> None:
        self.trunk, self.plan, self.pixels = trunk, plan, pixels
        self._tile_px = plan.run.tile_px
        self._kept: dict[tuple[str, int], _Kept] = {}
        each = trunk.map_bytes(self._tile_px)
        self.val_bytes = each * sum(len(self.grid("val", i)) for i in range(len(pixels["val"])))
        self.train_bytes = each * plan.num_views * plan.run.views
        self._keep_val = self.val_bytes <= memory_bytes
        self._keep_train = plan.repeats and self.val_bytes * self._keep_val + self.train_bytes <= memory_bytes

    @property
    def source(self) -> str:
        """Where features come from, for people."""
        if self.trunk.backbone is None:
            return "pixels only"
        train = f"kept in memory ({_mib(self.train_bytes)})" if self._keep_train else "streamed"
        val = f"kept in memory ({_mib(self.val_bytes)})" if self._keep_val else "streamed"
        return f"training features {train}, validation features {val}"

    def grid(self, split: str, image: int) -> Grid:
        """The tiles of an image in validation or test."""
        height, width = self.pixels[split].sizes_px[image]
        overlap = self.plan.run.val_overlap if split == "val" else self.plan.run.overlap
        return Grid.over(height, width, self._tile_px, overlap)

    def train(self, epoch: int) -> Iterator[Batch]:
        """The training views of an epoch in its order, in chunks of the machine's size."""
        cycle = self.plan.cycle(epoch)
        views, order = self.plan.views(cycle), self.plan.order(epoch)
        kept = self._kept.setdefault(("train", cycle), _Kept(len(views))) if self._keep_train else None
        chunks = [order[i : i + self._chunk] for i in range(0, len(order), self._chunk)]
        for rows, tiles, masks in ahead((rows, *self._cut_views([views[k] for k in rows])) for rows in chunks):
            pixels = recolour(self._pixels(tiles), [views[k].colour for k in rows])
            yield Batch(self._maps(kept, rows, pixels), pixels, self._target(masks))

    def tiles(self, split: str, image: int) -> Iterator[Batch]:
        """The tiles of a whole image of ``val`` or ``test``, in the order of its grid."""
        corners = list(self.grid(split, image))
        kept = self._kept.setdefault((split, image), _Kept(len(corners))) if split == "val" and self._keep_val else None
        chunks = [np.arange(i, min(i + self._chunk, len(corners))) for i in range(0, len(corners), self._chunk)]
        for rows, tiles, masks in ahead((rows, *self._cut_corners(split, image, [corners[k] for k in rows])) for rows in chunks):
            pixels = self._pixels(tiles)
            yield Batch(self._maps(kept, rows, pixels), pixels, self._target(masks))

    @property
    def _chunk(self) -> int:
        return self.trunk.machine.chunk

    def _maps(self, kept: _Kept | None, rows: np.ndarray, pixels: Tensor) -> dict[int, Tensor]:
        maps = kept.get(rows, pixels.device) if kept is not None else None
        if maps is None:
            maps = self.trunk.maps(pixels)
            if kept is not None and maps:
                kept.put(rows, maps)
        return maps

    def _cut_views(self, views: list[View]) -> tuple[np.ndarray, np.ndarray]:
        pairs = []
        for view in views:
            image, mask = self.pixels["train"][view.image]
            pairs.append([turn(cut(array, view.y, view.x, self._tile_px), view.turn) for array in (image, mask)])
        return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])

    def _cut_corners(self, split: str, index: int, corners: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        pair = self.pixels[split][index]
        tiles, masks = (np.stack([cut(array, y, x, self._tile_px) for y, x in corners]) for array in pair)
        return tiles, masks

    def _pixels(self, tiles_BTTC: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(tiles_BTTC).to(self.trunk.machine.device, non_blocking=True).permute(0, 3, 1, 2)
        return pixels.float().div_(255)

    def _target(self, masks_BTT: np.ndarray) -> Tensor:
        return torch.from_numpy(masks_BTT).to(self.trunk.machine.device, non_blocking=True).long()


def ahead(items: Iterable[T], num: int = 2) -> Iterator[T]:
    """The same items, made up to ``num`` in advance by a thread: decoding and cutting go on while the network computes."""
    made: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(maxsize=num)
    stop = threading.Event()

    def make() -> None:
        end: BaseException | None = None
        try:
            for item in items:
                while not stop.is_set():
                    try:
                        made.put((item, None, False), timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            end = error
        while not stop.is_set():
            try:
                made.put((None, end, True), timeout=0.1)
                return
            except queue.Full:
                continue

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error, over = made.get()
            if error is not None:
                raise error
            if over:
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
