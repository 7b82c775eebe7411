"""The only module that imports Ray: joins or starts a cluster, lists its nodes, and starts workers on them with the resources they need.

Ray's own retries are off: lost work is handed out again by ``work_queue``. Every node opens data, weights, cards and the store by the driver's
paths.
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
from pathlib import Path
from typing import Any, Literal

import torch

from cellbench.errors import CellbenchError, one_line
from cellbench.execution.worker_job import CohortWorker, JobSpec, apply_job_environment, check_same_version, code_version
from cellbench.features.extractor import FeaturePass
from cellbench.files import write_atomic
from cellbench.hardware import Hardware
from cellbench.tracking.schema import this_owner
from cellbench.tracking.sqlite_store import store_file

OBJECTS_BYTES = 200 * 2**20
"""Object store of a Ray that is started here. Messages are a few kilobytes; features go through the cache folder, not through Ray."""
PROCESS_BYTES = 700 * 2**20
"""Python with torch, MLflow and the drawing libraries loaded, measured."""
CONNECT_TIMEOUT_S = 5.0
CLIENT_PORT = 10001
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""Of HTTP/2, with empty settings. A gRPC server answers with its own settings: a frame whose fourth byte is 4 (RFC 9113)."""


def check_address(on: str, gpu_share: float = 1.0) -> str:
    """``on``, if it looks like a cluster that can be joined. Raises CellbenchError. Ray itself would try a dead address for a minute."""
    if not 0 < gpu_share <= 1:
        raise CellbenchError(f"--gpu-share {gpu_share:g}: expected more than 0 and at most 1.")
    name, slashes, address = on.partition("://")
    if name != "ray" or bool(slashes) != bool(address):
        raise CellbenchError(
            f"--on {on}: expected ray, or ray://HOST:PORT for a cluster that is there (ray://auto: the one of this machine)."
        )
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
    """Ray, inside ``with``: started here for ``ray``, or joined at ``ray://ADDRESS``, as :func:`check_address`. Raises CellbenchError."""
    address = on.removeprefix("ray").removeprefix("://")
    if not address:
        # Read where Ray is imported. Without it a Ray that is started here listens to the whole network, whatever address it is given.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            cores = machine.lanes * machine.threads
            ray.init(address="local", num_cpus=cores, object_store_memory=OBJECTS_BYTES, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CellbenchError(f"--on {on}: {one_line(error)[:300]} Is a cluster there (`ray status`), of Ray {ray.__version__}?") from None
    try:
        yield ray
    finally:
        ray.shutdown()


Node = dict[str, float]
"""Resources of one node of the cluster: ``CPU``, ``GPU`` and ``memory`` (bytes)."""


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """What a worker needs of a node."""

    cpus: int
    gpus: float
    memory_bytes: int

    def times(self, node: Node) -> int:
        """How many of these fit onto a node."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}
        return min(int(node.get(name, 0) / num + 1e-6) for name, num in needed.items() if num)

    @property
    def description(self) -> str:
        gpus = f"{self.gpus:g} of a GPU, " if self.gpus else ""
        return f"{gpus}{self.cpus} core{'s' * (self.cpus > 1)} and {self.memory_bytes / 2**30:.1f} GiB of memory"


def resources_for(params_m: float, machine: Hardware, gpu_share: float) -> ResourceRequest:
    """For a worker on such a share of a machine and a backbone of ``params_m`` million parameters.

    Its memory is that of a process, the backbone's weights and the share's budget.
    """
    gpus = gpu_share if machine.device.type == "cuda" else 0.0
    memory = PROCESS_BYTES + int(params_m * 4e6) + machine.memory_bytes
    return ResourceRequest(cpus=machine.lanes * machine.threads, gpus=gpus, memory_bytes=memory)


def resource_share(machine: Hardware, nodes: Sequence[Node], num: int, gpu_share: float) -> Hardware:
    """The part of a node for one of ``num`` workers. Raises CellbenchError where that is more than any node has.

    On CPUs as many lanes as keep the cluster's cores busy, of the driver's threads each; on GPUs one lane, with the same part of the node's
    cores as of its GPUs.
    """
    if machine.device.type == "cuda":
        slots = [int(node.get("GPU", 0) / gpu_share + 1e-6) for node in nodes]  # three times a third is one
        if not any(slots):
            raise CellbenchError(f"--on ray: no node has {gpu_share:g} of a GPU to give. --device cpu, or nodes with GPUs (`ray status`).")
        threads = max(1, min(int(node.get("CPU", 0)) // n for node, n in zip(nodes, slots, strict=True) if n))
        part, lanes = [1 / n if n else 0.0 for n in slots], 1
        # Ray shows each process its own GPUs, as the first ones.
        machine = replace(machine, device=torch.device("cuda"), threads=threads)
    else:
        slots = [int(node.get("CPU", 0)) // machine.threads for node in nodes]
        if not any(slots):
            raise CellbenchError(
                f"--on ray: no node has the {machine.threads} cores that an operation uses here. Set OMP_NUM_THREADS to fewer."
            )
        lanes = max(1, min(max(slots), sum(slots) // max(1, num)))
        part = [lanes / n if n >= lanes else 0.0 for n in slots]
    # Nodes need not be like the driver's machine: the part of the smallest node's memory, and never more than the driver would use.
    memory = min(int(node.get("memory", 0) * p) for node, p in zip(nodes, part, strict=True) if p)
    return replace(machine, lanes=lanes, memory_bytes=max(2**26, min(machine.memory_bytes, (memory - PROCESS_BYTES) // 2)))


Reply = tuple[Literal["done", "refused", "error", "lost"], Any, list[str]]
"""Of a worker: what it returned, or a text that says why it did not; and lines for people."""


class RayWorker:
    """The actor's class: a :class:`CohortWorker` on some node."""

    def __init__(self, job: bytes, version: str, token: str) -> None:
        self._job, self._version, self._token = job, version, token

    def where(self) -> tuple[str, str]:
        """Its name as the owner of runs, and its node."""
        return this_owner(), _node_here()

    def cohort(self, fingerprints: list[str], title: str, halvings: int) -> Reply:
        """Runs a cohort; returns its outcome."""
        return self._reply(lambda job, say: CohortWorker(job, say).cohort(fingerprints, title, halvings))

    def passes(self, cohorts: list[list[str]]) -> Reply:
        """Returns the passes that each cohort will keep on disk."""
        return self._reply(lambda job, say: CohortWorker(job, say).passes(cohorts))

    def fill(self, fingerprints: list[str], readers: list[str], shards: list[tuple[FeaturePass, int]]) -> Reply:
        """Computes shards of a cohort's passes. Returns whether the cache folder that holds them is the driver's."""

        def fill(job: JobSpec, say: Callable[[str], None]) -> bool:
            CohortWorker(job, say).fill(fingerprints, readers, shards)
            return self._shares_cache(job)

        return self._reply(fill)

    def call(self, function: bytes) -> Reply:
        """Calls a pickled function with the job."""
        return self._reply(lambda job, say: pickle.loads(function)(job))  # noqa: S301

    def _reply(self, work: Callable[[JobSpec, Callable[[str], None]], Any]) -> Reply:
        lines: list[str] = []
        try:
            return "done", work(self._checked_job(), lines.append), lines
        except CellbenchError as error:
            return "refused", str(error), lines

    def _checked_job(self) -> JobSpec:
        """The job, if this node can execute it. Raises CellbenchError."""
        check_same_version(self._version)  # before anything of another version is unpickled
        job: JobSpec = pickle.loads(self._job)  # noqa: S301
        if not job.cache_url and not self._shares_cache(job):
            raise CellbenchError(
                f"{this_owner()} does not see the cache folder {job.cache}. Name one that all nodes share with --cache, or a URL with --cache-url."
            )
        if job.machine.device.type == "cuda" and not torch.cuda.is_available():
            raise CellbenchError(f"{this_owner()} was given a GPU, but torch finds none there. Repair its driver, or use --device cpu.")
        return apply_job_environment(job)

    def _shares_cache(self, job: JobSpec) -> bool:
        return (job.cache / self._token).is_file()


def _node_here() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def live_nodes(ray: Any, *stores: str) -> dict[str, Node]:
    """What each node has that is alive, by its id. Raises CellbenchError where machines cannot share a store, one of these URLs."""
    there = [node for node in ray.nodes() if node["Alive"]]
    if len({node["NodeManagerHostname"] for node in there}) > 1:
        for file in filter(None, map(store_file, stores)):
            raise CellbenchError(
                f"--on ray: several machines cannot keep their runs in {file}, a file of one of them. "
                "Name a server (MLFLOW_TRACKING_URI=http://…) and, for a search, a database (OPTUNA_STORAGE=…); compose.yaml starts both."
            )
    return {node["NodeID"]: node["Resources"] for node in there}


def nearest_node(held: Mapping[str, int], free: Mapping[str, int]) -> str:
    """The node that holds the most shards, of those with room; empty where none has both. ``free``: for how many more workers each has room.

    >>> nearest_node({"a": 3, "b": 5, "c": 9}, {"a": 1, "b": 2, "c": 0})
    'b'
    """
    return max((node for node in held if free.get(node, 0) > 0), key=lambda node: held[node], default="")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActorTask:
    """A worker on the cluster and its one task."""

    item: Any
    """What the caller started it for."""
    request: ResourceRequest
    actor: Any
    result: Any
    """Ray's reference to its reply."""
    where: Any
    """Ray's reference to its owner's name and its node."""
    node: str
    """The node that was asked for; empty: any."""


class ActorPool:
    """Workers of one driver on the cluster, each with one task. A file in the cache folder shows them whether they share it."""

    def __init__(self, ray: Any, cache: Path) -> None:
        self._ray = ray
        self.tasks: dict[Any, ActorTask] = {}
        self._marker = cache / f".ray-{uuid.uuid4().hex}"
        write_atomic(self._marker, "nodes that see this file share the cache folder")

    def close(self) -> list[ActorTask]:
        """Kills all workers. Gives the tasks that were not done."""
        left = list(self.tasks.values())
        for task in left:
            self.kill(task)
        self._marker.unlink(missing_ok=True)
        return left

    def kill(self, task: ActorTask) -> None:
        self._ray.kill(task.actor)
        self.tasks.pop(task.result, None)

    def start(self, job: JobSpec, request: ResourceRequest, title: str, method: str, *args: Any, item: Any = None, node: str = "") -> None:
        """Starts a worker that calls a method of :class:`RayWorker`, as soon as there is room: on this node while it exists, else on any."""
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
        """The tasks that are over after at most ``timeout_s``, with their replies."""
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
                why = one_line(RuntimeError(str(error).strip().splitlines()[-1]))[:200]
                return "refused", f"--on ray: a node cannot load cellbench ({why}). Install the same version on all nodes.", []
            return "lost", type(error).__name__, []
        except errors.RayTaskError as error:  # a bug of ours
            return "error", str(error), []

    def place(self, task: ActorTask) -> tuple[str, str]:
        """The owner's name and node of a worker; empty strings where it has not started yet."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            return self._ray.get(task.where, timeout=0)
        return "", ""
