"""Planted faults of masks are found by kind and place; small differences of outlines, unparted cells and dissenting models are none."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_faults import plant

from cellbench.data.audit.label_faults import LabelFault, LabelFaults, find_label_faults, rank_faults
from cellbench.data.dataset import Sample
from cellbench.metrics.instances import numbered_instances, reference_instances

SIZE = (240, 320)
RADIUS = 12
USUAL_PX = np.pi * RADIUS**2
SAMPLE = Sample(name="i.png", image=Path("i.png"), mask=Path("mask/i.png"))


def disc(x: float, y: float, radius: float = RADIUS) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def ids_of(*discs: np.ndarray) -> np.ndarray:
    out = np.zeros(SIZE, np.int32)
    for number, one in enumerate(discs, 1):
        out[one] = number
    return out


def faults(
    ids: np.ndarray, *found: np.ndarray, classes: np.ndarray | None = None, predicted: list[np.ndarray] | None = None
) -> list[LabelFault]:
    """Of a mask, by models that find these pixels."""
    truth = numbered_instances(ids, (ids > 0).astype(np.uint8) if classes is None else classes)
    votes = [one.astype(np.uint8) * 250 for one in found]
    listed, outlines = find_label_faults("i.png", truth, ids > 0, votes, predicted or [one.astype(np.uint8) for one in found], USUAL_PX)
    return [fault for _, fault in rank_faults([(SAMPLE, one) for one in listed], outlines)]


GRID = [(x, y) for x in range(30, 310, 40) for y in range(30, 230, 40)]
ALL = ids_of(*(disc(x, y) for x, y in GRID))


def test_right_masks_have_no_faults_whatever_the_models_join_or_draw_a_little_wider() -> None:
    wide = ids_of(*(disc(x, y, RADIUS + 1.5) for x, y in GRID)) > 0
    assert faults(ALL, ALL > 0, wide) == []
    pair = ids_of(disc(60, 60), disc(83, 60))  # which touch: the models do not part them
    assert faults(pair, pair > 0) == []
    parted = pair.copy()
    parted[:, 71:73] = 0
    assert faults(parted, pair > 0, pair > 0) == []


def test_each_kind_is_found_where_it_is() -> None:
    assert [
        (one.kind, round(one.x_px), round(one.y_px), one.num_models) for one in faults(np.where(ALL == 9, 0, ALL), ALL > 0, ALL > 0)
    ] == [("missing", GRID[8][0], GRID[8][1], 2)]
    (false,) = faults(ALL, np.isin(ALL, [0, 9], invert=True), np.isin(ALL, [0, 9], invert=True))
    assert (false.kind, round(false.x_px), round(false.y_px), false.num_models) == ("false", *GRID[8], 2)
    moved = ids_of(*(disc(x + 10 * (k == 8), y) for k, (x, y) in enumerate(GRID)))
    (outline,) = faults(moved, ALL > 0, ALL > 0)
    both = (disc(*GRID[8]) & disc(GRID[8][0] + 10, GRID[8][1])).sum()
    assert (outline.kind, round(outline.x_px), round(outline.y_px)) == ("outline", GRID[8][0] + 10, GRID[8][1])
    assert outline.score == pytest.approx(1 - both / (2 * disc(*GRID[8]).sum() - both), abs=0.01)


def test_a_cell_missing_beside_one_that_the_models_join_it_with_is_found_as_missing() -> None:
    pair = ids_of(disc(60, 60), disc(80, 60))
    (one,) = faults(np.where(pair == 2, 0, pair), pair > 0)
    assert one.kind == "missing"
    assert abs(one.x_px - 80) < 4


def test_the_score_is_the_mean_probability_and_a_minority_of_models_is_not_enough() -> None:
    without = np.where(ALL == 9, 0, ALL)
    (one,) = faults(without, ALL > 0, ALL > 0, ALL > 0, without > 0)
    assert (one.score, one.num_models) == (pytest.approx(0.75 * 250 / 255, abs=1e-4), 3)
    assert faults(without, ALL > 0, without > 0, without > 0) == []


def test_models_that_draw_every_cell_wider_find_only_the_outline_that_differs_more() -> None:
    wide = ids_of(*(disc(x, y, RADIUS + 5) for x, y in GRID)) > 0
    assert faults(ALL, wide) == []
    small = np.where((ALL == 9) & ~disc(*GRID[8], radius=6), 0, ALL)
    (one,) = faults(small, wide)
    assert (one.kind, round(one.x_px)) == ("outline", GRID[8][0])


def test_a_cell_of_another_class_is_found_where_most_models_say_so() -> None:
    classes = (ALL > 0).astype(np.uint8)
    classes[ALL == 3] = 2
    other = np.where(ALL == 9, 2, classes).astype(np.uint8)
    (one,) = faults(ALL, ALL > 0, ALL > 0, classes=classes, predicted=[other, other])
    assert (one.kind, one.classes, one.score, one.num_models) == ("class", (1, 2), 1.0, 2)
    assert faults(ALL, ALL > 0, ALL > 0, classes=classes, predicted=[other, classes]) == []


def test_cells_without_a_mark_at_the_border_come_last() -> None:
    cut = disc(2, 150)
    without = np.where(ALL == 9, 0, ALL)
    found = faults(without, (ALL > 0) | cut, cut, cut | (ALL > 0))
    assert [(one.kind, round(one.score, 2)) for one in found] == [("missing", 0.65), ("border", 0.98)]


def test_ignored_pixels_hold_no_fault() -> None:
    classes = (ALL > 0).astype(np.uint8)
    classes[disc(*GRID[8], radius=RADIUS + 4)] = 255
    truth, _ = reference_instances(classes, np.where(classes == 255, 0, ALL), 1)
    assert find_label_faults("i.png", truth, classes > 0, [(ALL > 0).astype(np.uint8) * 255], [], USUAL_PX)[0] == []


def test_an_empty_mask_lacks_every_cell_and_an_empty_image_has_false_ones() -> None:
    none = np.zeros(SIZE, bool)
    assert [one.kind for one in faults(np.zeros(SIZE, np.int32), ALL > 0)] == ["missing"] * len(GRID)
    assert [one.kind for one in faults(ALL, none)] == ["false"] * len(GRID)


def test_planted_faults_are_found_by_models_that_see_the_truth_with_noise() -> None:
    rng = np.random.default_rng(0)
    found, planted = 0, []
    for _ in range(3):
        wrong, here = plant(ALL, rng, 0.1)
        seen = [ids_of(*(disc(x, y, RADIUS + rng.normal(0, 0.7)) for x, y in GRID)) > 0 for _ in range(3)]
        listed = faults(wrong, *seen)
        assert len(listed) == len(here)
        planted += here
        found += sum(any(a.kind == b.kind and np.hypot(a.x - b.x_px, a.y - b.y_px) < 4 for b in listed) for a in here)
    assert {one.kind for one in planted} == {"missing", "false", "outline"}
    assert found == len(planted)


def test_the_list_is_ranked_and_its_file_has_a_row_a_fault() -> None:
    without = np.where(ALL == 9, 0, ALL)
    (one,) = faults(without, ALL > 0)
    some = [(SAMPLE, one), (SAMPLE, replace(one, kind="class", score=0.6, classes=(1, 2)))]
    every = LabelFaults(
        found=some, classes=("background", "red", "white"), experiment="e", models=["a", "b"], num_judged=3, num_images=4, num_cells=90
    )
    assert every.finding.images == ("i.png",)
    assert every.finding.message.startswith(
        "2 cells are likely wrong in the masks of 1 of 3 images (cell without a mark 1, other class 1): "
    )
    assert "say more about the models" not in every.finding.message
    assert "say more about the models" in replace(every, num_cells=9).finding.message
    rows = list(csv.DictReader(io.StringIO(every.csv())))
    assert [(row["kind"], row["models_class"], row["x_px"]) for row in rows] == [
        ("missing", "", str(one.x_px)),
        ("class", "white", str(one.x_px)),
    ]
    assert "labels: 3 of 4 images compared with a, b of 'e'; the models were trained or validated on the others." in every.lines()[1]
