"""Claims about the table of cells, against shapes whose measures are known."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from cellbench.metrics.instances import numbered_instances
from cellbench.metrics.measurements import density, measure_cells


def table(ids, image=None, um_per_px=None):
    classes = (ids > 0).astype(np.uint8)
    image = np.zeros((*ids.shape, 3), np.uint8) if image is None else image
    return list(csv.DictReader(io.StringIO(measure_cells(numbered_instances(ids, classes), image, ("background", "cell"), um_per_px).text)))


def test_a_disc_and_a_bar_measure_what_they_are():
    y, x = np.mgrid[:100, :140]
    disc = np.hypot(y - 40, x - 50) <= 20
    ids = disc.astype(np.int32)
    ids[90:100, 60:100] = 2
    image = np.zeros((100, 140, 3), np.uint8)
    image[disc] = (10, 20, 30)
    one, two = table(ids, image)
    assert (one["x_px"], one["y_px"], one["class"], one["at_edge"], two["at_edge"]) == ("50.0", "40.0", "cell", "0", "1")
    assert [float(one[name]) for name in ("red", "green", "blue")] == [10, 20, 30]
    assert float(one["area_px"]) == disc.sum()
    assert float(one["diameter_px"]) == pytest.approx(40, rel=0.02)
    assert float(one["eccentricity"]) < 0.05
    # A bar of sides a, b has the second moments of an ellipse with the same ratio of axes.
    assert float(two["eccentricity"]) == pytest.approx(np.sqrt(1 - (10 / 40) ** 2), abs=0.01)


def test_a_scale_changes_lengths_once_and_areas_twice():
    ids = np.zeros((50, 50), np.int32)
    ids[10:30, 10:30] = 1
    (px,), (um,) = table(ids), table(ids, um_per_px=0.25)
    assert float(um["area_um2"]) == float(px["area_px"]) / 16
    assert float(um["diameter_um"]) == pytest.approx(float(px["diameter_px"]) / 4, abs=1e-4)
    assert um["x_px"] == px["x_px"]
    assert density(1, 2500, 0.25) == pytest.approx(density(1, 2500) * 16)


def test_no_cell_is_a_heading_alone():
    assert table(np.zeros((9, 9), np.int32)) == []
