"""The meaning of a set's masks is decided once from all of them, reported, and overridden by its card; the minimum cell area follows the cells."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from cohorts import features_of, run_of, trainers_of
from PIL import Image

from cellbench.cli.check import check_folder
from cellbench.config.experiment import DataSpec, Experiment
from cellbench.config.registry import Registry
from cellbench.data.audit.image_statistics import measure_image
from cellbench.data.dataset import Dataset
from cellbench.data.io.images import labels_to_classes
from cellbench.data.loading import open_dataset
from cellbench.data.masks import MaskFacts, count_below, decide_meaning, mask_facts, min_cell_area, off_values
from cellbench.errors import CellbenchError
from cellbench.execution import artifacts
from cellbench.execution.artifacts import EvaluationResult
from cellbench.metrics.instances import numbered_instances
from cellbench.metrics.pixel import IGNORE
from cellbench.parallel import WorkerPool
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.fit import fit
from cellbench.training.tiled_inference import score_tiles, segment_images

SIDE = 120
EXPERIMENT = Experiment.of({"experiment": "a", "dataset": "folder", "grid": {"backbone": ["filter-bank"], "head": ["bilinear"]}}, "here")


def scene(num_small: int = 9, large: bool = True, shift: int = 0) -> np.ndarray:
    """Numbers of cells (120, 120): small discs in a row, of which the first two touch, and perhaps a large one, the last."""
    y, x = np.mgrid[:SIDE, :SIDE]
    ids = np.zeros((SIDE, SIDE), np.uint16)
    for k in range(num_small):
        ids[(y - 8) ** 2 + (x - (6 + 11 * k if k < 2 else 8 + 12 * k)) ** 2 < 34] = k + 1
    if large:
        ids[(y - 68) ** 2 + (x - 60) ** 2 < 45**2] = num_small + 1
    return np.roll(ids, shift, axis=0)


def jpeg(mask: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "JPEG", quality=75)
    return np.array(Image.open(buffer))


def facts(masks: list[np.ndarray]) -> list[MaskFacts]:
    return [mask_facts(mask, labels_to_classes(mask)) for mask in masks]


IDS = [scene(shift=k) for k in range(4)]
NUMBERS = {
    "16 bit": IDS,
    "8 bit, where the last cell has most of the pixels": [ids.astype(np.uint8) for ids in IDS],
    "counted down from 255": [np.where(ids > 0, 256 - ids.astype(int), 0).astype(np.uint8) for ids in IDS],
    "32 bit, unique in the set": [
        np.where(ids > 0, ids.astype(np.int32) + 10**7 * (k + 1), 0).astype(np.int32) for k, ids in enumerate(IDS)
    ],
    "one cell in most images": [scene(0), scene(0), scene(1), scene(0)],
    "one cell in each, numbered over the set": [np.where(scene(0) > 0, k + 1, 0).astype(np.uint8) for k in range(9)],
    "an image without a cell": [IDS[0], np.zeros_like(IDS[0])],
    "a cell that another cuts in two": [*IDS[:3], np.where(np.arange(SIDE)[:, None] == 70, 11, IDS[3]).astype(np.uint16)],
}


@pytest.mark.parametrize("masks", NUMBERS.values(), ids=list(NUMBERS))
def test_numbers_of_cells_are_known_as_such(masks: list[np.ndarray]) -> None:
    found = decide_meaning(facts(masks))
    nums = [len(np.unique(mask[mask > 0])) for mask in masks]
    assert (found.kind, found.ask) == ("cells", "")
    assert f"{f'{min(nums)} to ' if min(nums) < max(nums) else ''}{max(nums)} an image" in found.description


BINARY = {
    "0 and 255": [(ids > 0) * np.uint8(255) for ids in IDS],
    "0 and 1": [(ids > 0).astype(np.uint8) for ids in IDS],
    "some of each": [(ids > 0) * np.uint8(255 if k else 1) for k, ids in enumerate(IDS)],
    "one cell in each": [scene(0, shift=k) for k in range(4)],
    "no cell at all": [np.zeros((SIDE, SIDE), np.uint8)] * 3,
}


@pytest.mark.parametrize("masks", BINARY.values(), ids=list(BINARY))
def test_one_value_beside_the_background_is_binary(masks: list[np.ndarray]) -> None:
    found = decide_meaning(facts(masks))
    assert (found.kind, found.values, found.ask, found.doubt) == ("binary", (), "", "")


@pytest.mark.parametrize("how", ["jpeg", "smoothed", "one of them smoothed"])
def test_noise_and_smooth_edges_between_two_values_are_rounded_off(how: str) -> None:
    clean = BINARY["0 and 255"]
    if how == "jpeg":
        masks = [jpeg(mask) for mask in clean]
    else:
        small = [np.array(Image.fromarray(mask).resize((90, 90), Image.Resampling.BILINEAR)) for mask in clean]
        masks = small if how == "smoothed" else [*clean[1:], small[0]]
    found = decide_meaning(facts(masks))
    assert (found.kind, found.values, found.ask) == ("binary", (0, 255), "")
    if how == "jpeg":
        for mask, true in zip(masks, clean, strict=True):
            assert np.array_equal(labels_to_classes(mask, found.values), true > 0)


def test_class_values_are_not_taken_for_cells() -> None:
    masks = [np.where(ids == 10, 1, 2 * (ids > 0)).astype(np.uint8) for ids in IDS]  # 1 the large cell, 2 nine small ones
    found = decide_meaning(facts(masks))
    assert (found.kind, found.ask) == ("classes", "")
    assert "1, 2" in found.description
    assert "classes = [...]" in found.doubt


def test_the_same_values_in_many_masks_are_classes_unless_they_count_up_from_1() -> None:
    nested = np.where(scene(0) > 0, 128 + 127 * (np.hypot(*np.mgrid[-68:52, -60:60]) < 20), 0).astype(np.uint8)
    found = decide_meaning(facts([nested] * 5))
    assert (found.kind, found.ask) == ("classes", "")
    assert "128, 255 occur in each of 5 masks" in found.doubt
    counted = [(mask > 0) + (mask == 255) * np.uint8(1) for mask in [nested] * 5]
    assert "Write" in decide_meaning(facts(counted)).ask


AMBIGUOUS = {
    "a nucleus in its cytoplasm": [np.where(scene(0) > 0, 1 + (np.hypot(*np.mgrid[-68:52, -60:60]) < 20), 0).astype(np.uint8)] * 3,
    "one value an image, of a few": [np.where(scene(0) > 0, k, 0).astype(np.uint8) for k in (1, 2, 1, 3)],
    "noise around three values": [jpeg(np.where(ids == 10, 128, 255 * (ids > 0))) for ids in IDS],
}


@pytest.mark.parametrize("masks", AMBIGUOUS.values(), ids=list(AMBIGUOUS))
def test_ambiguous_masks_raise_a_question_for_the_user(masks: list[np.ndarray]) -> None:
    assert "Write" in decide_meaning(facts(masks)).ask


def test_255_beside_small_numbers_is_named_and_left_out() -> None:
    ignored = np.hypot(*np.mgrid[-68:52, -60:60]) < 20
    masks = [np.where(ignored, 255, ids).astype(np.uint8) for ids in IDS]
    found = decide_meaning(facts(masks))
    assert found.ignore == IGNORE
    assert "255 occurs beside the values 1 to 10" in found.doubt
    said = decide_meaning(facts(masks), kind="cells")
    assert (said.kind, said.ignore) == ("cells", None)
    assert "255" in said.doubt


# --- through a folder -------------------------------------------------------------------------------------------------------------------


def folder_of(folder: Path, masks: list[np.ndarray], card: str = "") -> Path:
    """One folder of images, of noise, with these masks."""
    rng = np.random.default_rng(0)
    for kind in ("original", "mask"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for k, mask in enumerate(masks):
        picture = rng.integers(0, 99, (*mask.shape, 3)).astype(np.uint8)
        picture[mask > 0] += np.uint8(120)
        Image.fromarray(picture).save(folder / "original" / f"i{k}.png")
        Image.fromarray(mask).save(folder / "mask" / f"i{k}.png")
    if card:
        (folder / "dataset.toml").write_text(card)
    return folder


def opened(folder: Path) -> Dataset:
    return open_dataset(Registry().dataset("folder"), folder, DataSpec(group="none", split_seed=1))


def num_cells(data: Dataset) -> set[int]:
    samples = (*data.train, *data.val, *data.test)
    return {numbered_instances(ids, data.read_mask(sample)).num for sample in samples if (ids := data.read_instances(sample)) is not None}


SIX = [scene(shift=k).astype(np.uint8) for k in range(6)]
WITH_IGNORED = [np.where(np.hypot(*np.mgrid[-68:52, -60:60]) < 20, 255, mask).astype(np.uint8) for mask in SIX]


def test_the_set_says_how_its_masks_are_understood_and_what_its_smallest_cell_is(tmp_path: Path) -> None:
    data = opened(folder_of(tmp_path / "own", SIX))
    assert data.masks == "cells"
    assert num_cells(data) == {10}
    assert "masks: cell numbers, 10 an image" in data.notes
    assert any(note.startswith(f"smallest cell: {data.min_cell_px} px") for note in data.notes)


@pytest.mark.parametrize(
    ("card", "kind", "cells", "share"),
    [
        ("", "cells", {10}, True),
        ("ignore = 255", "cells", {10}, True),
        ('masks = "cells"', "cells", {11}, False),
        ('masks = "binary"\nignore = 255', "binary", set(), True),
        ('masks = "classes"\nignore = 255', "classes", set(), True),
    ],
)
def test_the_card_overrides_what_masks_mean(tmp_path: Path, card: str, kind: str, cells: set[int], share: bool) -> None:
    data = opened(folder_of(tmp_path / "own", WITH_IGNORED, card))
    assert (data.masks, num_cells(data)) == (kind, cells)
    classes = data.read_mask(data.train[0])
    assert bool((classes == IGNORE).any()) == share
    assert any("ignored: " in note for note in data.notes) == share


def test_numbers_of_classes_are_values_where_a_card_names_classes_only(tmp_path: Path) -> None:
    masks = [np.where(ids == 10, 1, 2 * (ids > 0)).astype(np.uint8) for ids in SIX]
    data = opened(folder_of(tmp_path / "own", masks, 'classes = ["background", "large", "small"]'))
    assert np.array_equal(data.read_mask(data.train[0]), labels_to_classes(masks[int(data.train[0].name[1])], (0, 1, 2)))
    masks[0][40:43, 40:90] = 255
    data = opened(folder_of(tmp_path / "own", masks))
    assert any("such as 255: each pixel takes the nearest class. Write ignore = 255" in note for note in data.notes)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ('masks = "cells"\nvalues = [0, 255]', "keep one"),
        ("ignore = 255\nvalues = [0, 255]", "is also a class"),
        ("ignore = [255, 0, 0]", "must be a value"),
        ("min_cell_px = 0", "min_cell_px"),
        ('mask_kind = "ids"', "mask_kind"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(tmp_path: Path, card: str, says: str) -> None:
    with pytest.raises(CellbenchError, match=says):
        opened(folder_of(tmp_path / "own", SIX, card))


def test_a_colour_can_be_ignored(tmp_path: Path) -> None:
    palette = np.array([(255, 255, 255), (200, 0, 0), (9, 9, 9)], np.uint8)
    masks = [palette[np.where(mask == 10, 2, mask > 0)] for mask in SIX]
    folder = folder_of(tmp_path / "own", SIX, "colors = [[255, 255, 255], [200, 0, 0]]\nignore = [9, 9, 9]")
    for k, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / "mask" / f"i{k}.png")
    data = opened(folder)
    expected = np.where(SIX[0] == 10, IGNORE, SIX[0] > 0)
    assert np.array_equal(data.read_mask(next(s for s in (*data.train, *data.val, *data.test) if s.name == "i0.png")), expected)


def test_the_decision_is_part_of_what_a_run_was_trained_on(tmp_path: Path) -> None:
    folder, digests = folder_of(tmp_path / "own", SIX), set()
    for card in ("", 'masks = "binary"', "min_cell_px = 17", "ignore = 9"):
        (folder / "dataset.toml").write_text(card)
        digests.add(opened(folder).digest)
    assert len(digests) == 4


def test_doubtful_masks_are_a_question_before_training_and_a_severe_finding(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "own", [np.roll(mask, k, axis=0) for k, mask in enumerate(AMBIGUOUS["a nucleus in its cytoplasm"] * 2)])
    with pytest.raises(CellbenchError, match="the values 1, 2 in every image: cell numbers, or classes"):
        opened(folder)
    lines: list[str] = []
    assert check_folder(folder, spec=DataSpec(group="none"), out=tmp_path / "out", say=lines.append) == 1
    assert any("severe  meaning: The masks hold the values 1, 2" in line for line in lines)
    (folder / "dataset.toml").write_text('masks = "cells"')
    assert num_cells(opened(folder)) == {2}


# --- the smallest cell ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("areas", "expected"),
    [
        ([(7720, 770), (20, 230)], 100),  # BCCD: 23 % specks
        ([(7720, 100), (3, 900)], 100),  # nine tenths specks
        ([(50, 300)], 5),
        ([(9, 300)], 1),
        ([(400, 300), (200_000, 3)], 10),  # three clumps of hundreds of cells
        ([], 1),
    ],
)
def test_the_smallest_cell_follows_the_median_whatever_specks_and_clumps_there_are(areas: list[tuple[int, int]], expected: int) -> None:
    assert min_cell_area(areas) == expected


def test_what_is_below_a_limit_is_counted() -> None:
    assert count_below([(5, 2), (10, 3), (11, 1)], 10) == (2, 6)


@pytest.mark.slow
def test_small_cells_count_in_truth_and_prediction(tmp_path: Path) -> None:
    y, x = np.mgrid[:SIDE, :SIDE]
    mask = (((y % 20 - 10) ** 2 + (x % 20 - 10) ** 2) < 16) * np.uint8(255)  # 36 cells of 49 px
    lines: list[str] = []
    folder = folder_of(tmp_path / "own", [np.roll(mask, k, axis=1) for k in range(6)])
    check_folder(folder, spec=DataSpec(group="none"), out=tmp_path / "out", say=lines.append)
    assert any("cells an image  36 in the median" in line for line in lines)
    assert opened(folder).min_cell_px == 5


def test_a_numbered_cell_is_one_however_small(tmp_path: Path) -> None:
    masks = [mask.copy() for mask in SIX]
    masks[2][-1, -3:] = 11
    data = opened(folder_of(tmp_path / "own", masks))
    assert data.min_cell_px == 3


# --- what is ignored, through training and test -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"framing": "resize", "tile_px": 96}, {"targets": "cell+border+distance", "tile_scale": 0.5}])
def test_training_validation_and_test_leave_ignored_pixels_out(tmp_path: Path, settings: dict[str, object]) -> None:
    data = opened(folder_of(tmp_path / "own", WITH_IGNORED, "ignore = 255"))
    run = run_of(backbone="filter-bank", **{"epochs": 1, "crops_per_image": 2, **settings})
    features = features_of(data, [run])
    trainer = trainers_of(data, [run], features)[0]
    fit([trainer], features)
    assert all(np.isfinite(value) for value in trainer.history[0].values())
    known = {split: sum(int((data.read_mask(sample) != IGNORE).sum()) for sample in data.samples(split)) for split in ("val", "test")}
    with WorkerPool(1) as pool:
        counts = score_tiles([trainer.model], features, "val", lambda *_: None, pool)[0]
    assert counts.sum() == known["val"]
    with CohortEvaluator(data, 1) as evaluator:
        for image, answers in segment_images([trainer.model], features, "test"):
            evaluator.add_image(image, features.pixels["test"][image][1], answers)
    evaluation = evaluator.evaluations[0]
    assert evaluation.counts.sum() == np.sum(evaluation.histograms) == known["test"]
    assert {one.num_true for one in evaluation.agreements} == {10}
    result = EvaluationResult(evaluation=evaluation, cost={})
    artifacts.write_artifacts(tmp_path, run, EXPERIMENT, [data], result)
    drawings = artifacts.pictures("a run", data, features.pixels["test"], result)
    assert all(draw().startswith(b"\x89PNG") for draw in drawings.values())
    assert json.loads((tmp_path / "separation.json").read_text())["min_area_px"] == data.min_cell_px
    assert set(json.loads((tmp_path / "per_image.json").read_text())["min_area_px"]) == {data.min_cell_px}


def test_statistics_of_a_set_leave_ignored_pixels_out(tmp_path: Path) -> None:
    lines: list[str] = []
    check_folder(
        folder_of(tmp_path / "own", WITH_IGNORED, "ignore = 255"), spec=DataSpec(group="none"), out=tmp_path / "out", say=lines.append
    )
    shares = np.concatenate([(mask > 0)[mask != 255] for mask in WITH_IGNORED])
    assert any(f"background {1 - shares.mean():.1%}, cell {shares.mean():.1%}" in line for line in lines)
    data = opened(tmp_path / "own")
    assert measure_image(data, data.train[0]).cell_share == pytest.approx(shares.mean(), abs=1e-3)
    assert measure_image(data, data.train[0]).num_cells == 10


def test_a_number_beyond_the_classes_is_no_class_and_noise_around_a_value_is():
    labels = np.array([[0, 1, 3, 4, 10]])
    assert off_values(labels, labels_to_classes(labels, (0, 1, 2, 3)), (0, 1, 2, 3), 20).tolist() == [[False, False, False, True, True]]
    noisy = np.array([[11, 120, 140, 240, 90]])
    assert off_values(noisy, labels_to_classes(noisy, (0, 128, 255)), (0, 128, 255), 20).tolist() == [[False, False, False, False, True]]
