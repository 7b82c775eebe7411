"""Claims about outline and cell scores; against hand-worked examples, distance transforms, an assignment solver and brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.optimize import linear_sum_assignment

from cellbench.metrics.boundary import boundary_pixels, dilate
from cellbench.metrics.instance import SCORES, CellPairs, ReferenceMask, instance_scores
from cellbench.metrics.instances import connected_instances, drop_ignored, merge_parts_into_objects, numbered_instances, reference_instances
from cellbench.metrics.pixel import IGNORE


def drawn(*boxes, size=(40, 60)):
    """A map of numbered boxes (top, left, height, width)."""
    ids = np.zeros(size, np.int32)
    for number, (y, x, h, w) in enumerate(boxes, 1):
        ids[y : y + h, x : x + w] = number
    return ids


def as_cells(ids):
    return numbered_instances(ids, (ids > 0).astype(np.uint8))


def agreement(truth, found, num_classes=2, **more):
    return ReferenceMask(truth.astype(np.uint8), num_classes, **more).agreement(found.astype(np.uint8))


def blobs(seed, num=12, size=(80, 90)):
    rng = np.random.default_rng(seed)
    ids = np.zeros(size, np.int32)
    for number in range(1, num + 1):
        y, x, h, w = rng.integers([0, 0, 4, 4], [70, 80, 16, 16])
        ids[y : y + h, x : x + w] = number
    return ids


# --- outlines -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0, 0.5, 1, 1.5, 2, 2.9, 5, 100])
def test_dilation_is_the_distance_transform_cut_at_the_radius(radius):
    mask = np.random.default_rng(0).random((30, 47)) < 0.01
    assert np.array_equal(dilate(mask, radius), distance_transform_edt(~mask) <= radius)


def test_contour_is_the_mask_without_its_erosion_and_the_frame_is_none():
    mask = blobs(1) > 0
    assert np.array_equal(boundary_pixels(mask), mask & ~binary_erosion(mask, border_value=1))
    assert not boundary_pixels(np.ones((5, 5), bool)).any()


@pytest.mark.parametrize("tolerance", [1, 2, 3.5])
def test_outline_scores_equal_their_definitions_by_full_distance_transforms(tolerance):
    truth, found = blobs(2) > 0, blobs(3) > 0
    edge_t, edge_f = (m & ~binary_erosion(m, border_value=1) for m in (truth, found))
    to_t, to_f = distance_transform_edt(~edge_t), distance_transform_edt(~edge_f)
    nsd = ((to_f[edge_t] <= tolerance).sum() + (to_t[edge_f] <= tolerance).sum()) / (edge_t.sum() + edge_f.sum())
    band_t, band_f = (m & (distance_transform_edt(m) <= tolerance) for m in (truth, found))
    band = 2 * (band_t & band_f).sum() / (band_t.sum() + band_f.sum())
    got = agreement(truth, found, tolerance_px=tolerance)
    assert (got.nsd, got.boundary_dice) == pytest.approx((nsd, band), abs=1e-12)


def test_a_square_moved_by_three_pixels_by_hand():
    truth, found = drawn((10, 10, 20, 20)) > 0, drawn((10, 13, 20, 20)) > 0
    got = agreement(truth, found)
    # 76 contour pixels each; upper and lower sides mostly overlie, the left and right ones are 3 px apart. Counted pixel by pixel.
    edge = np.zeros((40, 60), bool)
    edge[10:30, 10] = edge[10:30, 29] = edge[10, 10:30] = edge[29, 10:30] = True
    other = np.roll(edge, 3, axis=1)
    ys, xs = np.nonzero(other)
    far = sum(min((ys - y) ** 2 + (xs - x) ** 2) > 4 for y, x in zip(*np.nonzero(edge), strict=True))
    assert edge.sum() == 76
    assert got.nsd == pytest.approx(1 - far / 76)
    assert agreement(truth, found, tolerance_px=3).nsd == 1


def test_a_wrong_class_is_a_missing_outline_and_a_missing_cell():
    truth, found = drawn((5, 5, 20, 20)), 2 * drawn((5, 5, 20, 20))
    got = agreement(truth, found, num_classes=3)
    assert (got.nsd, got.ap50, got.aji, got.pq) == (0, 0, 0, 0)
    assert got.num_predicted == got.num_true


# --- cells --------------------------------------------------------------------------------------------------------------------------------


def test_cell_scores_by_hand():
    truth = as_cells(drawn((0, 0, 10, 10), (0, 20, 10, 10), (20, 0, 10, 10)))  # 100 px each
    found = as_cells(drawn((0, 0, 10, 10), (0, 20, 10, 7), (30, 40, 5, 10)))  # the same; 70 of 100; one where none is (50 px)
    got = instance_scores(truth, found)
    assert got["num_true"] == got["num_predicted"] == 3
    assert got["ap50"] == 2 / 4  # 2 hits, 1 false, 1 missed
    # IoU 1 and 0.7: two hits at 0.50 to 0.65, one from 0.70 on (the IoU must exceed the threshold).
    assert got["ap50_95"] == pytest.approx((4 * 2 / 4 + 6 * 1 / 5) / 10)
    assert got["dq"] == pytest.approx(2 / 3)
    assert got["sq"] == pytest.approx(0.85)
    assert got["pq"] == pytest.approx(2 / 3 * 0.85)
    assert got["aji"] == pytest.approx((100 + 70) / (100 + 100 + 100 + 50))


def test_half_and_half_matches_nothing():
    halves = drawn((0, 0, 10, 10), (0, 10, 10, 10))
    assert instance_scores(as_cells((halves > 0).astype(np.int32)), as_cells(halves))["ap50"] == 0


def test_two_cells_grown_together_cost_both_of_them_but_no_dice():
    truth, found = drawn((5, 5, 20, 20), (5, 26, 20, 20)), drawn((5, 5, 20, 41))
    got = agreement(truth > 0, found > 0)
    assert got.num_true == 2
    assert got.num_predicted == 1
    assert got.ap50 == 0


OUTCOMES = ("num_true", "num_found", "num_missed", "num_split", "num_merged", "num_predicted", "num_extra")


@pytest.mark.parametrize(
    ("truth", "found", "outcomes"),
    [
        # One cell unchanged, one cut in halves (IoU 0.5 is not above 0.5), two merged, one missed, and one false positive.
        (
            [(0, 0, 10, 10), (0, 20, 10, 10), (0, 40, 10, 8), (0, 49, 10, 8), (20, 0, 10, 10)],
            [(0, 0, 10, 10), (0, 20, 10, 5), (0, 25, 10, 5), (0, 40, 10, 17), (30, 40, 5, 5)],
            (5, 1, 1, 1, 2, 5, 4),
        ),
        # A small cell swallowed by a large one's prediction: the large one is found (200 of 240 px), the small one merged.
        ([(0, 0, 10, 20), (0, 20, 10, 4)], [(0, 0, 10, 24)], (2, 1, 0, 0, 1, 1, 0)),
        # A piece of 70 % is a match, its rest an extra.
        ([(0, 0, 10, 10)], [(0, 0, 10, 7), (0, 7, 10, 3)], (1, 1, 0, 0, 0, 2, 1)),
        # As many cells found as are there, and none of them right.
        ([(0, 0, 10, 10), (0, 20, 10, 10)], [(20, 0, 10, 10), (20, 20, 10, 10)], (2, 0, 2, 0, 0, 2, 2)),
        # One piece that is not half of the cell is no split.
        ([(0, 0, 10, 10)], [(0, 0, 10, 4)], (1, 0, 1, 0, 0, 1, 1)),
        ([], [], (0, 0, 0, 0, 0, 0, 0)),
        ([], [(0, 0, 5, 5)], (0, 0, 0, 0, 0, 1, 1)),
    ],
)
def test_what_became_of_each_cell_by_hand(truth, found, outcomes):
    got = instance_scores(as_cells(drawn(*truth)), as_cells(drawn(*found)))
    assert tuple(got[name] for name in OUTCOMES) == outcomes


@pytest.mark.parametrize("seed", range(8))
def test_every_cell_is_counted_once_and_found_are_the_matches_of_ap50(seed):
    truth, found = as_cells(blobs(seed)), as_cells(np.roll(blobs(seed), 2, axis=seed % 2) | blobs(seed + 50) * (seed % 3 > 0))
    got = instance_scores(truth, found)
    assert got["num_found"] + got["num_missed"] + got["num_split"] + got["num_merged"] == got["num_true"] == truth.num
    assert got["num_found"] + got["num_extra"] == got["num_predicted"] == found.num
    assert got["ap50"] == pytest.approx(got["num_found"] / (truth.num + found.num - got["num_found"]))


def nested(size=(60, 80)):
    """Two cells of class 1, each with a nucleus of class 2 inside; a third nucleus that fills its cell; and one cell of class 3 that touches."""
    classes = np.zeros(size, np.uint8)
    classes[5:25, 5:25] = classes[5:25, 40:60] = 1
    classes[10:20, 10:20] = classes[10:20, 45:55] = 2
    classes[35:50, 5:20] = 2
    classes[5:25, 25:38] = 3
    return classes


def test_an_object_and_its_parts_are_one_cell_of_the_objects_class():
    classes = nested()
    assert connected_instances(classes).num == 6
    cells, _ = reference_instances(classes, None, owners=(0, 1, 1, 3))
    assert sorted(zip(cells.classes[1:].tolist(), cells.areas_px[1:].tolist(), strict=True)) == [(1, 225), (1, 400), (1, 400), (3, 260)]
    got = agreement(classes, classes, num_classes=4, owners=(0, 1, 1, 3))
    assert (got.num_true, got.num_found, got.ap50, got.pq, got.nsd) == (4, 4, 1, 1, 1)
    # A nucleus that is not found costs outlines, and no cell.
    got = agreement(classes, np.where(classes == 2, 1, classes), num_classes=4, owners=(0, 1, 1, 3))
    assert (got.num_found, got.ap50) == (4, 1)
    assert got.nsd < 1
    assert np.array_equal(merge_parts_into_objects(classes, ()), classes)


def test_a_truth_that_numbers_parts_gives_them_the_number_of_their_object():
    classes = nested()
    ids = np.zeros(classes.shape, np.int32)
    for number, (rows, columns) in enumerate(((np.s_[5:25], np.s_[5:25]), (np.s_[5:25], np.s_[40:60]), (np.s_[5:25], np.s_[25:38])), 1):
        ids[rows, columns] = number
    for number, (rows, columns) in enumerate(((np.s_[10:20], np.s_[10:20]), (np.s_[10:20], np.s_[45:55]), (np.s_[35:50], np.s_[5:20])), 4):
        ids[rows, columns] = number
    cells, _ = reference_instances(classes, ids, owners=(0, 1, 1, 3))
    assert sorted(zip(cells.classes[1:].tolist(), cells.areas_px[1:].tolist(), strict=True)) == [(1, 225), (1, 400), (1, 400), (3, 260)]


def test_a_class_that_is_nowhere_does_not_lift_outline_scores():
    truth, found = drawn((5, 5, 20, 20)), drawn((5, 8, 20, 20))
    two, three = agreement(truth, found), agreement(truth, found, num_classes=3)
    assert (two.nsd, two.boundary_dice) == (three.nsd, three.boundary_dice)
    extra = found.copy()
    extra[0, 0] = 2
    assert agreement(truth, extra, num_classes=3).nsd == pytest.approx(two.nsd / 2)
    assert agreement(truth, extra, num_classes=3, unused=(2,)).nsd == two.nsd


@pytest.mark.parametrize("seed", range(8))
def test_matching_is_what_an_assignment_solver_finds(seed):
    truth, found = as_cells(blobs(seed)), as_cells(np.roll(blobs(seed), 1, axis=seed % 2))
    iou = np.zeros((truth.num, found.num))
    for i in range(truth.num):
        for j in range(found.num):
            a, b = truth.ids == i + 1, found.ids == j + 1
            iou[i, j] = (a & b).sum() / (a | b).sum()
    got = instance_scores(truth, found)
    precisions = []
    for threshold in np.arange(10, 20) / 20:
        hit = iou > threshold
        rows, columns = linear_sum_assignment(-(hit + iou / 100))
        num = hit[rows, columns].sum()
        precisions.append(num / (truth.num + found.num - num))
        if threshold == 0.5:
            assert got["ap50"] == pytest.approx(precisions[0])
            assert got["sq"] == pytest.approx(iou[rows, columns][hit[rows, columns]].mean())
    assert got["ap50_95"] == pytest.approx(np.mean(precisions))
    # AJI with loops, as its authors wrote it.
    shared = whole = 0
    used = set()
    for i in range(truth.num):
        j = int(iou[i].argmax())
        if iou[i, j] > 0:
            a, b = truth.ids == i + 1, found.ids == j + 1
            shared, whole = shared + (a & b).sum(), whole + (a | b).sum()
            used.add(j)
        else:
            whole += (truth.ids == i + 1).sum()
    whole += sum((found.ids == j + 1).sum() for j in range(found.num) if j not in used)
    assert got["aji"] == pytest.approx(shared / whole)


def test_overlaps_sum_to_the_common_pixels():
    truth, found = as_cells(blobs(5)), as_cells(blobs(6))
    shared = CellPairs.of(truth, found).shared
    assert shared.sum() == ((truth.ids > 0) & (found.ids > 0)).sum()


def test_many_cells_on_both_sides_fit_memory_and_agree_with_themselves():
    ids = np.arange(1, 10_001, dtype=np.int32).reshape(100, 100)
    cells = as_cells(np.kron(ids, np.ones((2, 2), np.int32)))
    got = instance_scores(cells, cells)
    assert got["num_true"] == 10_000
    assert got["ap50_95"] == got["aji"] == got["pq"] == 1


@pytest.mark.parametrize(("truth", "found", "expected"), [(0, 0, None), (0, 1, 0), (1, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("shape", ["cell", "whole picture"])
def test_nothing_in_both_has_no_score_and_in_one_is_wrong(truth, found, expected, shape):
    mask = np.ones((40, 60)) if shape == "whole picture" else drawn((5, 5, 20, 20))
    got = agreement(mask * truth, mask * found)
    scores = {None if np.isnan(getattr(got, name)) else getattr(got, name) for name in SCORES}
    assert scores == {expected}


def test_specks_are_no_cells_and_diagonal_neighbours_are_two():
    classes = np.zeros((40, 60), np.uint8)
    classes[0:10, 0:10] = classes[10:20, 10:20] = classes[30:39, 30:41] = 1  # 100, 100 and 99 px
    cells = connected_instances(classes, 100)
    assert cells.num == 2
    assert cells.areas_px.tolist() == [0, 100, 100]
    assert connected_instances(classes, 1).num == 3


def test_numbers_of_a_mask_are_used_as_they_are():
    ids = drawn((0, 0, 10, 20), (10, 0, 10, 20), (30, 30, 3, 4))  # the first two touch, the third is small
    ids[ids == 2] = 60_000
    classes = (ids > 0).astype(np.uint8)
    got = agreement(classes, classes, ids=ids)
    assert got.num_true == 3
    assert got.num_predicted == 2  # touching cells are one to connected regions; 12 px are enough where cells are numbered
    strange = np.where(ids == 3, 2**40, ids.astype(np.int64))
    assert numbered_instances(strange, classes).num == 3
    with pytest.raises(ValueError, match="from 0"):
        numbered_instances(-ids, classes)


def test_a_large_image_takes_a_fraction_of_a_second():
    rng = np.random.default_rng(0)
    truth = np.zeros((1200, 1600), np.uint8)
    ys, xs = np.mgrid[:99, :99]
    disc = (ys - 49) ** 2 + (xs - 49) ** 2 < 45**2
    for y in range(0, 1100, 100):
        for x in range(0, 1500, 100):
            truth[y : y + 99, x : x + 99] |= disc
    found = np.roll(truth, 2, 1) ^ (rng.random(truth.shape) < 0.002)
    start = time.process_time()
    got = ReferenceMask(truth, 2).agreement(found.astype(np.uint8))
    assert time.process_time() - start < 1  # 0.2 s measured; the test's own limit is for a busy machine
    assert got.num_true == 11 * 15


# --- pixels that the truth ignores ------------------------------------------------------------------------------------------------------


def ignoring(ids, *boxes):
    """A class map (H, W) of cells' numbers, with boxes (top, left, height, width) that count nowhere."""
    classes = (ids > 0).astype(np.uint8)
    for y, x, h, w in boxes:
        classes[y : y + h, x : x + w] = IGNORE
    return classes


def test_predicted_cells_in_ignored_pixels_are_neither_hits_nor_false():
    ids = drawn((2, 2, 10, 10), (20, 2, 10, 10))
    classes = ignoring(ids, (0, 30, 40, 30))
    within = drawn((2, 2, 10, 10), (20, 2, 10, 10), (5, 40, 10, 10), (25, 28, 10, 10))  # the last by 2 of its 10 columns outside
    for numbers in (ids, None):
        truth = ReferenceMask(classes, 2, numbers, min_area_px=10)
        got = truth.agreement((within > 0).astype(np.uint8))
        assert (got.num_true, got.num_predicted) == (2, 2)
        assert (got.ap50, got.pq, got.aji, got.nsd, got.boundary_dice) == (1, 1, 1, 1, 1)
    mostly_outside = drawn((2, 2, 10, 10), (20, 2, 10, 10), (25, 24, 10, 10))
    got = ReferenceMask(classes, 2, ids, min_area_px=10).agreement((mostly_outside > 0).astype(np.uint8))
    assert (got.num_predicted, got.ap50) == (3, 2 / 3)


def test_a_cell_is_judged_by_what_is_left_of_it():
    ids = drawn((5, 5, 10, 10))
    classes = ignoring(ids, (5, 5, 10, 4))  # 60 px are left
    for found in (drawn((5, 5, 10, 10)), drawn((5, 9, 10, 6)), drawn((5, 6, 10, 9))):
        got = ReferenceMask(classes, 2, ids, min_area_px=1).agreement((found > 0).astype(np.uint8))
        assert (got.num_true, got.num_predicted, got.sq, got.aji) == (1, 1, 1, 1)
    half = drawn((5, 9, 10, 3))  # 30 of the 60
    assert ReferenceMask(classes, 2, ids, min_area_px=1).found(as_cells(half))["sq"] == 0


def test_an_image_of_ignored_pixels_only_has_nothing_to_find():
    classes = np.full((20, 20), IGNORE, np.uint8)
    got = ReferenceMask(classes, 3).agreement(np.ones((20, 20), np.uint8))
    assert (got.num_true, got.num_predicted) == (0, 0)


def test_nothing_ignored_changes_nothing():
    ids = blobs(4)
    cells = as_cells(blobs(5))
    truth = as_cells(ids)
    assert truth.ignored is None
    assert drop_ignored(cells, None) is cells
    assert drop_ignored(cells, np.zeros(ids.shape, bool)).areas_px.tolist() == cells.areas_px.tolist()


def test_what_is_too_small_to_be_a_cell_is_counted():
    ids = drawn((0, 0, 3, 3), (10, 10, 4, 4), (20, 20, 9, 9))
    assert connected_instances((ids > 0).astype(np.uint8), 16).num_left_out == 1
    assert numbered_instances(ids, (ids > 0).astype(np.uint8), 17).num_left_out == 2
