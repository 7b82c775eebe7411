"""Runs cohorts: computes their shared features, then trains, evaluates and logs every run. The status ``finished`` is written last.

An interrupted run resumes from its checkpoint. Which runs are executed here, :mod:`cellbench.execution.claims` decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cellbench.background import BackgroundCalls
from cellbench.config.cards import BaselineCard
from cellbench.config.experiment import Experiment
from cellbench.data.audit import seen_images
from cellbench.data.dataset import Dataset
from cellbench.errors import (
    CellbenchError,
    SystemFault,
    WeightsUnavailable,
    blaming,
    culprit_of,
    keeping_on,
    one_line,
    quantity,
    quote_name,
)
from cellbench.execution import artifacts
from cellbench.execution.artifacts import EvaluationResult
from cellbench.execution.baseline_evaluation import evaluate_function
from cellbench.execution.claims import ActiveRun, Outcome, RunClaims
from cellbench.execution.cohort_inputs import CohortInputs
from cellbench.execution.failures import describe_failure, traceback_of
from cellbench.execution.finished_training import finished_trainers
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.progress import CohortProgress, Report, no_report
from cellbench.execution.resources import Resources
from cellbench.execution.result_logging import ResultLogging
from cellbench.execution.run_logger import RunLogger, TrialCallback
from cellbench.execution.shift_tests import (
    FinishedRunToTest,
    predict_with_function,
    predict_with_heads,
    run_tests,
    try_tests,
)
from cellbench.execution.wanted_tests import missing_tests, wanted_tests
from cellbench.features.extractor import Features, non_finite_reason
from cellbench.files import os_errors_as
from cellbench.hardware import is_out_of_memory, release_memory
from cellbench.metrics import catalog
from cellbench.models.baselines.build import FoundClasses, open_baseline
from cellbench.system_load import SystemLoad
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.schema import RunRecord, RunState
from cellbench.tracking.tracker import Tracker
from cellbench.training import checkpoints
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.fit import fit
from cellbench.training.measured_cost import inference_speeds, latencies_ms, load_metric, reset_timers, training_cost
from cellbench.training.memory_check import why_frames_too_large
from cellbench.training.model import build_model
from cellbench.training.tiled_inference import segment_images
from cellbench.training.trainer import HeadTrainer
from cellbench.training.training_features import describe_training_images
from cellbench.training.validation_tuning import score_validation, tune_on_validation

MAX_HALVINGS = 3
"""How often the number of tiles per backbone call may be halved when memory runs out."""

Trained = list[tuple[ActiveRun, HeadTrainer]]


@dataclass(kw_only=True)
class Runner:
    """Executes cohorts. Holds what the cohorts of one command share."""

    experiment: Experiment
    resources: Resources
    datasets: Sequence[Dataset]
    """One, or one per fold."""
    tracker: Tracker
    parent_id: str
    say: Callable[[str], None] = print
    report: Report = no_report
    """Receives the progress of the current cohort."""
    drawing: BackgroundCalls | None = None
    """Processes that draw the pictures; its owner closes them. None: the runner has its own."""
    watch: TrialCallback | None = None
    """Set for the trials of a search, which are validated and not tested."""

    def __post_init__(self) -> None:
        self.registry, self.machine = self.resources.registry, self.resources.machine
        """``machine``: with fewer tiles at once while a cohort is out of memory."""
        self._own_metrics = catalog.own_metrics(self.registry)
        self._inputs = CohortInputs(datasets=self.datasets, resources=self.resources, say=self.say)
        self._logging = ResultLogging(self.drawing)
        self.claims = RunClaims(
            tracker=self.tracker, parent_id=self.parent_id, datasets=self.datasets, limit=self.experiment.data.limit, say=self.say
        )
        self._known: Mapping[str, RunRecord] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits until all evaluated runs are logged."""
        try:
            self.settle()
        except Exception:
            if kind is None:  # else the first error matters
                raise
        finally:
            self._logging.close()

    @property
    def dataset(self) -> Dataset:
        """That of the current cohort."""
        return self._inputs.dataset

    # --- evaluated runs ---------------------------------------------------------------------------------------------------------------

    def _finish(self, one: ActiveRun, result: EvaluationResult, out: Outcome, trained_on: Sequence[int] = ()) -> None:
        """Has the evaluation of a run logged in the background, once its pictures are drawn. ``trained_on``: indices of the training images."""
        folder, images = TemporaryFolder(), self._inputs.images["test"]
        seen = seen_images.record_seen_images(self.dataset, trained_on)
        with os_errors_as(f"writing a run's artifacts to {folder.name}"):
            artifacts.write_artifacts(Path(folder.name), one.resolved.run, self.experiment, self.datasets, result, seen)
        drawn = self._logging.draw(artifacts.pictures(one.name, self.dataset, images, result))
        metrics = artifacts.final_metrics(self.dataset, result)
        # At step 0, the UI's charts show a single value as a bar, at any other step as a dot. ``best/epoch`` holds the epoch.
        tags = artifacts.run_tags(one.name, metrics, self.machine.name, one.run.address("figures/worst.png"))
        tags |= {"cellbench.separation": result.evaluation.separation.description}
        self._logging.log(one, folder, drawn, metrics, tags, out, partial(self._fail, one, out))

    def _fail(self, one: ActiveRun, out: Outcome, error: Exception) -> None:
        self.claims.fail(one, describe_failure(error), out, traceback_of(error))

    def settle(self) -> None:
        """Waits until all evaluated runs are logged, and raises what went wrong."""
        self._logging.settle()

    # --- one cohort ---------------------------------------------------------------------------------------------------------------

    def cohort(self, cohort: Sequence[ResolvedRun], title: str, out: Outcome) -> None:
        """Executes the runs of one cohort. Their results are in ``out`` after :meth:`settle`: the last are logged while the next cohort runs.

        Then tests those that are finished, also in earlier calls, on the further test sets and perturbed images that they lack.
        """
        self._execute(cohort, title, out)
        if self.watch is None and (wanted := wanted_tests(self.experiment.data, self.datasets[cohort[0].run.fold])):
            self._test_further(cohort, wanted, title, out)

    def _execute(self, cohort: Sequence[ResolvedRun], title: str, out: Outcome) -> None:
        self._inputs.select(cohort[0])
        num_earlier = self._logging.num_under_way
        with contextlib.ExitStack() as stack:
            active, self._known = self.claims.claim(cohort, stack, out, self.watch)
            if not active:
                return
            if self.watch is None:
                self._logging.start_drawing()
            try:
                self._complete(active, title, out)
                self._logging.wait_for_first(num_earlier)  # no more than one cohort waits
            except BaseException:
                with contextlib.suppress(Exception):  # the first error matters
                    self.settle()  # else runs that are evaluated would count as interrupted
                raise
            self._logging.close_runs(stack)
        release_memory()

    def _complete(self, active: Sequence[ActiveRun], title: str, out: Outcome) -> None:
        """Executes the cohort until each of its runs has ended, by the policy of ``execution.failures``. Raises SystemFault."""
        whole = self.machine
        try:
            while active := [one for one in active if not one.ended]:
                alone = self._attempt(active, title, out)
                if any(not one.ended for one in active):  # not earlier: an error's traceback keeps tensors alive
                    release_memory()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                for one in alone:
                    self._complete([one], title, out)
        finally:
            self.machine = whole

    def _attempt(self, active: Sequence[ActiveRun], title: str, out: Outcome) -> Sequence[ActiveRun]:
        """Executes the cohort once. After an error: ends the runs whose fault it is, or returns those that have to be executed alone."""
        self._owners: list[tuple[object, ActiveRun]] = [(one, one) for one in active]
        try:
            with keeping_on():
                if active[0].resolved.trained:
                    self._train(active, title, out)
                else:
                    for one in active:
                        with blaming(one):
                            self._apply(one, out)
        except SystemFault:
            raise
        except WeightsUnavailable as error:
            self.claims.skip_all(active, one_line(error), out)
            more = f"{len(active)} runs ({active[0].name}, …)" if len(active) > 1 else active[0].name
            self.say(f"skipped {more}: {one_line(error)}")
        except Exception as error:
            if is_out_of_memory(error):
                self._use_less_memory([one for one in active if not one.ended], title, error, out)
                return []
            culprit = culprit_of(error)
            faulty = [one for thing, one in self._owners if thing is culprit]
            if not faulty and len(active) > 1 and not isinstance(error, CellbenchError):
                self.say(f"{title}: {describe_failure(error).partition('. ')[0]}. Its runs are executed one by one.")
                return active
            for one in faulty or active:
                self._fail(one, out, error)
        return []

    def _use_less_memory(self, active: Sequence[ActiveRun], title: str, error: Exception, out: Outcome) -> None:
        """Halves the number of tiles per backbone call; the runs fail where that is not enough."""
        if self.machine.chunk == 1 or self.machine.halvings >= MAX_HALVINGS:
            for one in active:
                self.claims.fail(one, f"out of memory: {one_line(error)}", out)
        elif active:
            self.machine = self.machine.smaller(1)
            self.say(f"{title}: out of memory; again with {self.machine.chunk} tiles at once.")

    # --- baselines without training ---------------------------------------------------------------------------------------------------

    def _apply(self, one: ActiveRun, out: Outcome) -> None:
        result = evaluate_function(self._function(one.resolved), one.resolved, self._inputs, self._own_metrics, self.report)
        self._finish(one, result, out)

    def _function(self, resolved: ResolvedRun) -> Callable[..., FoundClasses]:
        """The function of an untrained baseline. Raises WeightsUnavailable."""
        assert isinstance(resolved.card, BaselineCard), "only baselines are not trained"
        return open_baseline(resolved.card, self.registry, self.resources.weights)

    # --- heads and trained baselines --------------------------------------------------------------------------------------------------

    def features(self, cohort: Sequence[ResolvedRun], more: Sequence[ResolvedRun] = ()) -> Features:
        """The features of a cohort, including the levels that the runs ``more`` of the same backbone need."""
        return self._inputs.features(cohort, self.machine, more)

    def _trainer(self, one: ActiveRun, features: Features) -> HeadTrainer:
        """The run's trainer, restored from its last checkpoint."""
        run = one.resolved.run
        with blaming(one):
            model = build_model(run, one.resolved.card, features.backbone, len(self.dataset.classes))
            logger = RunLogger(one.resolved, one.run, one.checkpoint, self.watch)
            trainer = HeadTrainer(run=run, model=model, recorder=logger, num_views=features.plan.num_views, registry=self.registry)
            state, foreign = logger.resumed()
            if state is not None:
                try:
                    trainer.restore(state)
                except Exception as error:
                    if not is_out_of_memory(error):  # else it would fail each time
                        checkpoints.delete_checkpoint(one.checkpoint)
                    raise
                where = ", from a checkpoint of the same run in another store" if foreign else ""
                self.say(f"{one.name} resumes after epoch {trainer.epoch}{where}.")
            return trainer

    def _train(self, active: Sequence[ActiveRun], title: str, out: Outcome) -> None:
        busy, runs = SystemLoad(), [one.resolved.run for one in active]
        features = self.features([one.resolved for one in active])
        trainers = [self._trainer(one, features) for one in active]
        self._owners += [(thing, one) for one, trainer in zip(active, trainers, strict=True) for thing in (trainer, trainer.model)]
        if reason := why_frames_too_large(runs, [trainer.model for trainer in trainers], features):
            self.claims.skip_all(active, reason, out)
            self.say(f"{title}: skipped: {reason}")
            return
        num_views = features.plan.num_views
        what = f"{runs[0].backbone or runs[0].baseline}, {quantity(len(runs), 'run')}"
        self.say(f"{title}: {what}, {num_views} tiles an epoch, {features.source}.")
        epochs = max(run.epochs - trainer.epoch for run, trainer in zip(runs, trainers, strict=True))
        tiles = {split: sum(len(features.grid(split, k)) for k in range(len(features.pixels[split]))) for split in ("val", "test")}
        steps = {"training": epochs * num_views, "validating": epochs * tiles["val"]}
        self._progress = CohortProgress(self.report, steps if self.watch is not None else {**steps, "testing": tiles["test"]})
        finished = finished_trainers(
            [one.resolved for one in active],
            self._known,
            self.tracker,
            self.registry,
            features.backbone,
            len(self.dataset.classes),
            num_views,
        )
        fit(trainers, features, self._progress, finished)
        self._progress.end("training", "validating")  # also where they ended early
        release_memory()
        load = load_metric("cost/train_other_load_pct", busy)
        failed = [trainer.ended.startswith("failed") for trainer in trainers]
        # All runs of the cohort read the same features. If these are not finite, no learning rate helps.
        cause = non_finite_reason(features) if any(failed) else ""
        trained: Trained = []
        for one, trainer, bad in zip(active, trainers, failed, strict=True):
            if bad:
                self.claims.fail(one, cause or trainer.ended.removeprefix("failed: "), out, anew=True)
            else:
                trained.append((one, trainer))
        if trained and self.watch is not None:
            self._validate(trained, features, load, out)
        elif trained:
            self._test(trained, features, title, load, out)

    def _validate(self, trained: Trained, features: Features, load: dict[str, float], out: Outcome) -> None:
        """Ends trials with the validation scores of their best epochs and with their costs."""
        costs = [training_cost(trainer, features) | load for _, trainer in trained]
        models = [trainer.model for _, trainer in trained]
        latencies = latencies_ms(models, features)
        own_scores = score_validation(models, features, self.dataset, [metric for metric in self._own_metrics if metric.searchable])
        for (one, trainer), cost, latency_ms, own in zip(trained, costs, latencies, own_scores, strict=True):
            best = {name: value for name, value in trainer.history[trainer.best_epoch].items() if name.startswith("val/")}
            # The curves hold the validation scores of each epoch; "best/" holds the values that trials are compared by.
            metrics = {f"best/{name.replace('/', '_')}": value for name, value in best.items()} | {"best/epoch": trainer.best_epoch}
            metrics |= {f"best/val_{key}": value for key, value in own.items()}
            metrics |= cost | {"cost/latency_ms": latency_ms}
            status = "pruned" if trainer.ended == "pruned" else "validated"
            reason = f"in epoch {trainer.epoch} of {trainer.run.epochs}" if status == "pruned" else ""
            with blaming(one):
                one.run.end(status, reason, metrics=metrics, tags={"cellbench.machine": self.machine.name})
            checkpoints.delete_checkpoint(one.checkpoint)
            ended = RunState(run_id=one.run.run_id, name=one.name, status=status, metrics=metrics)
            (out.pruned if status == "pruned" else out.validated)[one.name] = ended

    def _test(self, trained: Trained, features: Features, title: str, load: dict[str, float], out: Outcome) -> None:
        models, test = [trainer.model for _, trainer in trained], self._inputs.images["test"]
        separations, calibrations = tune_on_validation(models, features, self.dataset)
        training_features = describe_training_images(features)
        costs, busy = [training_cost(trainer, features) | load for _, trainer in trained], SystemLoad()
        reset_timers(features.backbone, models)
        not_finite: dict[int, str] = {}
        with CohortEvaluator(self.dataset, len(models), separations, self._own_metrics, calibrations=calibrations) as evaluator:
            self._owners += [(evaluation, one) for evaluation, (one, _) in zip(evaluator.evaluations, trained, strict=True)]
            for image, answers in segment_images(models, features, "test"):
                self._progress.update("testing", len(features.grid("test", image)))
                evaluator.add_image(image, test[image][1], answers)
                for k, answer in enumerate(answers):
                    if not answer.finite:
                        not_finite.setdefault(k, self.dataset.test[image].name)
        speeds = inference_speeds(models, features)
        test_load = load_metric("cost/test_other_load_pct", busy)
        for k, ((one, trainer), speed, cost) in enumerate(zip(trained, speeds, costs, strict=True)):
            if k in not_finite:
                where = quote_name(not_finite[k])
                self.claims.fail(one, f"its scores for the test image {where} are not finite (NaN or infinite)", out, anew=True)
                continue
            cost |= test_load | {
                "cost/images_per_s": self.machine.lanes / max(speed.wall_s, 1e-9),
                "cost/image_cpu_s": speed.cpu_s * self.machine.cores_of_one,
            }
            result = EvaluationResult(
                evaluation=evaluator.evaluations[k],
                cost=cost,
                trainer=trainer,
                preparation=features.preparation,
                training_features=training_features,
            )
            with blaming(one):
                self._finish(one, result, out, features.plan.used_images)

    # --- further test sets and perturbed images ---------------------------------------------------------------------------------------

    def _test_further(self, cohort: Sequence[ResolvedRun], wanted: Mapping[str, str], title: str, out: Outcome) -> None:
        self.settle()  # their heads are read from the store
        self.tracker.flush()
        known = self.tracker.known(*[one.fingerprint for one in cohort])
        records = [(one, known[one.fingerprint]) for one in cohort if one.fingerprint in known]
        runs = [
            FinishedRunToTest(resolved=one, record=record, lacks=lacks)
            for one, record in records
            if record.status == "finished" and (lacks := missing_tests(record, wanted))
        ]
        if not runs:
            return
        self.say(
            f"{title}: {quantity(len(runs), 'run')} tested on {len({name for one in runs for name in one.lacks})} more sets of images."
        )
        try_tests(runs, self._run_tests, out, self.say)
        release_memory()

    def _run_tests(self, runs: Sequence[FinishedRunToTest]) -> None:
        one = runs[0].resolved
        dataset, num = self.datasets[one.run.fold], len(self.dataset.classes)
        test = partial(
            run_tests,
            dataset=dataset,
            tracker=self.tracker,
            own_metrics=self._own_metrics,
            spec=self.experiment.data,
            report=self.report,
        )
        if one.trained:
            features = self.features([each.resolved for each in runs])
            test(runs, predict_with_heads(runs, features, self.tracker, num))
        else:
            for each in runs:
                test([each], predict_with_function(self._function(each.resolved), each.resolved.run.options, num))
