"""A grid's cohorts as work for a Ray cluster, and Ray's one door: an actor a cohort, with the cores, GPU share and memory that it needs.

Ray's own retries are off. When an actor or its node is lost, the driver sets its runs free and hands the cohort out again, so that it goes on
from its checkpoints, which lie in the shared cache folder. Every node opens data, weights, cards and the store by the driver's paths.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cellbench.errors import CellbenchError, one_line
from cellbench.files import write_atomic
from cellbench.jobs import Job
from cellbench.logged import owner_here
from cellbench.machine import Machine
from cellbench.moved import store_file
from cellbench.orders import MOST_DEATHS, Hand, Order, Piece, join, pieces, same_version, settled, version
from cellbench.registry import Registry
from cellbench.runner import Outcome, Runner

OBJECTS_BYTES = 200 * 2**20
"""Of a Ray that is started here. What travels is a few kilobytes; features go through the cache folder, not through Ray."""
PROCESS_BYTES = 700 * 2**20
"""Python with torch, MLflow and the drawing libraries loaded, measured."""
ANSWER_S = 5.0
LOOK_EVERY_S = 5.0
"""How often it is seen whether nodes have come or gone."""
CLIENT_PORT = 10001
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""Of HTTP/2, with empty settings, which a gRPC server answers with its own: a frame whose fourth byte is 4 (RFC 9113)."""


def checked(on: str) -> str:
    """``on`` where it can be joined, as it seems. Raises CellbenchError. Ray itself would try a dead address for a minute."""
    name, slashes, address = on.partition("://")
    if name != "ray" or bool(slashes) != bool(address):
        raise CellbenchError(f"--on {on}: expected ray, or ray://HOST:PORT for a cluster that is there (ray://auto: the one of this machine).")
    if importlib.util.find_spec("ray") is None:
        raise CellbenchError(f"--on {on}: Ray is not installed. `pip install 'cellbench[ray]'` installs it; --workers N needs nothing more.")
    if not address or address == "auto":
        return on
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise CellbenchError(f"--on {on}: expected ray://HOST:PORT, as in `ray start --address HOST:PORT`.")
    if int(port) == CLIENT_PORT:
        raise CellbenchError(f"--on {on}: that is the port of Ray's client. Name the cluster's own, as in `ray start --address HOST:PORT` (6379).")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_S) as there:
            there.sendall(HELLO)
            if there.recv(4)[3:] != b"\4":
                raise CellbenchError(f"--on {on}: what listens at {host}:{port} is not a Ray cluster. `ray status` on its head node names the port.")
    except OSError as error:
        raise CellbenchError(f"--on {on}: {host}:{port} does not answer ({error.strerror or error}). Is the cluster up, and its port open?") from None
    return on


@contextlib.contextmanager
def joined(on: str, machine: Machine) -> Iterator[Any]:
    """Ray, inside ``with``: started here for ``ray``, or joined at ``ray://ADDRESS``. Raises CellbenchError."""
    address = checked(on).removeprefix("ray").removeprefix("://")
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
class Need:
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


def need(jobs: Sequence[Job], registry: Registry, machine: Machine, gpu_share: float) -> Need:
    """For a cohort on such a share of a machine: its memory is what a process takes, the backbone's weights and the share's budget."""
    backbone = jobs[0].run.backbone
    return _need(registry.backbone(backbone).params_m if backbone else 0.0, machine, gpu_share)


def _need(params_m: float, machine: Machine, gpu_share: float) -> Need:
    gpus = gpu_share if machine.device.type == "cuda" else 0.0
    memory = PROCESS_BYTES + int(params_m * 4e6) + machine.memory_bytes
    return Need(cpus=machine.lanes * machine.threads, gpus=gpus, memory_bytes=memory)


def share(machine: Machine, nodes: Sequence[Node], num: int, gpu_share: float) -> Machine:
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
            raise CellbenchError(f"--on ray: no node has the {machine.threads} cores that an operation uses here. Set OMP_NUM_THREADS to fewer.")
        lanes = max(1, min(max(slots), sum(slots) // max(1, num)))
        part = [lanes / n if n >= lanes else 0.0 for n in slots]
    # Nodes need not be like the driver's machine: the part of the smallest node's memory, and never more than the driver would use.
    memory = min(int(node.get("memory", 0) * p) for node, p in zip(nodes, part, strict=True) if p)
    return replace(machine, lanes=lanes, memory_bytes=max(2**26, min(machine.memory_bytes, (memory - PROCESS_BYTES) // 2)))


class _Hand:
    """The actor's class: a `Hand` on some node, and what it said."""

    def __init__(self, order: bytes, theirs: str, token: str) -> None:
        self._order, self._theirs, self._token = order, theirs, token

    def owner(self) -> str:
        return owner_here()

    def cohort(self, fingerprints: list[str], title: str, halvings: int) -> tuple[str, Any, list[str]]:
        """``done`` and the outcome, or ``refused`` and why; and the lines for people."""
        lines: list[str] = []
        try:
            return "done", Hand(self._fit(), lines.append).cohort(fingerprints, title, halvings), lines
        except CellbenchError as error:
            return "refused", str(error), lines

    def help(self, work: bytes) -> tuple[str, str]:
        """Does a pickled work that takes the order. ``done``, or ``refused`` and why."""
        try:
            order = self._fit()
            pickle.loads(work)(order)
            return "done", ""
        except CellbenchError as error:
            return "refused", str(error)

    def _fit(self) -> Order:
        """The order, where this node can carry it out. Raises CellbenchError."""
        same_version(self._theirs)  # before anything of another version is unpickled
        order: Order = pickle.loads(self._order)
        if not (order.cache / self._token).is_file():
            raise CellbenchError(f"{owner_here()} does not see the cache folder {order.cache}. Name one that all nodes share with --cache.")
        if order.machine.device.type == "cuda" and not torch.cuda.is_available():
            raise CellbenchError(f"{owner_here()} was given a GPU, but torch sees none there. Mend its driver, or use --device cpu.")
        return settled(order)


def alive(ray: Any, *stores: str) -> dict[str, Node]:
    """What each node has that is alive, by its id. Raises CellbenchError where machines cannot share a store, one of these URLs."""
    there = [node for node in ray.nodes() if node["Alive"]]
    if len({node["NodeManagerHostname"] for node in there}) > 1:
        for file in filter(None, map(store_file, stores)):
            raise CellbenchError(
                f"--on ray: several machines cannot keep their runs in {file}, a file of one of them. "
                "Name a server (MLFLOW_TRACKING_URI=http://…) and, for a search, a database (OPTUNA_STORAGE=…); compose.yaml starts both."
            )
    return {node["NodeID"]: node["Resources"] for node in there}


def _left_in(cache: Path) -> str:
    """The name of a new file there."""
    token = f".ray-{uuid.uuid4().hex}"
    write_atomic(cache / token, "nodes that see this file share the cache folder")
    return token


def _actor(ray: Any, wish: Need, order: Order, token: str, title: str) -> Any:
    threads = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(order.machine.threads)}
    asked = {"num_cpus": wish.cpus, "num_gpus": wish.gpus, "memory": wish.memory_bytes, "runtime_env": {"env_vars": threads}}
    made = ray.remote(_Hand).options(**asked, max_restarts=0, max_task_retries=0, name=f"{title}, {uuid.uuid4().hex[:6]}")
    return made.remote(pickle.dumps(order), version(), token)


def _check_loaded(error: Exception) -> None:
    """Raises CellbenchError where an actor is lost because it could not even be made."""
    if "creation task" in str(error):
        why = one_line(RuntimeError(str(error).strip().splitlines()[-1]))[:200]
        raise CellbenchError(f"--on ray: a node cannot load cellbench ({why}). Install the same version on all nodes.") from None


class Helpers:
    """Processes that share a search's trials on the Ray that was joined. Inside ``with`` they work; one that is lost is replaced.

    ``work`` takes the order with the process's share of a machine, and can be pickled. ``num``: how many are of use; ``params_m``: of the
    largest backbone.
    """

    def __init__(self, ray: Any, order: Order, url: str, work: Callable[[Order], None], num: int, params_m: float, gpu_share: float) -> None:
        nodes = list(alive(ray, order.store, url).values())
        self._ray, self._work = ray, pickle.dumps(work)
        self._order = replace(order, machine=share(order.machine, nodes, num, gpu_share))
        self._need = _need(params_m, self._order.machine, gpu_share)
        self.num = min(num, sum(self._need.times(node) for node in nodes))
        if not self.num:
            raise CellbenchError(f"--on ray: no node has {self._need.words}. A smaller --memory asks for less; `ray status` shows what there is.")
        self._actors: dict[Any, Any] = {}
        self._losses = 0

    def __enter__(self) -> Helpers:
        self._token = _left_in(self._order.cache)
        for _ in range(self.num):
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        (self._order.cache / self._token).unlink(missing_ok=True)

    def _begin(self) -> None:
        actor = _actor(self._ray, self._need, self._order, self._token, "search")
        self._actors[actor.help.remote(self._work)] = actor

    def look(self, wait_s: float) -> str:
        """What is to be told after at most ``wait_s``: a process that was lost. Raises CellbenchError where one refuses, or many are lost."""
        errors = self._ray.exceptions
        ready, _ = self._ray.wait(list(self._actors), timeout=wait_s) if self._actors else ([], [])
        for answer in ready:
            del self._actors[answer]
            try:
                kind, why = self._ray.get(answer)
            except (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError, errors.NodeDiedError) as error:
                _check_loaded(error)
                self._losses += 1
                if self._losses >= MOST_DEATHS * self.num:
                    why = f"{self._losses} processes of the search were lost ({type(error).__name__}). Is there enough memory?"
                    raise CellbenchError(f"--on ray: {why}") from None
                self._begin()
                return f"a process of the search or its node was lost ({type(error).__name__}); another one takes up its trials."
            if kind == "refused":
                raise CellbenchError(why)
        return ""

    @property
    def working(self) -> bool:
        return bool(self._actors)


@dataclass(frozen=True, kw_only=True)
class _Running:
    piece: Piece
    need: Need
    actor: Any
    owner: Any
    """Of its claims on runs, as it will say itself."""
    answer: Any


class Crew:
    """The cohorts of one grid on the Ray that was joined."""

    def __init__(self, ray: Any, order: Order, gpu_share: float = 1.0) -> None:
        self._ray, self._order, self._gpu_share = ray, order, gpu_share

    def __call__(self, runner: Runner, groups: Sequence[Sequence[Job]], out: Outcome) -> None:
        """Runs the cohorts to their ends. What their actors say is said by ``runner`` when they are done."""
        if not groups:
            return
        nodes = alive(self._ray, self._order.store)
        mine = self._shared_out(nodes, len(groups))
        waiting = deque(pieces(groups, runner.registry))
        for piece in waiting:
            self._check(piece, mine, nodes, runner)
        cores = sum(node.get("CPU", 0) for node in nodes.values())
        runner.say(f"Ray: {len(nodes)} node{'s' * (len(nodes) > 1)} with {cores:.0f} cores; a cohort gets {mine.machine.name}.")
        token = _left_in(mine.cache)
        running: dict[Any, _Running] = {}
        try:
            while waiting or running:
                while waiting:  # Ray queues what has no place yet
                    piece = waiting.popleft()
                    self._check(piece, mine, nodes, runner)
                    begun = self._begin(piece, mine, token, runner)
                    running[begun.answer] = begun
                ready, _ = self._ray.wait(list(running), timeout=LOOK_EVERY_S)
                for answer in ready:
                    self._hear(running.pop(answer), waiting, runner, out)
                now = alive(self._ray, self._order.store)
                if now.keys() != nodes.keys():
                    nodes = now
                    mine = self._shared_out(nodes, len(waiting) + len(running))
                    waiting.extend(self._homeless(running, nodes))
        finally:
            for one in running.values():
                self._ray.kill(one.actor)
                self._free(one, runner)
            (mine.cache / token).unlink(missing_ok=True)

    def _shared_out(self, nodes: dict[str, Node], num: int) -> Order:
        return replace(self._order, machine=share(self._order.machine, list(nodes.values()), num, self._gpu_share))

    def _check(self, piece: Piece, order: Order, nodes: dict[str, Node], runner: Runner) -> None:
        wish = need(piece.jobs, runner.registry, order.machine, self._gpu_share)
        if not any(wish.times(node) for node in nodes.values()):
            raise CellbenchError(
                f"--on ray: no node has what {piece.title} needs: {wish.words}. A smaller --memory asks for less; `ray status` shows what there is."
            )

    def _begin(self, piece: Piece, order: Order, token: str, runner: Runner) -> _Running:
        wish = need(piece.jobs, runner.registry, order.machine, self._gpu_share)
        actor = _actor(self._ray, wish, order, token, piece.title)
        owner = actor.owner.remote()
        answer = actor.cohort.remote([job.fingerprint for job in piece.jobs], piece.title, piece.halvings)
        return _Running(piece=piece, need=wish, actor=actor, owner=owner, answer=answer)

    def _hear(self, one: _Running, waiting: deque[Piece], runner: Runner, out: Outcome) -> None:
        """What became of a cohort that is over, or lost."""
        errors = self._ray.exceptions
        try:
            kind, what, lines = self._ray.get(one.answer)
        except (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError, errors.NodeDiedError) as error:
            _check_loaded(error)
            self._lost(one, type(error).__name__, waiting, runner, out)
            return
        except errors.RayTaskError as error:
            self._free(one, runner)
            raise RuntimeError(f"in a process on Ray:\n{error}") from error  # our own bug
        self._ray.kill(one.actor)
        for line in lines:
            runner.say(line)
        if kind == "refused":
            raise CellbenchError(what)
        join(out, what)

    def _lost(self, one: _Running, how: str, waiting: deque[Piece], runner: Runner, out: Outcome) -> None:
        one.piece.deaths.append(how)
        self._free(one, runner)
        if len(one.piece.deaths) < MOST_DEATHS:
            runner.say(f"{one.piece.title}: its process or node was lost ({how}); another one goes on from the checkpoints.")
            waiting.append(one.piece)
        else:
            runner.give_up(one.piece.jobs, f"its process or node was lost {MOST_DEATHS} times ({how}). Is there enough memory?", out)

    def _homeless(self, running: dict[Any, _Running], nodes: dict[str, Node]) -> list[Piece]:
        """Cohorts that wait for a node that is gone, taken back: Ray would wait for another such node for ever."""
        gone = [one for one in running.values() if not any(one.need.times(node) for node in nodes.values())]
        gone = [one for one in gone if not self._ray.wait([one.owner], timeout=0)[0]]
        for one in gone:
            self._ray.kill(one.actor)
            del running[one.answer]
        return [one.piece for one in gone]

    def _free(self, one: _Running, runner: Runner) -> None:
        """Its runs would count as alive for a quarter of an hour, since nobody here can see whether a process elsewhere lives."""
        with contextlib.suppress(self._ray.exceptions.RayError):  # it never got a place: nothing to free
            runner.release(one.piece.jobs, self._ray.get(one.owner, timeout=0))
