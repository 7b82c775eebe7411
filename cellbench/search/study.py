"""Optuna: what a search has asked and been told, kept so that it survives. Knows neither backbones nor MLflow.

Trials are asked for in batches. A worker that dies leaves trials that were asked and never told: the next call takes up the same trials, so
that nothing told is lost, nothing is told twice and numbers stay. What a trial is drawn from depends on the study's seed and the trial's
number alone: a search that was killed and goes on asks the same as one that was not, and workers do not repeat each other's first points.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from cellbench.config.base import Scalar
from cellbench.config.search_space import Dimension, Space
from cellbench.errors import CellbenchError, one_line
from cellbench.files import os_errors_as
from cellbench.search.samplers import sampler_and_pruner
from cellbench.tracking import sqlite_store

DEFAULT = "sqlite:///mlruns/optuna.db"
OWNER, BATCH, RUN_ID, METRICS, REASON, SAME, PRUNED = "owner", "batch", "mlflow_run_id", "metrics", "reason", "fingerprint", "pruned_at"
ASKED = "asked"
ALIVE = "alive "
"""Before a worker's name on the study: when it last gave a sign of life."""
BEAT_S, STALE_S = 20.0, 180.0

optuna.logging.set_verbosity(optuna.logging.ERROR)  # one line a trial is what the bar is for; what goes wrong is raised as well


@dataclass(frozen=True, kw_only=True)
class ProposedTrial:
    """A trial that was asked for and is not told yet."""

    number: int
    point: Mapping[str, Scalar]
    trial: Trial = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CompletedTrial:
    """A trial as the study remembers it."""

    number: int
    state: str
    """``complete``, ``pruned``, ``failed`` or ``running``."""
    point: Mapping[str, Scalar]
    values: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    """Of MLflow's run."""
    reason: str = ""
    same: str = ""
    """The fingerprint of its settings: equal for trials that would give equal numbers."""
    seconds: float = 0.0


class Study:
    """One study in a storage, made on first use. Use in ``with``: a worker gives signs of life inside."""

    def __init__(self, url: str, space: Space, asked: Mapping[str, str], epochs: int) -> None:
        self.url, self.name, self.settings = url, space.experiment, space.settings
        self._dimensions = space.dimensions
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"
        with self._refusals(), self.lock():
            self._storage = _storage(url)
            sampler, pruner = sampler_and_pruner(self.settings, self._dimensions, epochs)
            self.optuna = optuna.create_study(
                storage=self._storage,
                study_name=self.name,
                directions=[StudyDirection[way.upper()] for way in space.directions],
                load_if_exists=True,
                sampler=sampler,
                pruner=pruner,
            )
            self._check(dict(asked))
        self._stop = threading.Event()

    # --- the storage --------------------------------------------------------------------------------------------------------------

    def lock(self) -> FileLock:
        """Held by this machine's processes while the storage is made (workers that make it at once break it) and while trials are asked."""
        return sqlite_store.store_lock(self.url)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        import sqlalchemy.exc

        try:
            with os_errors_as(f"opening the study's storage {_shown(self.url)}"):
                yield
        except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
            text = one_line(error.__cause__ or error)[:300]
            raise CellbenchError(
                f"the study's storage {_shown(self.url)}: {text}. Mend it, or name another with --storage; what is told is kept."
            ) from error

    def _check(self, asked: dict[str, str]) -> None:
        """Refuses a study that was asked something else."""
        before = self.optuna.user_attrs.get(ASKED)
        if before is None:
            self.optuna.set_user_attr(ASKED, asked)
            return
        changed = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
        if changed:
            words = "; ".join(f"{name} was {before.get(name, 'not there')} and is {asked.get(name, 'not there')}" for name in changed[:4])
            more = f"; {len(changed) - 4} more" if len(changed) > 4 else ""
            raise CellbenchError(
                f"the study '{self.name}' in {_shown(self.url)} has {len(self.told())} trials of another search: {words}{more}. "
                f"Put that back to go on, or start anew under another name: --set 'experiment=\"{self.name}-2\"'."
            )

    def __enter__(self) -> Study:
        self._beat()
        self._thread = threading.Thread(target=self._beats, name="search-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def _beat(self) -> None:
        with self._refusals():
            self.optuna.set_user_attr(f"{ALIVE}{self.owner}", time.time())

    def _beats(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(CellbenchError):  # the main thread meets the same, and tells it
                self._beat()

    def _is_dead(self, owner: str, beats: Mapping[str, Any]) -> bool:
        if owner == self.owner:
            return False
        host, _, rest = owner.partition(":")
        pid, _, born = rest.partition(":")
        if host == socket.gethostname() and pid.isdigit():
            try:
                return abs(psutil.Process(int(pid)).create_time() - float(born)) > 2
            except psutil.NoSuchProcess:
                return True
        return time.time() - float(beats.get(f"{ALIVE}{owner}", 0)) > STALE_S

    # --- ask and tell -------------------------------------------------------------------------------------------------------------

    def ask(self) -> list[ProposedTrial]:
        """The next batch: what a dead worker left, in its own batch, else new trials. Empty where all are asked."""
        with self._refusals(), self.lock():
            trials = self.optuna.get_trials(deepcopy=False)
            room = self.settings.trials - len(trials)
            left = self._left(trials)
            # As many as the batch of those that were left had room for: it is then the batch that it would have been.
            batch = next((t.user_attrs[BATCH] for t in left if BATCH in t.user_attrs), left[0].number if left else len(trials))
            mine = [t for t in left if t.user_attrs.get(BATCH, batch) == batch]
            members = sum(t.user_attrs.get(BATCH) == batch for t in trials) + sum(BATCH not in t.user_attrs for t in mine)
            for t in mine:
                self._storage.set_trial_state_values(t._trial_id, TrialState.WAITING)  # `ask` gives those first, each to one worker
            num = len(mine) + min(max(self.settings.batch - members, 0), max(room, 0))
            return [self._ask(batch) for _ in range(num)]

    def _left(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        beats = self.optuna.user_attrs
        left = []
        for t in trials:
            if t.state == TrialState.WAITING:
                left.append(t)
            elif t.state == TrialState.RUNNING:
                owner = t.user_attrs.get(OWNER)
                # Without an owner: killed between two writes, or being asked on another machine at this moment.
                young = t.datetime_start is not None and time.time() - t.datetime_start.timestamp() < STALE_S
                if self._is_dead(owner, beats) if owner else not (young and self._is_shared):
                    left.append(t)
        return left

    @property
    def _is_shared(self) -> bool:
        return not self.url.startswith(("sqlite:", "journal:"))

    def _ask(self, batch: int) -> ProposedTrial:
        trial = self.optuna.ask()
        trial.set_user_attr(OWNER, self.owner)
        if BATCH not in trial.user_attrs:
            trial.set_user_attr(BATCH, batch)
        point: dict[str, Scalar] = {}
        for one in self._dimensions:
            if one.head in ("", point.get("head")):
                point[one.name] = _suggested(trial, one)
        return ProposedTrial(number=trial.number, point=point, trial=trial)

    def note(self, pending: ProposedTrial, attributes: Mapping[str, Any]) -> None:
        """Writes attributes onto a trial that has not ended."""
        with self._refusals():
            for name, value in attributes.items():
                pending.trial.set_user_attr(name, value)

    def goes_on(self, pending: ProposedTrial, epoch: int, value: float) -> bool:
        """Reports an epoch's value; False where the pruner ends the trial. An epoch that is reported again is answered as before."""
        with self._refusals():
            known = self._storage.get_trial(pending.trial._trial_id)
            if epoch + 1 in known.intermediate_values:
                return known.user_attrs.get(PRUNED) != epoch + 1
            pending.trial.report(value, epoch + 1)
            if not pending.trial.should_prune():
                return True
            pending.trial.set_user_attr(PRUNED, epoch + 1)
            return False

    def tell(self, pending: ProposedTrial, metrics: Mapping[str, float]) -> None:
        """A trial that was trained and validated to its end."""
        with self._refusals():
            for name, over in self.settings.excess(metrics).items():
                pending.trial.set_constraint(name, over)
            pending.trial.set_user_attr(METRICS, dict(metrics))
            self.optuna.tell(pending.trial, [metrics[name] for name in self.settings.objectives])

    def tell_pruned(self, pending: ProposedTrial, metrics: Mapping[str, float], reason: str) -> None:
        with self._refusals():
            pending.trial.set_user_attr(METRICS, dict(metrics))
            pending.trial.set_user_attr(REASON, reason)
            self.optuna.tell(pending.trial, state=TrialState.PRUNED)

    def tell_failed(self, pending: ProposedTrial, reason: str) -> None:
        with self._refusals():
            pending.trial.set_user_attr(REASON, reason)
            self.optuna.tell(pending.trial, state=TrialState.FAIL)

    # --- what was found -----------------------------------------------------------------------------------------------------------

    def told(self) -> list[CompletedTrial]:
        """All trials by number, those that run now too."""
        with self._refusals():
            return [_told(t) for t in self.optuna.get_trials(deepcopy=False)]

    def best(self) -> list[CompletedTrial]:
        """The trials that no other surpasses, within the bounds: one, or with several objectives the front, the best by the first of them first."""
        done = [t for t in self.told() if t.state == "complete" and all(over <= 0 for over in self.settings.excess(t.metrics).values())]
        signs = [1 if way == StudyDirection.MAXIMIZE else -1 for way in self.optuna.directions]
        scores = {t.number: tuple(sign * value for sign, value in zip(signs, t.values, strict=True)) for t in done}
        front = [t for t in done if not any(_surpasses(scores[o.number], scores[t.number]) for o in done)]
        front.sort(key=lambda t: ([-x for x in scores[t.number]], t.number))
        return front if len(signs) > 1 else front[:1]

    def mark(self, name: str, value: Any) -> None:
        """Writes a fact onto the study."""
        with self._refusals():
            self.optuna.set_user_attr(name, value)


def _surpasses(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


_STATES = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed", TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}  # fmt: skip


def _told(t: FrozenTrial) -> CompletedTrial:
    return CompletedTrial(
        number=t.number,
        state=_STATES[t.state],
        point=t.params,
        values=tuple(t.values or ()) if t.state == TrialState.COMPLETE else (),
        metrics=t.user_attrs.get(METRICS, {}),
        run_id=t.user_attrs.get(RUN_ID, ""),
        reason=t.user_attrs.get(REASON, ""),
        same=t.user_attrs.get(SAME, ""),
        seconds=t.duration.total_seconds() if t.duration else 0.0,
    )


def _suggested(trial: Trial, one: Dimension) -> Any:
    if one.choices:
        return trial.suggest_categorical(one.name, list(one.choices))
    if one.whole:
        return trial.suggest_int(one.name, int(one.low), int(one.high), step=int(one.step or 1), log=one.log)
    return trial.suggest_float(one.name, one.low, one.high, step=one.step, log=one.log)


def _shown(url: str) -> str:
    """A storage's URL without the password in it."""
    scheme, mark, rest = url.partition("://")
    who, at, where = rest.rpartition("@")
    return f"{scheme}{mark}{who.partition(':')[0]}{at}{where}" if at else url


def _storage(url: str) -> BaseStorage:
    if url.startswith("journal:"):
        path = Path(url.removeprefix("journal:").removeprefix("//"))
        _folder(path, url)
        return JournalStorage(JournalFileBackend(str(path)))
    if "://" not in url:
        raise CellbenchError(f"--storage {url}: expected a URL, like {DEFAULT}, postgresql://USER@HOST/NAME, mysql://… or journal:FILE.")
    wait: dict[str, Any] = {}
    if url.startswith("sqlite:///"):
        _folder(Path(url.removeprefix("sqlite:///")), url)
        wait = {"timeout": 60}
    elif url.startswith(("postgresql", "mysql")):
        wait = {"connect_timeout": 10}
    return RDBStorage(url, engine_kwargs={"connect_args": wait, "pool_pre_ping": not url.startswith("sqlite")})


def _folder(path: Path, url: str) -> None:
    with os_errors_as(f"making a folder for the study's storage {url}"):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
