"""Runs a search on Ray: workers take trials from the study until all are done."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cellbench.errors import CellbenchError, last_line
from cellbench.execution.ray_cluster import ActorPool, live_nodes, resource_share, resources_for
from cellbench.execution.work_queue import MAX_LOSSES
from cellbench.execution.worker_job import JobSpec


class SearchHelpers:
    """Workers for the trials of a search on a connected Ray cluster. They run inside ``with``; lost workers are replaced.

    ``work``: picklable function of the job with the worker's share of a machine. ``num``: maximum number of workers. ``params_m``: million
    parameters of the largest backbone.
    """

    def __init__(
        self, ray: Any, job: JobSpec, url: str, work: Callable[[JobSpec], None], num: int, params_m: float, gpu_share: float
    ) -> None:
        nodes = list(live_nodes(ray, job.store, url).values())
        self._ray, self._work = ray, pickle.dumps(work)
        self._job = replace(job, machine=resource_share(job.machine, nodes, num, gpu_share))
        self._request = resources_for(params_m, self._job.machine, gpu_share)
        self.num = min(num, sum(self._request.times(node) for node in nodes))
        if not self.num:
            raise CellbenchError(
                f"--on ray: no node has {self._request.description}. A smaller --memory requests less; `ray status` shows the nodes."
            )
        self._losses = 0

    def __enter__(self) -> SearchHelpers:
        self._pool = ActorPool(self._ray, self._job.cache)
        for _ in range(self.num):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def _start(self) -> None:
        self._pool.start(self._job, self._request, "search", "call", self._work)

    def poll(self, wait_s: float) -> str:
        """Waits at most ``wait_s``; returns a message if a worker was lost. Raises CellbenchError if one refuses, or many were lost."""
        lines = []
        for _, (kind, content, _) in self._pool.wait(wait_s):
            if kind == "refused":
                raise CellbenchError(content)
            if kind != "done":
                self._losses += 1
                why = last_line(content)
                if self._losses >= MAX_LOSSES * self.num:
                    raise CellbenchError(f"--on ray: {self._losses} workers of the search were lost ({why}). Is there enough memory?")
                self._start()
                lines.append(f"a worker of the search was lost ({why}); another one resumes its trials.")
        return "\n".join(lines)

    @property
    def working(self) -> bool:
        return bool(self._pool.tasks)
