"""One open run in MLflow: logs to it and ends it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cellbench.errors import CellbenchError
from cellbench.escaping import readable
from cellbench.files import os_errors_as
from cellbench.liveness import STALE_S, describe_owner, this_owner
from cellbench.temporary import TemporaryFolder
from cellbench.tracking import store_address
from cellbench.tracking.client import ResilientClient
from cellbench.tracking.offline_queue import TakenOverError
from cellbench.tracking.schema import HEARTBEAT, OWNER, REASON, STATUS, TERMINAL

MAX_METRICS_PER_CALL = 800
"""MLflow accepts at most 1,000 metrics, params and tags per call."""
SAMPLE_S, SAMPLES_PER_VALUE = 20.0, 15
"""How often the machine's load is measured, and how many samples are averaged into one logged value: one every five minutes."""


@dataclass
class Run:
    """One open run in MLflow."""

    run_id: str
    _mlflow: Any
    _client: ResilientClient
    ended: str = ""
    alive_s: float = field(default_factory=time.time)
    """The last sign of life, in seconds since 1970."""
    _buffer: list[Any] = field(default_factory=list)

    def require_ownership(self) -> None:
        """Raises TakenOverError if another process took the run over, which it may after a long silence of this one."""
        if abs(time.time() - self.alive_s) < STALE_S:
            return
        owner = self._client.get_run(self.run_id).data.tags.get(OWNER, "")
        if owner != this_owner():
            raise TakenOverError(f"taken over by {describe_owner(owner)} after a long silence of this process")
        self.alive_s = time.time()

    def beat(self) -> None:
        """Writes a heartbeat."""
        with contextlib.suppress(CellbenchError):  # a full or locked store stops the run where its scores are logged
            self.require_ownership()
            self.write((), tags={HEARTBEAT: str(time.time())})
            self.alive_s = time.time()

    def buffer(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics, such as those of an epoch, to the next :meth:`log`, since each commit costs milliseconds."""
        self._buffer += self._metrics(metrics, step)

    @property
    def key(self) -> str:
        """Identifies this run and its store, because a copied project has runs with the same ids."""
        uri = self._mlflow.get_tracking_uri()
        return f"{store_address.store_file(uri) or uri} {self.run_id}"

    def steps(self, metric: str) -> set[int]:
        """The steps at which the store holds a value of a metric."""
        return {one.step for one in self._client.get_metric_history(self.run_id, metric)}

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
    ) -> None:
        """Logs the buffered metrics and these metrics, params and tags in one commit."""
        self.require_ownership()
        values, self._buffer = [*self._buffer, *self._metrics(metrics, step)], []
        self.write(values, params=params, tags=tags)

    def write(self, metrics: Sequence[Any], *, params: Mapping[str, object] | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Logs MLflow's metrics, params and tags in as few calls as possible, whoever owns the run."""
        entities = self._mlflow.entities
        while len(metrics) > MAX_METRICS_PER_CALL:
            self._client.log_batch(self.run_id, metrics=metrics[:MAX_METRICS_PER_CALL])
            metrics = metrics[MAX_METRICS_PER_CALL:]
        given = [entities.Param(name, readable(str(value))) for name, value in (params or {}).items()]
        self._client.log_batch(
            self.run_id,
            metrics=metrics,
            params=given,
            tags=[entities.RunTag(name, readable(value)) for name, value in (tags or {}).items()],
        )

    def _metrics(self, metrics: Mapping[str, float], step: int) -> list[Any]:
        now = int(time.time() * 1000)
        return [self._mlflow.entities.Metric(name, float(value), now, step) for name, value in metrics.items()]

    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        """Logs the dataset by name and digest, without reading it."""
        entities = self._mlflow.entities
        dataset = entities.Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"uri": source}))
        self._client.log_inputs(
            self.run_id, datasets=[entities.DatasetInput(dataset, tags=[entities.InputTag("mlflow.data.context", context)])]
        )

    @contextlib.contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Logs CPU, memory, disk, network and GPU metrics of this machine to the run inside ``with``, by MLflow's monitor."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, SAMPLE_S, SAMPLES_PER_VALUE, resume_logging=True)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()
            # MLflow drops the samples since its last value: all of them in a short run.
            rest = {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            with contextlib.suppress(CellbenchError):  # a full or locked store stops the run where its scores are logged
                self.log(rest, step=monitor._logging_step)

    def address(self, name: str) -> str:
        """URL of an artifact in the UI, for figures in notes."""
        return f"get-artifact?path={quote(name)}&run_uuid={self.run_id}"

    def log_artifacts(self, folder: Path) -> None:
        """Logs everything below a folder, under the same names."""
        with os_errors_as("keeping a run's artifacts"):
            self._client.log_artifacts(self.run_id, str(folder))

    def log_text(self, name: str, text: str) -> None:
        """Logs a text as an artifact."""
        with TemporaryFolder() as folder:
            with os_errors_as(f"writing {name} to {folder}"):
                (Path(folder) / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            self.log_artifacts(Path(folder))

    def end(
        self, status: str, reason: str = "", *, metrics: Mapping[str, float] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """Ends the run, once, with its last metrics and tags.

        MLflow writes metrics before tags, so our status comes last. It is written before MLflow's own status, so after a crash between the two
        the run still counts as finished.
        """
        if self.ended:
            return
        self.log(metrics or {}, tags={**(tags or {}), STATUS: status, REASON: reason[:4000]})
        self.ended = status
        self._client.set_terminated(self.run_id, TERMINAL[status])
