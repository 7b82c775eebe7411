"""What all tests share: a folder, a cache and an MLflow store of their own, one thread, the real data where it lies, a small drawn set."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_data import QUESTION, SHARED, enter, finish_grid, write_set
from undrawn import Undrawn, leave_undrawn, unrendered

from cellbench import startup
from cellbench.background import BackgroundCalls
from cellbench.reporting.report_data import Figure

if TYPE_CHECKING:
    from cellbench.tracking.tracker import Tracker

startup.set_environment()  # as the command line does, before MLflow is imported
startup.collect_rarely()  # importing all tests takes a quarter less

MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")
SETTINGS = ("CELLBENCH_CACHE_URL", "CELLBENCH_WEIGHTS", "CELLBENCH_MAX_PIXELS", *MLFLOW)


LONGEST = (
    *("ray", "grid", "multiprocess", "check", "fit", "plugin_checks", "start", "export", "bench", "extensions", "search", "server_away"),
    *("failures", "golden", "report", "docs", "ensembles", "notebook", "evaluate", "predict", "api", "services", "planted", "build"),
    *("shift", "committee", "randomness", "framing", "startup", "state_dict", "remote_cache", "cell_targets", "heads", "study", "explore"),
    *("stain", "doctor", "folds", "background_logging", "learning_curves", "weight_values", "checkpoints", "counts", "sharded_cache"),
    *("intensity", "keypoint_matching", "masks", "commands", "parallel"),
)


DRAWN = Figure.__dict__["drawn"]


def leave_unsynchronised(connection: Any, _record: object) -> None:
    """At once: where another process has locked the file, its commits wait for the disk."""
    if isinstance(connection, sqlite3.Connection):
        (timeout_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
        connection.execute("PRAGMA busy_timeout = 0")
        with contextlib.suppress(sqlite3.Error):
            connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"PRAGMA busy_timeout = {timeout_ms}")


class LentCalls(BackgroundCalls):
    """Goes on after ``close``, which waits for the calls under way and drops the others."""

    def __init__(self, num: int) -> None:
        super().__init__(num)
        self._calls: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self._calls.append(super().submit(function, *arguments))
        return self._calls[-1]

    def close(self) -> None:
        wait([call for call in self._calls if not call.cancel()])
        self._calls = []

    def end(self) -> None:
        super().close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: begun last, one of them keeps a single core busy for two minutes."""
    for item in items:
        if "integration" in item.path.parts or "trained" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors, and a machine that others use too: beside a busy process test_heads.py took 87 s with two threads, 17 s with one."""
    import torch

    from cellbench.training import measured_cost

    torch.set_num_threads(1)
    measured_cost.MEASURED_S = 0.0  # what is timed here need not be exact: a second for each cohort would be minutes


@pytest.fixture(scope="session", autouse=True)
def without_waiting() -> Iterator[None]:
    """Stores of SQLite need not survive a power cut: waiting for the disk at each commit takes a fifth of a small grid's time."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    event.listen(Engine, "connect", leave_unsynchronised)
    yield
    event.remove(Engine, "connect", leave_unsynchronised)


@pytest.fixture(scope="session", autouse=True)
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The empty store that a command makes at its start, and hundreds of tests with it, is made once. Its own tests make it anew."""
    from cellbench.tracking import sqlite_store

    empty, copy, keep = tmp_path_factory.mktemp("store") / "empty.db", sqlite_store._copy, sqlite_store._keep_as_template

    def keep_also_here(file: Path, template: Path) -> None:
        keep(file, template)
        if not empty.exists():
            keep(file, empty)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_store, "_copy", lambda template, file: copy(template, file) or copy(empty, file))
        patch.setattr(sqlite_store, "_keep_as_template", keep_also_here)
        yield


@pytest.fixture(scope="session")
def drawing() -> Iterator[LentCalls]:
    """Processes that draw, started once for all tests that look at pictures; test_background.py starts its own."""
    calls = LentCalls(2)
    yield calls
    calls.end()


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[None]:
    """No picture is rendered, where a test does not ask for ``pictures``."""
    from cellbench.execution import experiment_run, result_logging

    laid_out = cached_property(unrendered)
    laid_out.__set_name__(Figure, "drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_run, "BackgroundCalls", Undrawn)
        patch.setattr(result_logging, "BackgroundCalls", Undrawn)
        patch.setattr(Figure, "drawn", laid_out)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, drawing: LentCalls) -> None:
    """Has the pictures of the test's grids and reports rendered."""
    for module in ("experiment_run", "result_logging"):
        monkeypatch.setattr(f"cellbench.execution.{module}.BackgroundCalls", lambda: drawing)
    monkeypatch.setattr("cellbench.reporting.report_data.Figure.drawn", DRAWN)


@pytest.fixture
def undrawn_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in the processes that a test starts."""
    leave_undrawn(monkeypatch)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the repository, the home folder or another test's store, and no setting of the caller's shell reaches one."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # compiling the package takes each process a third of a second
    monkeypatch.setenv("CELLBENCH_CACHE", str(caches / tmp_path.name))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shared() -> Path:
    """The folder of real data: ``bccd/``, ``wbc/``, ``dsb2018/`` and ``weights/``."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at {SHARED}; CELLBENCH_SHARED may name it")
    return SHARED


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Tracker]:
    """For all tests of a module a store of its own, in it the experiment that the module names as ``EXPERIMENT``."""
    import mlflow

    from cellbench.tracking.tracker import Tracker

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("tracker")
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        yield Tracker(request.module.EXPERIMENT)
    mlflow.set_tracking_uri(None)


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """Drawn images in BCCD's layout: 6 to train and 2 to test, 160 x 120 px, PNG and JPEG originals mixed, RGB masks."""
    write_set(tmp_path, ["a0.png", "a1.jpg", "b 2.png", "b3.jpeg", "zelle-ä.png", "c5.JPG"], ["t0.png", "t1.jpg"])
    return tmp_path / "smears"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished grid, made once for all who use a run; they may add to its store, and put back what they break."""
    folder = tmp_path_factory.mktemp("trained")
    write_set(folder, ["a0.png", "a1.jpg", "b 2.png", "b3.jpeg"], ["t0.png", "t1.jpg"])
    return finish_grid(folder, "small.toml", QUESTION, "--device", "cpu")


@pytest.fixture
def there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(trained, monkeypatch)
    return trained
