"""An experiment in MLflow and its runs: opens, ends and finds them.

All runs of a cohort are open at once, so MLflow's active run (one per thread) is not used.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cellbench.errors import CellbenchError, one_line, redact_passwords, unknown_name
from cellbench.files import file_name, make_folder, os_errors_as, to_nfc
from cellbench.liveness import HEARTBEAT_S, this_owner
from cellbench.parallel import repeating
from cellbench.temporary import TemporaryFolder
from cellbench.tracking import sqlite_store, store_address, ui_view
from cellbench.tracking.client import to_error
from cellbench.tracking.offline_queue import AlreadyExistsError, NotFoundError
from cellbench.tracking.open_run import Run
from cellbench.tracking.schema import (
    DATA,
    EXPERIMENT,
    FINGERPRINT,
    HEARTBEAT,
    KIND,
    NOTE,
    OWNER,
    PARENT,
    REASON,
    STATUS,
    TERMINAL,
    RunRecord,
    RunState,
    to_record,
)
from cellbench.tracking.store import newest_experiment, open_store, pages
from cellbench.tracking.store_address import local_path
from cellbench.tracking.store_lock import store_lock

MAX_IDS_PER_SEARCH, MAX_SEARCHES = 200, 30
"""Runs named in one search, which MLflow reads in one query; and fingerprints up to which a server is asked for each instead of for all runs."""


class Tracker:
    """One experiment in MLflow's store, created on first use; with ``make=False`` it must exist."""

    def __init__(self, experiment: str, *, make: bool = True) -> None:
        self.name = to_nfc(experiment)
        with open_store(make) as (self.mlflow, self.client):
            self.experiment_id = self._experiment(make)
            self.client.send_abandoned()

    def lock(self) -> AbstractContextManager[None]:
        """Lock that is held while runs of this experiment are claimed, on this machine and on others."""
        uri = self.mlflow.get_tracking_uri()
        return store_lock(uri, self.name, self.client if store_address.is_http(uri) else None)

    def _experiment(self, make: bool) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is None and not self.name.isascii():  # created by an older version or by hand, in another Unicode form
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
        # MLflow would resolve its default root against the folder that it is started from; a remote server knows its own.
        local = not self.mlflow.get_tracking_uri().startswith(("http:", "https:", "databricks"))
        folder = file_name(self.name)
        # Folders of MLflow's old file store are all digits; with one such below mlruns/ MLflow refuses to start.
        place = Path.cwd() / "mlruns" / (file_name(f"\0{self.name}") if folder.isdigit() else folder)
        if local:
            make_folder(place)
        try:
            return self.client.create_experiment(
                self.name, artifact_location=place.as_uri() if local else None, tags={KIND: "custom_model_development"}
            )
        except AlreadyExistsError:  # another process has just created it
            return self.client.get_experiment_by_name(self.name).experiment_id

    def known(self, *fingerprints: str) -> dict[str, RunRecord]:
        """The runs of this experiment by fingerprint: those of ``fingerprints``, or all. Of several runs, the finished one, else the latest."""
        found: dict[str, RunRecord] = {}
        for search in self._searches(tuple(dict.fromkeys(fingerprints))):  # on a server each is a call
            for run in self._runs(search):
                old = found.get(run.fingerprint)
                if old is None or old.status != "finished":
                    found[run.fingerprint] = run
        return found

    def _searches(self, fingerprints: Sequence[str]) -> list[str]:
        """The searches that find runs of these fingerprints, without reading the others of a large experiment where that can be had."""
        file = store_address.store_file(self.mlflow.get_tracking_uri())
        if fingerprints and file is not None:
            ids = sqlite_store.find_runs(file, self.experiment_id, FINGERPRINT, fingerprints)
            parts = [ids[k : k + MAX_IDS_PER_SEARCH] for k in range(0, len(ids), MAX_IDS_PER_SEARCH)]
            return [f"attributes.run_id IN ({', '.join(map(repr, part))})" for part in parts]
        if 0 < len(fingerprints) <= MAX_SEARCHES:
            return [f"tags.`{FINGERPRINT}` = '{one}'" for one in fingerprints]
        return [f"tags.`{FINGERPRINT}` != ''"]

    def stored(self) -> list[RunRecord]:
        """All runs of this experiment that are not deleted, the oldest first, including runs that cellbench did not log."""
        return list(self._runs())

    def _runs(self, search: str = "") -> Iterator[RunRecord]:
        order = ["attributes.start_time ASC"]
        yield from map(to_record, pages(self.client.search_runs, [self.experiment_id], search, order_by=order, max_results=1000))

    def num_deleted(self) -> int:
        """Number of runs that were deleted in the UI and are not purged yet."""
        return len(
            self.client.search_runs([self.experiment_id], run_view_type=self.mlflow.entities.ViewType.DELETED_ONLY, max_results=1000)
        )

    def artifact(self, run: RunRecord, name: str) -> bytes | None:
        """The bytes of an artifact; None if the run does not have it.

        Raises CellbenchError if this cannot be determined: the server does not respond or denies access, or the file is not readable.
        """
        if run.artifact_uri.startswith(("file:", "/")):  # 40 times faster than through MLflow: 1,000 runs in 1 s
            path = Path(local_path(run.artifact_uri)) / name
            try:
                with os_errors_as(f"reading {path}"):
                    return path.read_bytes()
            except CellbenchError as error:
                if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                    return None
                raise
        try:
            with TemporaryFolder() as folder:
                return Path(self.client.download_artifacts(run.run_id, name, folder)).read_bytes()
        except Exception as error:
            # MLflow reports "does not exist" for any failed download (measured on 3.17.2). Its listing is reliable.
            if not self._lists(run, name):
                return None
            uri = redact_passwords(self.mlflow.get_tracking_uri())
            raise CellbenchError(
                f"MLflow at {uri}: lists {name} of '{run.name}' but does not send it. Try again, or check its storage."
            ) from error

    def _lists(self, run: RunRecord, name: str) -> bool:
        """Whether a run has an artifact of this name. Raises CellbenchError if this cannot be determined."""
        try:
            return any(one.path == name for one in self.client.list_artifacts(run.run_id, name.rpartition("/")[0] or None))
        except NotFoundError:
            return False
        except CellbenchError:
            raise
        except Exception as error:  # each storage backend has its own exceptions
            raise to_error(error, self.mlflow.get_tracking_uri()) from error

    def data_source(self, run: RunRecord) -> str:
        """Where the data of a run lay when it was trained; empty where that was not logged."""
        inputs = self.client.get_run(run.run_id).inputs
        sources = [json.loads(one.dataset.source).get("uri", "") for one in (inputs.dataset_inputs if inputs else [])]
        return str(sources[0]) if sources else ""

    def history(self, run: RunState, metrics: Sequence[str]) -> list[dict[str, float]]:
        """The values of some metrics at each step, up to the first step without any."""
        rows: dict[int, dict[str, float]] = {}
        for name in metrics:
            for one in self.client.get_metric_history(run.run_id, name):
                rows.setdefault(one.step, {})[name] = one.value
        return [rows[step] for step in itertools.takewhile(rows.__contains__, itertools.count())]

    def flush(self) -> None:
        """Waits until everything is sent to a server that was unavailable. Raises CellbenchError."""
        self.client.flush()

    def mark_interrupted(self, run: RunState) -> None:
        """Ends a run whose process is gone."""
        self.client.set_tag(run.run_id, STATUS, "interrupted")
        self.client.set_terminated(run.run_id, TERMINAL["interrupted"])

    def attach(self, run: RunRecord, folder: Path) -> None:
        """Logs everything below a folder as artifacts of a run that has ended."""
        with os_errors_as("keeping a report in MLflow"):
            self.client.log_artifacts(run.run_id, str(folder))

    def reopen(self, run: RunState) -> Run:
        """A run that has ended, to log more to it."""
        return self._run(run.run_id)

    def _run(self, run_id: str) -> Run:
        return Run(run_id=run_id, _mlflow=self.mlflow, _client=self.client)

    def describe(self, markdown: str, columns: Sequence[str], search: str = "") -> None:
        """Sets the experiment's description in MLflow's UI, and its view: metrics as ``columns``, runs filtered by ``search``."""
        self.client.set_experiment_tag(self.experiment_id, NOTE, markdown)
        self.client.set_experiment_tag(self.experiment_id, ui_view.TAG, ui_view.leaderboard_view(columns, search))

    def where_to_look(self) -> str:
        """How to open the experiment's leaderboard in MLflow's UI; an address stands last, so that it can be clicked."""
        uri = self.mlflow.get_tracking_uri()
        if store_address.is_http(uri):
            return f"experiment '{self.name}': {ui_view.leaderboard_address(uri, self.experiment_id)}"
        where = "here" if store_address.store_file(uri) is not None else f"with MLFLOW_TRACKING_URI={redact_passwords(uri)}"
        return f"experiment '{self.name}': `cellbench ui` {where} prints the address of its leaderboard"

    @contextlib.contextmanager
    def run(
        self, name: str, fingerprint: str, *, parent: str = "", known: RunState | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[Run]:
        """Opens a new run, or resumes ``known``, inside ``with``. An exception ends the run with its reason."""
        all_tags = {
            **(tags or {}),
            FINGERPRINT: fingerprint,
            EXPERIMENT: self.name,
            STATUS: "running",
            OWNER: this_owner(),
            HEARTBEAT: str(time.time()),
        }
        if parent:
            all_tags[PARENT] = parent
        if known is None:
            context = _context_tags()
            run_id = self.client.create_run(self.experiment_id, run_name=name, tags={**context, **all_tags}).info.run_id
        else:
            run_id = known.run_id
            self.client.update_run(run_id, status="RUNNING")
            self.client.log_batch(run_id, tags=[self.mlflow.entities.RunTag(k, v) for k, v in {**all_tags, REASON: ""}.items()])
        run = self._run(run_id)
        try:
            # So that other machines do not take the run over during a long epoch.
            with repeating(run.beat, HEARTBEAT_S, wait_s=0):
                yield run
        except BaseException as error:
            # Ctrl-C, or SIGTERM turned into SystemExit: the next call resumes the run from its checkpoint.
            interrupted = not isinstance(error, Exception)
            with contextlib.suppress(CellbenchError):  # the store may be what failed; the first error matters
                run.end("interrupted" if interrupted else "failed", one_line(error) or type(error).__name__)
            raise
        run.end("finished")

    @contextlib.contextmanager
    def parent_run(self, name: str, fingerprint: str, params: Mapping[str, str], data: str, kind: str = "grid") -> Iterator[Run]:
        """Opens the parent run of a grid or search: the same one each time the same grid or search is started.

        ``params``: for display only. ``data``: the digest of its data.
        """
        with contextlib.ExitStack() as stack:
            with self.lock():  # else two processes that start it at once would open two
                old = self.known(fingerprint).get(fingerprint)
                run = stack.enter_context(self.run(name, fingerprint, known=old, tags={"cellbench.kind": kind, DATA: data}))
            if old is None:  # a param is written once, and a folder may have another name today
                run.log({}, params=params)
            yield run
        self.flush()


def open_experiments(names: Sequence[str], *, whole: bool = False) -> list[Tracker]:
    """The experiments of these names, each once; without a name, the one with the newest finished run. Raises CellbenchError.

    ``whole``: the newest of those that used all of their data, where there is one.
    """
    store_address.require_store()
    names = list(dict.fromkeys(names)) or [newest for newest in [newest_experiment(whole=whole)] if newest]
    if not names:
        raise CellbenchError("no experiment in MLflow's store has a finished run. `cellbench grid --data DIR` makes some.")
    return [Tracker(name, make=False) for name in names]


def open_experiment(name: str | None) -> Tracker:
    """The experiment of this name, or the one with the newest finished run. Raises CellbenchError."""
    return open_experiments([name] if name else [], whole=True)[0]


def _context_tags() -> dict[str, str]:
    """MLflow's tags of a new run: its user, its program, the commit of that. What cannot be there is not imported to find that out."""
    from mlflow.tracking.context import git_context, registry

    in_repository = any((folder / ".git").exists() for folder in Path(sys.argv[0]).absolute().parents)
    no_notebook = "IPython" not in sys.modules
    if no_notebook:
        sys.modules["IPython"] = None  # type: ignore[assignment]  # import IPython fails, and for MLflow this is no notebook: 108 modules less
    try:
        ignored: list[Any] = [] if in_repository else [git_context.GitRunContext]
        tags: dict[str, str] = registry.resolve_tags(ignore=ignored)
    finally:
        if no_notebook:
            del sys.modules["IPython"]
    return tags
