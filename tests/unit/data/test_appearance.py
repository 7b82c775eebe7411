"""Groups by appearance: what looks alike stays together, no group is tiny, and equal images always give equal groups."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.config.experiment import DataSpec
from cellbench.data.appearance import NUM_GROUPS, cluster, describe_appearances, group_by_appearance, measure_appearance
from cellbench.data.dataset import Sample
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.splits import split_of

STAINS = {"pink": ((240, 220, 225), (180, 60, 110)), "blue": ((225, 228, 240), (60, 50, 140)), "dark": ((8, 8, 8), (120, 120, 120))}


def smear(background: tuple[int, int, int], cells: tuple[int, int, int], seed: int) -> np.ndarray:
    """(80, 100, 3): discs on an even background, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:80, :100]
    image = np.tile(np.array(background, float), (80, 100, 1))
    for cy, cx in rng.uniform((10, 10), (70, 90), (6, 2)):
        image[(y - cy) ** 2 + (x - cx) ** 2 < 64] = cells
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def samples_of(folder: Path, num: int, group: str = "") -> tuple[Sample, ...]:
    """``num`` images of each stain; the file names say nothing of it."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for k in range(num * len(STAINS)):
        name = list(STAINS)[k % len(STAINS)]
        path = folder / f"{k:02d}.png"
        Image.fromarray(smear(*STAINS[name], seed=k)).save(path)
        out.append(Sample(name=path.name, image=path, mask=path, label=name, group=group.format(k // 2) if group else ""))
    return tuple(out)


def grouped(samples: tuple[Sample, ...], folds: int) -> tuple[Sample, ...]:
    return group_by_appearance(samples, folds, IntensityScaling(), tuple)


@pytest.mark.parametrize("stain", STAINS)
def test_background_and_foreground_are_told_apart_on_bright_and_dark_fields(stain: str) -> None:
    background, cells = STAINS[stain]
    found = measure_appearance(smear(background, cells, seed=1))
    assert found.background_rgb == pytest.approx(background, abs=3)
    assert found.foreground_rgb == pytest.approx(cells, abs=12)
    assert 0.05 < found.density < 0.2


def test_a_blurred_image_is_less_sharp() -> None:
    image = smear(*STAINS["pink"], seed=3)
    blurred = np.asarray(Image.fromarray(image).resize((25, 20)).resize((100, 80)))
    assert measure_appearance(blurred).sharpness < measure_appearance(image).sharpness - 0.3


def test_an_even_image_has_an_appearance() -> None:
    assert np.isfinite(measure_appearance(np.full((30, 40, 3), 128, np.uint8)).values).all()


def test_images_of_one_stain_have_one_appearance(tmp_path: Path) -> None:
    found = grouped(samples_of(tmp_path, 4), folds=3)
    assert len({(sample.label, sample.appearance) for sample in found}) == len({sample.appearance for sample in found}) == 3
    assert grouped(samples_of(tmp_path, 4), folds=3) == found


def test_each_fold_tests_one_appearance_that_its_models_have_not_seen(tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "images", 4)
    folds = [
        split_of(tmp_path, samples, (), DataSpec(folds=3, fold=k, group="appearance"), grouped=lambda some: grouped(some, 3))
        for k in range(3)
    ]
    assert {fold.test[0].label for fold in folds} == set(STAINS)
    for fold in folds:
        looks = [{sample.appearance for sample in part} for part in (fold.train, fold.val, fold.test)]
        assert all(len(one) == 1 for one in looks)
        assert len(set.union(*looks)) == 3


def test_a_patient_is_of_one_appearance(tmp_path: Path) -> None:
    found = grouped(samples_of(tmp_path, 4, group="patient {}"), folds=3)
    assert len({(sample.group, sample.appearance) for sample in found}) == len({sample.group for sample in found})


def test_the_groups_are_described(tmp_path: Path) -> None:
    samples = grouped(samples_of(tmp_path, 4), folds=3)
    lines = describe_appearances(samples, IntensityScaling())
    assert [line.split(" (")[0].split(",")[0] for line in lines] == [f"appearance {k}: 4 images" for k in (1, 2, 3)]
    assert describe_appearances(tuple(Sample(name="a", image=Path("a"), mask=Path("a")) for _ in range(2)), IntensityScaling()) == []


@pytest.mark.parametrize("num", [6, 14, 300, 10_000])
def test_no_group_is_tiny_for_few_and_for_many_images(num: int) -> None:
    points = np.random.default_rng(0).normal(size=(num, 8))
    points[0] = 100.0  # one odd image is no group of its own
    groups = min(NUM_GROUPS, num // 2)
    found = Counter(cluster(points, np.ones(num, int), groups).tolist())
    assert sorted(found) == list(range(groups))
    assert min(found.values()) >= (1 if num < 30 else num // (5 * groups))


def test_more_groups_than_images_are_as_many_as_images() -> None:
    assert sorted(cluster(np.zeros((2, 8)), np.ones(2, int), 5).tolist()) == [0, 1]
    assert cluster(np.zeros((7, 8)), np.ones(7, int), 3).max() <= 2
