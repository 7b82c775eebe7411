"""Claims about parting touching cells: discs whose number and place are known, and connected regions where nothing is to be cut."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cellbench.metrics.distance_watershed import SADDLE_RATIOS, DistanceWatershed
from cellbench.metrics.instance import instance_scores
from cellbench.metrics.instances import connected_instances, numbered_instances
from cellbench.metrics.pixel import IGNORE
from cellbench.metrics.separation import SeparationParams, SeparationTuner


def discs(*places, size=(120, 160)):
    """Numbered discs (y, x, radius); where two overlap, a pixel is of the one whose middle is nearer in radii."""
    y, x = np.mgrid[: size[0], : size[1]]
    reach = np.stack([np.hypot(y - cy, x - cx) / r for cy, cx, r in places])
    return np.where(reach.min(0) < 1, reach.argmin(0) + 1, 0).astype(np.int32)


def cells(ids, saddle_ratio, min_area_px=10):
    return SeparationParams(saddle_ratio=saddle_ratio, min_area_px=min_area_px).instances((ids > 0).astype(np.uint8))


TOUCHING = discs((40, 40, 22), (40, 79, 22), (76, 60, 22), (90, 120, 15))


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_touching_discs_are_separated_where_they_touch_at_any_magnification(scale):
    truth = np.kron(TOUCHING, np.ones((scale, scale), np.int32))
    found = cells(truth, 0.8)
    assert found.num == 4
    for number in range(1, 5):
        mine = truth == number
        best = np.bincount(found.ids[mine], minlength=2)[1:].argmax() + 1
        assert (mine & (found.ids == best)).sum() / (mine | (found.ids == best)).sum() > 0.95


@pytest.mark.parametrize("scale", [1, 4])
def test_a_region_is_cut_and_never_shrunk(scale):
    truth = np.kron(TOUCHING, np.ones((scale, scale), np.int32))
    for saddle_ratio in SADDLE_RATIOS:
        assert np.array_equal(cells(truth, saddle_ratio, 0).ids > 0, truth > 0)


def test_saddle_ratio_zero_gives_connected_regions():
    classes = (np.random.default_rng(0).random((90, 110)) < 0.6).astype(np.uint8) * np.random.default_rng(1).integers(
        1, 3, (90, 110), np.uint8
    )
    found, wanted = DistanceWatershed(classes).instances(5, saddle_ratio=0.0), connected_instances(classes, 5)
    assert found.num == wanted.num > 3
    assert np.array_equal(found.areas_px, wanted.areas_px)
    assert len(np.unique(np.stack([found.ids, wanted.ids]).reshape(2, -1), axis=1).T) == wanted.num + 1  # the same cells, each its number


@pytest.mark.parametrize("gap_px", [1, 2])
def test_gaps_in_the_mask_are_kept_to_the_pixel(gap_px):
    mask = np.zeros((300, 300), np.int32)
    mask[20:280, 20:280] = 1
    mask[:, 150 : 150 + gap_px] = 0  # far narrower than a block
    for saddle_ratio in (0.0, 0.5, 0.9):
        found = cells(mask, saddle_ratio)
        assert sorted(found.areas_px[1:]) == sorted([260 * 130, 260 * (130 - gap_px)])


def test_convex_cells_are_not_cut():
    y, x = np.mgrid[:200, :200]
    ellipse = (np.hypot((y - 100) / 40, (x - 100) / 80) < 1).astype(np.int32)
    bar = np.zeros((200, 200), np.int32)
    bar[90:110, 10:190] = 1
    for shape in (ellipse, bar, discs((60, 60, 50))):
        assert [cells(shape, saddle_ratio).num for saddle_ratio in SADDLE_RATIOS if saddle_ratio <= 0.9] == [1] * (len(SADDLE_RATIOS) - 1)


def test_a_higher_saddle_ratio_never_gives_fewer_cells():
    num = [cells(TOUCHING, saddle_ratio).num for saddle_ratio in SADDLE_RATIOS]
    assert num == sorted(num)
    assert num[0] == 2


@pytest.mark.parametrize(
    "classes", [np.zeros((9, 7), np.uint8), np.ones((9, 7), np.uint8), np.eye(9, dtype=np.uint8), np.zeros((0, 5), np.uint8)]
)
def test_empty_full_and_thin_maps_are_taken(classes):
    num = connected_instances(classes, 0).num
    assert [DistanceWatershed(classes).instances(0, saddle_ratio=saddle_ratio).num for saddle_ratio in (0.0, 0.8)] == [num, num]


def test_touching_cells_of_two_classes_are_two_cells_and_keep_their_class():
    classes = np.zeros((40, 60), np.uint8)
    classes[10:30, 10:30], classes[10:30, 30:50] = 2, 1
    found = DistanceWatershed(classes).instances(10, saddle_ratio=0.9)
    assert sorted(found.classes[1:].tolist()) == [1, 2]


def test_tuning_finds_the_saddle_ratio_that_separates_touching_cells_only():
    touching, whole = SeparationTuner(), SeparationTuner()
    dumbbell = discs((60, 50, 30), (60, 110, 30))
    dumbbell[50:70, 50:110] = 1
    touching.add((TOUCHING > 0).astype(np.uint8), None, None, numbered_instances(TOUCHING, (TOUCHING > 0).astype(np.uint8)), 10)
    one = (dumbbell > 0).astype(np.uint8)
    whole.add(one, None, None, connected_instances(one), 10)
    assert 0 < touching.best().saddle_ratio < 1
    assert touching.best().val_ap50[f"{touching.best().saddle_ratio:g}"] == 1
    assert whole.best().saddle_ratio == 0
    assert SeparationTuner().best() == SeparationParams()


def test_tuning_by_pieces_of_cells_scores_as_the_cells_of_each_setting_do():
    rng = np.random.default_rng(0)
    truth, found = (np.argmax([gaussian_filter(rng.normal(size=(150, 200)), 5) for _ in range(3)], 0).astype(np.uint8) for _ in range(2))
    found = np.where(gaussian_filter(rng.normal(size=truth.shape), 3) > 0, found, truth).astype(np.uint8)
    truth[60:90, 50:130] = IGNORE
    true_cells = connected_instances(truth, 20)
    finder = DistanceWatershed(found)
    expected = [instance_scores(true_cells, finder.instances(20, saddle_ratio=ratio))["ap50"] for ratio in SADDLE_RATIOS]
    assert DistanceWatershed(found).ap50s(true_cells, 20) == expected
    assert len(set(expected)) > 3


def test_a_saddle_ratio_out_of_range_is_refused():
    with pytest.raises(ValueError, match="ratio"):
        DistanceWatershed(np.ones((4, 4), np.uint8)).instances(0, saddle_ratio=1.5)


def test_an_image_without_a_cell_tunes_only_where_something_was_found_in_it():
    one = (TOUCHING > 0).astype(np.uint8)
    nothing = np.zeros_like(one)
    empty, both = SeparationTuner(), SeparationTuner()
    empty.add(nothing, None, None, connected_instances(nothing), 10)
    assert empty.best().val_ap50 == {}
    both.add(one, None, None, numbered_instances(TOUCHING, one), 10)
    alone = both.best()
    both.add(nothing, None, None, connected_instances(nothing), 10)
    assert both.best().val_ap50 == alone.val_ap50
    # A find in it scores 0 at every saddle_ratio that keeps it, and 1 at one that cuts it into specks.
    bars = np.zeros_like(one)
    bars[20:30, 20:30] = bars[24:26, 30:34] = bars[20:30, 34:44] = 1
    both.add(bars, None, None, connected_instances(nothing), 150)
    found = both.best().val_ap50
    assert [round(found[f"{saddle_ratio:g}"] * 2 - alone.val_ap50[f"{saddle_ratio:g}"]) for saddle_ratio in (0.0, 0.8)] == [0, 1]


def test_a_cell_and_its_nucleus_are_separated_from_a_touching_neighbour_together():
    classes = (TOUCHING > 0).astype(np.uint8)
    for cy, cx in ((40, 40), (40, 79), (76, 60), (90, 120)):
        classes[cy - 6 : cy + 6, cx - 6 : cx + 6] = 2
    assert SeparationParams(saddle_ratio=0.8, min_area_px=10).instances(classes).num > 4
    found = SeparationParams(saddle_ratio=0.8, min_area_px=10, owners=[0, 1, 1]).instances(classes)
    assert found.num == 4
    assert set(found.classes[1:].tolist()) == {1}
    tuning = SeparationTuner(owners=(0, 1, 1))
    tuning.add(classes, None, None, numbered_instances(TOUCHING, (TOUCHING > 0).astype(np.uint8)), 10)
    assert tuning.best().owners == (0, 1, 1)
    assert tuning.best().val_ap50["0.8"] == 1
