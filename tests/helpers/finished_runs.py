"""Finished runs with synthetic scores, logged through the tracker as a grid logs them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cellbench.config.run import RunSpec
from cellbench.reporting.model_groups import FinishedRun
from cellbench.tracking.schema import RunRecord, run_params
from cellbench.tracking.tracker import Tracker

EXPERIMENT = "cells, a/b & ü 🔬"
IMAGES = tuple(f"smear-{k:02d}.png" for k in range(16))


def per_image_scores(mean: float, seed: int, images: tuple[str, ...] = IMAGES, digest: str = "d" * 16) -> dict[str, Any]:
    """A ``per_image.json``: hard images are hard for everyone, so that pairing matters."""
    hard = np.random.default_rng(0).normal(0, 0.03, len(images))
    noise = np.random.default_rng(seed + int(mean * 1e6)).normal(0, 0.002, len(images))
    dice = np.clip(mean + hard + noise, 0, 1)
    plain = {
        name: dice.tolist() for name in ("dice", "iou", "precision", "recall", "accuracy", "nsd", "boundary_dice", "ap50_95", "aji", "pq")
    }
    return {
        "classes": ["background", "cell"],
        "images": list(images),
        "dataset": digest,
        "tolerance_px": 2.0,
        "min_area_px": [100] * len(images),
        "cells_numbered": [False] * len(images),
        **plain,
        "ap50": np.clip(3 * dice - 2, 0, 1).tolist(),
        "num_true": [90] * len(images),
        "num_predicted": [91] * len(images),
    }


def finished_run(head: str, per_image: dict[str, Any], seed: int = 0, fold: int | None = None) -> FinishedRun:
    params = {name: str(value) for name, value in run_params(RunSpec(backbone="uni", head=head, seed=seed), "drawn", "fp32").items()}
    if fold is not None:
        params["fold"] = str(fold)
    metrics = {"test/dice": 0.9, "test/iou": 0.8, "test/precision": 0.9, "test/recall": 0.9, "best/val_dice": 0.9}
    return FinishedRun(
        record=RunRecord(run_id=f"{head} {seed} {fold}", name=head, status="finished", metrics=metrics, params=params), per_image=per_image
    )


def log_finished_run(
    tracker: Tracker,
    run: RunSpec,
    per_image: dict[str, Any] | None,
    parent: str = "",
    name: str = "",
    mean: float | None = None,
    **tags: str,
) -> str:
    """Writes a finished run; ``per_image=None`` leaves it without per-image scores. ``mean``: its Dice; None: of its images. Returns its id."""
    if mean is None:
        mean = float(np.mean(per_image["dice"])) if per_image else 0.5
    metrics = {"test/dice": mean, "test/iou": 0.9, "test/precision": 0.9, "test/recall": 0.9, "cost/train_s": 30.0 + 10 * len(run.model)}
    metrics |= {"cost/images_per_s": 100 / len(run.model), "cost/head_params": 770, "cost/backbone_params": 2.2e7, "cost/peak_mib": 1500}
    digest = per_image["dataset"] if per_image else ""
    fingerprint = f"{run.model} {run.seed} {run.epochs} {run.fraction} {digest}"
    with tracker.run(name or f"{run.model} · seed {run.seed}", fingerprint, parent=parent, tags={"model": run.model} | tags) as opened:
        opened.log(metrics, params=run_params(run, "drawn", "fp32"))
        if per_image is not None:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "per_image.json").write_text(json.dumps(per_image))
                opened.log_artifacts(Path(folder))
    return opened.run_id


def small_grid(tracker: Tracker) -> str:
    """Two backbones x two heads x two seeds and a baseline; the id of the parent."""
    with tracker.run("grid: small", "parent", tags={"cellbench.kind": "grid"}) as top:
        for backbone, good in (("dinobloom-s", 0.93), ("uni", 0.9)):
            for head, better in (("fpn", 0.02), ("bilinear", 0.0)):
                for seed in (0, 1):
                    log_finished_run(
                        tracker, RunSpec(backbone=backbone, head=head, seed=seed), per_image_scores(good + better, seed), top.run_id
                    )
        log_finished_run(tracker, RunSpec(baseline="otsu"), per_image_scores(0.8, 0), top.run_id)
    return top.run_id
