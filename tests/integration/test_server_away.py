"""A tracking server that is unavailable for a while loses nothing: no metric of a grid, and no call of a process that is gone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import mlflow
import pytest
from experiment_files import QUESTION, finished_results, place
from mlflow_server import Server

from cellbench.errors import CellbenchError
from cellbench.files import cache_dir
from cellbench.run import main
from cellbench.tracking import store_lock
from cellbench.tracking.client import ResilientClient, is_unavailable
from cellbench.tracking.store import experiment_of
from cellbench.tracking.store_lock import _server_lock
from cellbench.tracking.tracker import Tracker

FEW = ["--set", "grid.seed=[0]", "--set", 'grid.backbone=["vit-tiny-random"]', "--set", "baselines=[]"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = Server(tmp_path_factory.mktemp("server"))
    one.start()
    yield one
    one.stop()


class _Proxy:
    """Before a server: answers with ``status`` instead where it is set and the path holds ``on``; with 0 it ends the connection.

    Stopped, its address is as that of a server that is stopped: nothing listens there.
    """

    def __init__(self, server: Server) -> None:
        proxy, self.status, self.on = self, None, "mlflow-artifacts"

        class Handler(BaseHTTPRequestHandler):
            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.status == 0 and proxy.on in self.path:
                    self.close_connection = True
                    return
                if proxy.status is not None and proxy.on in self.path:
                    code, data = proxy.status, b"no"
                else:
                    headers = {name: self.headers[name] for name in ("Content-Type", "Host") if name in self.headers}
                    asked = urllib.request.Request(server.address + self.path, body or None, headers, method=self.command)
                    try:
                        with urllib.request.urlopen(asked, timeout=60) as answer:
                            code, data = answer.status, answer.read()
                    except urllib.error.HTTPError as error:
                        code, data = error.code, error.read()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._port, self._handler = 0, Handler
        self.start()
        self.address = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def gateway(server, monkeypatch):
    """The server's address for a test, which may stop and start it."""
    one = _Proxy(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one.address)
    yield one
    one.stop()


@pytest.fixture
def proxy(gateway, monkeypatch):
    """The same for callers without patience."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("cellbench.tracking.client.PATIENCE_S", 0.2)
    monkeypatch.setattr("cellbench.tracking.offline_queue.RETRY_S", 0.05)
    monkeypatch.setattr("cellbench.tracking.client.RETRY_S", 0.05)
    return gateway


def test_a_grid_continues_while_the_server_is_unavailable_and_loses_nothing(tmp_path, monkeypatch, gateway, capsys):
    place(tmp_path / "alone", monkeypatch)
    assert main([*QUESTION, *FEW]) == 0
    alone, curves = finished_results(), _curves()
    place(tmp_path / "served", monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gateway.address)
    monkeypatch.setattr("cellbench.tracking.offline_queue.RETRY_S", 0.5)
    queue = tmp_path / "served" / "cache" / "offline_queue"

    def interrupt() -> None:
        while not mlflow.MlflowClient(gateway.address).search_runs(["1"], "metrics.`val/dice` >= 0"):
            time.sleep(0.1)
        gateway.stop()
        end = time.monotonic() + 300  # on a machine that others keep busy
        while sum(len(one.read_text().splitlines()) for one in queue.glob("*/*/calls.jsonl")) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        gateway.start()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert main([*QUESTION, *FEW]) == 0
    finally:
        thread.join()
    printed = capsys.readouterr().err
    assert "does not answer. What is logged is kept in" in printed
    assert "MLflow answers again" in printed
    assert finished_results() == alone
    assert _curves() == curves
    assert not list(queue.glob("*/*"))


def _curves() -> dict[str, list[float]]:
    (run,) = [run for run in mlflow.search_runs(experiment_names=["small"], output_format="list") if "mlflow.parentRunId" in run.data.tags]
    names = [name for name in run.data.metrics if name.startswith(("train/", "val/"))]
    found = {name: mlflow.MlflowClient().get_metric_history(run.info.run_id, name) for name in names}
    assert {len(history) for history in found.values()} == {30}  # every epoch, none twice
    return {name: [one.value for one in sorted(history, key=lambda one: one.step)] for name, history in found.items()}


def test_unsent_calls_of_a_killed_process_are_sent_by_the_next_one(tmp_path, monkeypatch, gateway):
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "cache"))
    code = """
import os, pathlib, sys
from cellbench.tracking.store import experiment_of
from cellbench.tracking.tracker import Tracker
pathlib.Path("files/figures").mkdir(parents=True)
pathlib.Path("files/figures/a.txt").write_text("seen")
with Tracker("small").run("one", "f1") as run:
    print("ready", flush=True)
    sys.stdin.readline()
    run.log({"val/dice": 0.5, "val/loss": float("nan")}, params={"seed": 3}, step=7)
    run.log_artifacts(pathlib.Path("files"))
    run.end("finished")
    os._exit(9)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    gateway.stop()
    process.communicate("\n", timeout=120)
    assert process.returncode == 9
    gateway.start()
    (run,) = [run for run in Tracker("small", make=False).stored() if run.name == "one"]
    assert (run.status, run.params["seed"], run.metrics["val/dice"]) == ("finished", "3", 0.5)
    assert mlflow.MlflowClient().get_run(run.run_id).info.status == "FINISHED"
    assert mlflow.artifacts.load_text(f"runs:/{run.run_id}/figures/a.txt") == "seen"
    assert not list((tmp_path / "cache" / "offline_queue").glob("*/*"))


def test_a_server_that_never_answered_fails_soon_and_one_that_stays_away_names_the_kept_calls(tmp_path, monkeypatch):
    monkeypatch.setattr("cellbench.tracking.client.PATIENCE_S", 0.2)
    monkeypatch.setattr("cellbench.tracking.offline_queue.RETRY_S", 0.05)
    calls = SimpleNamespace(get_run=lambda run: f"found {run}", log_batch=lambda *_, **__: None, there=False)

    def away(*_: object, **__: object) -> None:
        raise mlflow.exceptions.MlflowException("API request to http://127.0.0.1:1/api failed with exception refused")

    client = ResilientClient(_mlflow("http://lab:s3cret@127.0.0.1:1", calls))
    assert client.get_run("a") == "found a"
    calls.log_batch = calls.get_run = away
    client.log_batch("a", metrics=[mlflow.entities.Metric("x", 1.0, 2, 3)])
    with pytest.raises(CellbenchError, match=r"1 calls are kept in \S+: the same command sends them first") as stayed:
        client.get_run("a")
    assert "s3cret" not in str(stayed.value)
    never = ResilientClient(_mlflow("http://127.0.0.1:1", calls))
    with pytest.raises(CellbenchError, match="Fix it, or set another"):
        never.get_run("a")
    sent = []
    calls.log_batch, calls.get_run = (lambda *arguments, **named: sent.append((arguments, named))), (lambda run: f"found {run}")
    assert client.get_run("b") == "found b"
    ((arguments, named),) = sent
    assert arguments == ("a",)
    assert [(one.key, one.value, one.timestamp, one.step) for one in named["metrics"]] == [("x", 1.0, 2, 3)]


def _mlflow(uri: str, calls: object) -> SimpleNamespace:
    return SimpleNamespace(MlflowClient=lambda: calls, get_tracking_uri=lambda: uri, exceptions=mlflow.exceptions, entities=mlflow.entities)


@pytest.mark.parametrize(
    ("text", "code", "away"),
    [
        (
            "API request to http://x/api failed with exception HTTPConnectionPool(host='x', port=1): Max retries exceeded",
            "INTERNAL_ERROR",
            True,
        ),
        ("API request to http://x/api failed with timeout exception timed out. To increase the timeout", "INTERNAL_ERROR", True),
        ("API request to endpoint /api failed with error code 503 != 200. Response body: 'starting'", "INTERNAL_ERROR", True),
        ("(psycopg.OperationalError) the database system is shutting down", "TEMPORARILY_UNAVAILABLE", True),
        ("API request to endpoint /api failed with error code 429 != 200. Response body: ''", "INTERNAL_ERROR", True),
        ("failures occurred while downloading: 503 Server Error: SERVICE UNAVAILABLE for url: http://x", "INTERNAL_ERROR", True),
        ("failures occurred while downloading: HTTPConnectionPool(host='x', port=1): Max retries exceeded", "INTERNAL_ERROR", True),
        ("failures occurred while downloading: 404 Client Error: NOT FOUND for url: http://x", "INTERNAL_ERROR", False),
        ("Run 'a' not found", "RESOURCE_DOES_NOT_EXIST", False),
        ("API request to endpoint /api failed with error code 403 != 200. Response body: 'no'", "PERMISSION_DENIED", False),
    ],
)
def test_temporary_errors_are_distinguished_from_rejected_calls(text, code, away):
    code = getattr(mlflow.protos.databricks_pb2, code)
    assert is_unavailable(mlflow.exceptions.MlflowException(text, error_code=code)) == away


def test_server_errors_are_never_taken_for_lost_data(proxy, tmp_path):
    tracker = Tracker("trouble")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "head.safetensors").write_bytes(b"weights")
    with tracker.run("one", "f2") as run:
        run.log_artifacts(tmp_path / "left")
    (stored,) = tracker.stored()
    assert tracker.artifact(stored, "head.safetensors") == b"weights"
    assert tracker.artifact(stored, "preparation.json") is None  # it really has none
    for status in (0, 401, 429, 503):
        proxy.status, proxy.on = status, "mlflow-artifacts"
        for name in ("head.safetensors", "preparation.json"):
            with pytest.raises(CellbenchError, match="MLflow at"):
                tracker.artifact(stored, name)
        proxy.on = f"{stored.run_id}/artifacts/head"  # it lists the file and does not send it
        with pytest.raises(CellbenchError, match="MLflow at"):
            tracker.artifact(stored, "head.safetensors")
        proxy.on = "runs/get"
        with pytest.raises(CellbenchError, match="MLflow at"):
            experiment_of(stored.run_id)
    proxy.status = None
    assert experiment_of(stored.run_id) == "trouble"
    assert experiment_of("0" * 32) is None


def test_calls_are_queued_while_the_server_denies_access(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("cellbench.tracking.client.PATIENCE_S", 20.0)
    tracker = Tracker("barred")
    with tracker.run("one", "f3") as run:
        proxy.status, proxy.on = 401, "runs/log-batch"
        run.log({"val/dice": 0.25})
        proxy.status = None
    tracker.flush()
    (stored,) = tracker.stored()
    assert stored.metrics["val/dice"] == 0.25
    assert stored.status == "finished"


def test_a_server_that_answers_503_for_long_loses_nothing(proxy, tmp_path, monkeypatch):
    """Behind a gateway: every call is answered 503 for longer than MLflow's client itself tries again, here scaled from ten minutes to seconds."""
    monkeypatch.setattr("cellbench.tracking.client.PATIENCE_S", 30.0)
    tracker = Tracker("gateway")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "head.safetensors").write_bytes(b"weights")
    with tracker.run("one", "f503") as run:
        proxy.status, proxy.on = 503, ""
        for epoch in range(3):
            run.log({"val/dice": epoch / 10}, step=epoch)
        run.log_artifacts(tmp_path / "files")
        run.end("finished", metrics={"test/dice": 0.5})
        time.sleep(1)
        proxy.status = None
    tracker.flush()
    (stored,) = tracker.stored()
    assert (stored.status, stored.metrics["test/dice"]) == ("finished", 0.5)
    assert tracker.artifact(stored, "head.safetensors") == b"weights"
    assert [one.value for one in sorted(tracker.client.get_metric_history(run.run_id, "val/dice"), key=lambda one: one.step)] == [
        0,
        0.1,
        0.2,
    ]
    assert not list(cache_dir().glob("offline_queue/*/*"))


def test_machines_that_share_only_the_server_hold_its_lock_one_after_the_other(proxy):
    tracker, inside, most = Tracker("claims"), [0], [0]

    def claim() -> None:
        with _server_lock(tracker.client, "claims"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.1)
            inside[0] -= 1

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1]
    assert not list(tracker.client.search_registered_models())


@pytest.mark.parametrize("owner", ["dead", "host-b:1:77.abc.4"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(proxy, monkeypatch, owner):
    monkeypatch.setattr(store_lock, "LEASE_S", 0.6)
    if owner == "dead":
        monkeypatch.setattr(store_lock, "LEASE_S", 600.0)
        code = "from cellbench.liveness import this_owner; print(this_owner())"
        owner = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    tracker = Tracker("claims")
    name = f"cellbench-lock-{hashlib.sha256(b'claims').hexdigest()[:16]}"
    tracker.client.create_registered_model(name, tags={"token": "t", "owner": owner})
    with _server_lock(tracker.client, "claims"):
        assert tracker.client.get_registered_model(name).tags["token"] != "t"
    assert not list(tracker.client.search_registered_models())


def test_two_nodes_that_register_one_dataset_at_once_both_succeed(monkeypatch):
    monkeypatch.setattr("cellbench.tracking.client.time.sleep", lambda _: None)
    text = '(psycopg.errors.UniqueViolation) duplicate key value violates unique constraint "dataset_pk"'
    answers = [mlflow.exceptions.MlflowException(text, error_code=mlflow.protos.databricks_pb2.BAD_REQUEST), "logged"]

    def log_inputs(*_: object) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert ResilientClient(_mlflow("http://127.0.0.1:1", SimpleNamespace(log_inputs=log_inputs))).log_inputs("a") == "logged"
