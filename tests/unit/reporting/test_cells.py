"""What the report says of single cells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cellbench.reporting.cells import class_rows, describe_errors
from cellbench.reporting.model_groups import FinishedRun, ModelGroup
from cellbench.reporting.plots.cells import plot_cell_confusion


def model(*per_image: dict[str, Any], targets: str = "flows") -> ModelGroup:
    runs = tuple(
        FinishedRun(
            record=SimpleNamespace(params={"seed": str(seed), "targets": targets}, metrics={}, is_external=False, can_predict=True),
            per_image={"classes": ["background", "red", "white"], **one},
        )
        for seed, one in enumerate(per_image)
    )
    return ModelGroup(name="uni · fpn", backbone="uni", head="fpn", baseline=False, plain=True, runs=runs)


def outcomes(found: list[int], missed: list[int], split: list[int], merged: list[int], extra: list[int]) -> dict[str, Any]:
    true, predicted = np.add(np.add(found, missed), np.add(split, merged)), np.add(found, extra)
    counts = {
        "true": true.tolist(),
        "predicted": predicted.tolist(),
        "found": found,
        "missed": missed,
        "split": split,
        "merged": merged,
        "extra": extra,
    }
    return {f"num_{name}": values for name, values in counts.items()}


def test_the_most_frequent_error_is_named_first() -> None:
    assert describe_errors(model(outcomes([40, 20], [1, 1], [0, 0], [6, 2], [3, 1]))) == [
        "uni · fpn does not find 10 of 70 cells (14.3%). Its most frequent error: cells merged with another (8), then missed cells (2). "
        "4 of 64 predicted cells match no true cell."
    ]


@pytest.mark.parametrize(("merged", "targets", "advised"), [(6, "cell", True), (6, "flows", False), (0, "cell", False)])
def test_flows_are_advised_where_a_model_of_classes_alone_merges_cells_most(merged: int, targets: str, advised: bool) -> None:
    (said,) = describe_errors(model(outcomes([40], [3], [0], [merged], [3]), targets=targets))
    assert ('targets = "flows"' in said) == advised


@pytest.mark.parametrize(
    ("one", "said"), [({"dice": [1.0]}, 0), (outcomes([0], [0], [0], [0], [2]), 0), (outcomes([5], [0], [0], [0], [2]), 1)]
)
def test_nothing_is_said_of_errors_where_cells_are_not_known_or_not_there(one: dict[str, Any], said: int) -> None:
    assert len(describe_errors(model(one))) == said


def test_the_rows_of_classes_are_means_of_the_seeds_over_all_images() -> None:
    one = {"cell_confusion": [[[0, 1, 0], [0, 3, 1], [0, 0, 2]], [[0, 0, 0], [1, 2, 0], [0, 0, 0]]]}
    other = {"cell_confusion": [[[0, 0, 0], [0, 7, 0], [2, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]]}
    red, white = class_rows([model(one, other)])
    assert red == {
        "model": "uni · fpn",
        "class": "red",
        "AP50": "0.812",
        "cells": "7",
        "predicted": "6.5",
        "found": "6",
        "count error": "-7.1%",
    }
    assert (white["AP50"], white["cells"], white["predicted"], white["count error"]) == ("0.333", "2", "1.5", "-25.0%")


def test_the_confusion_shows_counts_of_used_classes_and_what_was_missed_or_not_there() -> None:
    matrix = np.array([[0, 4, 0, 0], [2, 50, 3, 0], [1, 0, 8, 0], [0, 0, 0, 0]])
    (axes,) = plot_cell_confusion(["background", "red", "white", "platelet"], matrix).axes
    assert [text.get_text() for text in axes.texts] == ["50", "3", "2", "0", "8", "1", "4", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["red", "white", "no true cell"]
