"""Work queue for workers in other processes, local or on Ray, and the policy for lost workers. ``execution.failures`` has that for failed runs.

The cohort of a lost worker is assigned again and resumes from its checkpoints. From the second loss on, the queue assumes that memory ran out,
and the next worker gets smaller chunks. After ``MAX_LOSSES`` the cohort's runs fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from cellbench.errors import CellbenchError, last_line
from cellbench.execution.claims import Outcome
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.progress import GridProgress, relative_cost
from cellbench.execution.runner import Runner
from cellbench.features.extractor import FeaturePass

MAX_LOSSES = 3

Shard = tuple[FeaturePass, int]


@dataclass(kw_only=True, eq=False)
class WorkItem:
    """A unit of work: a cohort, or shards of features that cohorts read."""

    cohort: list[ResolvedRun]
    title: str
    shards: list[Shard] = field(default_factory=list)
    """Shards to compute; empty: run the cohort."""
    readers: list[str] = field(default_factory=list)
    """Fingerprints of all runs that read these shards."""
    waits_for: frozenset[str] = frozenset()
    """Folders of the feature passes that must be complete before it starts."""
    losses: int = 0

    @property
    def fingerprints(self) -> list[str]:
        return [one.fingerprint for one in self.cohort]

    @property
    def folders(self) -> set[str]:
        """Folders of the passes that its shards belong to."""
        return {one.folder for one, _ in self.shards}

    @property
    def halvings(self) -> int:
        """How often the worker halves its chunk size."""
        return max(0, self.losses - 1)


@dataclass(frozen=True, kw_only=True)
class Message:
    """A worker's message about its item, or the notice that the worker was lost."""

    item: WorkItem
    kind: Literal["say", "progress", "done", "refused", "error", "lost"]
    content: Any = None
    """The outcome, or a text: a line to print, the reason of a refusal, a traceback, or how the worker was lost."""
    lines: Sequence[str] = ()
    """Lines to print first."""
    owner: str = ""
    """Owner of the item's runs in the store, if it was lost on another machine."""


class Workers(Protocol):
    """Starts and stops workers and delivers their messages. Scheduling is up to :class:`WorkQueue`."""

    def assign(self, queue: WorkQueue) -> None:
        """Assigns ready items to workers."""

    def messages(self) -> Iterable[Message]:
        """Messages since the last call; waits a short time for them."""

    def stop(self) -> Sequence[tuple[WorkItem, str]]:
        """Stops all workers. Returns the items of those that were killed at work, each with the owner of its runs in the store."""


class WorkQueue:
    """The items of one grid. The most expensive come first, so that all workers end at about the same time."""

    def __init__(self, runner: Runner, cohorts: Sequence[Sequence[ResolvedRun]], out: Outcome) -> None:
        self.runner, self._out = runner, out
        items = [WorkItem(cohort=list(cohort), title=f"cohort {k} of {len(cohorts)}") for k, cohort in enumerate(cohorts, 1)]
        self.waiting = deque(sorted(items, key=lambda item: -relative_cost(item.cohort)))
        self.running: list[WorkItem] = []
        self._progress = GridProgress(cohorts, runner.say)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def run(self, workers: Workers) -> None:
        """Runs until every item is done. Raises CellbenchError if a worker refuses its item."""
        try:
            with self._progress:
                while len(self):
                    workers.assign(self)
                    for message in workers.messages():
                        self._handle(message)
        finally:
            for item, owner in workers.stop():
                self._release(item, owner)

    def take(self) -> WorkItem | None:
        """Removes and returns the next item that waits for no other; None if there is none."""
        unfinished = {folder for item in (*self.waiting, *self.running) for folder in item.folders}
        item = next((one for one in self.waiting if not one.waits_for & unfinished), None)
        if item is not None:
            self.waiting.remove(item)
            self.running.append(item)
        return item

    def put_back(self, item: WorkItem) -> None:
        self.running.remove(item)
        self.waiting.appendleft(item)

    def _handle(self, message: Message) -> None:
        item = message.item
        for line in message.lines:
            self.runner.say(line)
        self._release(item, message.owner)
        match message.kind:
            case "say":
                self.runner.say(message.content)
            case "progress":
                self._progress.update(item.cohort, *message.content)
            case "done":
                self.running.remove(item)
                if not item.shards:
                    self._progress.update(item.cohort, 1.0)
                    _merge(self._out, message.content)
            case "lost":
                self._lost(item, message.content)
            case "refused" if not item.shards:
                raise CellbenchError(message.content)
            case "refused" | "error":
                self.running.remove(item)
                reason = last_line(message.content)
                if item.shards:
                    self.runner.say(f"{item.title}: {reason} Its cohorts compute what is missing.")
                else:
                    self.runner.claims.give_up(item.cohort, reason, self._out, message.content)

    def _release(self, item: WorkItem, owner: str) -> None:
        if owner and not item.shards:
            self.runner.claims.release(item.cohort, owner)

    def _lost(self, item: WorkItem, how: str) -> None:
        item.losses += 1
        self.put_back(item)
        if item.losses < MAX_LOSSES:
            self.runner.say(f"{item.title}: its worker was lost ({how}); another one resumes it.")
            return
        self.waiting.remove(item)
        reason = f"its worker was lost {MAX_LOSSES} times ({how})."
        if item.shards:
            self.runner.say(f"{item.title}: {reason} Its cohorts compute what is missing.")
        else:
            self.runner.claims.give_up(item.cohort, f"{reason} Is there enough memory?", self._out)


def _merge(out: Outcome, more: Outcome) -> None:
    """Adds the outcome of one cohort."""
    for one in fields(Outcome):
        mine, other = getattr(out, one.name), getattr(more, one.name)
        if isinstance(mine, dict):
            mine.update(other)
        elif isinstance(mine, list):
            mine.extend(other)
        else:
            setattr(out, one.name, mine + other)
