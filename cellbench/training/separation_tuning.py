"""Tunes how single cells are found, for each run, on its own predictions for the validation images.

It costs one more pass over at most ``MOST_IMAGES`` validation images, and 0.05 s an image and run on 1600x1200.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cellbench.data.dataset import Dataset
from cellbench.features.extractor import Features
from cellbench.metrics.instances import MIN_AREA_PX, reference_instances
from cellbench.metrics.separation import SeparationParams, SeparationTuner
from cellbench.training.model import SegmentationModel
from cellbench.training.segmented_image import SegmentedImage
from cellbench.training.tiled_inference import segment_images

MOST_IMAGES = 16
"""Number of validation images used, the first ones: a few hundred cells suffice for one parameter with ten values."""

Seen = Callable[[int, Sequence[SegmentedImage]], object]
"""Is called with each validation image's number and its predictions by all models."""


def tune_separation(
    models: Sequence[SegmentationModel], features: Features, dataset: Dataset, seen: Seen | None = None
) -> list[SeparationParams]:
    """The separation with the best AP50 on the validation images, for each model. ``seen`` gets the same predictions."""

    def answers() -> Iterator[tuple[int, Sequence[SegmentedImage]]]:
        for image, found in predictions:
            if seen is not None:
                seen(image, found)
            yield image, found

    # Closed after enough images: the tiles of the others are never decoded.
    with contextlib.closing(segment_images(models, features, "val")) as predictions:
        return choose_separations(dataset, [model.method for model in models], answers())


def choose_separations(
    dataset: Dataset, methods: Sequence[str], answers: Iterable[tuple[int, Sequence[SegmentedImage]]]
) -> list[SeparationParams]:
    """The same from pairs of a validation image's number and its predictions, in any order; ``methods``: how cells are found in each."""
    least = MIN_AREA_PX if dataset.min_cell_px is None else dataset.min_cell_px
    tunings = [SeparationTuner(least, owners=dataset.owners, method=method) for method in methods]
    with ThreadPoolExecutor(min(len(methods), os.cpu_count() or 1), "tuning") as pool:
        jobs: list[Future[None]] = []
        for image, found in itertools.islice(answers, MOST_IMAGES):
            sample = dataset.val[image]
            truth, min_area_px = reference_instances(*dataset.read_truth(sample), dataset.min_cell_px, owners=dataset.owners)
            for job in jobs:  # in the order of images; meanwhile the next one is segmented
                job.result()
            jobs = [
                pool.submit(tuning.add, one.classes, one.fields, one.cell, truth, min_area_px)
                for tuning, one in zip(tunings, found, strict=True)
            ]
        for job in jobs:
            job.result()
    return [one.best() for one in tunings]
