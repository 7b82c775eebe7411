"""MLflow, and the only place that knows it: runs with parents, names by the contract, and what is finished already.

No tracking URI is ever set: MLflow's default (``./mlflow.db`` and ``./mlruns/``) or ``MLFLOW_TRACKING_URI``, so that a bare
``mlflow ui`` shows the runs. Runs of a cohort learn side by side, so nothing here uses MLflow's active run, which is one a thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlparse
from urllib.request import url2pathname

from filelock import FileLock

from cellbench import startup
from cellbench.errors import CellbenchError, one_line, redact_passwords, unknown_name
from cellbench.files import file_name, make_folder, os_errors_as, to_nfc
from cellbench.tracking import relocate, sqlite_store, ui_view
from cellbench.tracking.client import ResilientClient, to_error
from cellbench.tracking.offline_queue import NotFoundError, print_warning
from cellbench.tracking.schema import (
    EXPERIMENT,
    FINGERPRINT,
    HEARTBEAT,
    KIND,
    LIMIT,
    NOTE,
    OWNER,
    PARENT,
    REASON,
    STATUS,
    TERMINAL,
    RunRecord,
    RunState,
    this_owner,
    to_record,
)

for _noisy in ("mlflow.store.db.utils", "mlflow.store.db_migrations", "alembic", "alembic.runtime.migration", "urllib3.connectionpool"):
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)  # what goes wrong there is raised as well, and told in one line

MOST_AT_ONCE = 800
"""Metrics, beside the params and tags of a run."""
BEAT_S = 60.0
"""Between signs of life of a run that is logged to: a fifteenth of what makes another machine take it over."""


class Tracker:
    """One experiment in MLflow's store, made on first use; with ``make=False`` one that is there already."""

    def __init__(self, experiment: str, *, make: bool = True) -> None:
        self.name = to_nfc(experiment)
        with _store(make) as (self.mlflow, self.client):
            self.experiment_id = self._experiment(make)
            self.client.send_left()

    def lock(self) -> FileLock:
        """Held while the store is made (four processes that make it at once break it: measured, 5 of 5) and while runs are claimed."""
        return sqlite_store.store_lock(self.mlflow.get_tracking_uri())

    def _experiment(self, make: bool) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is None and not self.name.isascii():  # one of an older version, or made by hand, in another Unicode form
            found = next((one for one in self.client.search_experiments() if to_nfc(one.name) == self.name), None)
        if found is not None and found.lifecycle_stage == "deleted":
            raise CellbenchError(
                f"the experiment '{self.name}' was deleted in MLflow. Restore it there, or give the experiment file another name."
            )
        if found is not None:
            return found.experiment_id
        if not make:
            names = [one.name for one in self.client.search_experiments() if one.name != "Default"]
            raise unknown_name("experiment", self.name, names)
        # MLflow would resolve its default root against whatever folder it is started from; a remote server knows its own.
        local = not self.mlflow.get_tracking_uri().startswith(("http:", "https:", "databricks"))
        folder = file_name(self.name)
        # An old file store's folders are all digits, and one such below mlruns/ would make MLflow refuse to start.
        place = Path.cwd() / "mlruns" / (file_name(f"\0{self.name}") if folder.isdigit() else folder)
        if local:
            make_folder(place)
        return self.client.create_experiment(
            self.name, artifact_location=place.as_uri() if local else None, tags={KIND: "custom_model_development"}
        )

    def known(self, fingerprint: str = "") -> dict[str, RunState]:
        """The runs of this experiment by fingerprint, or only that of one; where one has several, the finished one, else the latest."""
        found: dict[str, RunState] = {}
        token, wanted = None, f"= '{fingerprint}'" if fingerprint else "!= ''"
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                f"tags.`{FINGERPRINT}` {wanted}",
                max_results=1000,
                page_token=token,
                order_by=["attributes.start_time ASC"],
            )
            for run in page:
                logged = to_record(run)
                old = found.get(logged.fingerprint)
                if old is None or old.status != "finished":
                    found[logged.fingerprint] = logged
            token = page.token
            if not token:
                return found

    def stored(self) -> list[RunRecord]:
        """All runs of this experiment that were not deleted, the oldest first; other people's too."""
        found: list[RunRecord] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], max_results=1000, page_token=token, order_by=["attributes.start_time ASC"])
            found += [to_record(run) for run in page]
            token = page.token
            if not token:
                return found

    def num_deleted(self) -> int:
        """Runs that were deleted in the UI and not yet cleared away."""
        return len(
            self.client.search_runs([self.experiment_id], run_view_type=self.mlflow.entities.ViewType.DELETED_ONLY, max_results=1000)
        )

    def artifact(self, run: RunRecord, name: str) -> bytes | None:
        """The bytes of an artifact; None where the run has none of that name, or has lost it.

        Raises CellbenchError where that is not known: a server that does not answer or lets nobody in, a file that may not be read.
        """
        if run.artifact_uri.startswith(("file:", "/")):  # 40 times faster than through MLflow: 1,000 runs in 1 s
            path = Path(_path(run.artifact_uri)) / name
            try:
                with os_errors_as(f"reading {path}"):
                    return path.read_bytes()
            except CellbenchError as error:
                if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                    return None
                raise
        try:
            with tempfile.TemporaryDirectory(prefix="cellbench-") as folder:
                return Path(self.client.download_artifacts(run.run_id, name, folder)).read_bytes()
        except Exception as error:
            # MLflow says "does not exist" of whatever it could not download (measured on 3.17.2). What is there, its listing says.
            if not self._lists(run, name):
                return None
            uri = redact_passwords(self.mlflow.get_tracking_uri())
            raise CellbenchError(
                f"MLflow at {uri}: lists {name} of '{run.name}' but does not send it. Try again, or see to its storage."
            ) from error

    def _lists(self, run: RunRecord, name: str) -> bool:
        """Whether a run has an artifact of this name. Raises CellbenchError where that is not known."""
        try:
            return any(one.path == name for one in self.client.list_artifacts(run.run_id, name.rpartition("/")[0] or None))
        except NotFoundError:
            return False
        except CellbenchError:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            raise to_error(error, self.mlflow.get_tracking_uri()) from error

    def settle(self) -> None:
        """Waits until a server that was away has been told everything. Raises CellbenchError."""
        self.client.settle()

    def interrupted(self, run: RunState) -> None:
        """Marks a run whose process is gone."""
        self.client.set_tag(run.run_id, STATUS, "interrupted")
        self.client.set_terminated(run.run_id, TERMINAL["interrupted"])

    def log(
        self, run_id: str, metrics: Sequence[Any], *, params: Mapping[str, object] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """MLflow's metrics, params and tags of a run in one commit, or in a few: MLflow takes at most 1,000 things at once."""
        entities = self.mlflow.entities
        while len(metrics) > MOST_AT_ONCE:
            self.client.log_batch(run_id, metrics=metrics[:MOST_AT_ONCE])
            metrics = metrics[MOST_AT_ONCE:]
        given = [entities.Param(name, str(value)) for name, value in (params or {}).items()]
        self.client.log_batch(
            run_id, metrics=metrics, params=given, tags=[entities.RunTag(name, value) for name, value in (tags or {}).items()]
        )

    def attach(self, run: RunRecord, folder: Path) -> None:
        """Everything below a folder, as artifacts of a run that has ended."""
        with os_errors_as("keeping a report in MLflow"):
            self.client.log_artifacts(run.run_id, str(folder))

    def describe(self, markdown: str, columns: Sequence[str], search: str = "") -> None:
        """Sets the experiment's description in MLflow's UI, and its view: metrics as ``columns``, and the runs that the filter ``search`` finds."""
        self.client.set_experiment_tag(self.experiment_id, NOTE, markdown)
        self.client.set_experiment_tag(self.experiment_id, ui_view.TAG, ui_view.leaderboard_view_url(columns, search))

    @contextlib.contextmanager
    def run(
        self, name: str, fingerprint: str, *, parent: str = "", known: RunState | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[Run]:
        """A run that is open inside ``with``: a new one, or ``known`` gone on with. Whatever ends the block ends the run, with its reason."""
        told_tags = {
            **(tags or {}),
            FINGERPRINT: fingerprint,
            EXPERIMENT: self.name,
            STATUS: "running",
            OWNER: this_owner(),
            HEARTBEAT: str(time.time()),
        }
        if parent:
            told_tags[PARENT] = parent
        if known is None:
            context = self.mlflow.tracking.context.registry.resolve_tags()
            run_id = self.client.create_run(self.experiment_id, run_name=name, tags={**context, **told_tags}).info.run_id
        else:
            run_id = known.run_id
            self.client.update_run(run_id, status="RUNNING")
            self.client.log_batch(run_id, tags=[self.mlflow.entities.RunTag(k, v) for k, v in {**told_tags, REASON: ""}.items()])
        run = Run(run_id=run_id, _tracker=self)
        try:
            yield run
        except BaseException as error:
            # A person's Ctrl-C, a SIGTERM turned into SystemExit, or the disk: the run goes on from its checkpoint next time.
            interrupted = not isinstance(error, Exception)
            with contextlib.suppress(CellbenchError):  # the store may be what failed; the first error is the one to tell
                run.end("interrupted" if interrupted else "failed", one_line(error) or type(error).__name__)
            raise
        run.end("finished")


@dataclass
class Run:
    """One run in MLflow, told of everything by its id."""

    run_id: str
    _tracker: Tracker
    ended: str = ""
    _beat_s: float = field(default_factory=time.monotonic)
    """When it last gave a sign of life; opening it is one."""
    _kept: list[Any] = field(default_factory=list)

    def keep(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an epoch, say. They wait for the next :meth:`log` and go with it: a commit costs milliseconds whatever it holds."""
        self._kept += self._metrics(metrics, step)

    @property
    def key(self) -> str:
        """Names this run and the store that it is in: a copy of a project has runs of the same ids."""
        uri = self._tracker.mlflow.get_tracking_uri()
        return f"{sqlite_store.store_file(uri) or uri} {self.run_id}"

    def steps(self, metric: str) -> set[int]:
        """The steps at which the store holds a value of a metric."""
        return {one.step for one in self._tracker.client.get_metric_history(self.run_id, metric)}

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
    ) -> None:
        """What was kept, metrics, params and tags in one commit, now and then with a sign of life."""
        given = dict(tags or {})
        if time.monotonic() - self._beat_s > BEAT_S:  # a tag costs as much as all metrics together
            given[HEARTBEAT], self._beat_s = str(time.time()), time.monotonic()
        values, self._kept = [*self._kept, *self._metrics(metrics, step)], []
        self._tracker.log(self.run_id, values, params=params, tags=given)

    def _metrics(self, metrics: Mapping[str, float], step: int) -> list[Any]:
        now = int(time.time() * 1000)
        return [self._tracker.mlflow.entities.Metric(name, float(value), now, step) for name, value in metrics.items()]

    def data(self, name: str, digest: str, source: str, context: str) -> None:
        """Says which data was used, by name and content, without reading it."""
        entities = self._tracker.mlflow.entities
        dataset = entities.Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"uri": source}))
        self._tracker.client.log_inputs(
            self.run_id, datasets=[entities.DatasetInput(dataset, tags=[entities.InputTag("mlflow.data.context", context)])]
        )

    def address(self, name: str) -> str:
        """Where the UI serves an artifact: for pictures in notes."""
        return f"get-artifact?path={quote(name)}&run_uuid={self.run_id}"

    def artifacts(self, folder: Path) -> None:
        """Everything below a folder, under the same names."""
        with os_errors_as("keeping a run's artifacts"):
            self._tracker.client.log_artifacts(self.run_id, str(folder))

    def end(
        self, status: str, reason: str = "", *, metrics: Mapping[str, float] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """Ends the run once, with what is left to say of it. MLflow writes metrics before tags, so that the mark of our own is the last of it;
        it comes before MLflow's, so that a crash between them reads as unfinished to no one."""
        if self.ended:
            return
        self.log(metrics or {}, tags={**(tags or {}), STATUS: status, REASON: reason[:4000]})
        self.ended = status
        self._tracker.client.set_terminated(self.run_id, TERMINAL[status])


def newest_experiment(*, whole: bool = False) -> str | None:
    """The experiment with the newest finished run of ours in MLflow's store; None where there is none. ``whole``: runs on a part of their data
    (``--limit``) count only where there are no others."""
    client = _reader()
    names = {one.experiment_id: one.name for one in client.search_experiments()}
    first, token = None, None
    while True:
        page = client.search_runs(
            list(names), f"tags.`{STATUS}` = 'finished'", max_results=100, order_by=["attributes.start_time DESC"], page_token=token
        )
        # Grids, evaluations and explorations are no models. Sorted out here: servers of an older MLflow know no IS NULL.
        found = [stored for run in page if not (stored := to_record(run)).is_parent]
        first = first or next((stored.run_id for stored in found), None)
        chosen = next((stored.run_id for stored in found if LIMIT not in stored.tags), None) if whole else first
        token = page.token
        if chosen or not token:
            break
    return None if (run_id := chosen or first) is None else names[client.get_run(run_id).info.experiment_id]


def all_experiments() -> list[str]:
    """The names of all experiments in MLflow's store."""
    return [one.name for one in _reader().search_experiments()]


def experiment_of(run_id: str) -> str | None:
    """The name of the experiment that a run belongs to; None where no run has this id."""
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):  # not asked of the store: a run's name may hold anything
        return None
    client = _reader()
    with contextlib.suppress(NotFoundError):
        return client.get_experiment(client.get_run(run_id).info.experiment_id).name
    return None


def _reader() -> ResilientClient:
    """The store's client, for what may make none."""
    with _store(make=False) as (_, client):
        return client


_healed: set[Path | None] = set()
"""The stores that this process has set right."""


@contextlib.contextmanager
def _store(make: bool) -> Iterator[tuple[Any, ResilientClient]]:
    """MLflow and the client of its store, which is locked inside ``with``. Raises CellbenchError."""
    with startup.no_gc_during_import():
        import mlflow  # 1 to 2 s, which `--help` and `list` must not pay

    uri = mlflow.get_tracking_uri()
    if (file := sqlite_store.store_file(uri)) not in _healed:  # whatever opens a store first, a copy must not write into the original
        for line in relocate.fix_artifact_paths(uri):
            print_warning(line)
        _healed.add(file)
    with os_errors_as("opening MLflow's store here"), sqlite_store.store_lock(uri):
        with startup.no_gc_during_import():  # of the store
            client = sqlite_store.open_or_create(mlflow, make)
        yield mlflow, client


def _path(uri: str) -> str:
    """The path of a ``file:`` URI, or of a plain path."""
    return url2pathname(urlparse(uri).path) if uri.startswith("file:") else uri
