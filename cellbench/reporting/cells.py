"""What becomes of single cells: the most frequent errors in words, and the cells of each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellbench.metrics.cell_classes import cells_of_classes
from cellbench.metrics.instance import COUNTS
from cellbench.metrics.pixel import nan_mean
from cellbench.reporting.leaderboard import format_number
from cellbench.reporting.model_groups import ModelGroup, TestSet

ERRORS = {"num_missed": "missed cells", "num_merged": "cells merged with another", "num_split": "cells split into several"}
TEACH_FLOWS = ' With targets = "flows" a head also learns where each cell is, and merges fewer; it needs masks that number their cells.'
CLASS_COUNTS = {"num_true": "cells", "num_predicted": "predicted", "num_found": "found"}


def describe_errors(model: ModelGroup) -> list[str]:
    """The most frequent error of a model over all its runs, and what may help against it; none for runs of older versions and images without cells."""
    if not model.has(*COUNTS):
        return []
    num = {name: sum(sum(run.per_image[name]) for run in model.runs) for name in COUNTS}
    if not num["num_true"]:
        return []
    lost, runs = num["num_true"] - num["num_found"], ", all runs together" if len(model.by_seed) > 1 else ""
    extra = f"{num['num_extra']:,} of {num['num_predicted']:,} predicted cells match no true cell"
    if not lost:
        return [f"{model.name} finds all {num['num_true']:,} cells of the test images{runs}; {extra}."]
    kinds = [name for name in sorted(ERRORS, key=lambda name: -num[name]) if num[name]]
    first, *others = (f"{ERRORS[name]} ({num[name]:,})" for name in kinds)
    then = f", then {' and '.join(others)}" if others else ""
    return [
        f"{model.name} does not find {lost:,} of {num['num_true']:,} cells ({lost / num['num_true']:.1%}{runs}). "
        f"Its most frequent error: {first}{then}. {extra}."
        + (TEACH_FLOWS if kinds[0] == "num_merged" and _learns_classes_alone(model) else "")
    ]


def _learns_classes_alone(model: ModelGroup) -> bool:
    return not model.kind and model.can_predict and model.runs[0].record.params.get("targets", "cell") == "cell"


def class_rows(models: Sequence[ModelGroup]) -> list[dict[str, str]]:
    """The cells of each class in all test images, a row a class of a model, the mean of its seeds."""
    rows = []
    for model in models:
        each = [cells_of_classes(matrix) for matrix in model.cell_confusions]
        for seeds in zip(*each, strict=True):
            num = {name: float(np.mean([getattr(one, name) for one in seeds])) for name in CLASS_COUNTS}
            if num["num_true"] or num["num_predicted"]:
                rows.append({
                    "model": model.name,
                    "class": model.classes[seeds[0].index],
                    "AP50": format_number(nan_mean(np.array([one.ap50 for one in seeds])), 3),
                    **{label: f"{num[name]:.1f}".removesuffix(".0") for name, label in CLASS_COUNTS.items()},
                    "count error": f"{(num['num_predicted'] - num['num_true']) / num['num_true']:+.1%}" if num["num_true"] else "",
                })  # fmt: skip
    return rows


def models_with_classes(here: TestSet, most: int) -> list[ModelGroup]:
    """The best models whose runs recorded the classes of cells."""
    return [model for model in here.models if model.has("cell_confusion")][:most]
