"""One run on its way: its model, loss, optimiser, schedule and end. It knows a :class:`Recorder`, not MLflow, and never hears of a search:
pruning reaches it as a recorder's answer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cellbench.config.run import RunSpec
from cellbench.features.extractor import Batch, Features
from cellbench.metrics.pixel import IGNORE, pixel_scores, pooled_classes
from cellbench.training.losses import parse_loss, targets_loss
from cellbench.training.model import SegmentationModel


class Recorder(Protocol):
    """Where a run's numbers go, and who may end it."""

    def epoch(self, epoch: int, metrics: dict[str, float]) -> bool:
        """Told each epoch's metrics; False ends the run as pruned."""

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Given everything that a run needs to go on from here, after each epoch."""


@dataclass
class HeadTrainer:
    """One run on its way: its model, what trains it, and how far it has come."""

    run: RunSpec
    model: SegmentationModel
    recorder: Recorder
    num_views: int
    """Views an epoch."""
    epoch: int = 0
    """The next epoch."""
    best_epoch: int = -1
    best: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    train_s: float = 0.0
    """Spent in learning. On a GPU this is the time to hand the work over, unless something waits for it."""
    train_cpu_s: float = 0.0
    """Of the processor, by the thread that learned: other processes make ``train_s`` longer, this hardly."""
    trunk_s: float = 0.0
    """Spent in the backbone, which the cohort shares, in the epochs that it took part in; those before an interruption too."""
    trunk_cpu_s: float = 0.0
    ended: str = ""
    """Why it stopped: ``done``, ``stopped early``, ``pruned`` or ``failed: …``; empty while it learns."""

    def __post_init__(self) -> None:
        self._loss = parse_loss(self.run.loss)
        self.optimiser = torch.optim.AdamW(self.model.groups(self.run), lr=self.run.lr, weight_decay=self.run.weight_decay)
        self.num_steps = len(batch_sizes(self.num_views, self.run.batch_size))
        """An epoch."""
        self._val_sum, self._val_num = torch.zeros(()), 0

    # --- training -----------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new epoch."""
        self.model.train()
        self._trunk_before = self._trunk.seconds, self._trunk.cpu_seconds
        self._step, self._batches = 0, MiniBatches(self.num_views, self.run.batch_size)
        self.loss_sum = torch.zeros((), device=self.device)

    def take(self, chunk: Batch) -> None:
        """Learns from as many whole mini-batches as are there; the rest waits for the next chunk. A run that has failed learns no more."""
        if self.ended:
            return
        start, start_cpu = time.perf_counter(), time.thread_time()
        with fail_single_values([self]):
            for batch in self._batches.of(chunk):
                self._learn(batch)
        self.train_s += time.perf_counter() - start
        self.train_cpu_s += time.thread_time() - start_cpu

    def end(self) -> None:
        """The epoch's last mini-batch was learned from."""

    def _learn(self, batch: Batch) -> None:
        rate = self.lr(self.epoch * self.num_steps + self._step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self.optimiser.zero_grad(set_to_none=True)
        with self.model.draws.seeded(self.run.seed, self.epoch, self._step) as drawing:
            with self.autocast():
                logits = self.model(batch)
            loss = self.loss(logits, batch)
            if drawing is not None:
                drawing.backward()
            loss.backward()
        self.optimiser.step()
        self.loss_sum += loss.detach() * batch.num
        self._step += 1

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The run's loss, a scalar float32, of what its model answers to a batch (B, K, T, T); of (N, B, K, T, T), the answers of N models like
        it, the N losses."""
        num, auxiliary_targets = self.model.num_classes, self.model.auxiliary_targets
        if not auxiliary_targets:
            return self._loss(logits, batch.target, batch.ignoring)
        assert batch.auxiliary_targets is not None
        if logits.dim() > 4:
            return torch.stack([self.loss(one, batch) for one in logits])
        kept = batch.target != IGNORE if batch.ignoring else None
        return self._loss(logits[:, :num], batch.target, batch.ignoring) + targets_loss(logits[:, num:], batch.auxiliary_targets, auxiliary_targets, kept)

    def lr(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a cosine to zero or a constant."""
        warmup = self.run.warmup_epochs * self.num_steps
        if step < warmup:
            return self.run.lr * (step + 1) / (warmup + 1)
        if self.run.schedule == "constant":
            return self.run.lr
        share = (step - warmup) / max(self.run.epochs * self.num_steps - warmup, 1)
        return self.run.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    # --- validation ---------------------------------------------------------------------------------------------------------------

    def watch(self, logits: Tensor, batch: Batch) -> None:
        """Adds a validation batch to the epoch's validation loss."""
        self._val_sum = self._val_sum + self.loss(logits, batch).cpu().double() * batch.num
        self._val_num += batch.num

    def finish(self, counts: np.ndarray) -> None:
        """Ends the epoch with the validation pixels' confusion matrix (K, K): keeps the best weights and decides whether to go on."""
        self.trunk_s += self._trunk.seconds - self._trunk_before[0]
        self.trunk_cpu_s += self._trunk.cpu_seconds - self._trunk_before[1]
        row = {
            "train/loss": float(self.loss_sum) / self.num_views,
            "val/loss": float(self._val_sum) / max(self._val_num, 1),
            "lr": self.lr(self.epoch * self.num_steps),
        }
        # Over the classes that validation masks hold, so that every epoch is judged by the same ones; where none holds a cell, the loss judges.
        if counts[1:].any():
            pooled = pixel_scores(counts).of(pooled_classes(counts))
            row |= {"val/dice": pooled["dice"], "val/iou": pooled["iou"]}
        self._val_sum, self._val_num = torch.zeros(()), 0
        self.history.append(row)
        go_on = self.recorder.epoch(self.epoch, row)
        value = row["val/dice"] if self.run.select == "val/dice" and "val/dice" in row else -row["val/loss"]
        if value > self.best:
            self.best, self.best_epoch = value, self.epoch
            self.best_weights = {name: x.detach().to("cpu", copy=True) for name, x in self.model.state_dict().items()}
        self.epoch += 1
        if not math.isfinite(row["train/loss"]):
            self.ended = (
                f"failed: the training loss became {row['train/loss']} in epoch {self.epoch}; a smaller lr than {self.run.lr:g} may help"
            )
        elif not math.isfinite(row["val/loss"]):
            self.ended = f"failed: the validation loss became {row['val/loss']} in epoch {self.epoch}: its scores are not finite"
        elif not go_on:
            self.ended = "pruned"
        elif self.epoch >= self.run.epochs:
            self.ended = "done"
        elif self.run.patience and self.epoch - 1 - self.best_epoch >= self.run.patience:
            self.ended = "stopped early"
        self.recorder.checkpoint(self.state())

    # --- state --------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that is needed to go on after this epoch as if nothing had happened: tensors, numbers and strings only."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
            "best_weights": self.best_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where :meth:`state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.best_weights = state["best_weights"]
        for name in _PROGRESS:
            setattr(self, name, state["progress"][name])

    def load_best(self) -> None:
        """Puts the best epoch's weights into the model."""
        self.model.load_state_dict(self.best_weights)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """The context in which its model computes."""
        return self._machine.autocast()

    def on(self, features: Features) -> HeadTrainer:
        """Tells the learner where it computes; returns itself."""
        self._trunk, self._machine = features.trunk, features.trunk.machine
        return self


_PROGRESS = ("epoch", "best_epoch", "best", "history", "train_s", "train_cpu_s", "trunk_s", "trunk_cpu_s", "ended")


def batch_sizes(num_views: int, batch_size: int) -> list[int]:
    """The sizes of an epoch's mini-batches: as few as ``batch_size`` allows, and as equal as can be, the larger ones first.

    A short last one would be a step of full weight from few tiles, and batch norm would take its statistics from them.

    >>> batch_sizes(9, 8)
    [5, 4]
    """
    num = math.ceil(num_views / batch_size)
    return [num_views // num + (k < num_views % num) for k in range(num)]


@contextlib.contextmanager
def fail_single_values(learners: Sequence[HeadTrainer]) -> Iterator[None]:
    """Ends these learners as failed where batch norm is given a single value of each channel, of which it can take no statistics: one tile with
    a map of one place, which is a matter of their settings."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        for learner in learners:
            run = learner.run
            learner.ended = (
                f"failed: batch norm cannot learn from a mini-batch of one tile with a map of one place (tile_px = {run.tile_px}, batch_size = "
                f"{run.batch_size}, {learner.num_views} tiles an epoch); set a larger tile_px or batch_size"
            )


class MiniBatches:
    """An epoch's ``num_views`` views come in chunks of any size and leave in mini-batches of :func:`batch_sizes`, in the same order."""

    def __init__(self, num_views: int, batch_size: int) -> None:
        self._sizes = batch_sizes(num_views, batch_size)
        self._held: list[Batch] = []

    def of(self, chunk: Batch) -> Iterator[Batch]:
        """As many whole mini-batches as are there; what is left waits for the next chunk."""
        self._held.append(chunk)
        while self._sizes and sum(batch.num for batch in self._held) >= self._sizes[0]:
            yield self._pop(self._sizes.pop(0))

    def _pop(self, num: int) -> Batch:
        parts = []
        while num:
            head = self._held[0]
            parts.append(head[:num])
            if head.num <= num:
                self._held.pop(0)
            else:
                self._held[0] = head[num:]
            num -= parts[-1].num
        return parts[0] if len(parts) == 1 else concat_batches(parts)


def concat_batches(parts: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    return Batch(
        {index: torch.cat([part.maps[index] for part in parts]) for index in parts[0].maps},
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat(auxiliary_targets) if len(auxiliary_targets := [part.auxiliary_targets for part in parts if part.auxiliary_targets is not None]) == len(parts) else None,
        any(part.ignoring for part in parts),
    )
