"""The metrics and artifacts of a run: what is scored, counted and kept, in any order of the images."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from cohorts import dataset_of, run_of
from finished_runs import finished_run
from PIL import Image

from cellbench.config.experiment import Experiment
from cellbench.data.image_cache import ImageCache
from cellbench.data.io.images import thumbnail
from cellbench.execution import artifacts
from cellbench.execution.artifacts import EvaluationResult
from cellbench.metrics.instance import ReferenceMask
from cellbench.metrics.separation import CONNECTED, SeparationParams
from cellbench.reporting.grouping import group_models
from cellbench.training.evaluator import CANDIDATES, CohortEvaluator, ExampleKeeper
from cellbench.training.segmented_image import SegmentedImage


def taken(dataset, answers, shorten=False, separation=CONNECTED):
    """The evaluation of one run with given predictions; ``shorten`` passes a class map of a wrong size."""
    with CohortEvaluator(dataset, 1, [separation]) as evaluator:
        for k, sample in enumerate(dataset.test):
            truth = dataset.read_mask(sample)
            classes, cell = answers(truth)
            evaluator.add_image(k, truth, [SegmentedImage(classes=classes[:5] if shorten else classes, cell=cell)])
    return evaluator.evaluations[0]


@pytest.fixture
def dataset(small_folder):
    return dataset_of(small_folder)


def test_a_perfect_prediction_scores_one_everywhere(dataset):
    evaluation = taken(dataset, lambda truth: (truth, truth * np.uint8(255)))
    found = artifacts.final_metrics(dataset, EvaluationResult(evaluation=evaluation, cost={}))
    for name in ("dice", "nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq"):
        assert found[f"test_image/{name}"] == 1
    assert found["test_image/count_error"] == found["test_image/count_error_abs"] == 0
    assert found["test/calibration_error"] == 0


def test_shape_scores_of_the_evaluation_are_those_of_the_image(dataset):
    evaluation = taken(dataset, lambda truth: (np.roll(truth, 3, axis=1), None))
    for k, sample in enumerate(dataset.test):
        truth = dataset.read_mask(sample)
        assert evaluation.agreements[k] == ReferenceMask(truth, 2, min_area_px=dataset.min_cell_px).agreement(np.roll(truth, 3, axis=1))
    assert evaluation.calibration() is None
    assert "test/calibration_error" not in artifacts.final_metrics(dataset, EvaluationResult(evaluation=evaluation, cost={}))


def test_calibration_counts_every_pixel_once(dataset):
    evaluation = taken(dataset, lambda truth: (truth, np.where(truth, 204, 51).astype(np.uint8)))  # 0.8 for every cell, 0.2 elsewhere
    record = evaluation.calibration()
    assert sum(record["pixels"]) == sum(np.prod(sample.size_px) for sample in dataset.test)
    assert record["share_cell"][16] == 1
    assert record["share_cell"][4] == 0
    assert record["probability"][16] == pytest.approx(0.8)
    assert artifacts.final_metrics(dataset, EvaluationResult(evaluation=evaluation, cost={}))["test/calibration_error"] == pytest.approx(
        0.2
    )


def test_the_interval_in_mlflow_is_over_groups_as_the_reports_is(dataset):
    """Ten images of five patients: five observations, not ten; without groups ten."""
    named = [(f"{k}.png", f"p{k // 2}", dataset.test[k % 2]) for k in range(10)]
    found = {}
    for grouped in (True, False):
        test = tuple(replace(sample, name=name, group=group if grouped else "") for name, group, sample in named)
        one, shift = replace(dataset, test=test), itertools.count()
        evaluation = taken(one, lambda truth, shift=shift: (np.roll(truth, 2 + 3 * (next(shift) // 2), axis=1), None))
        metrics = artifacts.final_metrics(one, EvaluationResult(evaluation=evaluation, cost={}))
        record = artifacts.per_image_record(one, EvaluationResult(evaluation=evaluation, cost={}))
        (here,), _ = group_models([finished_run("fpn", record)])
        (reported,) = here.intervals("dice")
        assert (metrics["test_image/dice_low"], metrics["test_image/dice_high"]) == (round(reported.low, 6), round(reported.high, 6))
        assert metrics["test_image/dice_units"] == reported.num == (5 if grouped else 10)
        found[grouped] = reported
    assert found[True].high - found[True].low > found[False].high - found[False].low


def test_an_error_in_a_thread_is_raised(dataset):
    with pytest.raises(ValueError, match="prediction"):
        taken(dataset, lambda truth: (truth, None), shorten=True)


@pytest.mark.parametrize("num", [1, 2, 3, 15, 159])
def test_worst_median_and_best_are_kept(num):
    dices = np.random.default_rng(num).permutation(np.linspace(0.5, 0.99, num))
    keep = ExampleKeeper()
    for image, dice in enumerate(dices.tolist()):
        keep.offer(image, dice, np.full((4, 6), image, np.uint8), None)
    cases = keep.cases
    assert cases["worst"].dice == dices.min()
    assert len({case.image for case in cases.values()}) == len(cases) == min(num, 3)
    if num >= 3:
        assert cases["best"].dice == dices.max()
        middle = np.quantile(dices, 0.5, method="lower")
        assert np.count_nonzero(np.abs(dices - middle) < abs(cases["median"].dice - middle)) <= (4 if num > 2 * CANDIDATES else 0)
        assert (cases["median"].classes == cases["median"].image).all()
        assert cases["median"].cell is None


def test_the_median_is_near_even_where_scores_drift():
    keep = ExampleKeeper()
    for image, dice in enumerate(np.linspace(0.5, 0.99, 200).tolist()):
        keep.offer(image, dice, np.zeros((4, 6), np.uint8), None)
    assert len(keep._middle) + len(keep._drawn) <= 2 * CANDIDATES
    assert abs(keep.cases["median"].dice - 0.745) < 0.07


def test_kept_predictions_are_thumbnails():
    classes = np.zeros((1200, 1600), np.uint8)
    classes[300:600, 400:900] = 1
    keep = ExampleKeeper()
    keep.offer(0, 0.9, classes, classes * np.uint8(200))
    case = keep.cases["worst"]
    assert np.array_equal(case.classes, thumbnail(classes))
    assert np.array_equal(case.cell, thumbnail(classes) * 200)
    assert len(case.packed) + len(case.packed_cell) < 100_000


def write(folder, run, experiment, dataset, result):
    """All files of a run: artifacts, and pictures, which a grid draws in other processes."""
    artifacts.write_artifacts(folder, run, experiment, [dataset], result)
    drawings = artifacts.pictures("a run", dataset, ImageCache(dataset, "test", 2**28), result)
    artifacts.write_pictures(folder, {name: draw() for name, draw in drawings.items()})


def test_files_of_a_run_are_what_the_report_and_the_ui_read(dataset, tmp_path):
    evaluation = taken(dataset, lambda truth: (np.roll(truth, 2, axis=0), truth * np.uint8(250)))
    run = run_of()
    tree = {"experiment": "a / b, ü 🔬", "dataset": "folder", "grid": {"backbone": [run.backbone], "head": [run.head]}}
    out = tmp_path / "out"
    out.mkdir()
    write(out, run, Experiment.of(tree, "here"), dataset, EvaluationResult(evaluation=evaluation, cost={}))
    record = json.loads((out / "per_image.json").read_text())
    assert record["images"] == [sample.name for sample in dataset.test]
    assert len(record["nsd"]) == len(record["ap50"]) == len(record["num_true"]) == 2
    assert record["tolerance_px"] == 2
    table = json.loads((out / artifacts.TABLE).read_text())
    assert table["columns"][:2] == ["image", "dice"]
    assert [row[1] for row in table["data"]] == sorted(record["dice"])
    assert {path.name for path in (out / "figures").iterdir()} == {"scores.png", "worst.png", "best.png"}


def test_touching_cells_are_scored_after_separation(dataset, tmp_path):
    # Two true cells, side by side; the answer is one region with a waist.
    y, x = np.mgrid[:80, :120]
    left, right = np.hypot(y - 40, x - 35) < 25, np.hypot(y - 40, x - 84) < 25
    ids = (left + 2 * (right & ~left)).astype(np.uint16)
    Image.fromarray(ids).save(tmp_path / "mask.png")
    one = replace(dataset, values=(), masks="cells", test=(replace(dataset.test[0], mask=tmp_path / "mask.png"),))
    cut = SeparationParams(saddle_ratio=0.8, val_ap50={"0": 0.5, "0.8": 0.75}, num_images=3)
    found = {}
    for which in (CONNECTED, cut):
        evaluation = taken(one, lambda truth: (truth, None), separation=which)
        found[which.saddle_ratio] = artifacts.final_metrics(one, EvaluationResult(evaluation=evaluation, cost={}))
    assert found[0]["test_image/ap50"] == found[0.8]["test_image/ap50_connected"] < 1
    assert found[0.8]["test_image/ap50"] == 1
    assert found[0.8]["test_image/count_error_abs"] == 0
    assert found[0.8]["test_image/count_error_abs_connected"] == 1
    assert found[0.8]["separation/val_ap50"] == 0.75


# --- images without a cell ------------------------------------------------------------------------------------------------------------------


def strict(path):
    """JSON without NaN, which is not JSON."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.fixture
def mostly_empty(dataset, tmp_path):
    """A test of four images: one with two cells, three without any."""
    cells = np.zeros((60, 80), np.uint8)
    cells[5:25, 5:25] = cells[35:55, 40:60] = 255
    samples = []
    for k in range(4):
        for kind, pixels in (("image", np.full((60, 80), 200, np.uint8)), ("mask", cells * np.uint8(k == 0))):
            Image.fromarray(pixels).save(tmp_path / f"{kind}{k}.png")
        samples.append(
            type(dataset.test[0])(name=f"{k}.png", image=tmp_path / f"image{k}.png", mask=tmp_path / f"mask{k}.png", size_px=(60, 80))
        )
    return replace(dataset, test=tuple(samples))


def nothing(truth):
    return np.zeros_like(truth), np.zeros_like(truth)


def everything(truth):
    return np.ones_like(truth), np.full_like(truth, 255)


def test_predicting_nothing_scores_zero_however_many_images_are_empty(mostly_empty):
    found = artifacts.final_metrics(mostly_empty, EvaluationResult(evaluation=taken(mostly_empty, nothing), cost={}))
    for name in ("dice", "iou", "precision", "recall", "nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq"):
        assert found[f"test_image/{name}"] == 0
    for name in ("dice", "iou", "nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq"):
        assert found[f"test_image/{name}_empty1"] == 0.75  # the older rule
    assert (found["test/num_empty"], found["test/num_empty_found"]) == (3, 0)
    assert [found[f"test/num_{what}"] for what in ("true", "found", "missed", "extra", "predicted")] == [2, 0, 2, 0, 0]


def test_a_false_positive_in_an_empty_image_scores_zero_and_is_counted(mostly_empty):
    found = artifacts.final_metrics(mostly_empty, EvaluationResult(evaluation=taken(mostly_empty, everything), cost={}))
    assert found["test_image/dice"] == pytest.approx(2 * 800 / (4800 + 800) / 4, abs=1e-6)
    assert (found["test/num_empty"], found["test/num_empty_found"]) == (3, 3)
    assert found["test/num_extra"] == 4


def test_the_right_answer_to_mostly_empty_images_is_one_of_one_image(mostly_empty):
    found = artifacts.final_metrics(
        mostly_empty, EvaluationResult(evaluation=taken(mostly_empty, lambda truth: (truth, truth * np.uint8(255))), cost={})
    )
    assert found["test_image/dice"] == found["test_image/ap50"] == found["test/dice"] == 1
    assert "test_image/dice_low" not in found  # one image has no interval


@pytest.mark.slow
@pytest.mark.parametrize("answer", [nothing, everything])
@pytest.mark.parametrize("all_empty", [False, True])
def test_files_and_notes_of_a_test_with_empty_images_hold_no_nan(mostly_empty, tmp_path, answer, all_empty):
    one = replace(mostly_empty, test=mostly_empty.test[1:]) if all_empty else mostly_empty
    result = EvaluationResult(evaluation=taken(one, answer), cost={})
    run, out = run_of(), tmp_path / "out"
    out.mkdir()
    tree = {"experiment": "e", "dataset": "folder", "grid": {"backbone": [run.backbone], "head": [run.head]}}
    write(out, run, Experiment.of(tree, "here"), one, result)
    record, table = strict(out / "per_image.json"), strict(out / artifacts.TABLE)
    assert record["dice"][-1] is (None if answer is nothing else record["dice"][-1])
    assert (out / "figures" / "worst.png").exists()
    assert len(table["data"]) == len(one.test)
    metrics = artifacts.final_metrics(one, result)
    assert np.isfinite(list(metrics.values())).all()
    assert ("test_image/dice" in metrics) == (not all_empty or answer is everything)
    assert "nan" not in artifacts.run_note("a run", metrics)
    assert f"{len(one.test) - (not all_empty)}; something was found in" in artifacts.run_note("a run", metrics)


def test_the_worst_image_is_one_with_a_score(mostly_empty):
    assert taken(mostly_empty, nothing).examples.cases["worst"].image == 0
    assert {case.image for case in taken(mostly_empty, nothing).examples.cases.values()} == {0}
