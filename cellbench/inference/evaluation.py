"""Evaluates a trained run on labelled images."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cellbench.config.cards import DatasetCard
from cellbench.config.experiment import DataSpec, Experiment
from cellbench.config.registry import Registry
from cellbench.console import progress_bar
from cellbench.data.classes import unused_classes, with_owners
from cellbench.data.dataset import Dataset, validated
from cellbench.data.io.intensity import Note, format_notes
from cellbench.data.loading import dataset_of_card, read_test_images, scan_dataset, split_dataset
from cellbench.data.scan import Listing
from cellbench.errors import CellbenchError
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.calibration import Calibration
from cellbench.system_load import SystemLoad
from cellbench.training.evaluator import CohortEvaluator, ExamplePrediction, RunEvaluation
from cellbench.training.segmented_image import SegmentedImage


def open_test_images(trained: TrainedRun, experiment: Experiment, registry: Registry, folder: Path | None) -> tuple[Dataset, str]:
    """Opens the images to test on as the ``test`` split of a dataset, and describes them.

    They are the run's own test images if the folder holds its training data; else the folder's test images, or all images if it has no split.
    Raises CellbenchError, also if the classes differ from those of the run.
    """
    card = registry.dataset(experiment.dataset)
    if folder is None and not card.draw:
        if not Path(trained.data_folder).exists() or not trained.data_folder:
            place = f"the run's own data, {trained.data_folder}, is not there any more" if trained.data_folder else "no data is recorded"
            raise CellbenchError(f"'{trained.name}': {place}. Give --data DIR.")
        folder = Path(trained.data_folder)
    if folder is not None and card.draw:
        card = registry.dataset("folder")
    spec = experiment.data if card.draw or not experiment.data.draw else experiment.data.model_copy(update={"draw": {}})
    card, listing = scan_dataset(card, folder, spec)
    listing.raise_first()
    if card.classes != trained.classes:
        raise CellbenchError(
            f"--data {folder}: its classes are {', '.join(card.classes)}; those of '{trained.name}' are {', '.join(trained.classes)}. "
            "Name a folder with the same classes."
        )
    owners = trained.separation.owners  # what makes up one cell is as in the training data of the run
    own = _own_test_images(trained, card, listing, spec)
    if own is not None and own.digest == trained.dataset_digest:
        return replace(own, train=(), val=()), "the run's own test images"
    own = own or replace(dataset_of_card(card, listing.root), um_per_px=listing.um_per_px)
    # So do the pictures of its worst predictions.
    return read_test_images(own, listing, replace(own, reading=trained.preparation.reading, owners=owners))


def _own_test_images(trained: TrainedRun, card: DatasetCard, listing: Listing, spec: DataSpec) -> Dataset | None:
    """The folder split as the run's training data was; None for images that cannot be split so, such as too few: they are others."""
    try:
        own, _ = split_dataset(card, listing, DataSpec(**{**spec.model_dump(), "fold": trained.run.fold if spec.folds else 0}))
    except CellbenchError:
        return None
    if spec.limit:
        own = replace(own, train=own.train[: spec.limit], val=own.val[: spec.limit], test=own.test[: spec.limit])
    own, contents = validated(own)
    own = with_owners(own, trained.separation.owners)
    notes = (*listing.notes, *(doubt.line for doubt in listing.doubts))
    return replace(own, unused=unused_classes(own, contents.values()), notes=notes)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of evaluating a run on a dataset's test images."""

    scores: RunEvaluation
    cost: dict[str, float]
    worst: list[ExamplePrediction]
    """The worst first."""
    notes: list[str]
    """Notes on how the images were read."""


def evaluate_segmenter(segmenter: Segmenter, dataset: Dataset, num_worst: int) -> Evaluation:
    """Evaluates a run on a dataset's test images and keeps the ``num_worst`` worst predictions. Raises CellbenchError for an unreadable image."""
    notes: list[tuple[str, Note]] = []
    load, seconds, num_timed, start = SystemLoad(), 0.0, 0, time.perf_counter()
    plain = copy.copy(segmenter)  # probabilities are scored before and after their correction
    plain.trained = replace(segmenter.trained, calibration=Calibration())
    predictions = plain.predict_all(sample.image for sample in dataset.test)
    trained = segmenter.trained
    with CohortEvaluator(dataset, 1, [trained.separation], calibrations=[trained.calibration], count_cells=True) as evaluator:
        examples = evaluator.evaluations[0].examples
        examples.num_worst = num_worst
        for index, found in enumerate(progress_bar(predictions, total=len(dataset.test), desc="testing", unit="image")):
            if index or len(dataset.test) == 1:  # the first image is a warm-up
                seconds, num_timed = seconds + time.perf_counter() - start, num_timed + 1
            notes += [(dataset.test[index].name, note) for note in found.notes]
            truth = dataset.read_mask(dataset.test[index])
            evaluator.add_image(index, truth, [SegmentedImage(classes=found.classes, cell=found.probability, fields=found.fields)])
            start = time.perf_counter()  # excludes reading masks and scoring
    cost = {"cost/images_per_s": num_timed / max(seconds, 1e-9)}
    if (load_pct := load.others_pct()) is not None:
        cost["cost/test_other_load_pct"] = load_pct
    return Evaluation(scores=evaluator.evaluations[0], cost=cost, worst=examples.lowest, notes=format_notes(notes))
