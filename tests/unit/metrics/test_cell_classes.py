"""The classes of single cells, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cellbench.metrics.cell_classes import cell_confusion, cells_of_classes, part_confusion
from cellbench.metrics.instance import CellPairs, instance_scores
from cellbench.metrics.instances import Instances, connected_instances
from cellbench.metrics.pixel import IGNORE


def drawn(*cells: tuple[int, int, int]) -> np.ndarray:
    """A class map (40, 120) of squares of 12 px: left edge, row of squares (0 or 1) and class."""
    classes = np.zeros((40, 120), np.uint8)
    for left, row, label in cells:
        classes[20 * row + 2 : 20 * row + 14, left : left + 12] = label
    return classes


def found_in(classes: np.ndarray) -> Instances:
    return connected_instances(classes, 20)


def test_each_true_cell_is_counted_under_the_class_it_is_taken_for() -> None:
    truth = drawn((0, 0, 1), (20, 0, 1), (40, 0, 1), (60, 0, 2), (80, 0, 2), (100, 0, 3))
    found = drawn((0, 0, 1), (21, 0, 1), (40, 0, 2), (60, 0, 2), (100, 0, 1), (0, 1, 3), (20, 1, 1))
    expected = [[0, 1, 0, 1], [0, 2, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0]]
    assert cell_confusion(CellPairs.of(found_in(truth), found_in(found)), 4).tolist() == expected


def test_the_counts_and_ap50_of_each_class_follow_from_the_matrix() -> None:
    red, white = cells_of_classes(np.array([[0, 1, 0], [2, 5, 1], [0, 3, 4]]))
    assert (red.num_true, red.num_predicted, red.num_found) == (8, 9, 5)
    assert red.ap50 == pytest.approx(5 / (5 + 3 + 4))
    assert (white.num_true, white.num_predicted, white.ap50) == (7, 5, pytest.approx(4 / (4 + 3 + 1)))


def test_one_class_agrees_with_the_scores_of_all_cells() -> None:
    truth, found = drawn((0, 0, 1), (20, 0, 1), (40, 1, 1)), drawn((3, 0, 1), (29, 0, 1), (60, 1, 1), (80, 1, 1))
    (cell,) = cells_of_classes(cell_confusion(CellPairs.of(found_in(truth), found_in(found)), 2))
    scores = instance_scores(found_in(truth), found_in(found))
    assert (cell.ap50, cell.num_true, cell.num_predicted) == (scores["ap50"], scores["num_true"], scores["num_predicted"])
    assert cell.num_found == scores["num_found"] == 1


def test_parts_of_cells_are_counted_as_regions_of_their_own() -> None:
    """Nuclei (2) within cells (1): one found, one missed, one where there is none; ignored pixels hold none."""
    truth, found = drawn((0, 0, 2), (20, 0, 2), (40, 0, 1), (60, 0, 2)), drawn((0, 0, 2), (20, 0, 1), (40, 0, 2), (60, 0, 2))
    truth[:, 60:72] = IGNORE
    assert part_confusion(truth, found, (0, 1, 1), 3, 20).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert not part_confusion(truth, found, (0, 1, 2), 3, 20).any()
