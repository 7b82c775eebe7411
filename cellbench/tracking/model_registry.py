"""Registers the best models in MLflow's list of models, with weights, signature and the metrics of the best epoch.

MLflow's ``log_model`` is not used, because it copies the metrics of step 0 (measured on 3.17.2: a model's Dice was that of the first epoch) and
needs an active run. :func:`write_model_files` defines the content of an entry.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cellbench.errors import CellbenchError
from cellbench.files import os_errors_as
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.offline_queue import NotFoundError
from cellbench.tracking.schema import CALIBRATION, EXPERIMENT, FINGERPRINT, MODEL, NOTE, VERDICT, RunRecord
from cellbench.tracking.store import pages
from cellbench.tracking.tracker import Tracker

EPOCH_METRICS = ("train/loss", "val/loss", "val/dice", "val/iou", "lr")
"""Metrics with one value per epoch; all other metrics of a run have one value."""
FILES = ("config.toml", "head.safetensors", "preparation.json", "separation.json", CALIBRATION)


def register(tracker: Tracker, run: RunRecord, verdict: str, more: str = "") -> str:
    """Creates the entry of a finished run, once; returns its id. Raises CellbenchError if artifacts of the run are missing.

    ``verdict``: the reason, such as "the best"; shown in the model's description with ``more``, sentences on how it was chosen.
    """
    with tracker.lock():  # else two processes that end at once would make two entries
        return _register(tracker, run, verdict, more)


def _register(tracker: Tracker, run: RunRecord, verdict: str, more: str) -> str:
    client, entities = tracker.client, tracker.mlflow.entities
    tags = {VERDICT: verdict, NOTE: f"In '{tracker.name}': {verdict}.{more}"}
    if (known := client.get_run(run.run_id).data.tags.get(MODEL)) and _exists(tracker, known):
        client.set_logged_model_tags(known, tags)  # the verdict may have changed
        return known
    best = int(run.metrics.get("best/epoch", 0))
    model = client.create_logged_model(
        tracker.experiment_id,
        name=model_name(run.name),
        source_run_id=run.run_id,
        params=dict(run.params),
        tags={EXPERIMENT: tracker.name, FINGERPRINT: run.fingerprint, **tags},
        model_type="segmentation",
    )
    try:
        with TemporaryFolder() as name, os_errors_as("creating a model's entry"):
            write_model_files(Path(name), tracker, run, model.model_id)
            client.log_model_artifacts(model.model_id, name)
        client.log_outputs(run.run_id, [entities.LoggedModelOutput(model.model_id, step=best)])
        tracker.reopen(run).write(_metrics(tracker, run, model.model_id, best), tags={MODEL: model.model_id})
    except CellbenchError:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


SUPERSEDED = "superseded"
"""The verdict of an entry whose model is no longer among the best."""


def mark_superseded(tracker: Tracker, winners: Collection[str]) -> None:
    """Marks the experiment's entries that are no longer among the best; ``winners``: ids of those that are."""
    for model in pages(tracker.client.search_logged_models, [tracker.experiment_id]):
        before = model.tags.get(VERDICT, SUPERSEDED)
        if model.model_id not in winners and before != SUPERSEDED:
            note = f"In '{tracker.name}': superseded by later runs. Before: {before}."
            tracker.client.set_logged_model_tags(model.model_id, {VERDICT: SUPERSEDED, NOTE: note})


def write_model_files(folder: Path, tracker: Tracker, run: RunRecord, model_id: str) -> None:
    """Writes the files of an entry: the run's artifacts that inference needs (``FILES``), and MLflow's ``MLmodel`` with the signature.

    Raises CellbenchError if the run has no ``config.toml``. A baseline without training has no weights.
    """
    from mlflow.models import Model

    for name in FILES:
        data = tracker.artifact(run, name)
        if data is not None:
            (folder / name).write_bytes(data)
        elif name == "config.toml":
            raise CellbenchError(f"'{run.name}' has no {name} in MLflow any more, so it cannot have a model entry. Run it again.")
    model = Model(run_id=run.run_id, model_id=model_id, signature=model_signature())
    model.add_flavor("cellbench", config="config.toml", weights="head.safetensors" if (folder / "head.safetensors").exists() else "")
    model.save(str(folder / "MLmodel"))


def model_signature() -> Any:
    """Input: images (N, H, W, 3) uint8 RGB. Output: class numbers and cell probability 0..255, both (N, H, W) uint8."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(np.dtype(np.uint8), (-1, *shape), name)

    return ModelSignature(inputs=Schema([spec("image", -1, -1, 3)]), outputs=Schema([spec("classes", -1, -1), spec("cell", -1, -1)]))


def model_name(run: str) -> str:
    """A run's name without the characters that MLflow refuses in a model's name.

    >>> model_name("vit-tiny-in1k · fpn · lr 0.001 / a")
    'vit-tiny-in1k · fpn · lr 0-001 - a'
    """
    return re.sub(r"[/:.%\"']", "-", run).strip() or "model"


def _exists(tracker: Tracker, model_id: str) -> bool:
    try:
        return tracker.client.get_logged_model(model_id).status == "READY"
    except NotFoundError:  # deleted in the UI
        return False


def _metrics(tracker: Tracker, run: RunRecord, model_id: str, best: int) -> list[Any]:
    """The run's metrics with the model's id, at the same time and step, so that the run itself gets no second value."""
    client, metric = tracker.client, tracker.mlflow.entities.Metric
    inputs = client.get_run(run.run_id).inputs.dataset_inputs
    data = (inputs[0].dataset.name, inputs[0].dataset.digest) if inputs else (None, None)
    scores = [name for name in run.metrics if name not in EPOCH_METRICS and not name.startswith("system/")]
    # They were logged together at the run's end, so they share one timestamp: this saves 140 queries.
    times_ms = [one.timestamp for name in scores[:1] for one in client.get_metric_history(run.run_id, name)][-1:]
    values = [metric(name, run.metrics[name], now, 0) for now in times_ms for name in scores]
    for name in EPOCH_METRICS:
        values += [one for one in client.get_metric_history(run.run_id, name) if one.step == best][-1:]
    out = []
    for one in values:
        # With the dataset's name, the UI's list of models shows one column of scores per dataset.
        about = data if one.key.startswith("test") else (None, None)
        out.append(metric(one.key, one.value, one.timestamp, one.step, model_id=model_id, dataset_name=about[0], dataset_digest=about[1]))
    return out
