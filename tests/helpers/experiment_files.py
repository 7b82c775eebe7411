"""Small experiments for several processes: runs them in a folder, reads the results back, and kills one of the processes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from small_data import enter, write_set

EXPERIMENT = """# Two cohorts and a threshold
experiment = "small"
dataset    = "folder"
baselines  = ["otsu"]
[grid]
backbone = ["vit-tiny-random", "filter-bank"]
head     = ["bilinear"]
seed     = [0, 1]
[run]
tile_px = 64
epochs  = 30
patience = 0
crops_per_image = 4
lr = 5e-3
"""
SEARCH = """# A search that several processes can share
experiment = "sought"
dataset    = "folder"
[search]
trials      = {trials}
batch       = {batch}
repeat_best = 1
[space]
backbone = ["filter-bank"]
head     = ["bilinear"]
lr       = {{low = 1e-4, high = 1e-1, log = true}}
[run]
tile_px = 64
epochs  = 1
crops_per_image = 2
"""
QUESTION = ["grid", "small.toml", "--data", "smears", "--device", "cpu"]


def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(folder, ["a0.png", "a1.jpg", "b 2.png", "b3.jpeg", "c5.JPG"], ["t0.png", "t1.jpg"])
    (folder / "small.toml").write_text(EXPERIMENT)
    enter(folder, monkeypatch)


def finished_results() -> dict[str, tuple[dict[str, float], bytes]]:
    """Metrics (without costs) and head weights of each finished run, by name."""
    out = {}
    for run in mlflow.search_runs(experiment_names=["small"], output_format="list"):
        if "mlflow.parentRunId" in run.data.tags:
            assert run.data.tags["cellbench.status"] == "finished", run.data.tags.get("cellbench.reason")
            head = Path(run.info.artifact_uri.removeprefix("file://")) / "head.safetensors"
            if run.info.artifact_uri.startswith("mlflow-artifacts:") and run.data.params["head"] != "none":
                head = Path(
                    mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="head.safetensors", dst_path=run.info.run_id)
                )
            numbers = {name: value for name, value in run.data.metrics.items() if not name.startswith(("cost/", "system/"))}
            assert run.info.run_name not in out, "run twice"
            out[run.info.run_name] = numbers, head.read_bytes() if head.is_file() else b""
    return out


@contextlib.contextmanager
def process_killer(kill: Callable[[int], bool]) -> Iterator[list[int]]:
    """Calls ``kill`` with ids of processes that have completed an epoch, until it returns True; yields a list with the killed process id."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not killed and not over.wait(0.1):
            try:
                runs = mlflow.MlflowClient().search_runs(["1"], "tags.`cellbench.status` = 'running'")
            except mlflow.exceptions.MlflowException:
                continue  # the store is being made
            for run in runs:
                pid = int(run.data.tags["cellbench.owner"].split(":")[1])
                if "val/dice" in run.data.metrics and not killed and kill(pid):
                    killed.append(pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
