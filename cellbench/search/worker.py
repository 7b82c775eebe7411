"""One process of a search: takes batches of trials from the study, trains and prunes them as cohorts, and reports their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cellbench.config.search_space import Space
from cellbench.errors import CellbenchError
from cellbench.execution.claims import Outcome
from cellbench.execution.grid import group_cohorts
from cellbench.execution.planning import ResolvedRun, resolve_tree
from cellbench.execution.progress import Progress, Report, no_report
from cellbench.execution.runner import Runner
from cellbench.files import text_digest
from cellbench.search.study import RUN_ID, SAME, CompletedTrial, ProposedTrial, Study
from cellbench.tracking.open_run import Run
from cellbench.tracking.schema import STUDY, TRIAL, run_params


class SearchProgress(Progress):
    """Progress of a search: the trials that have ended in all processes, and the part done of those that this process trains."""

    def __init__(self, num_trials: int, num_ended: int, say: Callable[[str], None]) -> None:
        self._ended, self._own, self._best = num_ended, 0.0, ""
        super().__init__(num_trials, say, num_ended)

    def cohort(self, num: int) -> Report:
        """The function through which the next cohort of the batch, of ``num`` trials, reports."""
        before = self._own

        def report(part: float, doing: str) -> None:
            self._own = before + part * num
            self._show(doing)

        return report

    def count(self, num_ended: int, best: float | None) -> None:
        """Shows the number of ended trials and the best value. Call between batches."""
        self._ended, self._own, self._best = num_ended, 0.0, "" if best is None else f", best {best:.4f}"
        self._show()

    def _show(self, doing: str = "") -> None:
        self.move(self._ended + self._own, f"{self._ended}/{self.total:.0f} trials{self._best}{', ' * bool(doing)}{doing}")


@dataclass(kw_only=True)
class SearchWorker:
    """Takes batches of trials and runs them, until all trials are complete."""

    space: Space
    study: Study
    runner: Runner
    where: str
    progress: SearchProgress | None = None
    """Set in the main process."""

    def __post_init__(self) -> None:
        self.runner.watch = self
        self._trials: dict[str, ProposedTrial] = {}
        """Trials by the fingerprint of their runs."""
        self._runs: dict[int, ResolvedRun] = {}
        self._same: dict[int, str] = {}
        """Fingerprint of the settings, by trial number. Trials with equal settings share it."""

    def work(self, over: Callable[[], bool]) -> None:
        """Works until all trials are taken, or until ``over()`` is true before a batch. Raises CellbenchError if the first trials all fail."""
        while not over():
            batch = self.study.ask()
            if not batch:
                return
            self._batch(batch)
            trials = self.show()
            failed = [t for t in trials if t.state == "failed"]
            if len(failed) >= self.space.settings.max_failed and not any(t.state in ("complete", "pruned") for t in trials):
                raise CellbenchError(
                    f"the first {len(failed)} trials have all failed, so the search stops. Trial {failed[0].number}: {failed[0].reason}"
                )

    def show(self) -> list[CompletedTrial]:
        """Shows the progress of all processes. Returns the trials."""
        trials = self.study.trials()
        if self.progress is not None:
            best = self.study.best()
            self.progress.count(sum(t.state != "running" for t in trials), best[0].values[0] if best else None)
        return trials

    # --- one batch ----------------------------------------------------------------------------------------------------------------

    def _batch(self, batch: Sequence[ProposedTrial]) -> None:
        trials = [trial for trial in batch if self._resolve(trial)]
        seen = {t.same for t in self.study.trials() if t.state == "complete"}
        new: list[ProposedTrial] = []
        repeated: list[ProposedTrial] = []
        for trial in trials:
            same = self._same[trial.number]
            (repeated if same in seen else new).append(trial)
            seen.add(same)
        self._train(new)
        complete = {t.same: t for t in self.study.trials() if t.state == "complete"}
        for trial in repeated:
            first = complete.get(self._same[trial.number])
            self._train([trial]) if first is None else self._copy(trial, first)

    def _resolve(self, trial: ProposedTrial) -> bool:
        """Resolves a trial's run. If the combination of settings is invalid, reports the trial as failed and returns False."""
        try:
            _, (run,) = resolve_tree(self.space.tree(trial.point), self.runner.resources, self.runner.datasets, self.where)
        except CellbenchError as error:
            self.study.tell_failed(trial, str(error))
            return False
        # Specific to this trial and study: a grid's run with the same settings is tested, and a trial must not be.
        own = text_digest(f"{run.fingerprint}:{self.study.name}:{trial.number}")
        self._same[trial.number] = run.fingerprint
        self._runs[trial.number] = replace(run, name=f"trial {trial.number} · {run.run.model}", fingerprint=own)
        self._trials[own] = trial
        return True

    def _train(self, trials: Sequence[ProposedTrial]) -> None:
        for cohort in group_cohorts([self._runs[trial.number] for trial in trials]):
            members, out = [self._trials[one.fingerprint] for one in cohort], Outcome()
            numbers = ", ".join(str(trial.number) for trial in members)
            self.runner.report = self.progress.cohort(len(cohort)) if self.progress is not None else no_report
            self.runner.cohort(cohort, f"trial{'s' * (len(members) > 1)} {numbers}", out)
            for trial, resolved in zip(members, cohort, strict=True):
                self._tell(trial, resolved, out)

    def _tell(self, trial: ProposedTrial, resolved: ResolvedRun, out: Outcome) -> None:
        """Reports the result of a trial to the study."""
        if resolved.name in out.busy:
            return  # another process has its run, and so its trial
        ended = out.validated.get(resolved.name) or out.pruned.get(resolved.name)
        metrics = search_metrics(ended.metrics) if ended else {}
        if ended is None:
            self.study.tell_failed(trial, out.failed.get(resolved.name) or out.skipped.get(resolved.name, "no result"))
        elif ended.status == "pruned":
            self.study.tell_pruned(trial, metrics, ended.reason)
        elif missing := [name for name in self.space.settings.objectives if name not in metrics]:
            self.study.tell_failed(trial, f"no {missing[0]}: no validation image has a cell")
        else:
            self.study.tell(trial, metrics)

    def _copy(self, trial: ProposedTrial, first: CompletedTrial) -> None:
        """Copies the metrics of a completed trial with the same settings. Training would give equal ones."""
        resolved, tracker = self._runs[trial.number], self.runner.tracker
        metrics = {name.replace("val/", "best/val_"): value for name, value in first.metrics.items()}
        known = tracker.known(resolved.fingerprint).get(resolved.fingerprint)
        with tracker.run(resolved.name, resolved.fingerprint, parent=self.runner.parent_id, known=known) as run:
            params = run_params(resolved.run, self.runner.dataset.name, resolved.precision)
            run.log(metrics, params=params, tags={"cellbench.same_as": first.run_id})
            self.opened(resolved, run)
            run.end("validated", f"the settings of trial {first.number}, whose numbers these are")
        self.study.tell(trial, first.metrics)

    # --- called by the runner -----------------------------------------------------------------------------------------------------

    def opened(self, resolved: ResolvedRun, run: Run) -> None:
        """Links the trial and its run before training."""
        trial = self._trials[resolved.fingerprint]
        self.study.note(trial, {RUN_ID: run.run_id, SAME: self._same[trial.number]})
        run.log({}, tags={STUDY: self.study.name, TRIAL: str(trial.number)})

    def epoch(self, resolved: ResolvedRun, epoch: int, metrics: dict[str, float]) -> bool:
        """Reports an epoch to the pruner; False ends the trial."""
        objective = self.space.settings.objectives[0]
        if self.space.settings.pruner == "none" or objective not in metrics:
            return True
        return self.study.should_continue(self._trials[resolved.fingerprint], epoch, metrics[objective])


def search_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """A validated run's metrics under the names that ``[search]`` uses."""
    return {name.replace("best/val_", "val/"): float(value) for name, value in metrics.items() if name.startswith(("best/val_", "cost/"))}
