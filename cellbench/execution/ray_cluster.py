"""The only module that imports Ray: joins or starts a cluster, lists its nodes and starts workers with the resources they need.

Ray's own retries are off, because ``work_queue`` assigns lost work again. Every node reads data, weights, cards and the store at the same paths
as the driver.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from cellbench.errors import CellbenchError, last_line, one_line, quantity
from cellbench.execution.worker_job import CohortWorker, JobSpec, apply_job_environment, check_same_version, code_version
from cellbench.features.extractor import FeaturePass
from cellbench.files import write_atomic
from cellbench.hardware import Hardware
from cellbench.liveness import ask_also, describe_owner, seen_here, this_owner
from cellbench.tracking.store_address import store_file

OBJECTS_BYTES = 200 * 2**20
"""Size of the object store of a local Ray. Messages are a few kilobytes; features are passed through the cache folder."""
PROCESS_BYTES = 700 * 2**20
"""Measured memory of a Python process with torch, MLflow and Matplotlib loaded."""
CONNECT_TIMEOUT_S = 5.0
NODE_ANSWERS_S = 20.0
CLIENT_PORT = 10001
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""HTTP/2 preface with empty settings. A gRPC server replies with a SETTINGS frame, whose fourth byte is 4 (RFC 9113)."""


def check_address(on: str, gpu_share: float = 1.0) -> str:
    """Returns ``on`` if a Ray cluster responds there. Raises CellbenchError otherwise, while Ray itself would retry for a minute."""
    if not 0 < gpu_share <= 1:
        raise CellbenchError(f"--gpu-share {gpu_share:g}: expected more than 0 and at most 1.")
    name, slashes, address = on.partition("://")
    if name != "ray" or bool(slashes) != bool(address):
        raise CellbenchError(f"--on {on}: expected ray, or ray://HOST:PORT for a running cluster (ray://auto: the one on this machine).")
    if importlib.util.find_spec("ray") is None:
        raise CellbenchError(
            f"--on {on}: Ray is not installed. `pip install 'cellbench[ray]'` installs it; --workers N needs nothing more."
        )
    if not address or address == "auto":
        return on
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise CellbenchError(f"--on {on}: expected ray://HOST:PORT, as in `ray start --address HOST:PORT`.")
    if int(port) == CLIENT_PORT:
        raise CellbenchError(
            f"--on {on}: that is the port of Ray's client. Name the cluster's own, as in `ray start --address HOST:PORT` (6379)."
        )
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S) as there:
            there.sendall(HTTP2_PREFACE)
            if there.recv(4)[3:] != b"\4":
                raise CellbenchError(
                    f"--on {on}: what listens at {host}:{port} is not a Ray cluster. `ray status` on its head node names the port."
                )
    except OSError as error:
        raise CellbenchError(
            f"--on {on}: {host}:{port} does not answer ({error.strerror or error}). Is the cluster up, and its port open?"
        ) from None
    return on


@contextlib.contextmanager
def connect(on: str, machine: Hardware) -> Iterator[Any]:
    """Context manager that yields Ray: a local one for ``ray``, or the cluster at ``ray://ADDRESS``. Raises CellbenchError."""
    address = on.removeprefix("ray").removeprefix("://")
    if not address:
        # Ray reads this when it is imported. Without it, a local Ray listens on all network interfaces, whatever its address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            cores = machine.lanes * machine.threads
            ray.init(address="local", num_cpus=cores, object_store_memory=OBJECTS_BYTES, include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises plain ones too, for example where one of its processes was killed while it started
        advice = (
            f"Is a cluster there (`ray status`), of Ray {ray.__version__}?"
            if address
            else "RAY_TMPDIR names the folder of its sockets and logs."
        )
        raise CellbenchError(f"--on {on}: {one_line(error)[:300]} {advice}") from None
    try:
        with ask_also(partial(seen_by_nodes, ray)):
            yield ray
    finally:
        ray.shutdown()


def seen_by_nodes(ray: Any, owner: str) -> bool | None:
    """Whether a process lives, as the nodes of its machine see it; None where no node is, or was, on that machine, or it does not answer."""
    host, nodes = owner.partition(":")[0], ray.nodes()
    there = [node for node in nodes if node["NodeManagerHostname"] == host]
    if not any(node["Alive"] for node in there):
        return False if there else None
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for node in there:
        if node["Alive"]:
            on_it = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            answer = ray.remote(seen_here).options(num_cpus=0, max_retries=0, scheduling_strategy=on_it).remote(owner)
            with contextlib.suppress(ray.exceptions.RayError):
                if (seen := ray.get(answer, timeout=NODE_ANSWERS_S)) is not None:
                    return bool(seen)
    return None


Node = dict[str, float]
"""Resources of one node: ``CPU``, ``GPU`` and ``memory`` (bytes)."""


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """Resources that a worker needs on a node."""

    cpus: int
    gpus: float
    memory_bytes: int

    def times(self, node: Node) -> int:
        """How many such requests fit on a node."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}
        return min(int(node.get(name, 0) / num + 1e-6) for name, num in needed.items() if num)

    @property
    def description(self) -> str:
        gpus = f"{self.gpus:g} of a GPU, " if self.gpus else ""
        return f"{gpus}{quantity(self.cpus, 'core')} and {self.memory_bytes / 2**30:.1f} GiB of memory"


def resources_for(params_m: float, machine: Hardware, gpu_share: float) -> ResourceRequest:
    """The request of a worker with this share of a machine and a backbone of ``params_m`` million parameters.

    The memory is the sum of the process, the backbone's weights and the memory budget of the share.
    """
    gpus = gpu_share if machine.device.type == "cuda" else 0.0
    memory = PROCESS_BYTES + int(params_m * 4e6) + machine.memory_bytes
    return ResourceRequest(cpus=machine.lanes * machine.threads, gpus=gpus, memory_bytes=memory)


def resource_share(machine: Hardware, nodes: Sequence[Node], num: int, gpu_share: float) -> Hardware:
    """The share of a node for one of ``num`` workers. Raises CellbenchError if no node has so much.

    On CPUs, a worker gets as many lanes as keep the cluster's cores busy, with the driver's number of threads each. On GPUs it gets one lane,
    and the same fraction of the node's cores as of its GPUs.
    """
    if machine.device.type == "cuda":
        slots = [int(node.get("GPU", 0) / gpu_share + 1e-6) for node in nodes]  # three times a third is one
        if not any(slots):
            raise CellbenchError(f"--on ray: no node has {gpu_share:g} of a GPU to give. --device cpu, or nodes with GPUs (`ray status`).")
        threads = max(1, min(int(node.get("CPU", 0)) // n for node, n in zip(nodes, slots, strict=True) if n))
        part, lanes = [1 / n if n else 0.0 for n in slots], 1
        # Ray sets CUDA_VISIBLE_DEVICES, so each process sees its GPUs as the first ones.
        machine = replace(machine, device_name="cuda", threads=threads)
    else:
        slots = [int(node.get("CPU", 0)) // machine.threads for node in nodes]
        if not any(slots):
            raise CellbenchError(
                f"--on ray: no node has the {machine.threads} cores that an operation uses here. Set OMP_NUM_THREADS to fewer."
            )
        lanes = max(1, min(max(slots), sum(slots) // max(1, num)))
        part = [lanes / n if n >= lanes else 0.0 for n in slots]
    # Nodes may differ from the driver's machine: use a fraction of the smallest node's memory, and at most the driver's budget.
    memory = min(int(node.get("memory", 0) * p) for node, p in zip(nodes, part, strict=True) if p)
    return replace(machine, lanes=lanes, memory_bytes=max(2**26, min(machine.memory_bytes, (memory - PROCESS_BYTES) // 2)))


Reply = tuple[Literal["done", "refused", "error", "lost"], Any, list[str]]
"""Reply of a worker: a status, the returned value or the reason of the failure, and lines to print."""


class RayWorker:
    """The Ray actor: a :class:`CohortWorker` on some node."""

    def __init__(self, job: bytes, version: str, token: str) -> None:
        self._job, self._version, self._token = job, version, token

    def where(self) -> tuple[str, str]:
        """Its name as owner of runs, and its node's id."""
        return this_owner(), _node_here()

    def cohort(self, fingerprints: list[str], title: str, halvings: int) -> Reply:
        """Runs a cohort and returns its outcome."""
        return self._reply(lambda job, say: CohortWorker(job, say).cohort(fingerprints, title, halvings))

    def passes(self, cohorts: list[list[str]]) -> Reply:
        """Returns the feature passes that each cohort will cache on disk."""
        return self._reply(lambda job, say: CohortWorker(job, say).passes(cohorts))

    def fill(self, fingerprints: list[str], readers: list[str], shards: list[tuple[FeaturePass, int]]) -> Reply:
        """Computes shards of a cohort's passes. Returns whether it shares the driver's cache folder."""

        def fill(job: JobSpec, say: Callable[[str], None]) -> bool:
            CohortWorker(job, say).fill(fingerprints, readers, shards)
            return self._shares_cache(job)

        return self._reply(fill)

    def call(self, function: bytes) -> Reply:
        """Calls a pickled function with the job."""
        return self._reply(lambda job, say: pickle.loads(function)(job))  # noqa: S301

    def _reply(self, work: Callable[[JobSpec, Callable[[str], None]], Any]) -> Reply:
        import ray

        lines: list[str] = []
        try:
            with ask_also(partial(seen_by_nodes, ray)):
                return "done", work(self._checked_job(), lines.append), lines
        except CellbenchError as error:  # a path that is missing, for example: say on which of the nodes
            here = describe_owner(this_owner())
            return "refused", str(error) if here in str(error) else f"{here}: {error}", lines

    def _checked_job(self) -> JobSpec:
        """The job, if this node can execute it. Raises CellbenchError."""
        check_same_version(self._version)  # must come before unpickling
        job: JobSpec = pickle.loads(self._job)  # noqa: S301
        if not job.cache_url and not self._shares_cache(job):
            raise CellbenchError(
                f"{describe_owner(this_owner())} does not see the cache folder {job.cache}. "
                "Name one that all nodes share with --cache, or a URL with --cache-url."
            )
        if job.machine.device.type == "cuda" and not torch.cuda.is_available():
            raise CellbenchError(
                f"{describe_owner(this_owner())} was given a GPU, but torch finds none there. Repair its driver, or use --device cpu."
            )
        return apply_job_environment(job)

    def _shares_cache(self, job: JobSpec) -> bool:
        return (job.cache / self._token).is_file()


def _node_here() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def live_nodes(ray: Any, *stores: str) -> dict[str, Node]:
    """Resources of each live node, by node id. Raises CellbenchError if several machines cannot share a store (``stores``: URLs)."""
    there = [node for node in ray.nodes() if node["Alive"]]
    if len({node["NodeManagerHostname"] for node in there}) > 1:
        for file in filter(None, map(store_file, stores)):
            raise CellbenchError(
                f"--on ray: several machines cannot share {file}, a file on one of them. "
                "Name a server (MLFLOW_TRACKING_URI=http://…) and, for a search, a database (OPTUNA_STORAGE=…); compose.yaml starts both."
            )
    return {node["NodeID"]: node["Resources"] for node in there}


def nearest_node(held: Mapping[str, int], free: Mapping[str, int]) -> str:
    """The node with the most shards among those with free resources; empty if there is none. ``free``: number of workers that each can still take.

    >>> nearest_node({"a": 3, "b": 5, "c": 9}, {"a": 1, "b": 2, "c": 0})
    'b'
    """
    return max((node for node in held if free.get(node, 0) > 0), key=lambda node: held[node], default="")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActorTask:
    """A worker on the cluster and its one task."""

    item: Any
    """The caller's item, returned with the reply."""
    request: ResourceRequest
    actor: Any
    result: Any
    """Ray's reference to its reply."""
    where: Any
    """Ray's reference to the owner's name and the node id."""
    node: str
    """Id of the requested node; empty: any."""


class ActorPool:
    """The workers of one driver on the cluster, each with one task. A marker file shows them whether they share the driver's cache folder."""

    def __init__(self, ray: Any, cache: Path) -> None:
        self._ray = ray
        self.tasks: dict[Any, ActorTask] = {}
        self._marker = cache / f".ray-{uuid.uuid4().hex}"
        write_atomic(self._marker, "nodes that see this file share the cache folder")

    def close(self) -> list[ActorTask]:
        """Kills all workers and returns the unfinished tasks."""
        left = list(self.tasks.values())
        for task in left:
            self.kill(task)
        self._marker.unlink(missing_ok=True)
        return left

    def kill(self, task: ActorTask) -> None:
        self._ray.kill(task.actor)
        self.tasks.pop(task.result, None)

    def start(self, job: JobSpec, request: ResourceRequest, title: str, method: str, *args: Any, item: Any = None, node: str = "") -> None:
        """Starts a worker that calls a method of :class:`RayWorker` as soon as resources are free: on ``node`` if given and alive, else on any."""
        environment = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(job.machine.threads)}
        options: dict[str, Any] = {
            "num_cpus": request.cpus,
            "num_gpus": request.gpus,
            "memory": request.memory_bytes,
            "runtime_env": {"env_vars": environment},
        }
        if node:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
        name = f"{title}, {uuid.uuid4().hex[:6]}"
        remote = self._ray.remote(RayWorker).options(**options, max_restarts=0, max_task_retries=0, name=name)
        actor = remote.remote(pickle.dumps(job), code_version(), self._marker.name)
        where, result = actor.where.remote(), getattr(actor, method).remote(*args)
        self.tasks[result] = ActorTask(item=item, request=request, actor=actor, result=result, where=where, node=node)

    def wait(self, timeout_s: float | None) -> Iterator[tuple[ActorTask, Reply]]:
        """Waits at most ``timeout_s`` and yields the completed tasks with their replies."""
        ready, _ = self._ray.wait(list(self.tasks), timeout=timeout_s) if self.tasks else ([], [])
        for result in ready:
            task = self.tasks.pop(result)
            reply = self._reply(task)
            if reply[0] != "lost":
                self._ray.kill(task.actor)
            yield task, reply

    def _reply(self, task: ActorTask) -> Reply:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task.result)
        except (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError, errors.NodeDiedError) as error:
            if "creation task" in str(error):
                why = last_line(str(error))[:200]
                return "refused", f"--on ray: a node cannot load cellbench ({why}). Install the same version on all nodes.", []
            return "lost", type(error).__name__, []
        except errors.RayTaskError as error:  # a bug of ours
            return "error", str(error), []

    def place(self, task: ActorTask) -> tuple[str, str]:
        """Owner's name and node id of a worker; empty strings if it has not started yet."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            return self._ray.get(task.where, timeout=0)
        return "", ""
