"""Evaluates a baseline that is not trained: a function of one image, applied to validation and test images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cellbench.config.cards import BaselineCard
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.execution.artifacts import EvaluationResult
from cellbench.execution.cohort_inputs import CohortInputs
from cellbench.execution.planning import ResolvedRun
from cellbench.execution.progress import Report
from cellbench.hardware import peak_memory_mib
from cellbench.metrics.catalog import Metric
from cellbench.metrics.instances import MIN_AREA_PX
from cellbench.metrics.separation import NUMBERS, SeparationParams
from cellbench.models.baselines.build import FoundClasses
from cellbench.system_load import SystemLoad
from cellbench.training import measured_cost
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.segmented_image import SegmentedImage
from cellbench.training.separation_tuning import choose_separations


def evaluate_function(
    function: Callable[..., FoundClasses], resolved: ResolvedRun, inputs: CohortInputs, own_metrics: Sequence[Metric], report: Report
) -> EvaluationResult:
    """Its scores and cost on the test images, with the separation of cells that suits the validation images best."""
    dataset, options, num = inputs.dataset, resolved.run.options, len(inputs.dataset.classes)

    def segment(image: Any) -> FoundClasses:
        return function(image, num, **options)

    val, test, busy, wall_s, cpu_s = inputs.images["val"], inputs.images["test"], SystemLoad(), 0.0, 0.0
    predictions = ((k, [SegmentedImage(classes=segment(val[k][0]).classes)]) for k in range(len(val)))
    if isinstance(resolved.card, BaselineCard) and resolved.card.package:
        least = MIN_AREA_PX if dataset.min_cell_px is None else dataset.min_cell_px
        separations = [SeparationParams(method=NUMBERS, min_area_px=least, owners=dataset.owners)]
    else:
        separations = choose_separations(dataset, ["watershed"], predictions)
    with CohortEvaluator(dataset, 1, separations, own_metrics) as evaluator:
        for index in range(len(test)):
            report(index / len(test), "testing")
            image, truth = test[index]
            start, start_cpu = time.perf_counter(), time.thread_time()
            found = segment(image)
            wall_s, cpu_s = wall_s + time.perf_counter() - start, cpu_s + time.thread_time() - start_cpu
            evaluator.add_image(index, truth, [SegmentedImage(classes=found.classes, fields=found.fields)])
    speed = measured_cost.InferenceSpeed(wall_s=wall_s / len(test), cpu_s=cpu_s / len(test))
    if wall_s < measured_cost.MEASURED_S:
        speed = measured_cost.function_speed(segment, test)
    cost = {"cost/train_s": 0.0, "cost/head_params": 0, "cost/backbone_params": 0}
    cost |= {"cost/images_per_s": 1 / max(speed.wall_s, 1e-9), "cost/image_cpu_s": speed.cpu_s, "cost/peak_mib": peak_memory_mib()}
    cost |= measured_cost.load_metric("cost/test_other_load_pct", busy)
    # It reads whole images, so framing does not apply; files are read in the same way.
    preparation = Preparation(framing=resolved.framing, reading=dataset.reading, um_per_px=dataset.um_per_px)
    return EvaluationResult(evaluation=evaluator.evaluations[0], cost=cost, preparation=preparation)
