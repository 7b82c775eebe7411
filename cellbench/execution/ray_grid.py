"""A grid on Ray: a process a cohort, with the cores, GPU share and memory that it needs; before them, where features are kept, processes for shards.

When a process or its node is lost, its runs are set free and the cohort is handed out again, so that it goes on from its checkpoints, which lie
in the shared cache folder. A shard is computed once, however many cohorts want it, and a cohort starts when its own are there. Where nodes have a
cache folder each, it starts on the node that holds most of them, if that has room; in a folder that all share any node is equally near.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cellbench.errors import CellbenchError
from cellbench.execution.planning import PlannedRun
from cellbench.execution.ray_cluster import (
    ResourceRequest,
    actor_result,
    leave_marker,
    live_nodes,
    nearest_node,
    resource_share,
    resources_for,
    start_actor,
)
from cellbench.execution.runner import Outcome, Runner
from cellbench.execution.worker_job import MOST_DEATHS, JobSpec, WorkItem, merge_outcomes, work_items
from cellbench.features.extractor import FeaturePass
from cellbench.features.sharded_cache import num_shards

LOOK_EVERY_S = 5.0
"""How often it is seen whether nodes have come or gone."""


@dataclass(kw_only=True)
class CacheFillTask:
    """Shards of a cohort's passes, on their way as a `Piece` is."""

    jobs: list[PlannedRun]
    more: list[str]
    """The fingerprints of all runs that want them."""
    title: str
    shards: list[tuple[FeaturePass, int]]
    deaths: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Running:
    work: WorkItem | CacheFillTask
    need: ResourceRequest
    actor: Any
    where: Any
    """The owner of its claims on runs, as it will say itself, and its node."""
    node: str
    """Where it was asked to be; empty: anywhere."""
    answer: Any


class RayExecutor:
    """The cohorts of one grid on the Ray that was joined."""

    def __init__(self, ray: Any, order: JobSpec, gpu_share: float = 1.0) -> None:
        self._ray, self._order, self._gpu_share = ray, order, gpu_share

    def __call__(self, runner: Runner, groups: Sequence[Sequence[PlannedRun]], out: Outcome) -> None:
        """Runs the cohorts to their ends. What their processes say is said by ``runner`` when they are done."""
        if not groups:
            return
        self._runner, self._out, self._running = runner, out, dict[Any, _Running]()
        self._nodes = live_nodes(self._ray, self._order.store)
        self._at, self._apart = dict[str, Counter[str]](), False
        self._mine = self._shared_out(len(groups))
        cohorts = work_items(groups, runner.registry)
        for piece in cohorts:
            self._check(piece)
        num, cores = len(self._nodes), sum(node.get("CPU", 0) for node in self._nodes.values())
        runner.say(f"Ray: {num} node{'s' * (num > 1)} with {cores:.0f} cores; a cohort gets {self._mine.machine.name}.")
        self._token = leave_marker(self._mine.cache)
        try:
            fills, wanted = self._shards_of(cohorts) if self._mine.prefer_disk else ([], [set[str]() for _ in cohorts])
            self._work(deque(fills), list(zip(cohorts, wanted, strict=True)))
        finally:
            for one in self._running.values():
                self._ray.kill(one.actor)
                self._free(one)
            (self._mine.cache / self._token).unlink(missing_ok=True)

    def _work(self, waiting: deque[WorkItem | CacheFillTask], held: list[tuple[WorkItem, set[str]]]) -> None:
        """``held``: the cohorts, each with the folders of the passes that it waits for."""
        self._wants = {piece.title: wanted for piece, wanted in held}
        while waiting or held or self._running:
            fills = [work for work in (*waiting, *(one.work for one in self._running.values())) if isinstance(work, CacheFillTask)]
            under_way = {one.folder for fill in fills for one, _ in fill.shards}
            waiting.extend(piece for piece, wanted in held if not wanted & under_way)
            held = [(piece, wanted) for piece, wanted in held if wanted & under_way]
            while waiting:  # Ray queues what has no place yet
                self._begin(waiting.popleft())
            ready, _ = self._ray.wait(list(self._running), timeout=LOOK_EVERY_S)
            for one in ready:
                self._hear(self._running.pop(one), waiting)
            now = live_nodes(self._ray, self._order.store)
            if now.keys() != self._nodes.keys():
                self._nodes = now
                self._mine = self._shared_out(len(waiting) + len(held) + len(self._running))
                waiting.extend(self._homeless())

    def _shared_out(self, num: int) -> JobSpec:
        return replace(self._order, machine=resource_share(self._order.machine, list(self._nodes.values()), num, self._gpu_share))

    def _wish(self, work: WorkItem | CacheFillTask) -> ResourceRequest:
        return resources_for(work.jobs, self._runner.registry, self._mine.machine, self._gpu_share)

    def _check(self, work: WorkItem | CacheFillTask) -> None:
        wish = self._wish(work)
        if not any(wish.times(node) for node in self._nodes.values()):
            raise CellbenchError(
                f"--on ray: no node has what {work.title} needs: {wish.words}. A smaller --memory asks for less; `ray status` shows what there is."
            )

    def _begin(self, work: WorkItem | CacheFillTask) -> None:
        self._check(work)
        wish, mine = self._wish(work), [job.fingerprint for job in work.jobs]
        fills = isinstance(work, CacheFillTask)
        node = self._near(self._wants[work.title], wish) if self._apart and not fills else ""
        made = start_actor(self._ray, wish, self._mine, self._token, work.title, node)
        where = made.where.remote()
        asked = made.fill.remote(mine, work.more, work.shards) if fills else made.cohort.remote(mine, work.title, work.halvings)
        self._running[asked] = _Running(work=work, need=wish, actor=made, where=where, node=node, answer=asked)

    def _near(self, wanted: set[str], wish: ResourceRequest) -> str:
        """The node that holds most of these passes and surely has room: what Ray has not placed yet may come to any."""
        held = sum((self._at.get(folder, Counter()) for folder in wanted), Counter[str]())
        busy = Counter(self._node_of(one) for one in self._running.values())
        return nearest_node(held, {name: wish.times(node) - busy[name] - busy[""] for name, node in self._nodes.items()})

    def _node_of(self, one: _Running) -> str:
        """Where it is, or will be; empty where that is not known yet."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            return self._ray.get(one.where, timeout=0)[1]
        return one.node

    def _hear(self, one: _Running, waiting: deque[WorkItem | CacheFillTask]) -> None:
        """What became of a work that is over, or lost."""
        try:
            came = actor_result(self._ray, one.answer)
        except RuntimeError:
            self._free(one)
            raise
        if isinstance(came, str):
            self._lost(one, came, waiting)
            return
        kind, what, lines = came
        if isinstance(one.work, CacheFillTask) and kind == "done":
            self._apart |= not what
            for folder, num in Counter(pass_.folder for pass_, _ in one.work.shards).items():
                self._at.setdefault(folder, Counter())[self._node_of(one)] += num
        self._ray.kill(one.actor)
        for line in lines:
            self._runner.say(line)
        if kind == "refused":
            raise CellbenchError(what)
        if isinstance(one.work, WorkItem):
            merge_outcomes(self._out, what)

    def _lost(self, one: _Running, how: str, waiting: deque[WorkItem | CacheFillTask]) -> None:
        work = one.work
        work.deaths.append(how)
        self._free(one)
        if len(work.deaths) < MOST_DEATHS:
            self._runner.say(f"{work.title}: its process or node was lost ({how}); another one goes on from what is there.")
            waiting.append(work)
        elif isinstance(work, CacheFillTask):
            self._runner.say(
                f"{work.title}: its process or node was lost {MOST_DEATHS} times ({how}). Its cohorts compute what is missing."
            )
        else:
            self._runner.give_up(work.jobs, f"its process or node was lost {MOST_DEATHS} times ({how}). Is there enough memory?", self._out)

    def _homeless(self) -> list[WorkItem | CacheFillTask]:
        """Work that waits for a node that is gone, taken back: Ray would wait for another such node for ever."""
        gone = [one for one in self._running.values() if not any(one.need.times(node) for node in self._nodes.values())]
        gone = [one for one in gone if not self._ray.wait([one.where], timeout=0)[0]]
        for one in gone:
            self._ray.kill(one.actor)
            del self._running[one.answer]
        return [one.work for one in gone]

    def _free(self, one: _Running) -> None:
        """Its runs would count as alive for a quarter of an hour, since nobody here can see whether a process elsewhere lives."""
        if isinstance(one.work, WorkItem):
            with contextlib.suppress(self._ray.exceptions.RayError):  # it never got a place: nothing to free
                self._runner.release(one.work.jobs, self._ray.get(one.where, timeout=0)[0])

    # --- shards -------------------------------------------------------------------------------------------------------------------

    def _shards_of(self, cohorts: Sequence[WorkItem]) -> tuple[list[CacheFillTask], list[set[str]]]:
        """What is to be computed before the cohorts, and of each cohort the folders of its passes. One process looks at all of them."""
        prints = [[job.fingerprint for job in piece.jobs] for piece in cohorts]
        made = start_actor(self._ray, self._wish(cohorts[0]), self._mine, self._token, "shards")
        came = actor_result(self._ray, made.passes.remote(prints))
        self._ray.kill(made)
        if isinstance(came, str):
            self._runner.say(f"the process that plans shards was lost ({came}); each cohort computes its own features.")
            return [], [set() for _ in cohorts]
        kind, passes, _ = came
        if kind == "refused":
            raise CellbenchError(passes)
        wants: dict[str, list[int]] = {}
        for k, mine in enumerate(passes):
            for one in mine:
                wants.setdefault(one.folder, []).append(k)
        fills: list[CacheFillTask] = []
        for k, mine in enumerate(passes):
            first = [one for one in mine if wants[one.folder][0] == k]
            more = sorted({text for one in first for cohort in wants[one.folder] for text in prints[cohort]})
            fills += self._fills(cohorts[k], first, more)
        num = sum(len(fill.shards) for fill in fills)
        if num:
            self._runner.say(
                f"{num} shard{'s' * (num > 1)} of features, in {len(fills)} task{'s' * (len(fills) > 1)}; a cohort starts when its own are there."
            )
        return fills, [{one.folder for one in mine} for mine in passes]

    def _fills(self, piece: WorkItem, passes: Sequence[FeaturePass], more: list[str]) -> list[CacheFillTask]:
        """Passes dealt out in as many tasks as the cluster has places; which shards are there already is seen by the tasks."""
        places = sum(self._wish(piece).times(node) for node in self._nodes.values())
        shards = [(one, k) for one in passes for k in range(num_shards(one.num))]
        parts = [shards[k::places] for k in range(min(len(shards), places))]
        return [CacheFillTask(jobs=piece.jobs, more=more, title=f"features of {piece.title}", shards=part) for part in parts]
