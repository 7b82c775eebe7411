"""Scores agree with smp's counts and the published table, pooled and per image are two numbers, an empty mask has a stated score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cellbench.metrics.pixel import (
    IGNORE,
    MEASURES,
    cell_classes,
    confusion_matrix,
    count_empty_images,
    named_scores,
    nan_mean,
    per_image_scores,
    pixel_scores,
)

SMP = {"dice": "f1_score", "iou": "iou_score", "precision": "precision", "recall": "recall", "accuracy": "accuracy"}


def maps(num_classes: int, num: int = 4, height: int = 13, width: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction (N, H, W) uint8 that agree in part; every class occurs in every image of both."""
    rng = np.random.default_rng(num_classes)
    truth = rng.integers(0, num_classes, (num, height, width), dtype=np.uint8)
    prediction = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, num_classes, truth.shape)).astype(np.uint8)
    return truth, prediction


def matrices(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    return np.stack([confusion_matrix(t, p, num_classes) for t, p in zip(truth, prediction, strict=True)])


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_scores_of_each_image_and_class_are_those_of_smp(num_classes: int) -> None:
    from segmentation_models_pytorch import metrics as smp

    truth, prediction = maps(num_classes)
    stats = smp.get_stats(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long(), mode="multiclass", num_classes=num_classes)
    ours = pixel_scores(matrices(truth, prediction, num_classes))
    for name, theirs in SMP.items():
        expected = getattr(smp, theirs)(*stats, reduction="none").numpy()
        np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-6, err_msg=name)


def test_pixels_that_the_truth_ignores_count_nowhere_whatever_was_predicted_there() -> None:
    truth = np.array([[0, 1, IGNORE], [IGNORE, 1, 2]], np.uint8)
    for guess in (0, 1, 2):
        prediction = np.array([[0, 1, guess], [guess, 0, 2]], np.uint8)
        assert confusion_matrix(truth, prediction, 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert confusion_matrix(np.full((2, 2), IGNORE, np.uint8), np.zeros((2, 2), np.uint8), 2).tolist() == [[0, 0], [0, 0]]


def test_pooled_scores_are_smp_scores_of_summed_counts_and_not_the_mean_over_images() -> None:
    from segmentation_models_pytorch import metrics as smp

    truth, prediction = maps(2)
    truth[0, :, 3:] = 0  # images of unequal cell area: pooled and per-image means part
    stats = smp.get_stats(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long(), mode="multiclass", num_classes=2)
    counts = matrices(truth, prediction, 2)
    pooled = named_scores("test", counts, ("background", "cell"))
    for name, theirs in SMP.items():
        summed = getattr(smp, theirs)(*(s.sum(0, keepdim=True) for s in stats), reduction="none")[0]
        assert pooled[f"test/{name}"] == pytest.approx(float(summed[1]), rel=1e-6)
        assert pooled[f"test_background/{name}"] == pytest.approx(float(summed[0]), rel=1e-6)
        assert pooled[f"test_mean/{name}"] == pytest.approx(float(summed.mean()), rel=1e-6)
    assert abs(pooled["test/dice"] - per_image_scores(counts)["dice"].mean()) > 0.01


def test_the_published_table_follows_from_three_of_its_numbers() -> None:
    """seed.md: precision, recall and accuracy of the cell class fix the counts, and the counts the other six numbers of its tables."""
    precision, recall, accuracy, pixels = 0.9396, 0.9680, 0.9709, 159 * 1600 * 1200
    wrong = (1 - accuracy) * pixels
    hit = wrong / (1 / precision - 1 + 1 / recall - 1)
    extra, missed = hit * (1 / precision - 1), hit * (1 / recall - 1)
    counts = np.array([[[pixels - hit - wrong, extra], [missed, hit]]])
    published = {
        "test/iou": 0.9112, "test/dice": 0.9536, "test/precision": 0.9396, "test/recall": 0.9680, "test/accuracy": 0.9709,
        "test_background/iou": 0.9584, "test_background/dice": 0.9788, "test_mean/iou": 0.9348, "test_mean/dice": 0.9662,
    }  # fmt: skip
    ours = named_scores("test", counts, ("background", "cell"))
    assert {name: ours[name] for name in published} == pytest.approx(published, abs=2e-4)


def test_dice_follows_from_iou() -> None:
    truth, prediction = maps(3)
    ours = pixel_scores(matrices(truth, prediction, 3))
    np.testing.assert_allclose(ours.dice, 2 * ours.iou / (1 + ours.iou))


def test_rows_are_truth_and_columns_prediction() -> None:
    counts = confusion_matrix(np.array([[1, 1, 0]], np.uint8), np.array([[0, 1, 0]], np.uint8), 2)
    assert counts.tolist() == [[1, 0], [1, 1]]
    ours = pixel_scores(counts)
    assert (ours.recall[1], ours.precision[1]) == (0.5, 1.0)


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    truth, prediction = maps(3)
    np.testing.assert_array_equal(matrices(truth, prediction, 3).sum(0), confusion_matrix(truth, prediction, 3))


def test_many_classes_do_not_overflow_the_bytes_they_come_in() -> None:
    truth = np.full((3, 3), 199, np.uint8)
    counts = confusion_matrix(truth, truth, 200)
    assert counts[199, 199] == counts.sum() == 9


@pytest.mark.parametrize(
    ("truth", "prediction", "dice", "accuracy"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 1], 0.0, 0.75),  # a false find in an empty image
        ([0, 0, 0, 1], [0, 0, 0, 0], 0.0, 0.75),  # all missed
        ([1, 1, 1, 1], [1, 1, 1, 1], 1.0, 1.0),  # no background at all
    ],
)
def test_what_is_in_only_one_of_both_scores_zero(truth, prediction, dice, accuracy) -> None:
    counts = confusion_matrix(np.array([truth], np.uint8), np.array([prediction], np.uint8), 2)
    ours = per_image_scores(counts[None])
    assert {name: ours[name].tolist() for name in MEASURES} == {
        "dice": [dice], "iou": [dice], "precision": [dice], "recall": [dice], "accuracy": [accuracy],
    }  # fmt: skip


def test_an_image_without_a_cell_and_a_find_has_no_score_and_is_left_out_of_means() -> None:
    """{empty and right, 1.0, 0.667} is 0.833 over the two images with a cell, 0.889 by the older rule, 0.857 pooled, 0.556 by smp's default."""
    counts = np.array([[[9, 0], [0, 0]], [[7, 0], [0, 2]], [[6, 1], [0, 1]]])
    assert nan_mean(per_image_scores(counts)["dice"]) == pytest.approx((1 + 2 / 3) / 2)
    assert per_image_scores(counts, absent=1.0)["dice"].mean() == pytest.approx(0.889, abs=1e-3)
    assert named_scores("test", counts, ("background", "cell"))["test/dice"] == pytest.approx(0.857, abs=1e-3)
    assert count_empty_images(counts) == (1, 0)
    assert count_empty_images(np.array([[[9, 0], [0, 0]], [[8, 1], [0, 0]]])) == (2, 1)


def test_without_any_pixel_there_is_no_score_and_by_the_older_rule_it_is_one() -> None:
    assert np.isnan([getattr(pixel_scores(np.zeros((2, 2))), name) for name in MEASURES]).all()
    assert {float(value) for name in MEASURES for value in getattr(pixel_scores(np.zeros((2, 2)), absent=1.0), name)} == {1.0}


FOUR = ("background", "red", "white", "platelet")


def counts_of(truth, prediction, num):
    return confusion_matrix(np.array([truth], np.uint8), np.array([prediction], np.uint8), num)


def test_a_class_that_is_nowhere_does_not_lift_means() -> None:
    three, four = (counts_of([0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 2, 1], num)[None] for num in (3, 4))
    mine, wider = named_scores("test", three, FOUR[:3]), named_scores("test", four, FOUR)
    for name in MEASURES:
        assert wider[f"test/{name}"] == mine[f"test/{name}"] == pytest.approx((mine[f"test_red/{name}"] + mine[f"test_white/{name}"]) / 2)
        assert wider[f"test_mean/{name}"] == mine[f"test_mean/{name}"]
        assert math.isnan(wider[f"test_platelet/{name}"])
        np.testing.assert_array_equal(per_image_scores(four)[name], per_image_scores(three)[name])
    # Red: 2 * 1 / (2 + 2), white: 2 * 1 / (2 + 1); the older rule adds a 1 for the platelets.
    assert mine["test/dice"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert wider["test/dice_empty1"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)


def test_a_stray_pixel_of_a_class_that_no_mask_holds_changes_no_pooled_mean_by_a_share_of_the_classes() -> None:
    extra = counts_of([0, 0, 0, 1, 1, 2], [3, 0, 0, 1, 1, 2], 4)[None]
    ours = named_scores("test", extra, FOUR)
    assert (ours["test/dice"], ours["test_platelet/dice"]) == (1, 0)
    assert per_image_scores(extra, unused=(3,))["dice"] == [1]
    assert per_image_scores(extra)["dice"] == pytest.approx([2 / 3])  # a class of the data: a false find in this image


def test_where_no_mask_has_a_cell_a_find_scores_zero() -> None:
    assert named_scores("test", counts_of([0, 0], [0, 1], 2)[None], FOUR[:2])["test/dice"] == 0
    assert math.isnan(named_scores("test", counts_of([0, 0], [0, 0], 2)[None], FOUR[:2])["test/dice"])


def test_with_several_cell_classes_the_cell_score_is_their_mean_without_the_background() -> None:
    truth, prediction = maps(3)
    counts = matrices(truth, prediction, 3)
    ours = named_scores("test", counts, ("background", "red", "white"))
    assert ours["test/dice"] == pytest.approx((ours["test_red/dice"] + ours["test_white/dice"]) / 2)
    assert ours["test_mean/dice"] == pytest.approx((ours["test_background/dice"] + 2 * ours["test/dice"]) / 3)
    np.testing.assert_allclose(per_image_scores(counts)["dice"], pixel_scores(counts).dice[:, cell_classes(3)].mean(1))


def test_names_are_those_of_the_contract() -> None:
    two = named_scores("test", np.ones((1, 2, 2)), ("background", "cell"))
    three = named_scores("val", np.ones((1, 3, 3)), ("background", "red", "white"))
    old = {"dice_empty1", "iou_empty1"}
    assert set(two) == {f"{group}/{m}" for group in ("test", "test_background", "test_mean") for m in MEASURES} | {f"test/{m}" for m in old}
    groups = ("val", "val_background", "val_red", "val_white", "val_mean")
    assert set(three) == {f"{group}/{m}" for group in groups for m in MEASURES} | {f"val/{m}" for m in old}


@pytest.mark.parametrize(
    ("truth", "prediction", "says"),
    [(np.zeros((2, 3), int), np.zeros((3, 2), int), "truth is"), (np.full((1, 1), 2), np.zeros((1, 1), int), "not below 2"),
     (np.zeros((1, 1), int), np.full((1, 1), 2), "not below 2"), (np.full((1, 1), -1), np.zeros((1, 1), int), "negative")],
)  # fmt: skip
def test_maps_that_do_not_fit_are_refused(truth: np.ndarray, prediction: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        confusion_matrix(truth, prediction, 2)
