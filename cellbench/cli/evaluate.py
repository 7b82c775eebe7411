"""``evaluate``: a finished run tested on any labelled folder, logged as a run of its own under the run that it tests."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from cellbench.config.experiment import DataSpec, Experiment
from cellbench.config.registry import Registry
from cellbench.data.audit import seen_images
from cellbench.data.classes import survey_classes, unused_classes, with_owners
from cellbench.data.dataset import Dataset, validated
from cellbench.data.image_cache import ImageCache
from cellbench.data.io.intensity import Note, format_notes
from cellbench.data.loading import scan_dataset, split_dataset
from cellbench.errors import CellbenchError
from cellbench.execution import artifacts
from cellbench.execution.artifacts import TestResult
from cellbench.files import file_name
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.instance import describe_outcomes
from cellbench.metrics.pixel import confusion_matrix, nan_mean, per_image_scores
from cellbench.reporting.plots import run as run_plots
from cellbench.reporting.plots import style
from cellbench.system_load import SystemLoad
from cellbench.tracking.schema import EVALUATED, EVALUATION, INDEPENDENT, NOTE, SEEN
from cellbench.tracking.tracker import Tracker
from cellbench.training.evaluator import CohortEvaluator, ExamplePrediction


def open_test_images(trained: TrainedRun, experiment: Experiment, registry: Registry, folder: Path | None) -> tuple[Dataset, str]:
    """The images to test on, as a dataset whose ``test`` they are, and what they are in words.

    The run's own test images where the folder holds the very data that it learned from; else the folder's test images, or all of it where it
    is not divided. Raises CellbenchError, for classes other than the run's too.
    """
    card = registry.dataset(experiment.dataset)
    if folder is not None and card.draw:
        card = registry.dataset("folder")
    spec = experiment.data if card.draw or not experiment.data.draw else experiment.data.model_copy(update={"draw": {}})
    card, listing = scan_dataset(card, folder, spec)
    listing.refuse()
    if card.classes != trained.classes:
        raise CellbenchError(
            f"--data {folder}: its classes are {', '.join(card.classes)}; '{trained.name}' tells apart {', '.join(trained.classes)}. "
            "Name a folder with the same classes."
        )
    own, _ = split_dataset(card, listing, DataSpec(**{**spec.model_dump(), "fold": trained.run.fold if spec.folds else 0}))
    if spec.limit:
        own = replace(own, **{part: own.samples(part)[: spec.limit] for part in ("train", "val", "test")})
    # What is one cell is what the run learned as one.
    owners = trained.separation.owners
    own = with_owners(validated(own), owners)
    own = replace(
        own, unused=unused_classes(own, survey_classes(own).values()), notes=(*listing.notes, *(doubt.line for doubt in listing.doubts))
    )
    if own.digest == trained.dataset_digest:
        return replace(own, train=(), val=()), "the run's own test images"
    # The run's model sees these images as its own; so do the pictures of its worst answers.
    own = replace(own, reading=trained.preparation.reading)
    parts = listing.parts
    chosen = parts.get("test") or (*parts.get("train", ()), *parts.get("val", ()))
    what = "the folder's test images" if parts.get("test") else "all images of the folder"
    other = with_owners(validated(replace(own, train=(), val=(), test=tuple(chosen), owners=(), unused=(), notes=())), owners)
    return replace(other, unused=unused_classes(other, survey_classes(other).values())), what


def evaluate_segmenter(segmenter: Segmenter, dataset: Dataset, num_shown: int) -> tuple[TestResult, list[ExamplePrediction], list[str]]:
    """The test of a segmenter on a dataset's test images, its ``num_shown`` worst answers, the worst first, and how images were read in words."""
    worst: list[ExamplePrediction] = []
    notes: list[tuple[str, Note]] = []
    num, busy, seconds, timed, start = len(dataset.classes), SystemLoad(), 0.0, 0, time.perf_counter()
    answers = segmenter.predict_all(sample.image for sample in dataset.test)
    with CohortEvaluator(dataset, 1, [segmenter.trained.separation]) as exams:
        for index, found in enumerate(tqdm(answers, total=len(dataset.test), desc="testing", unit="image", leave=False, disable=None)):
            if index or len(dataset.test) == 1:  # the first comes while everything is cold
                seconds, timed = seconds + time.perf_counter() - start, timed + 1
            notes += [(dataset.test[index].name, note) for note in found.notes]
            truth = dataset.read_mask(dataset.test[index])
            counts = confusion_matrix(truth, found.classes, num)
            exams.take(index, truth, [counts], [(found.classes, found.probability, found.relief)])
            worst.append(
                ExamplePrediction.of(
                    index, float(per_image_scores(counts[None], unused=dataset.unused)["dice"][0]), found.classes, found.probability
                )
            )
            worst = sorted(worst, key=lambda case: math.inf if math.isnan(case.dice) else case.dice)[:num_shown]
            start = time.perf_counter()  # reading the truth and scoring are not the model's
    cost = {"cost/images_per_s": timed / max(seconds, 1e-9)}
    if (load_pct := busy.others_pct()) is not None:
        cost["cost/test_other_load_pct"] = load_pct
    return TestResult(exam=exams.exams[0], cost=cost, preparation=segmenter.trained.preparation), worst, format_notes(notes)


def evaluate(
    asked: str,
    *,
    data: Path | None = None,
    visualize: int = 0,
    weights: Path | None = None,
    extra: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    say: Callable[[str], None] = print,
) -> int:
    """``cellbench evaluate``. Exit code 0."""
    if visualize < 0:
        raise CellbenchError(f"--visualize {visualize}: a number of images is expected, 0 or more.")
    segmenter = Segmenter.load(asked, weights=weights, registry=extra, device=device, precision=precision)
    trained = segmenter.trained
    for line in trained.origin:
        say(line)
    experiment = Experiment.of(tomllib.loads(trained.config), "config.toml")
    dataset, what = open_test_images(trained, experiment, Registry(extra), data)
    say(f"{trained.name}: {len(dataset.test)} images of {dataset.root} ({what}), on {segmenter.machine.name}.")
    for line in dataset.notes:
        say(line)
    seen = seen_images.match_seen_images(trained.seen, dataset.test) if trained.seen is not None else None
    if seen is None:
        warning = f"'{trained.name}' keeps no record of its training images (an older version), so these were not compared with them."
    else:
        warning = seen_images.describe_seen(seen)
    if warning:
        say(f"Warning: {warning}")
    result, worst, lines = evaluate_segmenter(segmenter, dataset, visualize)
    for line in lines:
        say(line)
    metrics = artifacts.final_metrics(dataset, result)
    name = f"evaluate: {trained.name} on {dataset.root.name}"
    tracker = Tracker(trained.experiment or "evaluations")
    key = hashlib.sha256(
        json.dumps([EVALUATION, trained.fingerprint, dataset.digest, segmenter.machine.precision_name]).encode()
    ).hexdigest()[:16]
    tags = {"cellbench.kind": EVALUATION, EVALUATED: trained.run_id or trained.name, "model": trained.run.model, "dataset": dataset.name}
    known = next((run for run in tracker.stored() if run.fingerprint == key), None)
    with tracker.run(name, key, parent=trained.run_id, known=known, tags=tags) as run:
        if known is None:
            run.log(
                {},
                params={
                    "evaluated": trained.name,
                    "dataset": dataset.name,
                    "images": len(dataset.test),
                    "precision": segmenter.machine.precision_name,
                },
            )
            if seen is not None:
                run.log(
                    {}, params={f"images_{word}": seen.count(part) for part, word in (("train", "trained_on"), ("val", "validated_on"))}
                )
            run.data(dataset.name, dataset.digest, str(dataset.root), "testing")
        with tempfile.TemporaryDirectory(prefix="cellbench-") as place:
            folder, pixels = Path(place), ImageCache(dataset, "test", 2**28)
            plain = experiment.model_copy(update={"data": DataSpec()})
            artifacts.write_artifacts(folder, name, trained.run.model_copy(update={"fold": 0}), plain, [dataset], pixels, result)
            if seen is not None:
                listed_images = {
                    part: [s.name for s, one in zip(dataset.test, seen, strict=True) if one == part] for part in seen_images.PARTS
                }
                (folder / SEEN).write_text(json.dumps(listed_images), encoding="utf-8")
            (folder / "config.toml").write_text(trained.config, encoding="utf-8")
            for rank, case in enumerate(worst, 1):
                picture, truth = pixels[case.image]
                file = dataset.test[case.image].name
                title = f"{rank}. worst of {len(dataset.test)}: {file}, {case.score}\n{describe_outcomes(asdict(result.exam.agreements[case.image]))}"
                stem = file_name(Path(file).stem)
                style.save_figure(
                    run_plots.plot_example(picture, truth, case.classes, case.cell, title),
                    folder / "figures" / f"worst-{rank:03d}-{stem}.png",
                )
            run.artifacts(folder)
        told = artifacts.run_tags(name, metrics, segmenter.machine.name, run.address("figures/worst.png"))
        independent = "unknown" if seen is None else "no" if any(seen) else "yes"
        told |= {INDEPENDENT: independent, NOTE: f"**Warning:** {warning}\n\n{told[NOTE]}" if warning else told[NOTE]}
        run.log(metrics, tags=told)
    mean = f"{artifacts.format_score(metrics, 'test_image/dice')}{artifacts.interval_words(metrics)}"
    say(
        f"Dice {artifacts.format_score(metrics, 'test/dice')} over all pixels, {mean} in the mean of the images; IoU {artifacts.format_score(metrics, 'test/iou')}."
    )
    say(f"{describe_outcomes({key.removeprefix('test/'): value for key, value in metrics.items()})}.")
    if metrics["test/num_empty"]:
        empty, found = metrics["test/num_empty"], metrics["test/num_empty_found"]
        say(f"{empty:g} of {len(dataset.test)} images have no cell; something was found in {found:g} of them. Means leave out the others.")
    if seen is not None and any(seen) and (new := [k for k, part in enumerate(seen) if not part]):
        dice = nan_mean(per_image_scores(result.exam.counts[new], unused=dataset.unused)["dice"])
        say(f"Dice {dice:.4f} in the mean of the {len(new)} images that the run has not seen.")
    say(f"logged as '{name}' in the experiment '{tracker.name}', under the run that it tests: metrics, figures and error maps.")
    return 0
