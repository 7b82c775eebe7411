"""Runs a grid on Ray: one worker per cohort, with the cores, GPU share and memory that it needs.

If features are cached, other workers compute their shards first. A shard is computed once, however many cohorts read it, and a cohort starts
when its shards are complete. If each node has its own cache folder, the cohort prefers the node that holds most of its shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from cellbench.errors import CellbenchError, last_line, quantity
from cellbench.execution.claims import Outcome
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.ray_cluster import (
    ActorPool,
    ActorTask,
    Node,
    ResourceRequest,
    live_nodes,
    nearest_node,
    resource_share,
    resources_for,
)
from cellbench.execution.runner import Runner
from cellbench.execution.work_queue import Message, WorkItem, WorkQueue
from cellbench.execution.worker_job import JobSpec
from cellbench.features.extractor import FeaturePass
from cellbench.features.sharded_cache import num_shards

POLL_S = 5.0
"""Interval at which the list of nodes is read."""


class RayExecutor:
    """Runs the cohorts of one grid on a connected Ray cluster."""

    def __init__(self, ray: Any, job: JobSpec, gpu_share: float = 1.0) -> None:
        self._ray, self._job, self._gpu_share = ray, job, gpu_share

    def run(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        if not cohorts:
            return
        queue = WorkQueue(runner, cohorts, out)
        nodes = live_nodes(self._ray, self._job.store)
        job = replace(self._job, experiment=runner.experiment)
        workers = RayWorkers(self._ray, job, self._gpu_share, nodes, len(queue))
        num, cores = len(nodes), sum(node.get("CPU", 0) for node in nodes.values())
        runner.say(f"Ray: {quantity(num, 'node')} with {cores:.0f} cores; a cohort gets {workers.job.machine.name}.")
        queue.run(workers)


class RayWorkers:
    """One worker per item. Its messages are passed on when it is done."""

    def __init__(self, ray: Any, job: JobSpec, gpu_share: float, nodes: dict[str, Node], num_items: int) -> None:
        self._ray, self._whole_job, self._gpu_share = ray, job, gpu_share
        self._pool = ActorPool(ray, job.cache)
        self._shards_at: dict[str, Counter[str]] = {}
        """Number of shards that each node computed, by folder."""
        self._separate_caches = False
        self._started = False
        self._set_nodes(nodes, num_items)

    def _set_nodes(self, nodes: dict[str, Node], num_items: int) -> None:
        self._nodes = nodes
        machine = resource_share(self._whole_job.machine, list(nodes.values()), num_items, self._gpu_share)
        self.job = replace(self._whole_job, machine=machine)

    def _request(self, item: WorkItem) -> ResourceRequest:
        backbone = item.cohort[0].backbone
        return resources_for(backbone.params_m if backbone else 0.0, self.job.machine, self._gpu_share)

    def _check(self, item: WorkItem) -> ResourceRequest:
        """The item's resources. Raises CellbenchError if no node has them."""
        request = self._request(item)
        if not any(request.times(node) for node in self._nodes.values()):
            raise CellbenchError(
                f"--on ray: no node has the resources for {item.title}: {request.description}. "
                "A smaller --memory requests less; `ray status` shows the nodes."
            )
        return request

    def assign(self, queue: WorkQueue) -> None:
        if not self._started:
            self._started = True
            for item in queue.waiting:
                self._check(item)
            if self.job.prefer_disk:
                self._plan_shards(queue)
        nodes = live_nodes(self._ray, self.job.store)
        if nodes.keys() != self._nodes.keys():
            self._set_nodes(nodes, len(queue))
            for task in self._unplaceable():
                self._pool.kill(task)
                queue.put_back(task.item)
        while (ready := queue.take()) is not None:  # Ray queues tasks until resources are free
            self._start(ready)

    def _start(self, item: WorkItem) -> None:
        request = self._check(item)
        if item.shards:
            self._pool.start(self.job, request, item.title, "fill", item.fingerprints, item.readers, item.shards, item=item)
        else:
            node = self._nearest(item, request) if self._separate_caches else ""
            self._pool.start(self.job, request, item.title, "cohort", item.fingerprints, item.title, item.halvings, item=item, node=node)

    def _nearest(self, item: WorkItem, request: ResourceRequest) -> str:
        """The node that holds most of its passes and surely has free resources: tasks that Ray has not placed yet may go to any node."""
        held = sum((self._shards_at.get(folder, Counter()) for folder in item.waits_for), Counter[str]())
        busy = Counter(self._node(task) for task in self._pool.tasks.values())
        return nearest_node(held, {name: request.times(node) - busy[name] - busy[""] for name, node in self._nodes.items()})

    def _node(self, task: ActorTask) -> str:
        """Node id of a worker; before it starts, the requested one; empty if unknown."""
        return self._pool.place(task)[1] or task.node

    def _unplaceable(self) -> list[ActorTask]:
        """Tasks that wait for a node that is gone. Ray would wait for such a node forever."""
        waiting = [task for task in self._pool.tasks.values() if not any(task.request.times(node) for node in self._nodes.values())]
        return [task for task in waiting if not self._ray.wait([task.where], timeout=0)[0]]

    def messages(self) -> Iterator[Message]:
        for task, (kind, content, lines) in self._pool.wait(POLL_S):
            item: WorkItem = task.item
            if item.shards and kind == "done":
                self._separate_caches |= not content
                for folder, num in Counter(one.folder for one, _ in item.shards).items():
                    self._shards_at.setdefault(folder, Counter())[self._node(task)] += num
            # The driver cannot see whether a process elsewhere is alive. Without the owner, its runs would count as running for 15 minutes.
            owner = self._pool.place(task)[0] if kind in ("lost", "error") else ""
            yield Message(item=item, kind=kind, content=content, lines=lines, owner=owner)

    def stop(self) -> list[tuple[WorkItem, str]]:
        return [(task.item, self._pool.place(task)[0]) for task in self._pool.close() if task.item is not None]

    # --- shards -------------------------------------------------------------------------------------------------------------------

    def _plan_shards(self, queue: WorkQueue) -> None:
        """Queues the shards that cohorts read before the cohorts. One worker lists the passes of all cohorts."""
        cohorts, say = list(queue.waiting), queue.runner.say
        fingerprints = [item.fingerprints for item in cohorts]
        self._pool.start(self.job, self._request(cohorts[0]), "shards", "passes", fingerprints)
        ((_, (kind, passes, _)),) = self._pool.wait(None)
        if kind != "done":
            say(f"the worker that plans shards {kind}: {last_line(passes)} Each cohort computes its own features.")
            return
        readers: dict[str, list[int]] = {}
        for k, cohort_passes in enumerate(passes):
            for one in cohort_passes:
                readers.setdefault(one.folder, []).append(k)
        fills: list[WorkItem] = []
        for k, (item, cohort_passes) in enumerate(zip(cohorts, passes, strict=True)):
            first = [one for one in cohort_passes if readers[one.folder][0] == k]
            more = sorted({text for one in first for reader in readers[one.folder] for text in fingerprints[reader]})
            fills += self._fills(item, first, more)
            item.waits_for = frozenset(one.folder for one in cohort_passes)
        queue.waiting.extendleft(reversed(fills))
        if num := sum(len(fill.shards) for fill in fills):
            say(f"{quantity(num, 'shard')} of features, in {quantity(len(fills), 'task')}; a cohort starts when its own are complete.")

    def _fills(self, item: WorkItem, passes: Sequence[FeaturePass], readers: list[str]) -> list[WorkItem]:
        """Splits passes into as many tasks as the cluster can run at once. The tasks skip existing shards."""
        num = sum(self._request(item).times(node) for node in self._nodes.values())
        shards = [(one, k) for one in passes for k in range(num_shards(one.num))]
        parts = [shards[k::num] for k in range(min(len(shards), num))]
        return [WorkItem(cohort=item.cohort, title=f"features of {item.title}", shards=part, readers=readers) for part in parts]
