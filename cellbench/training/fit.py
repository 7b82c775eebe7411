"""Trains all runs of a cohort on one stream of features. Each has its own head, loss, optimiser, schedule and early stopping.

``fit([a, b])`` gives the same numbers as ``fit([a])`` and ``fit([b])``, to the last bit on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from cellbench.config.run import RunSpec
from cellbench.features.extractor import Batch, Features
from cellbench.parallel import WorkerPool
from cellbench.startup import without_compiler
from cellbench.training.model import build_model
from cellbench.training.tiled_inference import score_tiles
from cellbench.training.trainer import HeadTrainer


class Progress(Protocol):
    """Counts the tiles of each phase, ``training`` and ``validating``."""

    def update(self, phase: str, num: float) -> Any: ...


def fit(
    trainers: Sequence[HeadTrainer], features: Features, progress: Progress | None = None, finished: Sequence[HeadTrainer] = ()
) -> None:
    """Trains the runs of one cohort until each has ended. A restored run joins at its own next epoch.

    ``progress`` counts the tiles that all runs have seen. Afterwards each model has the weights of its best epoch. Runs that differ only in
    what is done after training (``tta``) are trained once, and the members of an ensemble only if they are not among the runs. ``finished``:
    runs that were trained before, whose training others may take.
    """
    single = [trainer.on(features) for trainer in trainers if trainer.run.ensemble == "none"]
    ensembles = [trainer.on(features) for trainer in trainers if trainer.run.ensemble != "none" and not trainer.ended]
    source = {_key(trainer.run): trainer for trainer in finished}
    for trainer in sorted(single, key=lambda one: -one.epoch):  # of several, the one with most epochs
        source.setdefault(_key(trainer.run), trainer)
    twins = [trainer for trainer in single if trainer.run != source[_key(trainer.run)].run]
    own = [trainer for trainer in single if trainer.run == source[_key(trainer.run)].run]
    for ensemble in ensembles:
        for member in ensemble.run.members:
            if _key(member) not in source:
                source[_key(member)] = _unlogged(member, ensemble, features)
                own.append(source[_key(member)])
    _fit(own, features, progress)
    for twin in twins:
        twin.adopt(source[_key(twin.run)])
    for ensemble in ensembles:
        _combine(ensemble, [source[_key(member)] for member in ensemble.run.members], features)
    for trainer in trainers:
        if trainer.best_weights:
            trainer.load_best()


def _key(run: RunSpec) -> str:
    return run.training.model_dump_json()


class NoRecorder:
    """Records nothing and never ends a run."""

    def epoch(self, epoch: int, metrics: dict[str, float]) -> bool:
        return True

    def checkpoint(self, state: dict[str, Any]) -> None:
        pass


def _unlogged(run: RunSpec, other: HeadTrainer, features: Features) -> HeadTrainer:
    """A trainer of a run that is nowhere logged, with the data and classes of another one."""
    model = build_model(run, other.registry.part(run), features.backbone, other.model.num_classes)
    return HeadTrainer(run=run, model=model, recorder=NoRecorder(), num_views=other.num_views, registry=other.registry).on(features)


def _combine(ensemble: HeadTrainer, members: Sequence[HeadTrainer], features: Features) -> None:
    """Makes an ensemble of its trained members and validates it."""
    if failed := next((one for one in members if one.ended.startswith("failed") or not one.best_weights), None):
        reason = failed.ended.removeprefix("failed: ") or failed.ended
        ensemble.ended = f"failed: its member with seed {failed.run.seed}: {reason}"
        return
    ensemble.combine(members)
    with WorkerPool(features.backbone.machine.lanes) as pool:
        validate([ensemble], features, pool)


def _fit(trainers: Sequence[HeadTrainer], features: Features, progress: Progress | None) -> None:
    with without_compiler(), WorkerPool(features.backbone.machine.lanes) as pool:
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
