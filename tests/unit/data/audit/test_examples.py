"""Pictures of findings show the place that is meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.data.audit.checks import Finding, Severity
from cellbench.data.audit.examples import SIDE_PX, draw_examples, draw_samples
from cellbench.data.audit.image_statistics import SampleFacts, measure_sample
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io.overlay import RED, YELLOW


def dataset_of(folder: Path, image: np.ndarray, mask: np.ndarray) -> tuple[Dataset, SampleFacts]:
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(mask).save(folder / "a-mask.png")
    sample = Sample(image=folder / "a.png", mask=folder / "a-mask.png", name="a.png")
    dataset = Dataset(name="own", classes=("background", "cell"), values=(0, 255), train=(sample,), val=(), test=(), root=folder)
    return dataset, measure_sample(dataset, sample, "train")


def example(dataset: Dataset, facts: SampleFacts, kind: str, *others: SampleFacts):
    finding = Finding(kind=kind, severity=Severity.LOOK, message="", images=("a.png",), facts=((facts, *others),))
    (found,) = draw_examples(dataset, dict.fromkeys((facts, *others), dataset.train[0]), finding)
    return found


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour, np.uint8)).all(-1)


@pytest.fixture
def smear() -> tuple[np.ndarray, np.ndarray]:
    """Two cells of which one, at the upper border, is not marked, and a speck in the lower right of the mask."""
    image, mask = np.full((240, 240, 3), 220, np.uint8), np.zeros((240, 240), np.uint8)
    y, x = np.indices(mask.shape)
    cell, cut = (y - 120) ** 2 + (x - 60) ** 2 < 30**2, (y - 5) ** 2 + (x - 150) ** 2 < 30**2
    image[cell | cut] = (170, 90, 130)
    mask[cell] = 255
    mask[200:204, 200:204] = 255
    return image, mask


def test_a_cell_at_the_border_without_a_mark_is_framed_and_the_mask_outlined(tmp_path: Path, smear) -> None:
    found = example(*dataset_of(tmp_path, *smear), "border")
    assert found.caption == "a.png: 1 at the border without a mark"
    rows, columns = is_colour(found.picture, RED).nonzero()
    scale = SIDE_PX / 240
    assert abs(columns.min() - 120 * scale) < 12
    assert abs(columns.max() - 180 * scale) < 12
    assert abs(rows.max() - 35 * scale) < 12
    assert is_colour(found.picture, YELLOW)[round(120 * scale), round(28 * scale) : round(34 * scale)].any()


def test_specks_are_framed_where_they_lie(tmp_path: Path, smear) -> None:
    found = example(*dataset_of(tmp_path, *smear), "specks")
    rows, columns = is_colour(found.picture, RED).nonzero()
    assert (abs(np.array([rows.mean(), columns.mean()]) - 2 * 202) < 4).all()
    assert found.caption == "a.png: 1 below 100 px"


def test_specks_of_a_large_image_are_shown_where_most_of_them_lie(tmp_path: Path, smear) -> None:
    image, mask = (np.kron(array, np.ones((5, 5, 1)[: array.ndim], np.uint8)) for array in smear)
    mask[1000:1020, 1000:1020] = 0
    mask[1000:1016:8, 1000:1016:8] = 255
    found = example(*dataset_of(tmp_path, image, mask), "specks")
    assert "4 below 100 px" in found.caption
    assert is_colour(found.picture, RED).any()


def test_values_that_the_card_does_not_name_are_red_in_the_mask_beside_the_image(tmp_path: Path, smear) -> None:
    image, mask = smear
    mask[220:] = 100
    found = example(*dataset_of(tmp_path, image, mask), "values")
    assert found.is_wide
    assert is_colour(found.picture, RED)[-20:-6, SIDE_PX + 30 : -6].all()
    assert not is_colour(found.picture, RED)[:, :SIDE_PX].any()


def test_a_pair_stands_side_by_side(tmp_path: Path, smear) -> None:
    dataset, facts = dataset_of(tmp_path, *smear)
    twin = measure_sample(dataset, dataset.train[0], "train")
    picture = example(dataset, facts, "near", twin).picture
    width = (picture.shape[1] - 8) // 2
    assert (picture[:, :width] == picture[:, -width:]).all()


def test_a_file_that_is_gone_since_it_was_read_is_left_out(tmp_path: Path, smear) -> None:
    dataset, facts = dataset_of(tmp_path, *smear)
    (tmp_path / "a.png").unlink()
    finding = Finding(kind="stain", severity=Severity.LOOK, message="", images=("a.png",), facts=((facts,),))
    assert draw_examples(dataset, {facts: dataset.train[0]}, finding) == []


def test_some_images_show_how_masks_were_understood(tmp_path: Path, smear) -> None:
    dataset, _ = dataset_of(tmp_path, *smear)
    (found,) = draw_samples(dataset, dataset.train)
    assert is_colour(found.picture, YELLOW).any()
