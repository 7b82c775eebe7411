"""Training of one head: model, loss, optimiser, schedule and stopping. It reports to a :class:`Recorder` and knows neither MLflow nor Optuna.

:func:`cellbench.training.fit.fit` drives the trainers of a cohort: ``start_epoch``, ``train_on`` for each chunk of tiles, ``add_validation`` for
each validation batch, ``end_epoch``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.errors import blaming
from cellbench.features.extractor import Batch, Features
from cellbench.hardware import is_out_of_memory
from cellbench.metrics.pixel import IGNORE, pixel_scores, pooled_classes
from cellbench.startup import without_compiler
from cellbench.training.cuda_graph import GraphedStep
from cellbench.training.losses import parse_loss
from cellbench.training.model import SegmentationModel


class Recorder(Protocol):
    """Receives the metrics of a run, and may end it."""

    def epoch(self, epoch: int, metrics: dict[str, float]) -> bool:
        """Records the metrics of an epoch. False: the run ends as pruned."""

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Receives :meth:`HeadTrainer.state` after each epoch."""


@dataclass
class HeadTrainer:
    """Trains the head of one run."""

    run: RunSpec
    model: SegmentationModel
    recorder: Recorder
    num_views: int
    """Tiles per epoch."""
    registry: Registry = field(default_factory=Registry)
    """Source of the loss function."""
    capture: bool = True
    """Whether steps on a GPU may be captured as CUDA graphs."""
    epoch: int = 0
    """The next epoch."""
    best_epoch: int = -1
    best: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    train_s: float = 0.0
    """Wall time of this head's training steps. On a GPU: the time to queue the work, unless something synchronises."""
    train_cpu_s: float = 0.0
    """CPU time of the same, hardly affected by other processes."""
    trunk_s: float = 0.0
    """Wall time of the backbone, shared by the cohort, in all epochs of this run, including those before an interruption."""
    trunk_cpu_s: float = 0.0
    ended: str = ""
    """Why it stopped: ``done``, ``stopped early``, ``pruned`` or ``failed: …``; empty while it trains."""

    def __post_init__(self) -> None:
        self._loss = parse_loss(self.run.loss, self.registry)
        on_gpu = self.device.type == "cuda"
        with without_compiler():
            self.optimiser = torch.optim.AdamW(
                self.model.groups(self.run), lr=self.run.lr, weight_decay=self.run.weight_decay, capturable=on_gpu
            )
        self._graphs: dict[int, GraphedStep | None] = {}
        """By mini-batch size; None if the step cannot be captured."""
        self.steps_per_epoch = len(batch_sizes(self.num_views, self.run.batch_size))
        self._val_sum, self._val_num = torch.zeros((), device=self.device), 0

    # --- training -----------------------------------------------------------------------------------------------------------------

    def start_epoch(self) -> None:
        self.model.train()
        self._backbone_before = self._backbone.seconds, self._backbone.cpu_seconds
        self._step, self._batches = 0, MiniBatches(self.num_views, self.run.batch_size)
        self._loss_sum = torch.zeros((), device=self.device)

    def train_on(self, chunk: Batch) -> None:
        """Takes a step for each complete mini-batch; remaining tiles wait for the next chunk. Does nothing if the run has ended."""
        if self.ended:
            return
        start, start_cpu = time.perf_counter(), time.thread_time()
        try:
            with blaming(self):
                for batch in self._batches.of(chunk):
                    self._train_step(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            self.ended = (
                "failed: batch norm cannot learn from a mini-batch of one tile with a map of one place "
                f"(tile_px = {self.run.tile_px}, batch_size = {self.run.batch_size}, {self.num_views} tiles an epoch); "
                "set a larger tile_px or batch_size"
            )
        self.train_s += time.perf_counter() - start
        self.train_cpu_s += time.thread_time() - start_cpu

    def _train_step(self, batch: Batch) -> None:
        rate = self.lr(self.epoch * self.steps_per_epoch + self._step)
        for group in self.optimiser.param_groups:
            if self.device.type == "cuda":  # the captured step reads it there
                group["lr"] = torch.as_tensor(group["lr"], device=self.device).fill_(rate * group["share"])
            else:
                group["lr"] = rate * group["share"]
        graphed = self._graphed(batch)
        loss = graphed(batch) if graphed is not None else self._update(batch)
        self._loss_sum += loss * batch.num
        self._step += 1

    def _update(self, batch: Batch) -> Tensor:
        """Takes one step of the optimiser; returns the loss before it."""
        self.optimiser.zero_grad(set_to_none=True)
        with self.model.randomness.seeded(self.run.seed, self.epoch, self._step) as drawing:
            with self._machine.autocast():
                logits = self.model(batch)
            loss = self.loss(logits, batch)
            if drawing is not None:
                drawing.backward()
            loss.backward()
        self.optimiser.step()
        return loss.detach()

    def _graphed(self, batch: Batch) -> GraphedStep | None:
        """The captured step for this batch; None on a CPU, and for steps that draw random numbers or ignore pixels."""
        if not self.capture or self.device.type != "cuda" or batch.ignoring or not self.model.randomness.never_draws:
            return None
        if batch.num not in self._graphs:
            try:
                self._graphs[batch.num] = GraphedStep(self._update, batch, self.model, self.optimiser, _graph_pool())
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                torch.cuda.synchronize(self.device)
                self._graphs[batch.num] = None
        return self._graphs[batch.num]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The run's loss, a scalar float32, of its model's output (B, K + channels of its cell target, T, T) for a batch."""
        num, cell_target = self.model.num_classes, self.model.cell_target
        if cell_target is None:
            return self._loss(logits, batch.target, batch.ignoring)
        kept = batch.target != IGNORE if batch.ignoring else None
        auxiliary = cell_target.loss(logits[:, num:], batch.cell_targets[self.run.targets], kept)
        return self._loss(logits[:, :num], batch.target, batch.ignoring) + auxiliary

    def lr(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a cosine to zero or a constant."""
        warmup = self.run.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return self.run.lr * (step + 1) / (warmup + 1)
        if self.run.schedule == "constant":
            return self.run.lr
        share = (step - warmup) / max(self.run.epochs * self.steps_per_epoch - warmup, 1)
        return self.run.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    # --- validation ---------------------------------------------------------------------------------------------------------------

    def add_validation(self, logits: Tensor, batch: Batch) -> None:
        """Adds a batch to the epoch's validation loss."""
        with blaming(self):
            value = self.loss(logits, batch).detach()
        # Summed on the device, to avoid waiting for a GPU. A Mac's GPU has no double precision.
        self._val_sum = self._val_sum + (value if value.device.type == "mps" else value.double()) * batch.num
        self._val_num += batch.num

    def end_epoch(self, counts: np.ndarray) -> None:
        """Ends the epoch with the confusion matrix (K, K) of the validation pixels: keeps the best weights and decides whether to continue."""
        self.trunk_s += self._backbone.seconds - self._backbone_before[0]
        self.trunk_cpu_s += self._backbone.cpu_seconds - self._backbone_before[1]
        row = {
            "train/loss": float(self._loss_sum) / self.num_views,
            "val/loss": float(self._val_sum) / max(self._val_num, 1),
            "lr": self.lr(self.epoch * self.steps_per_epoch),
        }
        # Over the classes in the validation masks, so that all epochs are compared by the same classes; by the loss if no mask has a cell.
        if counts[1:].any():
            pooled = pixel_scores(counts).of(pooled_classes(counts))
            row |= {"val/dice": pooled["dice"], "val/iou": pooled["iou"]}
        self._val_sum, self._val_num = torch.zeros((), device=self.device), 0
        self.history.append(row)
        with blaming(self):
            proceed = self.recorder.epoch(self.epoch, row)
        value = row["val/dice"] if self.run.select == "val/dice" and "val/dice" in row else -row["val/loss"]
        if value > self.best:
            self.best, self.best_epoch = value, self.epoch
            self.best_weights = {name: x.detach().to("cpu", copy=True) for name, x in self.model.state_dict().items()}
        self.epoch += 1
        self.ended = self._ending(row, proceed)
        with blaming(self):
            self.recorder.checkpoint(self.state())

    def _ending(self, row: dict[str, float], proceed: bool) -> str:
        """The value of ``ended`` after this epoch."""
        if not math.isfinite(row["train/loss"]):
            return f"failed: the training loss became {row['train/loss']} in epoch {self.epoch}; a smaller lr than {self.run.lr:g} may help"
        if not math.isfinite(row["val/loss"]):
            return f"failed: the validation loss became {row['val/loss']} in epoch {self.epoch}: its scores are not finite"
        if not proceed:
            return "pruned"
        if self.epoch >= self.run.epochs or self.run.ensemble != "none":
            return "done"
        if self.run.patience and self.epoch - 1 - self.best_epoch >= self.run.patience:
            return "stopped early"
        return ""

    # --- state --------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state to resume from after this epoch with the same numbers: tensors, numbers and strings only."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
            "best_weights": self.best_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        # The run may resume on another kind of device: AdamW refuses a capturable step on a CPU, and a learning rate on another device.
        own = {"capturable": self.device.type == "cuda"}
        groups = [group | own | {"lr": float(group["lr"])} for group in state["optimiser"]["param_groups"]]
        with without_compiler():
            self.optimiser.load_state_dict(state["optimiser"] | {"param_groups": groups})
        self.best_weights = state["best_weights"]
        for name in _PROGRESS:
            setattr(self, name, state["progress"][name])

    def combine(self, members: Sequence[HeadTrainer]) -> None:
        """Takes the best weights of the trained members of an ensemble, as its only epoch; its validation is to follow."""
        self.start_epoch()
        self.model.load_state_dict(self.model.state_of([one.best_weights for one in members]))
        losses = [one.history[one.best_epoch]["train/loss"] for one in members]
        self._loss_sum = self._loss_sum + sum(losses) / len(losses) * self.num_views
        self.train_s, self.train_cpu_s = sum(one.train_s for one in members), sum(one.train_cpu_s for one in members)
        self.trunk_s, self.trunk_cpu_s = max(one.trunk_s for one in members), max(one.trunk_cpu_s for one in members)

    def adopt(self, other: HeadTrainer) -> None:
        """Takes the training of another run, whose own would be the same, and logs its epochs."""
        for epoch, row in enumerate(other.history[self.epoch :], self.epoch):
            self.recorder.epoch(epoch, row)
        self.restore(other.state())
        self.recorder.checkpoint(self.state())

    def load_best(self) -> None:
        """Loads the best epoch's weights into the model."""
        self.model.load_state_dict(self.best_weights)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def on(self, features: Features) -> HeadTrainer:
        """Sets backbone and device; returns itself."""
        self._backbone, self._machine = features.backbone, features.backbone.machine
        return self


@functools.cache
def _graph_pool() -> Any:
    """Memory shared by all captured steps of this process."""
    return torch.cuda.graph_pool_handle()


_PROGRESS = ("epoch", "best_epoch", "best", "history", "train_s", "train_cpu_s", "trunk_s", "trunk_cpu_s", "ended")


def batch_sizes(num_views: int, batch_size: int) -> list[int]:
    """The sizes of an epoch's mini-batches: as few as ``batch_size`` allows, and as equal as possible, the larger ones first.

    A short last mini-batch would be a full step from few tiles, with batch norm's statistics from these alone.

    >>> batch_sizes(9, 8)
    [5, 4]
    """
    num = math.ceil(num_views / batch_size)
    return [num_views // num + (k < num_views % num) for k in range(num)]


class MiniBatches:
    """Regroups an epoch's ``num_views`` tiles from chunks of any size into mini-batches of :func:`batch_sizes`, in the same order."""

    def __init__(self, num_views: int, batch_size: int) -> None:
        self._sizes = batch_sizes(num_views, batch_size)
        self._held: list[Batch] = []

    def of(self, chunk: Batch) -> Iterator[Batch]:
        """Adds a chunk; yields the mini-batches that it completes."""
        self._held.append(chunk)
        while self._sizes and sum(batch.num for batch in self._held) >= self._sizes[0]:
            yield self._pop(self._sizes.pop(0))

    def _pop(self, num: int) -> Batch:
        parts: list[Batch] = []
        while num:
            head = self._held[0]
            parts.append(cast(Batch, head[:num]))
            if head.num <= num:
                self._held.pop(0)
            else:
                self._held[0] = cast(Batch, head[num:])
            num -= parts[-1].num
        return parts[0] if len(parts) == 1 else concat_batches(parts)


def concat_batches(parts: Sequence[Batch]) -> Batch:
    return Batch(
        {index: torch.cat([part.maps[index] for part in parts]) for index in parts[0].maps},
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.target for part in parts]),
        {name: torch.cat([part.cell_targets[name] for part in parts]) for name in parts[0].cell_targets},
        any(part.ignoring for part in parts),
    )
