"""``fit``: all runs of a cohort learn from one stream of features, each with its own head, loss, optimiser, schedule and end.

``fit([a, b])`` gives the same numbers as ``fit([a])`` and ``fit([b])``, to the last bit on a CPU. On a GPU, heads of one kind learn as one
(``cellbench.training.stacked_heads``), and the numbers agree to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from cellbench.features.extractor import Batch, Features
from cellbench.parallel import WorkerPool
from cellbench.training.stacked_heads import group_stackable
from cellbench.training.tiled_inference import score_tiles
from cellbench.training.trainer import HeadTrainer


class Progress(Protocol):
    """A bar that is told of each step, as tqdm is."""

    def update(self, n: int = 1) -> Any: ...


def fit(learners: Sequence[HeadTrainer], features: Features, progress: Progress | None = None) -> None:
    """Trains the learners of one cohort to their ends. A learner that was restored takes part from its own next epoch on.

    ``progress`` is told of every view that went through the trunk. Weights of the best epoch are in each learner's model afterwards.
    """
    learners = [learner.on(features) for learner in learners]
    with WorkerPool(features.trunk.machine.lanes) as lanes:
        while active := [learner for learner in learners if not learner.ended]:
            epoch = min(learner.epoch for learner in active)
            active = [learner for learner in active if learner.epoch == epoch]
            teams = group_stackable(active, features)
            for team in teams:
                team.begin()
            for chunk in features.train(epoch, lanes):
                lanes.each([functools.partial(team.take, chunk) for team in teams], [team.train_s for team in teams])
                if progress is not None:
                    progress.update(chunk.num)
            for team in teams:
                team.end()
            validate([learner for learner in active if not learner.ended], features, lanes)
    for learner in learners:
        if learner.best_weights:
            learner.load_best()


def validate(learners: Sequence[HeadTrainer], features: Features, lanes: WorkerPool) -> None:
    """Scores the learners on the whole validation images and ends their epoch."""

    def watch(k: int, logits: Tensor, batch: Batch) -> None:
        learners[k].watch(logits, batch)

    counts = score_tiles([learner.model for learner in learners], features, "val", watch, lanes)
    for learner, mine in zip(learners, counts, strict=True):
        learner.finish(mine)
