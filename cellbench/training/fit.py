"""Trains all runs of a cohort on one stream of features. Each has its own head, loss, optimiser, schedule and early stopping.

``fit([a, b])`` gives the same numbers as ``fit([a])`` and ``fit([b])``, to the last bit on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from cellbench.features.extractor import Batch, Features
from cellbench.parallel import WorkerPool
from cellbench.training.tiled_inference import score_tiles
from cellbench.training.trainer import HeadTrainer


class Progress(Protocol):
    """Counts the tiles of each phase, ``training`` and ``validating``."""

    def update(self, phase: str, num: float) -> Any: ...


def fit(trainers: Sequence[HeadTrainer], features: Features, progress: Progress | None = None) -> None:
    """Trains the runs of one cohort until each has ended. A restored run joins at its own next epoch.

    ``progress`` counts the tiles that all runs have seen. Afterwards each model has the weights of its best epoch. Runs that differ only in
    what is done after training (``tta``) are trained once.
    """
    leaders, twins = _train_once([trainer.on(features) for trainer in trainers])
    _fit(leaders, features, progress)
    for twin, leader in twins:
        twin.adopt(leader)
    for trainer in trainers:
        if trainer.best_weights:
            trainer.load_best()


def _train_once(trainers: Sequence[HeadTrainer]) -> tuple[list[HeadTrainer], list[tuple[HeadTrainer, HeadTrainer]]]:
    """The runs to train, and the others, each with the one whose training is its own too. The one with most epochs done is trained."""
    chosen: dict[str, HeadTrainer] = {}
    for trainer in sorted(trainers, key=lambda one: -one.epoch):
        chosen.setdefault(trainer.run.training.model_dump_json(), trainer)
    leaders, twins = [], []
    for trainer in trainers:
        leader = chosen[trainer.run.training.model_dump_json()]
        if trainer.run == leader.run:
            leaders.append(trainer)
        else:
            twins.append((trainer, leader))
    return leaders, twins


def _fit(trainers: Sequence[HeadTrainer], features: Features, progress: Progress | None) -> None:
    with WorkerPool(features.backbone.machine.lanes) as pool:
        while active := [trainer for trainer in trainers if not trainer.ended]:
            epoch = min(trainer.epoch for trainer in active)
            active = [trainer for trainer in active if trainer.epoch == epoch]
            for trainer in active:
                trainer.start_epoch()
            for chunk in features.train(epoch, pool):
                pool.run_all([functools.partial(trainer.train_on, chunk) for trainer in active], [trainer.train_s for trainer in active])
                if progress is not None:
                    progress.update("training", chunk.num)
            validate([trainer for trainer in active if not trainer.ended], features, pool, progress)


def validate(trainers: Sequence[HeadTrainer], features: Features, pool: WorkerPool, progress: Progress | None = None) -> None:
    """Validates the runs on whole images and ends their epoch."""

    def add(k: int, logits: Tensor, batch: Batch) -> None:
        trainers[k].add_validation(logits, batch)
        if k == 0 and progress is not None:
            progress.update("validating", batch.num)

    counts = score_tiles([trainer.model for trainer in trainers], features, "val", add, pool)
    for trainer, own in zip(trainers, counts, strict=True):
        trainer.end_epoch(own)
