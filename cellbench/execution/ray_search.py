"""A search on Ray: processes that ask its study for trials, until all are told."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cellbench.errors import CellbenchError
from cellbench.execution.ray_cluster import actor_result, leave_marker, live_nodes, resource_share, resources_for_size, start_actor
from cellbench.execution.worker_job import MOST_DEATHS, JobSpec


class SearchHelpers:
    """Processes that share a search's trials on the Ray that was joined. Inside ``with`` they work; one that is lost is replaced.

    ``work`` takes the order with the process's share of a machine, and can be pickled. ``num``: how many are of use; ``params_m``: of the
    largest backbone.
    """

    def __init__(
        self, ray: Any, order: JobSpec, url: str, work: Callable[[JobSpec], None], num: int, params_m: float, gpu_share: float
    ) -> None:
        nodes = list(live_nodes(ray, order.store, url).values())
        self._ray, self._work = ray, pickle.dumps(work)
        self._order = replace(order, machine=resource_share(order.machine, nodes, num, gpu_share))
        self._need = resources_for_size(params_m, self._order.machine, gpu_share)
        self.num = min(num, sum(self._need.times(node) for node in nodes))
        if not self.num:
            raise CellbenchError(
                f"--on ray: no node has {self._need.words}. A smaller --memory asks for less; `ray status` shows what there is."
            )
        self._actors: dict[Any, Any] = {}
        self._losses = 0

    def __enter__(self) -> SearchHelpers:
        self._token = leave_marker(self._order.cache)
        for _ in range(self.num):
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        for made in self._actors.values():
            self._ray.kill(made)
        (self._order.cache / self._token).unlink(missing_ok=True)

    def _begin(self) -> None:
        made = start_actor(self._ray, self._need, self._order, self._token, "search")
        self._actors[made.help.remote(self._work)] = made

    def look(self, wait_s: float) -> str:
        """What is to be told after at most ``wait_s``: a process that was lost. Raises CellbenchError where one refuses, or many are lost."""
        ready, _ = self._ray.wait(list(self._actors), timeout=wait_s) if self._actors else ([], [])
        for one in ready:
            del self._actors[one]
            came = actor_result(self._ray, one)
            if isinstance(came, str):
                self._losses += 1
                if self._losses >= MOST_DEATHS * self.num:
                    raise CellbenchError(f"--on ray: {self._losses} processes of the search were lost ({came}). Is there enough memory?")
                self._begin()
                return f"a process of the search or its node was lost ({came}); another one takes up its trials."
            if came[0] == "refused":
                raise CellbenchError(came[1])
        return ""

    @property
    def working(self) -> bool:
        return bool(self._actors)
