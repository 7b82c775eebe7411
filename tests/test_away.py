"""A tracking server that is away for a while loses nothing: neither a number of a grid, nor what a process knew that is gone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from questions import QUESTION, answers, place
from server import Server

from cellbench.errors import CellbenchError
from cellbench.refusals import Client, is_away
from cellbench.run import main
from cellbench.track import Tracker

FEW = ["--set", "grid.seed=[0]", "--set", 'grid.backbone=["vit-tiny-random"]', "--set", "baselines=[]"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = Server(tmp_path_factory.mktemp("server"))
    one.start()
    yield one
    one.stop()


def test_a_grid_goes_on_while_the_server_is_away_and_nothing_is_missing_when_it_is_back(tmp_path, monkeypatch, server, capsys):
    place(tmp_path / "alone", monkeypatch)
    assert main([*QUESTION, *FEW]) == 0
    alone, curves = answers(), _curves()
    place(tmp_path / "served", monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setattr("cellbench.outbox.EVERY_S", 0.5)
    letters = tmp_path / "served" / "cache" / "outbox"

    def interrupt() -> None:
        while not mlflow.MlflowClient(server.address).search_runs(["1"], "metrics.`val/dice` >= 0"):
            time.sleep(0.1)
        server.stop()
        end = time.monotonic() + 300  # on a machine that others keep busy
        while not list(letters.glob("*/*/letters.jsonl")) and time.monotonic() < end:
            time.sleep(0.1)
        server.start()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert main([*QUESTION, *FEW]) == 0
    finally:
        thread.join()
    said = capsys.readouterr().err
    assert "does not answer. What is logged is kept in" in said
    assert "MLflow answers again" in said
    assert answers() == alone
    assert _curves() == curves
    assert not list(letters.glob("*/*"))


def _curves() -> dict[str, list[float]]:
    (run,) = [run for run in mlflow.search_runs(experiment_names=["small"], output_format="list") if "mlflow.parentRunId" in run.data.tags]
    names = [name for name in run.data.metrics if name.startswith(("train/", "val/"))]
    found = {name: mlflow.MlflowClient().get_metric_history(run.info.run_id, name) for name in names}
    assert {len(history) for history in found.values()} == {30}  # every epoch, none twice
    return {name: [one.value for one in sorted(history, key=lambda one: one.step)] for name, history in found.items()}


def test_what_a_killed_process_could_not_send_is_sent_by_the_next_one(tmp_path, monkeypatch, server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "cache"))
    code = """
import os, pathlib, sys
from cellbench.track import Tracker
pathlib.Path("files/figures").mkdir(parents=True)
pathlib.Path("files/figures/a.txt").write_text("seen")
with Tracker("small").run("one", "f1") as run:
    print("ready", flush=True)
    sys.stdin.readline()
    run.log({"val/dice": 0.5, "val/loss": float("nan")}, params={"seed": 3}, step=7)
    run.artifacts(pathlib.Path("files"))
    run.end("finished")
    os._exit(9)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    server.stop()
    process.communicate("\n", timeout=120)
    assert process.returncode == 9
    server.start()
    (run,) = [run for run in Tracker("small", make=False).stored() if run.name == "one"]
    assert (run.status, run.params["seed"], run.metrics["val/dice"]) == ("finished", "3", 0.5)
    assert mlflow.MlflowClient().get_run(run.run_id).info.status == "FINISHED"
    assert Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="figures/a.txt")).read_text() == "seen"
    assert not list((tmp_path / "cache" / "outbox").glob("*/*"))


def test_a_server_that_was_never_there_is_told_soon_and_one_that_stays_away_says_where_the_rest_lies(tmp_path, monkeypatch):
    monkeypatch.setattr("cellbench.refusals.PATIENCE_S", 0.2)
    monkeypatch.setattr("cellbench.outbox.EVERY_S", 0.05)
    calls = SimpleNamespace(get_run=lambda run: f"found {run}", log_batch=lambda *_, **__: None, there=False)

    def away(*_: object, **__: object) -> None:
        raise mlflow.exceptions.MlflowException("API request to http://127.0.0.1:1/api failed with exception refused")

    client = Client(_mlflow("http://lab:s3cret@127.0.0.1:1", calls))
    assert client.get_run("a") == "found a"
    calls.log_batch = calls.get_run = away
    client.log_batch("a", metrics=[mlflow.entities.Metric("x", 1.0, 2, 3)])
    with pytest.raises(CellbenchError, match=r"1 calls are kept in \S+: the same command sends them first") as stayed:
        client.get_run("a")
    assert "s3cret" not in str(stayed.value)
    never = Client(_mlflow("http://127.0.0.1:1", calls))
    with pytest.raises(CellbenchError, match="Mend it, or name another"):
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
        ("API request to http://x/api failed with exception HTTPConnectionPool(host='x', port=1): Max retries exceeded", "INTERNAL_ERROR", True),
        ("API request to http://x/api failed with timeout exception timed out. To increase the timeout", "INTERNAL_ERROR", True),
        ("API request to endpoint /api failed with error code 503 != 200. Response body: 'starting'", "INTERNAL_ERROR", True),
        ("(psycopg.OperationalError) the database system is shutting down", "TEMPORARILY_UNAVAILABLE", True),
        ("Run 'a' not found", "RESOURCE_DOES_NOT_EXIST", False),
        ("API request to endpoint /api failed with error code 403 != 200. Response body: 'no'", "PERMISSION_DENIED", False),
    ],
)
def test_what_may_be_sent_later_is_told_from_what_is_refused(text, code, away):
    code = getattr(mlflow.protos.databricks_pb2, code)
    assert is_away(mlflow.exceptions.MlflowException(text, error_code=code)) == away
