"""Ray's one door: a cluster is joined or started, its nodes are looked at, and processes on them are asked for what a cohort needs.

Ray's own retries are off: whoever hands work out hands it out again. Every node opens data, weights, cards and the store by the driver's paths.
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
from typing import Any

import torch

from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError, one_line
from cellbench.execution.planning import PlannedRun
from cellbench.execution.worker_job import CohortWorker, JobSpec, apply_job_environment, check_same_version, code_version
from cellbench.features.extractor import FeaturePass
from cellbench.files import write_atomic
from cellbench.hardware import Hardware
from cellbench.tracking.schema import this_owner
from cellbench.tracking.sqlite_store import store_file

OBJECTS_BYTES = 200 * 2**20
"""Of a Ray that is started here. What travels is a few kilobytes; features go through the cache folder, not through Ray."""
PROCESS_BYTES = 700 * 2**20
"""Python with torch, MLflow and the drawing libraries loaded, measured."""
ANSWER_S = 5.0
CLIENT_PORT = 10001
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""Of HTTP/2, with empty settings, which a gRPC server answers with its own: a frame whose fourth byte is 4 (RFC 9113)."""


def check_address(on: str, gpu_share: float = 1.0) -> str:
    """``on`` where it can be joined, as it seems. Raises CellbenchError. Ray itself would try a dead address for a minute."""
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
        with socket.create_connection((host, int(port)), timeout=ANSWER_S) as there:
            there.sendall(HELLO)
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

    quiet = {"log_to_driver": False, "logging_level": "CRITICAL"}
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
"""What one node of the cluster has: ``CPU``, ``GPU`` and ``memory`` (bytes)."""


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """What a cohort asks of a node."""

    cpus: int
    gpus: float
    memory_bytes: int

    def times(self, node: Node) -> int:
        """How many of these a node has."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}
        return min(int(node.get(name, 0) / num + 1e-6) for name, num in asked.items() if num)

    @property
    def words(self) -> str:
        gpus = f"{self.gpus:g} of a GPU, " if self.gpus else ""
        return f"{gpus}{self.cpus} core{'s' * (self.cpus > 1)} and {self.memory_bytes / 2**30:.1f} GiB of memory"


def resources_for(jobs: Sequence[PlannedRun], registry: Registry, machine: Hardware, gpu_share: float) -> ResourceRequest:
    """For a cohort on such a share of a machine: its memory is what a process takes, the backbone's weights and the share's budget."""
    backbone = jobs[0].run.backbone
    return resources_for_size(registry.backbone(backbone).params_m if backbone else 0.0, machine, gpu_share)


def resources_for_size(params_m: float, machine: Hardware, gpu_share: float) -> ResourceRequest:
    gpus = gpu_share if machine.device.type == "cuda" else 0.0
    memory = PROCESS_BYTES + int(params_m * 4e6) + machine.memory_bytes
    return ResourceRequest(cpus=machine.lanes * machine.threads, gpus=gpus, memory_bytes=memory)


def resource_share(machine: Hardware, nodes: Sequence[Node], num: int, gpu_share: float) -> Hardware:
    """What of its node one of ``num`` cohorts gets. Raises CellbenchError where that is more than any node has.

    On processors as many lanes as keep the cluster's cores busy, of the driver's threads each; on GPUs one lane, and of its node's cores as
    many as its part of the node's GPUs.
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


class RayWorker:
    """The actor's class: a `Hand` on some node, and what it said."""

    def __init__(self, order: bytes, theirs: str, token: str) -> None:
        self._order, self._theirs, self._token = order, theirs, token

    def where(self) -> tuple[str, str]:
        """Its name as the owner of runs, and its node."""
        return this_owner(), _node_here()

    def cohort(self, fingerprints: list[str], title: str, halvings: int) -> tuple[str, Any, list[str]]:
        """``done`` and the outcome, or ``refused`` and why; and the lines for people."""
        return self._do(lambda order, say: CohortWorker(order, say).cohort(fingerprints, title, halvings))

    def passes(self, cohorts: list[list[str]]) -> tuple[str, Any, list[str]]:
        """Of each cohort the passes that it will keep on disk."""
        return self._do(lambda order, say: CohortWorker(order, say).passes(cohorts))

    def fill(self, fingerprints: list[str], more: list[str], shards: list[tuple[FeaturePass, int]]) -> tuple[str, Any, list[str]]:
        """Computes shards of a cohort's passes. The outcome is whether the cache folder that they lie in now is the driver's."""

        def fill(order: JobSpec, say: Callable[[str], None]) -> bool:
            CohortWorker(order, say).fill(fingerprints, more, shards)
            return self._shares(order)

        return self._do(fill)

    def help(self, work: bytes) -> tuple[str, Any, list[str]]:
        """Does a pickled work that takes the order."""
        return self._do(lambda order, say: pickle.loads(work)(order))

    def _do(self, work: Callable[[JobSpec, Callable[[str], None]], Any]) -> tuple[str, Any, list[str]]:
        lines: list[str] = []
        try:
            return "done", work(self._fit(), lines.append), lines
        except CellbenchError as error:
            return "refused", str(error), lines

    def _fit(self) -> JobSpec:
        """The order, where this node can carry it out. Raises CellbenchError."""
        check_same_version(self._theirs)  # before anything of another version is unpickled
        order: JobSpec = pickle.loads(self._order)
        if not order.cache_url and not self._shares(order):
            raise CellbenchError(
                f"{this_owner()} does not see the cache folder {order.cache}. Name one that all nodes share with --cache, or a URL with --cache-url."
            )
        if order.machine.device.type == "cuda" and not torch.cuda.is_available():
            raise CellbenchError(f"{this_owner()} was given a GPU, but torch sees none there. Mend its driver, or use --device cpu.")
        return apply_job_environment(order)

    def _shares(self, order: JobSpec) -> bool:
        return (order.cache / self._token).is_file()


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


def leave_marker(cache: Path) -> str:
    """The name of a new file there, by which nodes see that they share the folder."""
    token = f".ray-{uuid.uuid4().hex}"
    write_atomic(cache / token, "nodes that see this file share the cache folder")
    return token


def nearest_node(held: Mapping[str, int], free: Mapping[str, int]) -> str:
    """The node that holds the most of some shards, of those with room; empty where none has both. ``free``: for how many more each has room.

    >>> near({"a": 3, "b": 5, "c": 9}, {"a": 1, "b": 2, "c": 0})
    'b'
    """
    return max((node for node in held if free.get(node, 0) > 0), key=lambda node: held[node], default="")


def start_actor(ray: Any, wish: ResourceRequest, order: JobSpec, token: str, title: str, node: str = "") -> Any:
    """A process on the cluster, as soon as there is room: on this node, while it is there, else on any."""
    threads = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(order.machine.threads)}
    asked: dict[str, Any] = {
        "num_cpus": wish.cpus,
        "num_gpus": wish.gpus,
        "memory": wish.memory_bytes,
        "runtime_env": {"env_vars": threads},
    }
    if node:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
    made = ray.remote(RayWorker).options(**asked, max_restarts=0, max_task_retries=0, name=f"{title}, {uuid.uuid4().hex[:6]}")
    return made.remote(pickle.dumps(order), code_version(), token)


def actor_result(ray: Any, one: Any) -> tuple[str, Any, list[str]] | str:
    """What an actor came to: ``done`` or ``refused``, and so on; or how it was lost. Raises CellbenchError where it could not even be made."""
    errors = ray.exceptions
    try:
        return ray.get(one)
    except (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError, errors.NodeDiedError) as error:
        if "creation task" in str(error):
            why = one_line(RuntimeError(str(error).strip().splitlines()[-1]))[:200]
            raise CellbenchError(f"--on ray: a node cannot load cellbench ({why}). Install the same version on all nodes.") from None
        return type(error).__name__
    except errors.RayTaskError as error:
        raise RuntimeError(f"in a process on Ray:\n{error}") from error  # our own bug
