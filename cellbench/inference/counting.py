"""Counts the cells of images with a trained run, beside true counts."""

from __future__ import annotations

from cellbench.console import progress_bar
from cellbench.data.count_truth import CountTruth, match_classes
from cellbench.inference.segmenter import Segmenter
from cellbench.metrics.counting import CountRow
from cellbench.metrics.measurements import part_classes


def count_cells(segmenter: Segmenter, truth: CountTruth) -> tuple[list[CountRow], str]:
    """The counts of every image by region and class, and a note on the classes. Raises CellbenchError for an unreadable image."""
    trained = segmenter.trained
    parts = part_classes(trained.separation.owners)
    counted = match_classes(truth, {k: name for k, name in enumerate(trained.classes) if k and k not in parts}, f"'{trained.name}'")
    predictions = segmenter.predict_all(sample.image for sample in truth.samples)
    rows: list[CountRow] = []
    for sample, found in zip(
        truth.samples, progress_bar(predictions, total=len(truth.samples), desc="counting", unit="image"), strict=True
    ):
        rows += counted.count(truth, sample, found.cells)
    return rows, counted.note
