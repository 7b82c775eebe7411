"""The training of finished runs, read back from MLflow: runs that differ in what is done after training, and ensembles, need no training then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import safetensors.torch
from safetensors import SafetensorError

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.execution.planning import ResolvedRun
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.tracking.schema import RunRecord
from cellbench.tracking.tracker import Tracker
from cellbench.training.fit import NoRecorder
from cellbench.training.model import build_model
from cellbench.training.trainer import HeadTrainer

CURVES = ("train/loss", "val/loss", "val/dice", "val/iou", "lr")


def finished_trainers(
    runs: Sequence[ResolvedRun],
    known: Mapping[str, RunRecord],
    tracker: Tracker,
    registry: Registry,
    backbone: FrozenBackbone,
    num_classes: int,
    num_views: int,
) -> list[HeadTrainer]:
    """The trainers, as they were at their end, of the finished runs whose training these runs may take; one for each training.

    ``known``: the runs of the experiment, by fingerprint.
    """
    own = {one.fingerprint for one in runs}
    wanted = {digest: run for one in runs for run, digest in one.same_training if digest not in own}
    found: dict[str, HeadTrainer] = {}
    for digest, run in wanted.items():
        key, record = run.training.model_dump_json(), known.get(digest)
        if key in found or record is None or record.status != "finished":
            continue
        if (trainer := _trainer(run, record, tracker, registry, backbone, num_classes, num_views)) is not None:
            found[key] = trainer
    return list(found.values())


def _trainer(
    run: RunSpec, record: RunRecord, tracker: Tracker, registry: Registry, backbone: FrozenBackbone, num_classes: int, num_views: int
) -> HeadTrainer | None:
    """None where something of it is lost: it is trained again then."""
    data = tracker.artifact(record, "head.safetensors")
    history = tracker.history(record, CURVES)
    best = int(record.metrics.get("best/epoch", -1))
    if data is None or not 0 <= best < len(history) or "train/loss" not in history[best]:
        return None
    model = build_model(run, registry.part(run), backbone, num_classes)
    try:
        weights = safetensors.torch.load(data)
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError):
        return None
    trainer = HeadTrainer(run=run, model=model, recorder=NoRecorder(), num_views=num_views, registry=registry)
    trainer.history, trainer.epoch, trainer.best_epoch, trainer.best_weights = history, len(history), best, weights
    cores = backbone.machine.cores_of_one
    for name, metric, share in (
        ("train_s", "cost/head_s", 1), ("train_cpu_s", "cost/head_cpu_s", cores), ("trunk_s", "cost/trunk_s", 1),
        ("trunk_cpu_s", "cost/trunk_cpu_s", cores),
    ):  # fmt: skip
        setattr(trainer, name, record.metrics.get(metric, 0.0) / share)
    trainer.ended = "done"
    return trainer
