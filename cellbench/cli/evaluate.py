"""``evaluate``: evaluates a finished run on any labelled folder, and logs the evaluation as a child of that run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cellbench.cli.counts import log_counts
from cellbench.cli.runs import open_run
from cellbench.config.experiment import DataSpec, Experiment
from cellbench.config.options import EvaluateOptions
from cellbench.config.registry import Registry
from cellbench.console import say, say_lines
from cellbench.data.audit import seen_images
from cellbench.data.count_truth import CountTruth
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.image_cache import ImageCache
from cellbench.data.loading import open_count_truth
from cellbench.errors import CellbenchError
from cellbench.execution import artifacts
from cellbench.execution.artifacts import EvaluationResult
from cellbench.files import facts_digest, file_name
from cellbench.inference.counting import count_cells
from cellbench.inference.evaluation import Evaluation, evaluate_segmenter, open_test_images
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.instance import describe_outcomes
from cellbench.metrics.pixel import nan_mean, per_image_scores
from cellbench.reporting.counts import count_metrics, describe_counts
from cellbench.reporting.plots.example import draw_example
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.open_run import Run
from cellbench.tracking.schema import EVALUATED, EVALUATION, INDEPENDENT, NOTE, SEEN
from cellbench.tracking.tracker import Tracker


def evaluate(options: EvaluateOptions) -> int:
    """Evaluates a run. Returns exit code 0."""
    if options.visualize < 0:
        raise CellbenchError(f"--visualize {options.visualize}: expected a number of images, 0 or more.")
    segmenter = open_run(options)
    trained, machine = segmenter.trained, segmenter.machine
    registry = Registry(options.registry)
    if options.data is not None and (truth := open_count_truth(options.data, registry)) is not None:
        return evaluate_counts(segmenter, truth)
    experiment = Experiment.of_text(trained.config, "config.toml")
    dataset, what = open_test_images(trained, experiment, registry, options.data)
    say(f"{trained.name}: {len(dataset.test)} images of {dataset.root} ({what}), on {machine.name}.")
    say_lines(dataset.notes)
    seen, warning = compare_with_training_images(trained, dataset.test)
    evaluation = evaluate_segmenter(segmenter, dataset, options.visualize)
    say_lines(evaluation.notes)
    result = EvaluationResult(evaluation=evaluation.scores, cost=evaluation.cost, preparation=trained.preparation)
    tested = _Tested(
        name=f"evaluate: {trained.name} on {dataset.root.name}",
        trained=trained,
        experiment=experiment,
        dataset=dataset,
        evaluation=evaluation,
        result=result,
        metrics=artifacts.final_metrics(dataset, result) | count_metrics(evaluation.scores.cells),
        seen=seen,
        warning=warning,
    )
    tracker = Tracker(trained.experiment or "evaluations")
    _log(tested, tracker, machine.name, machine.precision_name)
    say_lines(_summary(tested))
    say(f"logged as '{tested.name}' in the experiment '{tracker.name}', under the run that it tests: metrics, figures and error maps.")
    return 0


def compare_with_training_images(trained: TrainedRun, samples: Sequence[Sample]) -> tuple[list[str] | None, str]:
    """Which images the run was trained or validated on, as :func:`match_seen_images` says it, and the warning, which is printed."""
    seen = seen_images.match_seen_images(trained.seen, samples) if trained.seen is not None else None
    if seen is None:
        warning = f"'{trained.name}' has no record of its training images (an older version), so these were not compared with them."
    else:
        warning = seen_images.describe_seen(seen)
    if warning:
        say(f"Warning: {warning}")
    return seen, warning


def independence(seen: Sequence[str] | None) -> str:
    """Whether no image was trained or validated on: ``yes``, ``no`` or ``unknown``."""
    return "unknown" if seen is None else "no" if any(seen) else "yes"


def evaluate_counts(segmenter: Segmenter, truth: CountTruth) -> int:
    """Compares the counts of a run with true ones that come without masks. Returns exit code 0."""
    trained = segmenter.trained
    say(f"{trained.name}: counts of {len(truth.samples)} images of {truth.root}, on {segmenter.machine.name}.")
    say_lines(truth.notes)
    seen, warning = compare_with_training_images(trained, truth.samples)
    rows, note = count_cells(segmenter, truth)
    say(note)
    name = f"evaluate: {trained.name} on {truth.root.absolute().name}"
    tags = {EVALUATED: trained.run_id or trained.name, "model": trained.run.model, INDEPENDENT: independence(seen)}
    facts = [trained.fingerprint, segmenter.machine.precision_name]
    log_counts(name, rows, truth, facts, Tracker(trained.experiment or "evaluations"), tags, parent=trained.run_id, warning=warning)
    return 0


@dataclass(frozen=True, kw_only=True)
class _Tested:
    name: str
    trained: TrainedRun
    experiment: Experiment
    dataset: Dataset
    evaluation: Evaluation
    result: EvaluationResult
    metrics: dict[str, float]
    seen: Sequence[str] | None
    """For each test image, the split of the training data that contains it, or nothing; None if the run has no record of these images."""
    warning: str


def _log(tested: _Tested, tracker: Tracker, machine: str, precision: str) -> None:
    trained, dataset, seen, metrics = tested.trained, tested.dataset, tested.seen, tested.metrics
    key = facts_digest([EVALUATION, trained.fingerprint, dataset.digest, precision])
    tags = {"cellbench.kind": EVALUATION, EVALUATED: trained.run_id or trained.name, "model": trained.run.model, "dataset": dataset.name}
    known = tracker.known(key).get(key)
    with tracker.run(tested.name, key, parent=trained.run_id, known=known, tags=tags) as run:
        if known is None:
            facts = {"evaluated": trained.name, "dataset": dataset.name, "images": len(dataset.test), "precision": precision}
            if seen is not None:
                facts |= {"images_trained_on": seen.count("train"), "images_validated_on": seen.count("val")}
            run.log({}, params=facts)
            run.log_input(dataset.name, dataset.digest, str(dataset.root), "testing")
        with TemporaryFolder() as name:
            _write_artifacts(tested, Path(name))
            run.log_artifacts(Path(name))
        run.log(metrics, tags=_tags(tested, run, machine))


def _tags(tested: _Tested, run: Run, machine: str) -> dict[str, str]:
    tags = artifacts.run_tags(tested.name, tested.metrics, machine, run.address("figures/worst.png"))
    if tested.warning:
        tags[NOTE] = f"**Warning:** {tested.warning}\n\n{tags[NOTE]}"
    return tags | {INDEPENDENT: independence(tested.seen)}


def _write_artifacts(tested: _Tested, folder: Path) -> None:
    """Writes the artifacts of a run, its worst predictions, and which images the run was trained on."""
    dataset, result = tested.dataset, tested.result
    pixels = ImageCache(dataset, "test", 2**28)
    plain = tested.experiment.model_copy(update={"data": DataSpec()})
    run = tested.trained.run.model_copy(update={"fold": 0})
    artifacts.write_artifacts(folder, run, plain, [dataset], result)
    artifacts.write_counts(folder, result.evaluation.cells)
    artifacts.draw_pictures(folder, tested.name, dataset, pixels, result)
    if tested.seen is not None:
        names = {
            part: [sample.name for sample, one in zip(dataset.test, tested.seen, strict=True) if one == part] for part in seen_images.PARTS
        }
        (folder / SEEN).write_text(json.dumps(names), encoding="utf-8")
    (folder / "config.toml").write_text(tested.trained.config, encoding="utf-8")
    for rank, case in enumerate(tested.evaluation.worst, 1):
        picture, truth = pixels[case.image]
        file = dataset.test[case.image].name
        title = f"{rank}. worst of {len(dataset.test)}: {file}, {case.score}\n{describe_outcomes(asdict(result.evaluation.agreements[case.image]))}"
        drawn = draw_example(picture, truth, case.classes, case.cell, title, case.cells)
        (folder / "figures" / f"worst-{rank:03d}-{file_name(Path(file).stem)}.png").write_bytes(drawn)


def _summary(tested: _Tested) -> list[str]:
    metrics, num = tested.metrics, len(tested.dataset.test)
    mean = f"{artifacts.format_score(metrics, 'test_image/dice')}{artifacts.describe_interval(metrics)}"
    dice, iou = artifacts.format_score(metrics, "test/dice"), artifacts.format_score(metrics, "test/iou")
    lines = [
        f"Dice {dice} over all pixels, {mean} in the mean of the images; IoU {iou}.",
        f"{describe_outcomes({name.removeprefix('test/'): value for name, value in metrics.items()})}.",
    ]
    lines += describe_counts(tested.evaluation.scores.cells)
    if metrics["test/num_empty"]:
        empty, found = metrics["test/num_empty"], metrics["test/num_empty_found"]
        lines.append(f"{empty:g} of {num} images have no cell; something was found in {found:g} of them. Means leave out the others.")
    if tested.seen is not None and any(tested.seen) and (new := [k for k, part in enumerate(tested.seen) if not part]):
        new_dice = nan_mean(per_image_scores(tested.evaluation.scores.counts[new], unused=tested.dataset.unused)["dice"])
        lines.append(f"Dice {new_dice:.4f} in the mean of the {len(new)} images that the run was not trained or validated on.")
    return lines
