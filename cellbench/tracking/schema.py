"""A run in MLflow as a record: the names of our tags, the states of a run, and whether another process is executing it.

The names are stable, because saved searches and scripts use them. Nothing here needs MLflow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cellbench.config.run import ADDED_LATER, RunSpec
from cellbench.liveness import is_alive, this_owner

FINGERPRINT, STATUS, REASON, EXPERIMENT = "cellbench.fingerprint", "cellbench.status", "cellbench.reason", "cellbench.experiment"
OWNER, HEARTBEAT = "cellbench.owner", "cellbench.heartbeat"
PARENT, NOTE, KIND = "mlflow.parentRunId", "mlflow.note.content", "mlflow.experimentKind"
WEIGHTS = "cellbench.weights"
MACHINE = "cellbench.machine"
MODEL, VERDICT = "cellbench.model_entry", "cellbench.verdict"
EVALUATION, EVALUATED = "evaluation", "cellbench.evaluated"
"""The kind of a run that evaluates a trained run on other data, and the tag that only such runs have: the id of the trained run."""
COUNTED = "cellbench.counted"
"""Tag of an evaluation of counts without masks: name and digest of its images and true counts."""
EXTERNAL = "external"
"""The kind of a run that scores the masks of another tool, and the param that holds its name. It stands beside trained runs and has no model."""
ENSEMBLE, MEMBERS = "ensemble of models", "cellbench.members"
"""The kind of a run that is the mean of several models, and the param that holds its name; the tag with the names of its members. It has no model."""
NO_MODEL: dict[str, object] = {"backbone": "none", "head": "none", "baseline": "none", "seed": 0}
"""Params of those that have no model."""
INDEPENDENT = "cellbench.independent"
"""Tag of an evaluation: whether none of its images was used in training, ``yes``, ``no`` or ``unknown``."""
SEEN = "seen_images.json"
"""The artifact that lists a run's training and validation images."""
SHIFT_TESTS, TESTED = "tests.json", "cellbench.tests"
"""The artifact with a run's scores on further test sets and on perturbed images, and the tag that lists these tests."""
CALIBRATION = "calibration.json"
"""The artifact with the fields of a run's :class:`~cellbench.metrics.calibration.Calibration`."""
TRAINING_FEATURES = "training_features.safetensors"
"""The artifact with a run's :class:`~cellbench.metrics.training_features.TrainingFeatures`."""
TABLES = "mlflow.loggedArtifacts"
VIEW = "leaderboard"
LIMIT = "cellbench.limit"
"""Tag of a run on part of its data (``--limit``): number of images per split. A run on all data has no such tag."""
DATA = "cellbench.data"
"""Tag of the parent run of a grid or search: the digest of its data."""
TRIAL, STUDY, STATE = "optuna.trial", "optuna.study", "optuna.state"
"""Tags of the run of a trial."""

# MLflow's status for each of ours: it has no "skipped".
TERMINAL = {
    "finished": "FINISHED", "validated": "FINISHED", "skipped": "KILLED", "pruned": "KILLED", "interrupted": "KILLED", "failed": "FAILED",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run in MLflow: decides whether it can be resumed."""

    run_id: str
    name: str
    status: str
    reason: str = ""
    owner: str = ""
    heartbeat_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether another process is executing it."""
        return self.status == "running" and self.owner != this_owner() and is_alive(self.owner, self.heartbeat_s)


@dataclass(frozen=True, kw_only=True)
class RunRecord(RunState):
    """A run with everything that MLflow stores except its artifacts."""

    fingerprint: str = ""
    """Empty for a run that cellbench did not log."""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    artifact_uri: str = ""

    @property
    def is_parent(self) -> bool:
        """Whether it is no run of a model: the parent of a grid or search, an evaluation or an exploration."""
        return self.tags.get("cellbench.kind", EXTERNAL) not in (EXTERNAL, ENSEMBLE)

    @property
    def is_external(self) -> bool:
        return self.tags.get("cellbench.kind") == EXTERNAL

    @property
    def can_predict(self) -> bool:
        """Whether it is a model: not masks of another tool, and not the mean of several models."""
        return self.tags.get("cellbench.kind") not in (EXTERNAL, ENSEMBLE)

    @property
    def last_s(self) -> float:
        """Its last heartbeat, in seconds since 1970."""
        return max(self.start_s, self.heartbeat_s)


def _seconds(text: str) -> float:
    """A time in a tag, which anybody may edit; 0 for what is none."""
    with contextlib.suppress(ValueError):
        return value if math.isfinite(value := float(text)) else 0.0
    return 0.0


def to_record(run: Any) -> RunRecord:
    tags, params = run.data.tags, run.data.params
    if FINGERPRINT in tags and "loss" in params:  # a run of an older version is of the same model as a new one
        params = ADDED_LATER | params
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=tags.get(STATUS, ""),
        reason=tags.get(REASON, ""),
        owner=tags.get(OWNER, ""),
        heartbeat_s=_seconds(tags.get(HEARTBEAT, "")),
        metrics=run.data.metrics,
        fingerprint=tags.get(FINGERPRINT, ""),
        # Runs of older versions have their precision at the end of the machine's name: "cpu, 2 cores, bf16".
        params={"precision": tags[MACHINE].rpartition(", ")[2], **params} if MACHINE in tags else params,
        tags=tags,
        start_s=run.info.start_time / 1000,
        artifact_uri=run.info.artifact_uri or "",
    )


def run_params(run: RunSpec, dataset: str, precision: str) -> dict[str, object]:
    """A run's settings as MLflow params; a head's own settings as ``head.width``."""
    part = "baseline" if run.baseline else "head"
    plain = {name: value for name, value in run.model_dump().items() if name != "options"}
    plain |= {"backbone": run.backbone or "none", "head": run.head or "none", "baseline": run.baseline or "none"}
    return {**plain, "dataset": dataset, "precision": precision, **{f"{part}.{name}": value for name, value in run.options.items()}}
