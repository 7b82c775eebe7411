"""Cells are kept by their mean probability, and the scores of every threshold are those of the kept cells."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.metrics.cell_confidence import ap50_by_confidence, drop_improbable
from cellbench.metrics.instance import instance_scores
from cellbench.metrics.instances import numbered_instances
from cellbench.metrics.pixel import IGNORE
from cellbench.metrics.separation import SeparationParams, SeparationTuner, tried_settings


def image() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of cells (H, W), their classes, and probabilities by cell: 0.9, 0.7, 0.5."""
    ids = np.zeros((30, 70), np.int32)
    for number in (1, 2, 3):
        ids[5:20, 20 * number - 15 : 20 * number] = number
    return ids, (ids > 0).astype(np.uint8), np.array([0, 230, 179, 128], np.uint8)[ids]


def test_cells_below_the_confidence_are_left_out_and_the_others_numbered_again():
    ids, classes, probability = image()
    probability[ids == 1] = 60
    found = drop_improbable(numbered_instances(ids, classes), probability, 0.6)
    assert (found.num, found.num_left_out) == (1, 0)  # none was too small
    assert np.array_equal(found.ids > 0, ids == 2)
    assert found.areas_px.tolist() == [0, 225]


@pytest.mark.parametrize("ignoring", [False, True])
def test_the_score_at_each_confidence_is_that_of_the_kept_cells(ignoring):
    ids, classes, probability = image()
    known = classes.copy()
    if ignoring:
        known[:, 55:] = IGNORE
    truth, found = numbered_instances(np.where(ids == 2, 0, ids), known), numbered_instances(ids, classes)
    least = (0.0, 0.6, 0.8, 0.95)
    expected = [instance_scores(truth, drop_improbable(found, probability, value))["ap50"] for value in least]
    assert ap50_by_confidence(truth, found, probability, least) == pytest.approx(expected)


def test_the_tuned_confidence_leaves_out_what_is_no_cell():
    ids, classes, probability = image()
    fields = np.full((2, *ids.shape), 128, np.uint8)
    y, x = np.indices(ids.shape)
    for number in (1, 2, 3):  # each flows to its middle
        fields[0][ids == number] = np.where(y[ids == number] < 12, 255, 0)
        fields[1][ids == number] = np.where(x[ids == number] < 20 * number - 8, 255, 0)
    tuner = SeparationTuner(10, method="flows")
    tuner.add(classes, fields, probability, numbered_instances(np.where(ids == 3, 0, ids), classes), 10)
    best = tuner.best()
    assert best.settings["min_confidence"] == 0.6
    assert best.val_ap50_of_setting == 1.0
    assert best.settings.keys() == tried_settings("flows")[0].keys()
    assert best.instances(classes, fields, probability).num == 2
    assert (
        SeparationParams(method="flows", settings={**best.settings, "min_confidence": 0.0}).instances(classes, fields, probability).num == 3
    )
