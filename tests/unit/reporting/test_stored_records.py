"""Scores that are read back from artifacts are checked as a whole; a fault is one line."""

from __future__ import annotations

import json

import pytest
from finished_runs import per_image_scores

from cellbench.reporting.shift import read_further
from cellbench.reporting.stored_records import RunRequest, odd_settings, read_scores

GOOD = per_image_scores(0.9, 0, ("a.png", "b.png"))
MATRIX = [[3, 1], [0, 4]]


def test_what_a_run_wrote_is_read_as_it_is():
    record = GOOD | {"confusion": [MATRIX] * 2, "num_images": {"train": 3, "val": 1, "test": 2}, "later": [1], "dice": [0.5, None]}
    assert read_scores(json.dumps(record).encode()) == record


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dice": ["0.5", 0.4]}, "number"),
        ({"dice": [0.5]}, "dice does not hold one score an image"),
        ({"dice": [0.5, float("nan")]}, "NaN"),
        ({"images": []}, "images"),
        ({"images": [1, 2]}, "images.0"),
        ({"dataset": None}, "dataset"),
        ({"num_images": {"test": 2}}, "num_images.train"),
        ({"dice": []}, "dice does not hold one score an image"),
        ({"confusion": []}, "confusion does not hold one score an image"),
        ({"confusion": [MATRIX]}, "confusion does not hold one score an image"),
        ({"confusion": [MATRIX, [[1]]]}, "confusion does not hold a row and a column for each class"),
        ({"fold": 1}, "a fold without its pool"),
        ({"min_area_px": []}, "nsd without its tolerance and the smallest cell"),
        ({"own_metrics": [{"key": 3}]}, "own_metrics|label|key"),
        ({"num_true": [1, -2]}, "greater than or equal to 0"),
    ],
)
def test_each_fault_is_named_in_one_line(changes, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        read_scores(json.dumps(GOOD | changes).encode())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_record_is_refused(data):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  pydantic and json name different things
        read_scores(data)
    assert "\n" not in str(caught.value)


def test_further_tests_count_only_if_they_are_whole():
    good = {"sets": {"other": GOOD}, "perturbed": {"blur-1": [0.5, None, 0.25]}}
    assert read_further(json.dumps(good).encode(), 3) == good
    assert read_further(None, 3) == {"sets": {}, "perturbed": {}}
    for bad in (good | {"sets": {"other": {}}}, good | {"perturbed": {"blur-1": [0.5]}}, {"sets": [1]}):
        assert read_further(json.dumps(bad).encode(), 3) == {}


@pytest.mark.parametrize("params", [{"seed": "x"}, {"seed": "1.0"}, {"fraction": "nan"}, {"fraction": "[0]"}, {"seed": "9" * 5000}])
def test_settings_that_no_run_has_are_named(params):
    assert odd_settings({"seed": "3", "fraction": "0.5", "head": "fpn"}) == ""
    (name,) = params
    assert odd_settings(params).startswith(f"its {name} in MLflow is '")


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"dataset": [1]}', b'{"dataset": {"notes": [3]}}', b'{"versions": 3}', b'{"comments": "x"}']
)
def test_a_damaged_request_is_none(data):
    assert RunRequest.from_json(data) == RunRequest()
