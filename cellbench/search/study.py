"""The Optuna study of a search, with batches and a policy for dead workers. Knows neither backbones nor MLflow.

Trials are proposed in batches. A worker that dies leaves trials without a result; the next call to :meth:`Study.ask` returns the same trials. So
no result is lost, none is reported twice, and trial numbers are stable. A trial's point depends only on the study's seed, the trial's number and
the reported results. A resumed search therefore proposes the same trials, and workers do not repeat each other's first points.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from cellbench.config.base import Scalar
from cellbench.config.search_space import Dimension, Space
from cellbench.console import warn
from cellbench.errors import CellbenchError, SystemFault, one_line, redact_passwords
from cellbench.files import os_errors_as
from cellbench.liveness import is_alive, this_owner
from cellbench.parallel import repeating
from cellbench.search.samplers import sampler_and_pruner
from cellbench.tracking.availability import PATIENCE_S, RETRY_S, AwayError, LockWait, is_locked, wait_for_database, wait_until_unlocked
from cellbench.tracking.store_address import is_database_server, store_file
from cellbench.tracking.store_lock import store_lock

DEFAULT = "sqlite:///mlruns/optuna.db"
OWNER, BATCH, RUN_ID, METRICS, REASON, SAME, PRUNED = "owner", "batch", "mlflow_run_id", "metrics", "reason", "fingerprint", "pruned_at"
REQUEST = "asked"
ALIVE = "alive "
"""Prefix of the study attribute with the time of a worker's last heartbeat."""
BEAT_S, STALE_S = 20.0, 180.0

P = ParamSpec("P")
R = TypeVar("R")

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the progress bar shows the trials, and errors are raised as well


@dataclass(frozen=True, kw_only=True)
class ProposedTrial:
    """A trial without a result yet."""

    number: int
    point: Mapping[str, Scalar]
    trial: Trial = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CompletedTrial:
    """A trial as stored in the study."""

    number: int
    state: str
    """``complete``, ``pruned``, ``failed`` or ``running``."""
    point: Mapping[str, Scalar]
    values: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    """Id of its MLflow run."""
    reason: str = ""
    same: str = ""
    """Fingerprint of its settings: equal for trials that would give equal results."""
    seconds: float = 0.0


def _patient(method: Callable[Concatenate[Study, P], R]) -> Callable[Concatenate[Study, P], R]:
    """A method that waits for a storage that is away or locked. It may be called twice, since the reply to the first call may be lost."""

    @functools.wraps(method)
    def call(self: Study, *arguments: P.args, **named: P.kwargs) -> R:
        return self._patiently(lambda: method(self, *arguments, **named))

    return call


class Study:
    """A study in a storage, created on first use. Inside ``with``, the worker sends heartbeats."""

    def __init__(self, url: str, space: Space, request: Mapping[str, str], epochs: int) -> None:
        self.url, self.name, self.settings = url, space.experiment, space.settings
        self._dimensions = space.dimensions
        self._lock_errors = (RuntimeError,) if url.startswith("journal:") else ()  # raised where a journal's lock file is lost
        self.owner = this_owner()
        self._given: set[int] = set()
        """Numbers of the trials that this process has been given."""
        self._judge_after_s, self._beat_s = 0.0, time.monotonic()
        """When the silence of another process begins to count, since before it may be that of the storage; and this process's last heartbeat."""
        wait_for_database(url, "the study's storage")
        if (file := store_file(url)) is not None and file.exists():
            wait_until_unlocked(file)
        # A driver that is not installed; a storage of another version of Optuna, which RDBStorage reports so.
        with self._storage_errors(ImportError, RuntimeError), self.lock():
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
            self._check(dict(request))
        self._beating = contextlib.ExitStack()

    # --- the storage --------------------------------------------------------------------------------------------------------------

    def lock(self) -> AbstractContextManager[None]:
        """Lock between all processes of this study, also on other machines, held while the storage is created and in :meth:`ask`."""
        return store_lock(self.url, f"study {self.name}")

    @contextlib.contextmanager
    def _storage_errors(self, *more: type[Exception]) -> Iterator[None]:
        import sqlalchemy.exc

        try:
            with os_errors_as(f"opening the study's storage {redact_passwords(self.url)}"):
                yield
        except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, ValueError, *more, *self._lock_errors) as error:
            text = one_line(error.__cause__ or error)[:300]
            raise SystemFault(
                f"the study's storage {redact_passwords(self.url)}: {text}. Repair it, or name another with --storage; reported results are kept."
            ) from error

    def _patiently(self, call: Callable[[], R]) -> R:
        """Calls, and again while the storage is away or locked, up to ``PATIENCE_S``. Raises CellbenchError."""
        end, waiting = time.monotonic() + PATIENCE_S, None
        while True:
            try:
                with self._storage_errors():
                    result = call()
            except CellbenchError as error:
                if (file := store_file(self.url)) is not None and is_locked(error):
                    waiting = waiting or LockWait(file)
                    waiting.again()
                    continue
                if not is_database_server(self.url) or not _is_away(error) or time.monotonic() > end:
                    raise
                if self._judge_after_s < float("inf"):
                    shown = redact_passwords(self.url)
                    warn(f"the study's storage {shown} does not answer. It is asked again for {PATIENCE_S / 60:.0f} minutes.")
                self._judge_after_s = float("inf")
                time.sleep(RETRY_S)
                continue
            if self._judge_after_s == float("inf"):
                warn("the study's storage answers again.")
                self._judge_after_s = time.monotonic() + 2 * BEAT_S
            return result

    def _check(self, request: dict[str, str]) -> None:
        """Raises CellbenchError if the study belongs to a search with other settings."""
        before = self.optuna.user_attrs.get(REQUEST)
        if before is None:
            self.optuna.set_user_attr(REQUEST, request)
            return
        changed = [name for name in {**before, **request} if before.get(name) != request.get(name)]
        if changed:
            listed = "; ".join(
                f"{name} was {before.get(name, 'not there')} and is {request.get(name, 'not there')}" for name in changed[:4]
            )
            more = f"; {len(changed) - 4} more" if len(changed) > 4 else ""
            raise CellbenchError(
                f"the study '{self.name}' in {redact_passwords(self.url)} has {len(self.trials())} trials of another search: {listed}{more}. "
                f"Restore these settings to resume, or start a new study under another name: --set 'experiment=\"{self.name}-2\"'."
            )

    def __enter__(self) -> Study:
        self._send_heartbeat()
        self._beating.enter_context(repeating(self._beat, BEAT_S, wait_s=5))
        return self

    def __exit__(self, *_: object) -> None:
        self._beating.close()

    def _send_heartbeat(self) -> None:
        with self._storage_errors():
            self.optuna.set_user_attr(f"{ALIVE}{self.owner}", time.time())
        if time.monotonic() - self._beat_s > 3 * BEAT_S:
            self._judge_after_s = max(self._judge_after_s, time.monotonic() + 2 * BEAT_S)
        self._beat_s = time.monotonic()

    def _beat(self) -> None:
        with contextlib.suppress(CellbenchError):  # the main thread raises the same error
            self._send_heartbeat()

    def _is_dead(self, owner: str, trial: FrozenTrial, beats: Mapping[str, Any]) -> bool:
        if owner == self.owner:
            return trial.number not in self._given  # the storage went away while this process asked for it
        now = time.monotonic()
        silence_counts = now > self._judge_after_s and now - self._beat_s < 3 * BEAT_S
        return not is_alive(owner, float(beats.get(f"{ALIVE}{owner}", 0)), STALE_S if silence_counts else float("inf"))

    # --- ask and tell, as Optuna names them ---------------------------------------------------------------------------------------

    @_patient
    def ask(self) -> list[ProposedTrial]:
        """The next batch: the unfinished trials of a dead worker, else new ones. Empty if all trials were proposed."""
        with self.lock():
            trials = self.optuna.get_trials(deepcopy=False)
            room = self.settings.trials - len(trials)
            left = self._abandoned(trials)
            # Fill up the batch of the abandoned trials, so that it equals the batch of an uninterrupted search.
            batch = next((t.user_attrs[BATCH] for t in left if BATCH in t.user_attrs), left[0].number if left else len(trials))
            mine = [t for t in left if t.user_attrs.get(BATCH, batch) == batch]
            members = sum(t.user_attrs.get(BATCH) == batch for t in trials) + sum(BATCH not in t.user_attrs for t in mine)
            for t in mine:
                self._storage.set_trial_state_values(
                    t._trial_id, TrialState.WAITING
                )  # Optuna's `ask` returns waiting trials first, each to one worker
            num = len(mine) + min(max(self.settings.batch - members, 0), max(room, 0))
            asked = [self._ask(batch) for _ in range(num)]
            self._given |= {one.number for one in asked}
            return asked

    def _abandoned(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        beats = self.optuna.user_attrs
        left = []
        for t in trials:
            if t.state == TrialState.WAITING:
                left.append(t)
            elif t.state == TrialState.RUNNING:
                owner = t.user_attrs.get(OWNER)
                # Without an owner: its worker was killed between two writes, or the storage went away. Nobody is proposing it now: this holds the lock.
                if not owner or self._is_dead(owner, t, beats):
                    left.append(t)
        return left

    def _ask(self, batch: int) -> ProposedTrial:
        trial = self.optuna.ask()
        trial.set_user_attr(OWNER, self.owner)
        if BATCH not in trial.user_attrs:
            trial.set_user_attr(BATCH, batch)
        point: dict[str, Scalar] = {}
        for one in self._dimensions:
            if one.head in ("", point.get("head")):
                point[one.name] = _suggest(trial, one)
        return ProposedTrial(number=trial.number, point=point, trial=trial)

    @_patient
    def note(self, pending: ProposedTrial, attributes: Mapping[str, Any]) -> None:
        """Sets attributes of a trial without a result yet."""
        for name, value in attributes.items():
            pending.trial.set_user_attr(name, value)

    @_patient
    def should_continue(self, pending: ProposedTrial, epoch: int, value: float) -> bool:
        """Reports an epoch's value; False if the pruner stops the trial. If the epoch was reported before, the answer is the same."""
        known = self._storage.get_trial(pending.trial._trial_id)
        if epoch + 1 in known.intermediate_values:
            return known.user_attrs.get(PRUNED) != epoch + 1
        pending.trial.report(value, epoch + 1)
        if not pending.trial.should_prune():
            return True
        pending.trial.set_user_attr(PRUNED, epoch + 1)
        return False

    @_patient
    def tell(self, pending: ProposedTrial, metrics: Mapping[str, float]) -> None:
        """Reports the result of a completed trial."""
        if self._has_ended(pending):
            return
        for name, over in self.settings.excess(metrics).items():
            pending.trial.set_constraint(name, over)
        pending.trial.set_user_attr(METRICS, dict(metrics))
        self.optuna.tell(pending.trial, [metrics[name] for name in self.settings.objectives])

    @_patient
    def tell_pruned(self, pending: ProposedTrial, metrics: Mapping[str, float], reason: str) -> None:
        if self._has_ended(pending):
            return
        pending.trial.set_user_attr(METRICS, dict(metrics))
        pending.trial.set_user_attr(REASON, reason)
        self.optuna.tell(pending.trial, state=TrialState.PRUNED)

    @_patient
    def tell_failed(self, pending: ProposedTrial, reason: str) -> None:
        if self._has_ended(pending):
            return
        pending.trial.set_user_attr(REASON, reason)
        self.optuna.tell(pending.trial, state=TrialState.FAIL)

    def _has_ended(self, pending: ProposedTrial) -> bool:
        """Whether an earlier call has reported the result, and only its reply was lost."""
        return self._storage.get_trial(pending.trial._trial_id).state.is_finished()

    # --- results ------------------------------------------------------------------------------------------------------------------

    @_patient
    def trials(self) -> list[CompletedTrial]:
        """All trials by number, including running ones."""
        return [_completed_trial(t) for t in self.optuna.get_trials(deepcopy=False)]

    def best(self) -> list[CompletedTrial]:
        """The best trial within the bounds; with several objectives the Pareto front, sorted by the first objective."""
        done = [t for t in self.trials() if t.state == "complete" and self.settings.within_bounds(t.metrics)]
        signs = [1 if way == StudyDirection.MAXIMIZE else -1 for way in self.optuna.directions]
        scores = {t.number: tuple(sign * value for sign, value in zip(signs, t.values, strict=True)) for t in done}
        front = [t for t in done if not any(_dominates(scores[o.number], scores[t.number]) for o in done)]
        front.sort(key=lambda t: ([-x for x in scores[t.number]], t.number))
        return front if len(signs) > 1 else front[:1]

    @_patient
    def mark(self, name: str, value: Any) -> None:
        """Sets an attribute of the study."""
        self.optuna.set_user_attr(name, value)


def _is_away(error: CellbenchError) -> bool:
    """Whether the same call may succeed later: the database does not answer, or ended the connection."""
    import sqlalchemy.exc

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AwayError | sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
            return True
        cause = cause.__cause__
    return False


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


_STATES = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed", TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}  # fmt: skip


def _completed_trial(t: FrozenTrial) -> CompletedTrial:
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


def _suggest(trial: Trial, one: Dimension) -> Any:
    if one.choices:
        return trial.suggest_categorical(one.name, list(one.choices))
    if one.whole:
        return trial.suggest_int(one.name, int(one.low), int(one.high), step=int(one.step or 1), log=one.log)
    return trial.suggest_float(one.name, one.low, one.high, step=one.step, log=one.log)


def _storage(url: str) -> BaseStorage:
    if url.startswith("journal:"):
        path = Path(url.removeprefix("journal:").removeprefix("//"))
        _folder(path, url)
        return JournalStorage(JournalFileBackend(str(path)))
    if "://" not in url:
        raise CellbenchError(f"--storage {url}: expected a URL, like {DEFAULT}, postgresql://USER@HOST/NAME, mysql://… or journal:FILE.")
    wait: dict[str, Any] = {}
    if (file := store_file(url)) is not None:
        _folder(file, url)
        wait = {"timeout": 20}
    elif url.startswith(("postgresql", "mysql")):
        wait = {"connect_timeout": 10}
    return RDBStorage(url, engine_kwargs={"connect_args": wait, "pool_pre_ping": is_database_server(url)})


def _folder(path: Path, url: str) -> None:
    with os_errors_as(f"making a folder for the study's storage {url}"):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
