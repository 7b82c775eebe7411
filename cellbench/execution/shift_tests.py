"""Tests finished runs on further test sets and on perturbed images, with their stored heads: one pass of the backbone for all runs of a cohort.

It is a step of its own after the runs are finished, so that a run of an earlier call, which lacks a test that is asked for now, is only tested and
not trained again. The scores are in the artifact ``tests.json`` and in metrics ``shift.NAME/…``; a tag lists the tests that a run has.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_weights

from cellbench.config.experiment import DataSpec
from cellbench.data.dataset import Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms import perturbations
from cellbench.data.transforms.perturbations import PerturbedDataset
from cellbench.errors import CellbenchError, SystemFault, WeightsUnavailable
from cellbench.execution.artifacts import SEPARATION, EvaluationResult, per_image_record, round_metric, rounded
from cellbench.execution.claims import Outcome
from cellbench.execution.failures import TRACEBACK, describe_failure
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.wanted_tests import tested
from cellbench.features.extractor import Features
from cellbench.metrics import catalog
from cellbench.metrics.calibration import Calibration, expected_calibration_error
from cellbench.metrics.catalog import Metric
from cellbench.metrics.pixel import confusion_matrix, nan_mean, per_image_scores, pixel_scores, pooled_classes
from cellbench.metrics.separation import CONNECTED, SeparationParams
from cellbench.models.baselines.build import FoundClasses
from cellbench.tracking.offline_queue import CallRejectedError
from cellbench.tracking.schema import CALIBRATION, SHIFT_TESTS, TESTED, RunRecord
from cellbench.tracking.tracker import Tracker
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.model import SegmentationModel, build_model
from cellbench.training.segmented_image import SegmentedImage
from cellbench.training.tiled_inference import segment_images

T = TypeVar("T")

Answers = Iterator[tuple[int, Sequence[SegmentedImage]]]
"""The number of each image, and the predictions of all runs for it."""
Predict = Callable[[ImageCache, bool], Answers]
"""Segments images with all runs; ``True``: with the tiles of validation, which overlap less."""
CACHE_BYTES = 2**28
"""For decoded images: each is needed twice within a short time."""


@dataclass(frozen=True, kw_only=True)
class FinishedRunToTest:
    """A finished run that lacks tests."""

    resolved: ResolvedRun
    record: RunRecord
    lacks: Mapping[str, str]

    def separation(self, tracker: Tracker) -> SeparationParams:
        """How it separates touching cells. Raises CellbenchError."""
        return self._stored(tracker, SEPARATION, SeparationParams, CONNECTED)

    def calibration(self, tracker: Tracker) -> Calibration:
        """What was fitted on its validation images; nothing for a run of an older version. Raises CellbenchError."""
        return self._stored(tracker, CALIBRATION, Calibration, Calibration())

    def _stored(self, tracker: Tracker, file: str, record: Callable[..., T], without: T) -> T:
        data = tracker.artifact(self.record, file)
        try:
            return record(**json.loads(data)) if data is not None else without
        except (ValueError, TypeError):
            raise CellbenchError(f"'{self.record.name}': its {file} is damaged. Delete it, and run it again.") from None

    def weights(self, tracker: Tracker) -> dict[str, Any]:
        """Its trained weights. Raises CellbenchError."""
        data = tracker.artifact(self.record, "head.safetensors")
        try:
            return load_weights(data or b"")
        except SafetensorError:
            why = "is missing" if data is None else "is damaged"
            raise CellbenchError(
                f"'{self.record.name}': its head.safetensors {why}, so it cannot be tested further. Delete it, and run it again."
            ) from None


def load_model(one: FinishedRunToTest, features: Features, tracker: Tracker, num_classes: int) -> SegmentationModel:
    """The trained model of a finished run. Raises CellbenchError."""
    model = build_model(one.resolved.run, one.resolved.card, features.backbone, num_classes)
    model.load_state_dict(one.weights(tracker))
    model.adapt_as(one.calibration(tracker))
    return model


def predict_with_heads(runs: Sequence[FinishedRunToTest], features: Features, tracker: Tracker, num_classes: int) -> Predict:
    """With the stored heads of the runs, on the features of their cohort."""
    models = [load_model(one, features, tracker, num_classes) for one in runs]

    def predict(images: ImageCache, coarse: bool) -> Answers:
        split = "val" if coarse else "test"
        yield from segment_images(models, features.on(split, images), split)

    return predict


def predict_with_function(method: Callable[..., FoundClasses], options: Mapping[str, Any], num_classes: int) -> Predict:
    """With a baseline that is not trained."""

    def predict(images: ImageCache, coarse: bool) -> Answers:
        found = (method(images[k][0], num_classes, **options) for k in range(len(images)))
        return ((k, [SegmentedImage(classes=one.classes, fields=one.fields)]) for k, one in enumerate(found))

    return predict


def run_tests(
    runs: Sequence[FinishedRunToTest],
    predict: Predict,
    dataset: Dataset,
    tracker: Tracker,
    own_metrics: Sequence[Metric],
    spec: DataSpec,
    report: Callable[[float, str], object],
) -> None:
    """Tests the runs, all of one cohort, on what any of them lacks, and logs the scores to each. Raises CellbenchError."""
    lacking = {name for one in runs for name in one.lacks}
    separations, calibrations = [one.separation(tracker) for one in runs], [one.calibration(tracker) for one in runs]
    found: list[dict[str, Any]] = [{"sets": {}, "perturbed": {}} for _ in runs]
    metrics: list[dict[str, float]] = [{} for _ in runs]

    def watched(answers: Iterator[T], num: int, number: int, name: str) -> Iterator[T]:
        for done, answer in enumerate(answers):
            report((number + done / num) / len(lacking), f"testing on {name}")
            yield answer

    sets = [one for one in dataset.further if one.name in lacking]
    for number, here in enumerate(sets):
        images = ImageCache(here, "test", CACHE_BYTES)
        answers = watched(predict(images, False), len(images), number, here.name)
        for k, record in enumerate(_score_set(here, images, answers, separations, calibrations, own_metrics)):
            found[k]["sets"][here.name] = record
            metrics[k] |= _set_metrics(here.name, record)
    perturbed = [each for each in perturbations.perturbations(spec.perturbations) if each.name in lacking]
    for number, each in enumerate(perturbed, len(sets)):
        images = ImageCache(PerturbedDataset.of(dataset, each, runs[0].resolved.run.data_seed), "test", CACHE_BYTES)
        answers = watched(predict(images, True), len(images), number, each.name)
        for k, dice in enumerate(_dice(dataset, images, answers, len(runs))):
            found[k]["perturbed"][each.name] = rounded(dice)
            metrics[k] |= _finite(f"shift.{each.name}/dice", nan_mean(dice))
    for one, new, values in zip(runs, found, metrics, strict=True):
        _log(tracker, one, new, values)


def try_tests(
    runs: Sequence[FinishedRunToTest], test: Callable[[Sequence[FinishedRunToTest]], None], out: Outcome, say: Callable[[str], None]
) -> None:
    """Tests the runs together, after an error each alone. Those that cannot be tested stay finished, and ``out.untested`` says why."""
    try:
        test(runs)
        return
    except (SystemFault, CallRejectedError):
        raise
    except Exception as error:
        reason, all_meet_it = describe_failure(error).partition(f" {TRACEBACK}")[0], isinstance(error, WeightsUnavailable)
    if len(runs) > 1 and not all_meet_it:
        for one in runs:
            try_tests([one], test, out, say)
        return
    for one in runs:
        out.untested[one.record.name] = reason
        say(f"{one.record.name}: not tested on more images: {reason} The same command tries again.")


def _score_set(
    here: Dataset,
    images: ImageCache,
    answers: Answers,
    separations: Sequence[SeparationParams],
    calibrations: Sequence[Calibration],
    own_metrics: Sequence[Metric],
) -> list[dict[str, Any]]:
    """The record of each run, as ``per_image.json`` has it for the main test set."""
    with CohortEvaluator(here, len(separations), separations, own_metrics, calibrations=calibrations) as evaluator:
        for image, predictions in answers:
            evaluator.add_image(image, images[image][1], predictions)
    return [per_image_record(here, EvaluationResult(evaluation=one, cost={})) for one in evaluator.evaluations]


def _dice(dataset: Dataset, images: ImageCache, answers: Answers, num_runs: int) -> list[np.ndarray]:
    """Each run's Dice of each image (N,)."""
    num = len(dataset.classes)
    counts = np.zeros((num_runs, len(images), num, num), np.int64)
    for image, predictions in answers:
        truth = images[image][1]
        for k, one in enumerate(predictions):
            counts[k, image] = confusion_matrix(truth, one.classes, num)
    return [per_image_scores(mine, unused=dataset.unused)["dice"] for mine in counts]


def _set_metrics(name: str, record: Mapping[str, Any]) -> dict[str, float]:
    """``shift.NAME/dice`` and the other means over the images of a test set; ``dice_pooled`` and ``iou_pooled`` over all of its pixels.

    ``calibration_error`` is that of its probabilities as the run corrects them, ``calibration_error_raw`` without the correction.
    """
    out: dict[str, float] = {}
    for metric in catalog.per_image(catalog.from_record(record["own_metrics"])):
        if metric.key in record:
            out |= _finite(f"shift.{name}/{metric.key}", nan_mean(np.array(record[metric.key], np.float64)))
    counts = np.sum(record["confusion"], axis=0)
    pooled = pixel_scores(counts).of(pooled_classes(counts))
    for key in ("dice", "iou"):
        out |= _finite(f"shift.{name}/{key}_pooled", pooled[key])
    for key, name_of in (("calibration_corrected", "calibration_error"), ("calibration", "calibration_error_raw")):
        if record[key] is not None:
            out |= _finite(f"shift.{name}/{name_of}", expected_calibration_error(record[key]))
    return out


def _finite(name: str, value: float) -> dict[str, float]:
    return {name: round_metric(name, value)} if np.isfinite(value) else {}


def _log(tracker: Tracker, one: FinishedRunToTest, new: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Adds scores to those that the run has already; the tag comes last, so that an interrupted call tests again."""
    run = tracker.reopen(one.record)
    known: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):  # damaged: its tests are made again
        known = json.loads(tracker.artifact(one.record, SHIFT_TESTS) or b"{}")
    merged = {kind: {**known.get(kind, {}), **scores} for kind, scores in new.items()}
    run.log_text(SHIFT_TESTS, json.dumps(merged, allow_nan=False))
    run.log(metrics, tags={TESTED: json.dumps({**tested(one.record), **one.lacks})})
