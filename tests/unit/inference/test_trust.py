"""What `predict` says of masks without their truth: images that look otherwise by name, and the Dice to expect."""

from __future__ import annotations

from cellbench.inference.prediction import describe_expected_dice, describe_trust
from cellbench.metrics.training_features import Trust

KNOWN = {
    "a.png": Trust(distance=0.4, dice=0.95, dice_error=0.021),
    "b.png": Trust(distance=1.6, dice=0.85, dice_error=0.021),
    "c.png": Trust(distance=3.25),
    "d.png": Trust(),
}


def test_images_are_named_by_how_far_they_are_the_farthest_first() -> None:
    far, unusual = describe_trust({**KNOWN, "e.png": Trust(distance=7.0)})
    assert far.startswith("2 of 4 images are unlike the training images")
    assert far.endswith("e.png (7.0), c.png (3.2).")
    assert unusual == "1 of 4 images look unusual (distance 1 to 2): b.png (1.6)."


def test_usual_images_and_unknown_distances_are_no_news() -> None:
    assert describe_trust({"a.png": KNOWN["a.png"], "d.png": KNOWN["d.png"]}) == []


def test_the_expected_dice_is_of_the_images_that_have_one() -> None:
    assert describe_expected_dice(KNOWN) == [
        "Expected Dice by the probabilities: 0.90 in the mean of 2 images, lowest 0.85 (b.png); error of one image ± 0.02."
    ]
    assert describe_expected_dice({"c.png": KNOWN["c.png"]}) == []


def test_tables_have_the_known_values_only() -> None:
    assert KNOWN["b.png"].facts == {"distance": 1.6, "expected_dice": 0.85, "expected_dice_error": 0.021}
    assert KNOWN["d.png"].facts == {}
