"""What MLflow remembers of a run, as records: the names of our tags, the states, and whether another process is at a run now.

Names are a contract, for people's saved searches and for scripts. Nothing here needs MLflow.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from cellbench.config.run import RunSpec

FINGERPRINT, STATUS, REASON, EXPERIMENT = "cellbench.fingerprint", "cellbench.status", "cellbench.reason", "cellbench.experiment"
OWNER, HEARTBEAT = "cellbench.owner", "cellbench.heartbeat"
PARENT, NOTE, KIND = "mlflow.parentRunId", "mlflow.note.content", "mlflow.experimentKind"
WEIGHTS = "cellbench.weights"
MACHINE = "cellbench.machine"
MODEL, VERDICT = "cellbench.model_entry", "cellbench.verdict"
EVALUATION, EVALUATED = "evaluation", "cellbench.evaluated"
"""The kind of a run that tests another once more, and the tag that only such runs have: the id of that other."""
INDEPENDENT = "cellbench.independent"
"""Of an evaluation: whether the run has seen none of its images, ``yes``, ``no`` or ``unknown``."""
SEEN = "seen_images.json"
"""The artifact by which a run knows its training and validation images again."""
TABLES = "mlflow.loggedArtifacts"
VIEW = "leaderboard"
LIMIT = "cellbench.limit"
"""Of a run on a part of its data, a quick try: how many images of each split. Whole data has no such tag."""
DATA = "cellbench.data"
"""Of a grid's or search's run: the digest of its data, by which its runs are found."""
TRIAL, STUDY, STATE = "optuna.trial", "optuna.study", "optuna.state"
"""Of a trial's run."""

# How each of our states is told to MLflow: its own list of states has no "skipped".
TERMINAL = {
    "finished": "FINISHED", "validated": "FINISHED", "skipped": "KILLED", "pruned": "KILLED", "interrupted": "KILLED", "failed": "FAILED",
}  # fmt: skip
# Another machine's run without a sign of life for so long is taken over.
STALE_S = 15 * 60


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run as MLflow remembers it."""

    run_id: str
    name: str
    status: str
    reason: str = ""
    owner: str = ""
    heartbeat_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether another process is at it now."""
        if self.status != "running" or self.owner == this_owner():
            return False
        host, _, pid = self.owner.rpartition(":")
        if host == socket.gethostname():
            return pid.isdigit() and psutil.pid_exists(int(pid))
        return time.time() - self.heartbeat_s < STALE_S


@dataclass(frozen=True, kw_only=True)
class RunRecord(RunState):
    """A run with everything that MLflow holds of it but its artifacts."""

    fingerprint: str = ""
    """Empty for a run that is not ours."""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    artifact_uri: str = ""

    @property
    def is_parent(self) -> bool:
        return "cellbench.kind" in self.tags

    @property
    def last_s(self) -> float:
        """When it gave its last sign of life."""
        return max(self.start_s, self.heartbeat_s)


def to_record(run: Any) -> RunRecord:
    tags = run.data.tags
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=tags.get(STATUS, ""),
        reason=tags.get(REASON, ""),
        owner=tags.get(OWNER, ""),
        heartbeat_s=float(tags.get(HEARTBEAT, 0)),
        metrics=run.data.metrics,
        fingerprint=tags.get(FINGERPRINT, ""),
        # Runs of older versions say their precision as the machine's name ends: "cpu, 2 cores, bf16".
        params={"precision": tags[MACHINE].rpartition(", ")[2], **run.data.params} if MACHINE in tags else run.data.params,
        tags=tags,
        start_s=run.info.start_time / 1000,
        artifact_uri=run.info.artifact_uri or "",
    )


def run_params(run: RunSpec, dataset: str, precision: str) -> dict[str, object]:
    """A run's settings under the contract's names; a head's own settings as ``head.width``."""
    part = "baseline" if run.baseline else "head"
    plain = {name: value for name, value in run.model_dump().items() if name != "options"}
    plain |= {"backbone": run.backbone or "none", "head": run.head or "none", "baseline": run.baseline or "none"}
    return {**plain, "dataset": dataset, "precision": precision, **{f"{part}.{name}": value for name, value in run.options.items()}}


def this_owner() -> str:
    """This machine and process, as a run's owner."""
    return f"{socket.gethostname()}:{os.getpid()}"
