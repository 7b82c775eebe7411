"""One process's work on a search: batches of trials are asked for, trained and pruned together as cohorts, and told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from cellbench.config.experiment import Experiment
from cellbench.config.search_space import Space
from cellbench.errors import CellbenchError
from cellbench.execution.planning import ResolvedRun, group_cohorts, resolve_runs
from cellbench.execution.runner import Outcome, Runner
from cellbench.search.study import REASON, RUN_ID, SAME, CompletedTrial, ProposedTrial, Study
from cellbench.tracking.schema import STUDY, TRIAL, run_params
from cellbench.tracking.tracker import Run


@dataclass(kw_only=True)
class SearchWorker:
    """Asks for batches, runs them and tells what came of them, until all are told."""

    space: Space
    study: Study
    runner: Runner
    where: str

    def __post_init__(self) -> None:
        self.runner.watch = self
        self._trial_of: dict[str, ProposedTrial] = {}

    def work(self, over: Callable[[], bool], bar: tqdm) -> None:
        """Until all trials are told, or ``over`` says before a batch that it is. Raises CellbenchError where the first trials all fail."""
        while not over():
            batch = self.study.ask()
            if not batch:
                return
            self._batch(batch)
            told = self.study.told()
            self.show(told, bar)
            failed = [t for t in told if t.state == "failed"]
            if len(failed) >= self.space.settings.max_failed and not any(t.state in ("complete", "pruned") for t in told):
                raise CellbenchError(
                    f"the first {len(failed)} trials have all failed, so the search stops. Trial {failed[0].number}: {failed[0].reason}"
                )

    def show(self, told: list[CompletedTrial], bar: tqdm) -> None:
        bar.n = sum(t.state != "running" for t in told)
        best = self.study.best()
        bar.set_postfix_str(f"best {self.space.settings.objectives[0]} {best[0].values[0]:.4f} (trial {best[0].number})" if best else "")

    # --- one batch ----------------------------------------------------------------------------------------------------------------

    def _batch(self, batch: Sequence[ProposedTrial]) -> None:
        jobs: list[tuple[ProposedTrial, ResolvedRun]] = []
        seen = {t.same for t in self.study.told() if t.state == "complete"}
        again = []
        for pending in batch:
            try:
                job, same = self._job(pending)
            except CellbenchError as error:  # two settings that cannot go together: a fact about the space, worth a told trial
                self.study.note(pending, REASON, str(error))
                self.study.tell_failed(pending, str(error))
                continue
            self.study.note(pending, SAME, same)
            (again if same in seen else jobs).append((pending, job))
            seen.add(same)
        self._train(jobs)
        told = {t.same: t for t in self.study.told() if t.state == "complete"}
        same_of = {t.number: t.same for t in self.study.told()}
        for pending, job in again:
            first = told.get(same_of[pending.number])
            self._train([(pending, job)]) if first is None else self._copy(pending, job, first)

    def _job(self, pending: ProposedTrial) -> tuple[ResolvedRun, str]:
        """A trial's run, and the fingerprint that it shares with trials that would give equal numbers."""
        experiment = Experiment.of(self.space.tree(pending.point), self.where)
        runner = self.runner
        (job,) = resolve_runs(
            experiment, runner.registry, runner.datasets, runner.weights, self.where, precision=runner.machine.precision_name
        )
        # Of this trial in this study: a run of a grid with these settings is tested, and this one must not be.
        own = hashlib.sha256(f"{job.fingerprint}:{self.study.name}:{pending.number}".encode()).hexdigest()[:16]
        return replace(job, name=f"trial {pending.number} · {job.run.model}", fingerprint=own), job.fingerprint

    def _train(self, batch: Sequence[tuple[ProposedTrial, ResolvedRun]]) -> None:
        self._trial_of = {resolved.fingerprint: trial for trial, resolved in batch}
        for cohort in group_cohorts([resolved for _, resolved in batch]):
            trials, out = [self._trial_of[one.fingerprint] for one in cohort], Outcome()
            numbers = ", ".join(str(trial.number) for trial in trials)
            self.runner.cohort(cohort, f"trial{'s' * (len(trials) > 1)} {numbers}", out)
            for trial, resolved in zip(trials, cohort, strict=True):
                self._tell(trial, resolved, out)

    def _tell(self, pending: ProposedTrial, job: ResolvedRun, out: Outcome) -> None:
        if job.name in out.busy:
            return  # its run is another process's: so is its trial
        ended = out.validated.get(job.name) or out.pruned.get(job.name)
        if ended is None:
            self.study.tell_failed(pending, out.failed.get(job.name, "no result"))
        elif ended.status == "pruned":
            self.study.tell_pruned(pending, search_metrics(ended.metrics), ended.reason)
        elif missing := [name for name in self.space.settings.objectives if name not in search_metrics(ended.metrics)]:
            self.study.tell_failed(pending, f"no {missing[0]}: no validation image has a cell")
        else:
            self.study.tell(pending, search_metrics(ended.metrics))

    def _copy(self, pending: ProposedTrial, job: ResolvedRun, first: CompletedTrial) -> None:
        """The trial has the settings of one that is told: the same numbers would come of it, so they are taken."""
        tracker, metrics = self.runner.tracker, {name.replace("val/", "best/val_"): value for name, value in first.metrics.items()}
        with tracker.run(job.name, job.fingerprint, parent=self.runner.parent_id, known=tracker.known().get(job.fingerprint)) as run:
            run.log(metrics, params=run_params(job.run, self.runner.dataset.name, job.precision), tags={"cellbench.same_as": first.run_id})
            self.opened(job, run, pending)
            run.end("validated", f"the settings of trial {first.number}, whose numbers these are")
        self.study.tell(pending, first.metrics)

    # --- followed by the runner ---------------------------------------------------------------------------------------------------

    def opened(self, job: ResolvedRun, run: Run, pending: ProposedTrial | None = None) -> None:
        """Each half learns of the other before anything is trained."""
        pending = pending or self._trial_of[job.fingerprint]
        self.study.note(pending, RUN_ID, run.run_id)
        run.log({}, tags={STUDY: self.study.name, TRIAL: str(pending.number)})

    def epoch(self, job: ResolvedRun, epoch: int, metrics: dict[str, float]) -> bool:
        objective = self.space.settings.objectives[0]
        if self.space.settings.pruner == "none" or objective not in metrics:
            return True
        return self.study.goes_on(self._trial_of[job.fingerprint], epoch, metrics[objective])


def search_metrics(metrics: Any) -> dict[str, float]:
    """A validated run's numbers under the names that a search may seek."""
    return {name.replace("best/val_", "val/"): float(value) for name, value in metrics.items() if name.startswith(("best/val_", "cost/"))}
