"""Unlabelled images are ranked by the disagreement of masks and the distance from all that is labelled or ranks higher."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from labelled_folders import pairs, picture

from cellbench.cli.next_images import find_unlabelled
from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError
from cellbench.inference.labelling_order import mask_spread, rank_images
from cellbench.metrics.training_features import TrainingFeatures


def features_of(*rows: tuple[float, float]) -> TrainingFeatures:
    """Of training images with two features at one depth, unscaled; the unit of the distance is 1."""
    array = np.array(rows)
    return TrainingFeatures(rows={0: array}, centre={0: np.zeros(2)}, scale={0: np.ones(2)}, held_out={0: np.ones(3)})


def by_hand(spreads: list[float], points: list[tuple[float, float]], labelled: list[tuple[float, float]]) -> list[int]:
    """The order by the definition: each time the highest score of spread and distance to the nearest labelled or ranked image."""
    order: list[int] = []
    usual = sorted(spreads)[len(spreads) // 2]  # an odd number
    while len(order) < len(points):
        near = {
            k: min(np.sqrt(np.mean(np.subtract(points[k], one) ** 2)) for one in [*labelled, *(points[j] for j in order)])
            for k in range(len(points))
            if k not in order
        }
        order.append(max(near, key=lambda k: 1 - usual / (spreads[k] + usual) / (near[k] + 1)))
    return order


def test_the_order_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        points, labelled = [[tuple(one) for one in rng.normal(0, 2, (num, 2))] for num in (13, 4)]
        spreads = rng.uniform(0, 0.5, 13).tolist()
        found = rank_images(spreads, [{0: np.array(one)} for one in points], [features_of(*labelled[:2]), features_of(*labelled[2:])])
        assert [one.number for one in found] == by_hand(spreads, points, labelled)


def test_an_image_of_a_new_kind_ranks_first_although_models_agree_on_it() -> None:
    points = [(0.5, 0.0), (9.0, 0.0), (0.0, 0.5)]
    found = rank_images([0.1, 0.0, 0.05], [{0: np.array(one)} for one in points], [features_of((0.0, 0.0))])
    assert [one.number for one in found] == [1, 0, 2]
    assert found[0].score == pytest.approx(1 - 1 / (1 + found[0].distance))


def test_of_two_alike_images_the_second_ranks_behind_others() -> None:
    points = [(5.0, 0.0), (5.1, 0.0), (0.0, 2.0)]
    found = rank_images([0.3, 0.3, 0.3], [{0: np.array(one)} for one in points], [features_of((0.0, 0.0))])
    assert [one.number for one in found] == [1, 2, 0]


def test_without_features_the_spread_decides_and_with_one_model_the_distance() -> None:
    assert [one.number for one in rank_images([0.1, 0.3, 0.2], [None] * 3, [])] == [1, 2, 0]
    points = [{0: np.array([x, 0.0])} for x in (1.0, 3.0, -2.0)]
    assert [one.number for one in rank_images([None] * 3, points, [features_of((0.0, 0.0))])] == [1, 2, 0]


def test_the_spread_is_one_minus_the_mean_dice_of_pairs() -> None:
    masks = [np.random.default_rng(seed).random((20, 30)) > 0.5 for seed in range(3)]
    each = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(masks, 2)]
    assert mask_spread(masks) == pytest.approx(1 - np.mean(each))
    none = np.zeros((20, 30), bool)
    assert mask_spread([none, none]) == 0
    assert mask_spread([none, masks[0]]) == 1
    assert mask_spread(masks[:1]) is None


def test_images_without_a_mask_are_found_in_plain_folders_and_beside_labelled_ones(tmp_path: Path) -> None:
    for name in ("b.png", "in/a.png"):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / "plain" / name)
    assert [one.name for one in find_unlabelled(tmp_path / "plain", Registry())] == ["b.png", "in/a.png"]
    partly = pairs(tmp_path / "partly")
    (partly / "masks" / "i3.png").unlink()
    assert [one.name for one in find_unlabelled(partly, Registry())] == ["images/i3.png"]
    with pytest.raises(CellbenchError, match="each of its 6 images has a mask"):
        find_unlabelled(pairs(tmp_path / "all"), Registry())
    with pytest.raises(CellbenchError, match="there is no such folder"):
        find_unlabelled(tmp_path / "none", Registry())
