"""Perturbed test images: the same each time, stronger with the strength, and with a mask of their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_data import discs, write_pair

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.dataset import Dataset
from cellbench.data.loading import open_dataset
from cellbench.data.transforms.perturbations import Perturbation, PerturbedDataset, perturbations

KINDS = DataSpec(perturb=("all",)).perturbations


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    for k in range(8):
        write_pair(tmp_path / "data", f"i{k}.png", k)
    return open_dataset(Registry().dataset("folder"), tmp_path / "data", DataSpec(test_fraction=0.5))


def perturbed(kind: str, strength: int, image: np.ndarray, seed: int = 0) -> np.ndarray:
    return Perturbation(kind, strength)(image, np.random.default_rng(seed)).astype(float)


def test_each_kind_has_three_strengths_beside_the_unchanged_images() -> None:
    assert [one.name for one in perturbations(("blur", "jpeg"))] == [
        "none",
        *(f"{kind}-{k}" for kind in ("blur", "jpeg") for k in (1, 2, 3)),
    ]
    assert perturbations(()) == []
    assert KINDS == ("stain", "brightness", "blur", "noise", "jpeg", "scale")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scale"])
def test_a_stronger_perturbation_changes_an_image_more(kind: str) -> None:
    image = discs(0)[0]
    changes = [np.abs(perturbed(kind, k, image) - image).mean() for k in (1, 2, 3)]
    assert 0 < changes[0] < changes[1] < changes[2]


def test_noise_and_brightness_are_as_large_as_they_say() -> None:
    grey = np.full((200, 200, 3), 100, np.uint8)
    assert perturbed("noise", 2, grey).std() == pytest.approx(16, rel=0.02)
    assert perturbed("brightness", 2, grey)[0, 0, 0] in (70, 130)


def test_a_scaled_image_has_cells_of_another_size_and_its_mask_too(dataset: Dataset) -> None:
    directions = set()
    for strength, factor in ((1, 1.2), (3, 1.7)):
        other = PerturbedDataset.of(dataset, Perturbation("scale", strength), 5)
        for before, sample in zip(dataset.test, other.test, strict=True):
            image, classes = other.read(sample)
            assert image.shape[:2] == classes.shape == sample.size_px
            share = sample.size_px[0] / before.size_px[0]
            assert share == pytest.approx(factor, rel=0.02) or share == pytest.approx(1 / factor, rel=0.02)
            assert classes.mean() == pytest.approx(dataset.read_mask(before).mean(), rel=0.1)
            directions.add((before.name, share > 1))
    assert len(directions) == len(dataset.test)  # the same direction at each strength


def test_an_image_is_perturbed_in_the_same_way_whatever_the_others_are(dataset: Dataset) -> None:
    one = Perturbation("stain", 3)
    all_images = PerturbedDataset.of(dataset, one, 7)
    last = dataset.test[-1]
    alone = PerturbedDataset.of(dataset.with_samples({"train": (), "val": (), "test": (last,)}), one, 7)
    assert np.array_equal(alone.read(alone.test[0])[0], all_images.read(all_images.test[-1])[0])
    assert not np.array_equal(PerturbedDataset.of(dataset, one, 8).read(last)[0], all_images.read(all_images.test[-1])[0])


def test_unchanged_images_are_unchanged(dataset: Dataset) -> None:
    same = PerturbedDataset.of(dataset, Perturbation("none", 0), 0)
    assert np.array_equal(same.read(same.test[0])[0], dataset.read(dataset.test[0])[0])
