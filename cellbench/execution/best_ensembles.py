"""Ensembles of the best few models of an experiment: their mean prediction in a row of its own, without training.

The members are chosen by validation Dice, in each fold by its own validation images, never by the test. They may have different backbones, framings
and cell targets, so that they share no features: each segments the images with its stored head, and the probabilities of whole images are averaged. So are
flows, distances and the like where all members learned the same; they are in units of the image, whatever the framing. Else cells are separated by
watershed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellbench.config.run import NUMERICS_VERSION
from cellbench.data.cell_targets.base import CellTarget
from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.data.image_cache import ImageCache
from cellbench.errors import CellbenchError, SystemFault, one_line, quote_name
from cellbench.execution import artifacts
from cellbench.execution.artifacts import EvaluationResult
from cellbench.execution.claims import Outcome
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.runner import Runner
from cellbench.execution.shift_tests import Answers, FinishedRunToTest, load_model, run_tests
from cellbench.execution.wanted_tests import missing_tests, wanted_tests
from cellbench.features.extractor import Features
from cellbench.files import facts_digest
from cellbench.hardware import is_out_of_memory, release_memory
from cellbench.metrics import catalog
from cellbench.metrics.calibration import Calibration, histogram
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.schema import ENSEMBLE, LIMIT, MEMBERS, NO_MODEL, RunRecord, RunState
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.model import SegmentationModel
from cellbench.training.segmented_image import SegmentedImage
from cellbench.training.separation_tuning import choose_separations
from cellbench.training.tiled_inference import argmax_classes, segment_images, to_uint8

MEMBERS_FILE = "members.json"
"""The artifact with names and ids of the members."""


def evaluate_best_models(runner: Runner, runs: Sequence[ResolvedRun], out: Outcome) -> None:
    """Tests the mean of the ``ensemble_best`` best models of each fold, and adds the results to ``out``. A fold that fails is named."""
    num = runner.experiment.ensemble_best
    name = f"ensemble of the best {num} models"
    for fold in sorted({one.run.fold for one in runs}):
        title = f"{name} · fold {fold}" if runner.experiment.data.folds else name
        mine = [one for one in runs if one.run.fold == fold]
        known = runner.tracker.known(*[one.fingerprint for one in mine])
        chosen = choose_members([(one, known[one.fingerprint]) for one in mine if one.fingerprint in known], num)
        if len(chosen) < num:
            runner.say(f"{title}: not made: it needs {num} trained models, and {len(chosen)} finished.")
            continue
        ensemble = _Ensemble(runner, chosen, name, title, fold)
        try:
            out.finished[title] = ensemble.test()
            ensemble.test_further()
        except SystemFault:
            raise
        except (CellbenchError, RuntimeError, MemoryError) as error:
            if not isinstance(error, CellbenchError) and not is_out_of_memory(error):
                raise
            runner.say(f"{title}: not tested: {one_line(error)}")
        del ensemble  # and its members' networks
        release_memory()


def choose_members(runs: Sequence[tuple[ResolvedRun, RunRecord]], num: int) -> list[tuple[ResolvedRun, RunRecord]]:
    """The finished trained runs with the best validation Dice, one of each model: of its seeds the best.

    Runs that differ only in what is done after training have one validation Dice: the first of them is taken. Ensembles of seeds are left out.
    """
    best: dict[str, tuple[ResolvedRun, RunRecord]] = {}
    for one, record in runs:
        if record.status == "finished" and one.trained and one.run.ensemble == "none" and "best/val_dice" in record.metrics:
            model = one.run.training.model_copy(update={"seed": 0}).model_dump_json()
            if model not in best or record.metrics["best/val_dice"] > best[model][1].metrics["best/val_dice"]:
                best[model] = one, record
    return sorted(best.values(), key=lambda pair: -pair[1].metrics["best/val_dice"])[:num]


@dataclass(frozen=True)
class _Ensemble:
    """The ensemble of one fold."""

    runner: Runner
    members: Sequence[tuple[ResolvedRun, RunRecord]]
    name: str
    title: str
    fold: int

    @property
    def fingerprint(self) -> str:
        digests = sorted(one.fingerprint for one, _ in self.members)
        fields = ["fields"] if self._cell_target is not None else []  # not averaged by earlier versions
        return facts_digest([ENSEMBLE, NUMERICS_VERSION, digests, *fields])

    def test(self) -> RunState:
        """The finished run; of an earlier call where the members are the same."""
        tracker, dataset, key = self.runner.tracker, self.runner.datasets[self.fold], self.fingerprint
        known = tracker.known(key).get(key)
        if known is not None and known.status == "finished":
            return known
        names = ", ".join(one.name for one, _ in self.members)
        self.runner.say(f"{self.title}: {names}.")
        result = self._evaluated()
        params: dict[str, object] = {ENSEMBLE: self.name, **NO_MODEL, "fold": self.fold, "dataset": dataset.name}
        tags = {"cellbench.kind": ENSEMBLE, "model": self.name, "dataset": dataset.name, MEMBERS: names}
        if dataset.limited:
            tags[LIMIT] = str(self.runner.experiment.data.limit)
        with (
            tracker.run(self.title, key, parent=self.runner.parent_id, known=known, tags=tags) as run,
            TemporaryFolder() as temporary,
        ):
            if known is None:
                run.log({}, params={**params, "precision": self.members[0][0].precision})
                run.log_input(dataset.name, dataset.digest, str(dataset.root), "testing")
            folder = Path(temporary)
            artifacts.write_scores(folder, self.fold, self.runner.experiment.data.folds, self.runner.datasets, result)
            artifacts.write_separation(folder, result)
            facts = [
                {"name": record.name, "run_id": record.run_id, "val_dice": record.metrics["best/val_dice"]} for _, record in self.members
            ]
            (folder / MEMBERS_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            artifacts.draw_pictures(folder, self.title, dataset, ImageCache(dataset, "test", 2**28), result)
            run.log_artifacts(folder)
            metrics = artifacts.final_metrics(dataset, result)
            run.end(
                "finished",
                metrics=metrics,
                tags=artifacts.run_tags(self.title, metrics, self.runner.machine.name, run.address("figures/worst.png")),
            )
        return RunState(run_id=run.run_id, name=self.title, status="finished", metrics=metrics)

    def test_further(self) -> None:
        """Tests the finished run on the further test sets and perturbed images that it lacks."""
        runner, dataset, key = self.runner, self.runner.datasets[self.fold], self.fingerprint
        runner.tracker.flush()
        record = runner.tracker.known(key)[key]
        if lacks := missing_tests(record, wanted_tests(runner.experiment.data, dataset)):
            run_tests(
                [FinishedRunToTest(resolved=self.members[0][0], record=record, lacks=lacks)],
                self._predict,
                dataset=dataset,
                tracker=runner.tracker,
                own_metrics=catalog.own_metrics(runner.registry),
                spec=runner.experiment.data,
                report=runner.report,
            )

    @property
    def _cell_target(self) -> CellTarget | None:
        """What all members learned beside the classes, so that it has a mean; None where they learned nothing or different things."""
        first, *others = {one.run.targets for one, _ in self.members}
        return None if others else TARGETS[first]

    def _evaluated(self) -> EvaluationResult:
        dataset = self.runner.datasets[self.fold]
        pixels = {split: ImageCache(dataset, split, 2**28) for split in ("val", "test")}
        histograms: list[np.ndarray] = []

        def answers() -> Answers:
            for image, one in self._blended("val"):
                assert one.cell is not None
                histograms.append(histogram(pixels["val"][image][1], one.cell))
                yield image, [one]

        method = self._cell_target.method if self._cell_target is not None else "watershed"
        separations = choose_separations(dataset, [method], answers())
        own = catalog.own_metrics(self.runner.registry)
        with CohortEvaluator(dataset, 1, separations, own, calibrations=[Calibration.of(histograms)]) as evaluator:
            for image, one in self._blended("test"):
                self.runner.report(image / len(dataset.test), "testing")
                evaluator.add_image(image, pixels["test"][image][1], [one])
        return EvaluationResult(evaluation=evaluator.evaluations[0], cost=_costs([record for _, record in self.members]))

    def _predict(self, images: ImageCache, coarse: bool) -> Answers:
        return ((image, [one]) for image, one in self._blended("val" if coarse else "test", images))

    def _blended(self, split: str, images: ImageCache | None = None) -> Iterator[tuple[int, SegmentedImage]]:
        """The mean prediction for each image of a split, or for other ``images`` in its place."""
        streams = [
            segment_images([model], features if images is None else features.on(split, images), split, by_class=True)
            for features, model in self._opened
        ]
        for each in zip(*streams, strict=True):
            (image, _), found = each[0], [one for _, (one,) in each]
            if not all(one.finite for one in found):
                raise CellbenchError(
                    f"the scores for the image {quote_name(self._opened[0][0].pixels[split].samples[image].name)} are not finite (NaN or infinite)."
                )
            mean_KHW = np.mean([one.foreground for one in found], axis=0, dtype=np.float32) / np.float32(255)
            mean = torch.from_numpy(mean_KHW)
            classes, cell = argmax_classes(mean).numpy(), to_uint8(mean.sum(0)).numpy()
            yield image, SegmentedImage(classes=classes, cell=cell, fields=self._mean_fields(found))

    def _mean_fields(self, found: Sequence[SegmentedImage]) -> np.ndarray | None:
        if self._cell_target is None:
            return None
        fields = [one.fields for one in found if one.fields is not None]
        mean: np.ndarray = np.rint(np.mean(fields, axis=0, dtype=np.float32)).astype(np.uint8)
        return mean

    @cached_property
    def _opened(self) -> list[tuple[Features, SegmentationModel]]:
        """Features and model of each member, opened at the first image: the networks of all of them stay in memory, for all sets of images."""
        out = []
        for one, record in self.members:
            features = self.runner.features([one])
            member = FinishedRunToTest(resolved=one, record=record, lacks={})
            out.append((features, load_model(member, features, self.runner.tracker, len(self.runner.dataset.classes))))
        return out


def _costs(members: Sequence[RunRecord]) -> dict[str, float]:
    """What the members cost together, as far as all of them recorded it."""

    def each(name: str) -> list[float]:
        values = [record.metrics.get(f"cost/{name}") for record in members]
        return [value for value in values if value is not None] if None not in values else []

    sums: dict[str, Any] = {
        f"cost/{name}": sum(values)
        for name in ("train_s", "train_cpu_s", "image_cpu_s", "head_params", "backbone_params")
        if (values := each(name))
    }
    speeds = each("images_per_s")
    return sums | ({"cost/images_per_s": 1 / sum(1 / speed for speed in speeds)} if speeds and min(speeds) > 0 else {})
