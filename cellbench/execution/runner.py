"""Runs cohorts: each through one frozen pass, every run trained, tested and kept in MLflow, its mark as finished written last.

What was interrupted goes on from its checkpoint; what another process is at is left to it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from cellbench.config.experiment import Experiment
from cellbench.config.registry import Registry, load
from cellbench.config.run import NUMERICS_VERSION, RunSpec
from cellbench.data.audit import seen_images
from cellbench.data.dataset import Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.cell_targets import requested
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.errors import WeightsUnavailable, one_line, quote_name
from cellbench.execution import artifacts
from cellbench.execution.artifacts import TestResult
from cellbench.execution.planning import PlannedRun, backbone_identity
from cellbench.execution.run_logger import RunLogger, TrialCallback
from cellbench.features.extractor import CachePolicy, Features, non_finite_reason
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.remote_cache import RemoteCache, shared_url
from cellbench.hardware import Hardware, is_out_of_memory, peak_memory_mib, release_memory
from cellbench.metrics.pixel import confusion_matrix
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import open_backbone, weights_digest
from cellbench.system_load import SystemLoad
from cellbench.tracking.schema import LIMIT, WEIGHTS, RunState, run_params
from cellbench.tracking.system_metrics import log_system_metrics
from cellbench.tracking.tracker import Run, Tracker
from cellbench.training import checkpoints, cost_estimate
from cellbench.training.cost_estimate import InferenceSpeed, inference_speeds, latencies_ms, reset_timers
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.fit import fit
from cellbench.training.memory_check import why_frames_too_large
from cellbench.training.model import build_model, num_levels
from cellbench.training.separation_tuning import choose_separations, tune_separation
from cellbench.training.tiled_inference import score_images
from cellbench.training.trainer import HeadTrainer

MOST_HALVINGS = 3
"""Of the chunks that go through the backbone at once, when memory runs out."""


@dataclass(kw_only=True)
class Outcome:
    """What became of an experiment's runs."""

    finished: dict[str, RunState] = field(default_factory=dict)
    """By run name."""
    validated: dict[str, RunState] = field(default_factory=dict)
    """Runs that were to be validated only, and were."""
    pruned: dict[str, RunState] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)
    """Being run by another process at this moment."""
    num_new: int = 0


@dataclass(kw_only=True)
class Runner:
    """Everything that the cohorts of one call share."""

    experiment: Experiment
    registry: Registry
    datasets: Sequence[Dataset]
    """One, or one a fold."""
    machine: Hardware
    weights: Path | None
    tracker: Tracker
    parent_id: str
    disk_bytes: int = 0
    """What may be spent on features in the cache folder."""
    prefer_disk: bool = False
    say: Callable[[str], None] = print
    watch: TrialCallback | None = None
    """Given for runs that are to be validated and not tested."""

    def __post_init__(self) -> None:
        self._backbones: dict[str, Backbone] = {}
        self._shared = RemoteCache(url, self.say) if (url := shared_url()) else None
        self._turn_to(self.datasets[0])

    def _turn_to(self, dataset: Dataset) -> None:
        """The data of the next cohort."""
        self.dataset = dataset
        # A third for decoded images; features get the rest. Both are upper bounds, not reservations.
        third = self.machine.memory_bytes // 3
        share = {"train": 0.6, "val": 0.2, "test": 0.2}
        self._pixels = {split: ImageCache(dataset, split, int(third * part)) for split, part in share.items()}

    def skip(self, job: PlannedRun, old: RunState | None) -> None:
        """Marks a run that cannot be had, once for each reason."""
        if old is not None and old.status == "skipped" and old.reason == job.unavailable[:4000]:
            return
        with self._run(job, old) as run:
            run.end("skipped", job.unavailable)

    def give_up(self, jobs: list[PlannedRun], reason: str, out: Outcome) -> None:
        """Marks what is not finished of a cohort as failed, when the processes that were at it are lost."""
        with self.tracker.lock():
            known = self.tracker.known()
            for job in jobs:
                old = known.get(job.fingerprint)
                if old is not None and old.status == "finished":
                    out.finished[job.name] = old
                    continue
                with self._run(job, old) as run:
                    self._fail([run], [job], reason, out)

    def release(self, jobs: list[PlannedRun], owner: str) -> None:
        """Sets the runs free that a lost process elsewhere, ``owner``, was at: the next one takes them up at once."""
        with self.tracker.lock():
            known = self.tracker.known()
            for job in jobs:
                old = known.get(job.fingerprint)
                if old is not None and old.status == "running" and old.owner == owner:
                    self.tracker.interrupted(old)

    @contextlib.contextmanager
    def _run(self, job: PlannedRun, old: RunState | None) -> Iterator[Run]:
        """A job's run, open inside ``with``: a new one with its params, or the one that MLflow knows gone on with."""
        with self.tracker.run(job.name, job.fingerprint, parent=self.parent_id, known=old, tags=self._tags(job.run)) as run:
            if old is None:
                run.log({}, params=run_params(job.run, self.dataset.name, job.precision))
            yield run

    def _tags(self, run: RunSpec) -> dict[str, str]:
        params = run_params(run, self.dataset.name, self.machine.precision_name)
        tags = {name: str(params[name]) for name in ("backbone", "head", "baseline", "seed", "dataset")} | {"model": run.model}
        if self.dataset.limited:
            tags[LIMIT] = str(self.experiment.data.limit)
        with contextlib.suppress(WeightsUnavailable):
            if run.backbone is not None:
                tags[WEIGHTS] = weights_digest(self.registry.backbone(run.backbone), self.weights, download=False)
        return tags

    # --- one cohort ---------------------------------------------------------------------------------------------------------------

    def cohort(self, jobs: list[PlannedRun], title: str, out: Outcome) -> None:
        """Runs the jobs of one cohort to their ends, and says in ``out`` what became of each."""
        if self.datasets[jobs[0].run.fold] is not self.dataset:
            self._turn_to(self.datasets[jobs[0].run.fold])
        with contextlib.ExitStack() as stack:
            opened = self._open(jobs, stack, out)
            if not opened:
                return
            jobs = [job for job, _ in opened]
            if self.watch is None:
                artifacts.import_plotting()
            stack.enter_context(log_system_metrics(self.tracker, [run.run_id for _, run in opened]))
            try:
                self._within_memory(opened, title, out)
            except WeightsUnavailable as error:
                self._skip(opened, one_line(error), out)
                more = f"{len(jobs)} runs ({jobs[0].name}, …)" if len(jobs) > 1 else jobs[0].name
                self.say(f"skipped {more}: {one_line(error)}")
        release_memory()
        out.num_new += len(opened)

    def _within_memory(self, opened: list[tuple[PlannedRun, Run]], title: str, out: Outcome) -> None:
        """Runs the cohort, from its checkpoints again with smaller chunks where memory runs out, and fails it where that is not enough."""
        whole = self.machine
        try:
            while True:
                try:
                    self._untrained(opened, out) if self._is_untrained(opened[0][0].run) else self._trained(opened, title, out)
                    return
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    opened = [(job, run) for job, run in opened if not run.ended]
                    if not opened or self.machine.chunk == 1 or self.machine.halvings >= MOST_HALVINGS:
                        self._fail([run for _, run in opened], [job for job, _ in opened], f"out of memory: {one_line(error)}", out)
                        return
                # Out here, where the error no longer holds the tensors of its frames.
                self.machine = self.machine.smaller(1)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self.say(f"{title}: out of memory; again with {self.machine.chunk} tiles at once.")
        finally:
            self.machine = whole

    def _open(self, jobs: list[PlannedRun], stack: contextlib.ExitStack, out: Outcome) -> list[tuple[PlannedRun, Run]]:
        """Claims and opens the cohort's runs, except those that another process is at."""
        opened = []
        with self.tracker.lock():
            known = self.tracker.known()
            for job in jobs:
                old = known.get(job.fingerprint)
                if old is not None and old.status == "finished":
                    out.finished[job.name] = old
                elif old is not None and self.watch is not None and old.status in ("validated", "pruned"):
                    (out.validated if old.status == "validated" else out.pruned)[job.name] = old
                elif old is not None and old.alive:
                    out.busy.append(job.name)
                    self.say(f"{job.name} is being run by {old.owner} at this moment and is left to it.")
                else:
                    run = stack.enter_context(self._run(job, old))
                    if old is None:
                        run.data(self.dataset.name, self.dataset.digest, str(self.dataset.root), "training")
                    if self.watch is not None:
                        self.watch.opened(job, run)
                    opened.append((job, run))
        return opened

    def _is_untrained(self, run: RunSpec) -> bool:
        return run.baseline is not None and not self.registry.baseline(run.baseline).trained

    def _fail(self, runs: list[Run], jobs: list[PlannedRun], reason: str, out: Outcome) -> None:
        for job, run in zip(jobs, runs, strict=True):
            if not run.ended:
                run.end("failed", reason)
                checkpoints.delete_checkpoint(checkpoints.checkpoint_path(job.fingerprint, run.key))
                out.failed[job.name] = reason
                self.say(f"failed {job.name}: {reason}")

    def _skip(self, opened: list[tuple[PlannedRun, Run]], reason: str, out: Outcome) -> None:
        for job, run in opened:
            if not run.ended:
                run.end("skipped", reason)
                out.skipped[job.name] = reason

    def _untrained(self, opened: list[tuple[PlannedRun, Run]], out: Outcome) -> None:
        for job, run in opened:
            card = self.registry.baseline(job.run.baseline or "")
            segment = load(card)
            num, images, busy, wall_s, cpu_s = len(self.dataset.classes), self._pixels["test"], SystemLoad(), 0.0, 0.0
            answers = ((k, [(segment(self._pixels["val"][k][0], num, **job.run.options), None)]) for k in range(len(self.dataset.val)))
            with CohortEvaluator(self.dataset, 1, choose_separations(self.dataset, 1, answers)) as exams:
                for index in tqdm(range(len(self.dataset.test)), desc=job.name, unit="image", leave=False):
                    image, truth = images[index]
                    start, start_cpu = time.perf_counter(), time.thread_time()
                    classes = segment(image, num, **job.run.options)
                    wall_s, cpu_s = wall_s + time.perf_counter() - start, cpu_s + time.thread_time() - start_cpu
                    exams.take(index, truth, [confusion_matrix(truth, classes, num)], [(classes, None, None)])
            cost = {"cost/train_s": 0.0, "cost/head_params": 0, "cost/backbone_params": 0}
            speed = InferenceSpeed(wall_s=wall_s / len(images), cpu_s=cpu_s / len(images))
            if wall_s < cost_estimate.MEASURED_S:
                speed = cost_estimate.function_speed(
                    lambda image, call=segment, num=num, own=job.run.options: call(image, num, **own), images
                )
            cost |= {"cost/images_per_s": 1 / max(speed.wall_s, 1e-9), "cost/image_cpu_s": speed.cpu_s, "cost/peak_mib": peak_memory_mib()}
            cost |= _load_metric("cost/test_other_load_pct", busy)
            # Framing is not used by a method that sees whole images; its files are read all the same.
            preparation = Preparation(framing=Framing.of(job.run), reading=self.dataset.reading, um_per_px=self.dataset.um_per_px)
            self._keep(job, run, TestResult(exam=exams.exams[0], cost=cost, preparation=preparation), out)

    def _trained(self, opened: list[tuple[PlannedRun, Run]], title: str, out: Outcome) -> None:
        jobs, first, load = [job for job, _ in opened], opened[0][0].run, SystemLoad()
        num = len(self.dataset.classes)
        features = self.features([job.run for job in jobs])
        trunk, plan = features.trunk, features.plan
        learners = []
        for job, run in opened:
            made = build_model(job.run, self.registry, trunk, num)
            recorder = RunLogger(job, run, checkpoints.checkpoint_path(job.fingerprint, run.key), self.watch)
            learner = HeadTrainer(run=job.run, model=made, recorder=recorder, num_views=plan.num_views)
            state, foreign = recorder.resumed()
            if state is not None:
                learner.restore(state)
                self.say(
                    f"{job.name} goes on after epoch {learner.epoch}{', from a checkpoint of the same run in another store' if foreign else ''}."
                )
            learners.append(learner)
        if reason := why_frames_too_large([job.run for job in jobs], [learner.model for learner in learners], features):
            self._skip(opened, reason, out)
            self.say(f"{title}: skipped: {reason}")
            return
        what = f"{first.backbone or first.baseline}, {len(jobs)} run{'s' if len(jobs) > 1 else ''}"
        self.say(f"{title}: {what}, {plan.num_views} tiles an epoch, {features.source}.")
        epochs = max(learner.run.epochs - learner.epoch for learner in learners)
        with tqdm(total=epochs * plan.num_views, desc=f"{title}: {what}", unit="tile", leave=False, smoothing=0.05) as bar:
            fit(learners, features, bar)
        release_memory()
        self._ended(opened, learners, features, title, _load_metric("cost/train_other_load_pct", load), out)

    def features(self, runs: Sequence[RunSpec], more: Sequence[RunSpec] = ()) -> Features:
        """The features of a cohort, with the levels that ``more`` runs of its backbone read too."""
        first = runs[0]
        if self.datasets[first.fold] is not self.dataset:
            self._turn_to(self.datasets[first.fold])
        levels = [n for run in (*runs, *more) if (n := num_levels(run, self.registry))]
        trunk = FrozenBackbone(self._backbone(first.backbone), self.machine, levels, first.unfreeze)
        plan = SamplingPlan(self._pixels["train"].sizes_px, first)
        return Features(trunk, plan, self._pixels, self._keeping(first.backbone), any(requested(run.targets) for run in runs))

    def _ended(
        self,
        opened: list[tuple[PlannedRun, Run]],
        learners: list[HeadTrainer],
        features: Features,
        title: str,
        load: dict[str, float],
        out: Outcome,
    ) -> None:
        """``load``: of the machine while they learned, as a metric."""
        lost = [k for k, learner in enumerate(learners) if learner.ended.startswith("failed")]
        cause = non_finite_reason(features) if lost else ""  # every run of the cohort reads these, and no learning rate mends them
        for k in lost:
            self._fail([opened[k][1]], [opened[k][0]], cause or learners[k].ended.removeprefix("failed: "), out)
        live = [k for k in range(len(learners)) if k not in lost]
        if not live:
            return
        if self.watch is not None:
            self._validated([opened[k] for k in live], [learners[k] for k in live], features, load, out)
        else:
            self._tested([opened[k] for k in live], [learners[k] for k in live], features, title, load, out)

    def _validated(
        self, opened: list[tuple[PlannedRun, Run]], learners: list[HeadTrainer], features: Features, load: dict[str, float], out: Outcome
    ) -> None:
        """Ends runs with what validation says of their best epochs, and what they cost."""
        costs = self._costs(learners, features, load)
        latencies = latencies_ms([learner.model for learner in learners], features)
        for (job, run), learner, cost, latency_ms in zip(opened, learners, costs, latencies, strict=True):
            best = {name: value for name, value in learner.history[learner.best_epoch].items() if name.startswith("val/")}
            cost |= {"cost/latency_ms": latency_ms}
            # Its curves hold the validation by epoch; under "best/" stands what is compared.
            kept = {f"best/{name.replace('/', '_')}": value for name, value in best.items()} | {"best/epoch": learner.best_epoch}
            status = "pruned" if learner.ended == "pruned" else "validated"
            reason = f"in epoch {learner.epoch} of {learner.run.epochs}" if status == "pruned" else ""
            run.end(status, reason, metrics=kept | cost, tags={"cellbench.machine": self.machine.name})
            ended = RunState(run_id=run.run_id, name=job.name, status=status, metrics=kept | cost)
            (out.pruned if status == "pruned" else out.validated)[job.name] = ended
            checkpoints.delete_checkpoint(checkpoints.checkpoint_path(job.fingerprint, run.key))

    def _costs(self, learners: list[HeadTrainer], features: Features, load: dict[str, float]) -> list[dict[str, float]]:
        """What it took to train each run; ``load``: of the machine meanwhile, as a metric."""
        backbone, cores = features.trunk.backbone, self.machine.cores_of_one
        shared = {
            "cost/backbone_params": sum(p.numel() for p in backbone.parameters()) if backbone is not None else 0,
            "cost/peak_mib": peak_memory_mib(),
            "cost/features_mib": features.kept_bytes / 2**20,
            **load,
        }
        return [
            {
                **shared,
                "cost/train_s": learner.train_s + learner.trunk_s,
                "cost/train_cpu_s": (learner.train_cpu_s + learner.trunk_cpu_s) * cores,
                "cost/head_s": learner.train_s,
                "cost/head_cpu_s": learner.train_cpu_s * cores,
                "cost/trunk_s": learner.trunk_s,
                "cost/trunk_cpu_s": learner.trunk_cpu_s * cores,
                "cost/head_params": learner.model.num_params,
            }
            for learner in learners
        ]

    def _tested(
        self,
        opened: list[tuple[PlannedRun, Run]],
        learners: list[HeadTrainer],
        features: Features,
        title: str,
        load: dict[str, float],
        out: Outcome,
    ) -> None:
        models = [learner.model for learner in learners]
        parted = tune_separation(models, features, self.dataset)
        costs, tested = self._costs(learners, features, load), SystemLoad()
        reset_timers(features.trunk, models)
        bad: dict[int, str] = {}
        bar = tqdm(score_images(models, features, "test"), total=len(self.dataset.test), desc=f"{title}: test", unit="image", leave=False)
        with CohortEvaluator(self.dataset, len(learners), parted) as exams:
            for image, found, answers in bar:
                exams.take(image, self._pixels["test"][image][1], found, [(a.classes, a.cell, a.relief) for a in answers])
                for k, answer in enumerate(answers):
                    if not answer.finite:
                        bad.setdefault(
                            k, f"its scores for the test image {quote_name(self.dataset.test[image].name)} are not finite (NaN or infinite)"
                        )
        each = inference_speeds(models, features)
        now = _load_metric("cost/test_other_load_pct", tested)
        for place, ((job, run), learner, speed) in enumerate(zip(opened, learners, each, strict=True)):
            if place in bad:
                self._fail([run], [job], bad[place], out)
                continue
            cost = costs[place] | now
            cost |= {
                "cost/images_per_s": self.machine.lanes / max(speed.wall_s, 1e-9),
                "cost/image_cpu_s": speed.cpu_s * self.machine.cores_of_one,
            }
            result = TestResult(exam=exams.exams[place], cost=cost, learner=learner, preparation=features.preparation)
            self._keep(job, run, result, out)
            checkpoints.delete_checkpoint(checkpoints.checkpoint_path(job.fingerprint, run.key))

    def _keeping(self, backbone: str | None) -> CachePolicy:
        key = ""
        if backbone is not None:
            # Another torch or timm may round differently, and kept features must equal fresh ones to the last bit.
            versions = [
                torch.__version__,
                importlib.metadata.version("timm"),
                NUMERICS_VERSION,
                self.machine.device.type,
                self.machine.threads,
                self.machine.chunk,
            ]
            key = json.dumps([backbone_identity(self.registry.backbone(backbone), self.weights), *versions])
        return CachePolicy(
            memory_bytes=self.machine.memory_bytes * 2 // 3,
            disk_bytes=self.disk_bytes,
            prefer_disk=self.prefer_disk,
            key=key,
            backbone=backbone or "",
            dataset=self.dataset.name,
            shared=self._shared,
            tell=self.say,
        )

    def _backbone(self, name: str | None) -> Backbone | None:
        if name is None:
            return None
        if name not in self._backbones:
            self._backbones.clear()  # one in memory at a time: a giant one is 4.5 GB
            self._backbones[name] = open_backbone(self.registry.backbone(name), self.weights)
        return self._backbones[name]

    def _trained_on(self, run: RunSpec, result: TestResult) -> Sequence[int]:
        return SamplingPlan(self._pixels["train"].sizes_px, run).seen if result.learner is not None else ()

    def _keep(self, job: PlannedRun, run: Run, result: TestResult, out: Outcome) -> None:
        """Logs a run's test and ends it as finished: the mark is written last."""
        with tempfile.TemporaryDirectory(prefix="cellbench-") as folder:
            seen = seen_images.record_seen_images(self.dataset, self._trained_on(job.run, result))
            artifacts.write_artifacts(Path(folder), job.name, job.run, self.experiment, self.datasets, self._pixels["test"], result, seen)
            run.artifacts(Path(folder))
        metrics = artifacts.final_metrics(self.dataset, result)
        # At step 0: a single value there is a bar in the UI's charts, at any other step a lone dot. ``best/epoch`` says which epoch it was.
        tags = artifacts.run_tags(job.name, metrics, self.machine.name, run.address("figures/worst.png"))
        run.end("finished", metrics=metrics, tags=tags | {"cellbench.separation": result.exam.separation.words})
        out.finished[job.name] = RunState(run_id=run.run_id, name=job.name, status="finished", metrics=metrics)


def _load_metric(name: str, load: SystemLoad) -> dict[str, float]:
    """The load by other processes as a metric; none where it is not known."""
    return {} if (pct := load.others_pct()) is None else {name: pct}
