"""The same grid on a Ray of two nodes, one of which is killed at work: the same numbers to the last bit. Skipped where Ray is not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import psutil
import pytest
import torch
from experiment_files import QUESTION, SEARCH, finished_results, place, process_killer
from safetensors.torch import save_file
from small_data import OWN_VIT
from undrawn import leave_undrawn

from cellbench.config.loading import read_experiment
from cellbench.config.registry import Registry
from cellbench.data.loading import open_folds
from cellbench.errors import CellbenchError
from cellbench.execution import ray_cluster, ray_grid, ray_search
from cellbench.execution.planning import resolve_runs
from cellbench.execution.resources import Resources
from cellbench.execution.work_queue import WorkItem
from cellbench.execution.worker_job import CohortWorker, JobSpec, code_version, job_spec
from cellbench.files import write_atomic
from cellbench.hardware import Hardware
from cellbench.liveness import seen_here
from cellbench.run import main
from cellbench.tracking.tracker import Tracker

TWO = Hardware(device_name="cpu", precision_name="fp32", memory_bytes=2**30, lanes=2)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'cellbench[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core on this machine, both with little memory for objects, on which no picture is rendered."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "memory": 4 * 2**30}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        leave_undrawn(patch)
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        cluster.add_node(**small)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def two_nodes(cluster, monkeypatch):
    monkeypatch.setattr("cellbench.hardware.num_cores", lambda: 2)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return cluster


@needs_ray
def test_a_search_runs_only_on_workers_of_the_cluster(tmp_path, monkeypatch, two_nodes):
    place(tmp_path, monkeypatch)
    Path("sought.toml").write_text(SEARCH.format(trials=2, batch=2))
    assert main(["search", "sought.toml", "--data", "smears", "--device", "cpu", "--on", f"ray://{two_nodes.address}"]) == 0
    runs = mlflow.search_runs(experiment_names=["sought"], output_format="list")
    trials = [run for run in runs if "optuna.trial" in run.data.tags]
    assert sorted(run.data.tags["optuna.trial"] for run in trials) == ["0", "1"]
    tested = [run for run in runs if "test/dice" in run.data.metrics]
    assert [run.data.tags["cellbench.status"] for run in tested] == ["finished"]
    pids = {int(run.data.tags["cellbench.owner"].split(":")[1]) for run in trials + tested}
    assert os.getpid() not in pids


@needs_ray
def test_two_nodes_of_which_one_is_killed_give_the_numbers_of_one_process_to_the_last_bit(tmp_path, monkeypatch, two_nodes, capsys):
    """The last test of the cluster."""
    few = ["--set", "grid.seed=[0]", "--set", "baselines=[]"]
    place(tmp_path / "alone", monkeypatch)
    assert main([*QUESTION, *few]) == 0
    alone = finished_results()
    place(tmp_path / "together", monkeypatch)
    (second,) = two_nodes.worker_nodes
    raylet = second.all_processes["raylet"][0].process.pid

    def kill(pid: int) -> bool:
        at_work = psutil.pid_exists(pid) and psutil.Process(pid).ppid() == raylet
        if at_work:
            two_nodes.remove_node(second, allow_graceful=False)
        return at_work

    with process_killer(kill) as killed:
        assert main([*QUESTION, *few, "--on", f"ray://{two_nodes.address}"]) == 0
    printed = capsys.readouterr().out
    assert "Ray: 2 nodes with 2 cores; a cohort gets cpu, 1 core" in printed
    assert killed
    assert "its worker was lost" in printed
    assert len(alone) == 2
    assert finished_results() == alone


def test_missing_ray_is_a_one_line_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    place(tmp_path, monkeypatch)
    assert main([*QUESTION, "--on", "ray"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'cellbench[ray]'" in line


@pytest.fixture
def deaf():
    """A port of this machine that is nobody's, and one where something else than Ray answers."""
    with socket.socket() as free, socket.create_server(("127.0.0.1", 0)) as other:
        free.bind(("127.0.0.1", 0))

        def answer() -> None:
            with contextlib.suppress(OSError), other.accept()[0] as there:  # nobody came
                there.recv(100)
                there.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield {"NOBODY": free.getsockname()[1], "OTHER": other.getsockname()[1]}


@needs_ray
@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("dask", "expected ray, or"),
        ("ray://", "expected ray, or"),
        ("ray://cluster", "expected ray://HOST:PORT"),
        ("ray://127.0.0.1:10001", "the port of Ray's client"),
        ("ray://127.0.0.1:NOBODY", "does not answer"),
        ("ray://127.0.0.1:OTHER", "is not a Ray cluster"),
    ],
)
def test_an_address_without_a_cluster_is_reported_at_once(on, message, deaf):
    for name, port in deaf.items():
        on = on.replace(name, str(port))
    with pytest.raises(CellbenchError, match=message):
        ray_cluster.check_address(on)


@needs_ray
def test_a_ray_that_cannot_start_is_one_line(tmp_path):
    code = """
from cellbench.execution import ray_cluster
from cellbench.errors import CellbenchError
from cellbench.hardware import detect_hardware
try:
    with ray_cluster.connect("ray", detect_hardware("cpu", "fp32")):
        print("started")
except CellbenchError as error:
    print(error)
"""
    too_long = {**os.environ, "RAY_TMPDIR": str(tmp_path / ("a" * 100))}  # a socket's path has at most 107 bytes
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=too_long)
    assert "AF_UNIX path length" in done.stdout
    assert done.stdout.endswith("RAY_TMPDIR names the folder of its sockets and logs.\n")


@needs_ray
def test_a_local_ray_listens_on_loopback_only():
    code = """
import psutil, torch
from cellbench.execution import ray_cluster
from cellbench.hardware import Hardware
two = Hardware(device_name="cpu", precision_name="fp32", memory_bytes=2**30, lanes=2)
with ray_cluster.connect("ray", two):
    for process in psutil.Process().children(recursive=True):
        for one in process.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN:
                print(one.laddr.ip.removeprefix("::ffff:"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert set(done.stdout.split()) == {"127.0.0.1"}


def test_a_cohort_gets_the_cores_that_keep_the_cluster_busy_and_at_most_those_of_a_node():
    nodes = [{"CPU": 8.0, "memory": 64e9}, {"CPU": 4.0, "memory": 16e9}]
    assert [ray_cluster.resource_share(TWO, nodes, num, 1.0).lanes for num in (1, 2, 4, 100)] == [8, 6, 3, 1]
    with pytest.raises(CellbenchError, match="no node has the 1 cores"):
        ray_cluster.resource_share(TWO, [{"CPU": 0.0}], 1, 1.0)


def test_a_gpu_share_brings_its_part_of_the_cores_and_is_refused_if_no_node_has_it():
    gpu = replace(TWO, device_name="cuda", memory_bytes=2**40)
    nodes = [{"CPU": 32.0, "GPU": 2.0, "memory": 256e9}, {"CPU": 64.0, "memory": 1e9}]
    whole, third = (ray_cluster.resource_share(gpu, nodes, 10, part) for part in (1.0, 1 / 3))
    assert (whole.threads, third.threads) == (16, 5)
    assert whole.memory_bytes + ray_cluster.PROCESS_BYTES < 128e9
    with pytest.raises(CellbenchError, match=r"no node has 0\.5 of a GPU"):
        ray_cluster.resource_share(gpu, nodes[1:], 10, 0.5)


@pytest.fixture
def begun_grid(tmp_path, monkeypatch):
    """The order of a grid that has begun, and the fingerprint of its first run."""
    place(tmp_path, monkeypatch)
    experiment, data = read_experiment("small.toml", data=Path("smears"))[0], Path("smears").absolute()
    tracker = Tracker(experiment.experiment)
    with tracker.run("grid", "parent") as top:
        pass
    precision = TWO.precision_name
    jobs = resolve_runs(experiment, Registry(), open_folds(experiment, Registry(), data), None, "small.toml", precision=precision)
    resources = Resources(registry=Registry(), machine=TWO)
    job = job_spec(experiment, top.run_id, resources, where="small.toml", data=data)
    write_atomic(job.cache / "token", "seen")
    return job, jobs[0].fingerprint


def test_a_node_of_another_version_without_the_cache_or_with_other_data_refuses_in_one_line(begun_grid):
    job, known = begun_grid
    theirs = code_version().replace("torch 2", "torch 1")
    for pickled, versions, token, fingerprint, message in (
        (b"not even read", theirs, "token", known, "Install the same on all machines"),
        (pickle.dumps(job), code_version(), "unseen", known, "does not see the cache folder"),
        (pickle.dumps(job), code_version(), "token", "0123456789abcdef", "its cellbench, cards, data or weights differ from those"),
    ):
        kind, why, _ = ray_cluster.RayWorker(pickled, versions, token).cohort([fingerprint], "cohort 1 of 1", 0)
        assert kind == "refused"
        assert message in why
        assert "\n" not in why


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ({"data": Path("/srv/cells")}, "/srv/cells"),
        ({"weights": Path("/srv/weights")}, "/srv/weights"),
        ({"extra": Path("/srv/parts")}, "/srv/parts"),
    ],
    ids=["data", "weights", "cards"],
)
def test_a_refusal_names_the_node_and_what_it_lacks(begun_grid, tmp_path, absent, said):
    job, _ = begun_grid
    (tmp_path / "parts" / "backbones").mkdir(parents=True)
    (tmp_path / "parts" / "backbones" / "mine.toml").write_text(OWN_VIT)
    (tmp_path / "weights").mkdir()
    save_file({"norm.bias": torch.ones(192)}, tmp_path / "weights" / "mine.safetensors")
    grid = job.experiment.grid | {"backbone": ["mine"]}
    there = replace(
        job, experiment=job.experiment.model_copy(update={"grid": grid}), extra=tmp_path / "parts", weights=tmp_path / "weights"
    )
    (first, *_) = CohortWorker(there, print)._runs
    work = ray_cluster.RayWorker(pickle.dumps(replace(there, **absent)), code_version(), "token")
    kind, why, _ = work.cohort([first], "cohort 1 of 1", 0)
    assert kind == "refused"
    assert why.startswith(f"process {os.getpid()} on {socket.gethostname()}")
    assert said in why
    assert "\n" not in why


@pytest.mark.parametrize("part", [0.0, -1.0, 1.5, float("nan")])
def test_an_invalid_gpu_share_is_refused(part):
    with pytest.raises(CellbenchError, match="more than 0 and at most 1"):
        ray_cluster.check_address("ray", part)


def test_several_machines_cannot_share_a_file_store():
    nodes = [{"Alive": True, "NodeManagerHostname": name, "NodeID": name, "Resources": {"CPU": 1.0}} for name in ("a", "b")]
    ray = SimpleNamespace(nodes=lambda: nodes)
    with pytest.raises(CellbenchError, match="several machines cannot share"):
        ray_cluster.live_nodes(ray, "http://lab:5000", "sqlite:////lab/optuna.db")
    assert len(ray_cluster.live_nodes(ray, "http://lab:5000", "postgresql://lab/optuna")) == 2


def test_lost_workers_of_a_search_are_replaced_up_to_a_limit_and_a_refusal_ends_it(tmp_path):
    class RayActorError(Exception):
        pass

    answers, begun = [RayActorError(), ("done", None, []), *[RayActorError() for _ in range(5)]], []
    lost = SimpleNamespace(RayActorError=RayActorError, OutOfMemoryError=OSError, WorkerCrashedError=OSError, NodeDiedError=OSError)
    lost.RayTaskError = OSError
    made = SimpleNamespace(
        call=SimpleNamespace(remote=lambda _: begun.append(object()) or begun[-1]), where=SimpleNamespace(remote=lambda: "where")
    )

    def get(_: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    nodes = [{"Alive": True, "NodeManagerHostname": "a", "NodeID": "a", "Resources": {"CPU": 2.0, "memory": 8e9}}]
    ray = SimpleNamespace(
        nodes=lambda: nodes, get=get, kill=lambda _: None, wait=lambda all_, timeout: (all_[:1], all_[1:]), exceptions=lost
    )
    ray.remote = lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: made))
    job = JobSpec(experiment=SimpleNamespace(experiment="sought"), parent_id="", machine=TWO, cache=tmp_path, store="http://lab")
    with ray_search.SearchHelpers(ray, job, "postgresql://lab/optuna", print, 5, 0.0, 1.0) as helpers:
        assert (helpers.num, len(begun)) == (2, 2)  # of five that would be of use the cluster has room for two
        assert "was lost (RayActorError); another one" in helpers.poll(0)
        assert len(begun) == 3
        assert helpers.poll(0) == ""  # one is done
        for _ in range(4):
            helpers.poll(0)
        with pytest.raises(CellbenchError, match="6 workers of the search were lost"):
            helpers.poll(0)
        answers.append(("refused", "the first 3 trials have all failed", []))
        helpers._start()
        with pytest.raises(CellbenchError, match="have all failed"):
            helpers.poll(0)
    assert list(tmp_path.iterdir()) == []


def test_a_released_run_is_claimed_at_once(tmp_path, monkeypatch):
    place(tmp_path, monkeypatch)
    tracker = Tracker("small")
    with tracker.run("one", "f1") as run:
        tracker.client.set_tag(run.run_id, "cellbench.owner", "elsewhere:1")
        assert tracker.known()["f1"].alive
        tracker.mark_interrupted(tracker.known()["f1"])
        assert not tracker.known()["f1"].alive


def test_a_cohort_prefers_the_node_that_holds_most_of_its_features_and_has_room(tmp_path):
    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError), get=lambda where, timeout: where)
    job = JobSpec(experiment=SimpleNamespace(experiment="e"), parent_id="", machine=TWO, cache=tmp_path, store="http://lab")
    nodes = {name: {"CPU": 2.0, "memory": 8e9} for name in ("a", "b", "c")}
    workers = ray_grid.RayWorkers(ray, job, 1.0, nodes, 1)
    workers._shards_at = {"one": Counter(a=2, b=3), "two": Counter(a=2), "another": Counter(c=9)}
    both, neither = (WorkItem(cohort=[], title="", waits_for=frozenset(folders)) for folders in (("one", "two"), ("unknown",)))
    request = ray_cluster.ResourceRequest(cpus=2, gpus=0, memory_bytes=1)
    assert workers._nearest(both, request) == "a"
    workers._pool.tasks = {0: SimpleNamespace(where=("me", "a"), node="")}  # has taken the two cores there
    assert workers._nearest(both, request) == "b"
    assert workers._nearest(neither, request) == ""


@needs_ray
def test_a_process_on_another_machine_is_judged_by_the_nodes_there():
    """Where all nodes of its machine are dead it is gone; a node that lives looks into its own table of processes."""
    asked = []

    def remote(function):
        call = SimpleNamespace(remote=lambda owner: asked.append((function, owner)) or owner.endswith("alive"))
        return SimpleNamespace(options=lambda **_: call)

    nodes = [{"NodeManagerHostname": name, "Alive": name == "b", "NodeID": name * 56} for name in ("a", "b")]
    errors = SimpleNamespace(RayError=OSError)
    ray = SimpleNamespace(nodes=lambda: nodes, remote=remote, get=lambda answer, timeout: answer, exceptions=errors)
    assert ray_cluster.seen_by_nodes(ray, "a:7:alive") is False
    assert ray_cluster.seen_by_nodes(ray, "b:7:alive") is True
    assert ray_cluster.seen_by_nodes(ray, "b:7:gone") is False
    assert ray_cluster.seen_by_nodes(ray, "elsewhere:7:alive") is None
    assert asked == [(seen_here, "b:7:alive"), (seen_here, "b:7:gone")]
