"""``fit``: all runs of a cohort learn from one stream of features, each with its own head, loss, optimiser, schedule and end.

``fit([a, b])`` gives the same numbers as ``fit([a])`` and ``fit([b])``, to the last bit on a CPU. It knows a :class:`Recorder`, not MLflow,
and never hears of a search: pruning reaches it as a recorder's answer.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cellbench.features import Batch, Features
from cellbench.infer import tile_counts
from cellbench.lanes import Lanes
from cellbench.losses import loss_of
from cellbench.metrics import cell_classes, scores
from cellbench.model import Model
from cellbench.spec import RunSpec
from cellbench.targets import aims_loss


class Recorder(Protocol):
    """Where a run's numbers go, and who may end it."""

    def epoch(self, epoch: int, metrics: dict[str, float]) -> bool:
        """Told each epoch's metrics; False ends the run as pruned."""

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Given everything that a run needs to go on from here, after each epoch."""


class Progress(Protocol):
    """A bar that is told of each step, as tqdm is."""

    def update(self, n: int = 1) -> Any: ...


@dataclass
class Learner:
    """One run on its way: its model, what trains it, and how far it has come."""

    run: RunSpec
    model: Model
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
    ended: str = ""
    """Why it stopped: ``done``, ``stopped early``, ``pruned`` or ``failed: …``; empty while it learns."""

    def __post_init__(self) -> None:
        self._loss = loss_of(self.run.loss)
        self._optimiser = torch.optim.AdamW(self.model.groups(self.run), lr=self.run.lr, weight_decay=self.run.weight_decay)
        self._steps = math.ceil(self.num_views / self.run.batch_size)
        self._held: list[Batch] = []
        self._sum = torch.zeros(())
        self._val_sum, self._val_num = torch.zeros(()), 0

    # --- training -----------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new epoch."""
        self.model.train()
        self._step, self._held, self._sum = 0, [], torch.zeros((), device=self._device)

    def take(self, chunk: Batch, last: bool) -> None:
        """Learns from as many whole mini-batches as are there; the rest waits for the next chunk, or ends the epoch."""
        start = time.perf_counter()
        self._held.append(chunk)
        size = self.run.batch_size
        while (there := sum(batch.num for batch in self._held)) >= size or (last and there):
            self._learn(self._pop(min(size, there)))
        self.train_s += time.perf_counter() - start

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
        return parts[0] if len(parts) == 1 else joined(parts)

    def _learn(self, batch: Batch) -> None:
        rate = self.lr(self.epoch * self._steps + self._step)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self._optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.model(batch)
        loss = self._loss_of(logits, batch)
        loss.backward()
        self._optimiser.step()
        self._sum += loss.detach() * batch.num
        self._step += 1

    def _loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        num, aims = self.model.num_classes, self.model.aims
        if not aims:
            return self._loss(logits, batch.target)
        assert batch.aims is not None
        return self._loss(logits[:, :num], batch.target) + aims_loss(logits[:, num:], batch.aims, aims)

    def lr(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a cosine to zero or a constant."""
        warmup = self.run.warmup_epochs * self._steps
        if step < warmup:
            return self.run.lr * (step + 1) / (warmup + 1)
        if self.run.schedule == "constant":
            return self.run.lr
        share = (step - warmup) / max(self.run.epochs * self._steps - warmup, 1)
        return self.run.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    # --- validation ---------------------------------------------------------------------------------------------------------------

    def watch(self, logits: Tensor, batch: Batch) -> None:
        """Adds a validation batch to the epoch's validation loss."""
        self._val_sum = self._val_sum + self._loss_of(logits, batch).double().cpu() * batch.num
        self._val_num += batch.num

    def finish(self, counts: np.ndarray) -> None:
        """Ends the epoch with the validation pixels' confusion matrix (K, K): keeps the best weights and decides whether to go on."""
        pooled = scores(counts).of(cell_classes(len(counts)))
        row = {
            "train/loss": float(self._sum) / self.num_views,
            "val/loss": float(self._val_sum) / max(self._val_num, 1),
            "val/dice": pooled["dice"],
            "val/iou": pooled["iou"],
            "lr": self.lr(self.epoch * self._steps),
        }
        self._val_sum, self._val_num = torch.zeros(()), 0
        self.history.append(row)
        go_on = self.recorder.epoch(self.epoch, row)
        value = row["val/dice"] if self.run.select == "val/dice" else -row["val/loss"]
        if value > self.best:
            self.best, self.best_epoch = value, self.epoch
            self.best_weights = {name: x.detach().to("cpu", copy=True) for name, x in self.model.state_dict().items()}
        self.epoch += 1
        if not math.isfinite(row["train/loss"]):
            self.ended = f"failed: the training loss became {row['train/loss']} in epoch {self.epoch}; a smaller lr than {self.run.lr:g} may help"
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
            "optimiser": self._optimiser.state_dict(),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
            "best_weights": self.best_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where :meth:`state` was taken."""
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.best_weights = state["best_weights"]
        for name in _PROGRESS:
            setattr(self, name, state["progress"][name])

    def load_best(self) -> None:
        """Puts the best epoch's weights into the model."""
        self.model.load_state_dict(self.best_weights)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _autocast(self) -> torch.autocast:
        return self._machine.autocast()

    def on(self, features: Features) -> Learner:
        """Tells the learner where it computes; returns itself."""
        self._machine = features.trunk.machine
        return self


_PROGRESS = ("epoch", "best_epoch", "best", "history", "train_s", "ended")


def joined(parts: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    return Batch(
        {index: torch.cat([part.maps[index] for part in parts]) for index in parts[0].maps},
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat(aims) if len(aims := [part.aims for part in parts if part.aims is not None]) == len(parts) else None,
    )


def fit(learners: Sequence[Learner], features: Features, progress: Progress | None = None) -> None:
    """Trains the learners of one cohort to their ends. A learner that was restored takes part from its own next epoch on.

    ``progress`` is told of every view that went through the trunk. Weights of the best epoch are in each learner's model afterwards.
    """
    learners = [learner.on(features) for learner in learners]
    with Lanes(features.trunk.machine.lanes) as lanes:
        while active := [learner for learner in learners if not learner.ended]:
            epoch = min(learner.epoch for learner in active)
            active = [learner for learner in active if learner.epoch == epoch]
            for learner in active:
                learner.begin()
            seen = 0
            for chunk in features.train(epoch, lanes):
                seen += chunk.num
                last = seen == features.plan.num_views
                lanes.each([functools.partial(learner.take, chunk, last) for learner in active], [learner.train_s for learner in active])
                if progress is not None:
                    progress.update(chunk.num)
            validate(active, features, lanes)
    for learner in learners:
        if learner.best_weights:
            learner.load_best()


def validate(learners: Sequence[Learner], features: Features, lanes: Lanes) -> None:
    """Scores the learners on the whole validation images and ends their epoch."""

    def watch(k: int, logits: Tensor, batch: Batch) -> None:
        learners[k].watch(logits, batch)

    counts = tile_counts([learner.model for learner in learners], features, "val", watch, lanes)
    for learner, mine in zip(learners, counts, strict=True):
        learner.finish(mine)
