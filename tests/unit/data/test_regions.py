"""Regions of interest limit masks and counts: by name, by even-odd rings, and not a pixel more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from labelled_folders import FOLDER, pairs
from PIL import Image

from cellbench.config.experiment import DataSpec
from cellbench.data.loading import open_dataset
from cellbench.data.regions import read_regions, region_masks, within_regions
from cellbench.errors import CellbenchError
from cellbench.metrics.instance import ReferenceMask

SPLIT = DataSpec(test_fraction=0.34, val_fraction=0.3)


def square(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(name: str, *rings: list[list[float]], kind: str = "annotation") -> dict:
    geometry = {"type": "Polygon", "coordinates": list(rings)}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": kind, **({"name": name} if name else {})}}


def write(path: Path, *features: dict) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def numbered(folder: Path) -> Path:
    pairs(folder)
    (folder / "dataset.toml").write_text('masks = "cells"\n')
    return folder


def test_points_and_pixels_inside_are_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "a.geojson", feature("ring", square(2, 3, 30, 25), square(10, 10, 20, 20)), feature("", square(40, 0, 60, 40)))
    found = region_masks(file, (40, 60))
    assert [region.name for region, _ in found] == ["ring", "region"]
    y, x = np.mgrid[:40, :60] + 0.5
    for region, pixels in found:
        assert np.array_equal(region.holds(np.stack([x.ravel(), y.ravel()], 1)).reshape(40, 60), pixels)
    assert found[0][1].sum() == 28 * 22 - 100
    assert found[1][1].sum() == 800


def test_a_point_on_a_common_side_is_in_one_region(tmp_path: Path) -> None:
    file = write(tmp_path / "a.geojson", feature("left", square(0, 0, 30, 40)), feature("right", square(30, 0, 60, 40)))
    points = np.array([[30.0, y] for y in (0.5, 7, 20, 39.5)] + [[0.5, 0.5], [59.5, 3]])
    assert np.array([region.holds(points) for region in read_regions(file)]).sum(0).tolist() == [1] * len(points)


def test_regions_of_one_name_are_numbered_and_cells_are_none(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.geojson",
        feature("spot", square(0, 0, 9, 9)),
        feature("spot", square(20, 0, 29, 9)),
        feature("", square(1, 1, 4, 4), kind="cell"),
    )
    assert [region.name for region in read_regions(file)] == ["spot 1", "spot 2"]


def test_a_dataset_is_limited_to_the_regions_in_its_folder(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "set")
    whole = open_dataset(FOLDER, folder, SPLIT)
    sample = whole.train[0]
    before, ids = whole.read_mask(sample), whole.read_instances(sample)
    write(folder / "regions" / f"{Path(sample.name).stem}.geojson", feature("left", square(0, 0, 30, 40)))
    limited = open_dataset(FOLDER, folder, SPLIT)
    (one,) = [other for other in (*limited.train, *limited.val, *limited.test) if other.regions]
    assert one.name == sample.name
    after = limited.read_mask(one)
    assert np.array_equal(after[:, :30], before[:, :30])
    assert (after[:, 30:] == 255).all()
    assert limited.digest != whole.digest
    assert np.array_equal(limited.read_instances(one), ids)  # ignored pixels hold no cell, whatever their number
    assert any("regions: 1 images are limited" in note for note in limited.notes)
    assert not any("not used in set: regions" in note for note in limited.notes)
    other = next(one for one in limited.train + limited.val if one.regions is None)
    assert not (limited.read_mask(other) == 255).any()


def test_a_cell_counts_where_most_of_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for k in range(4):
        mask = np.zeros((40, 60), np.uint8)
        mask[2:12, 20:32], mask[20:32, 28:38] = 255, 255  # ten of twelve columns are inside, two of ten
        for inner, pixels in (("images", np.full((40, 60, 3), 50 * k, np.uint8)), ("masks", mask)):
            (folder / inner).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / inner / f"i{k}.png")
        write(folder / "regions" / f"i{k}.geojson", feature("left", square(0, 0, 30, 40)))
    dataset = open_dataset(FOLDER, folder, SPLIT)
    for one in (*dataset.train, *dataset.test):
        truth, ids = dataset.read_truth(one)
        assert np.array_equal(truth, dataset.read_mask(one))
        reference = ReferenceMask(truth, 2, ids, min_area_px=dataset.min_cell_px)
        assert reference.cells.areas_px[1:].tolist() == [100]
        whole = (np.array(Image.open(one.mask)) > 0).astype(np.uint8)
        scores = reference.agreement(whole)
        assert (scores.num_true, scores.num_found, scores.num_extra, scores.ap50) == (1, 1, 0, 1)


def test_faults_are_one_line(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "set")
    write(folder / "regions" / "i0.geojson", feature("far", square(70, 50, 90, 70)))
    with pytest.raises(CellbenchError, match=r"i0.geojson: a region lies outside its image of 60 x 40 px"):
        open_dataset(FOLDER, folder, SPLIT)
    write(folder / "regions" / "i0.geojson")
    with pytest.raises(CellbenchError, match="marks no region"):
        open_dataset(FOLDER, folder, SPLIT)
    write(folder / "regions" / "i0.geojson", feature("a", square(0, 0, 9, 9)))
    write(folder / "regions" / "i0_rois.geojson", feature("a", square(0, 0, 9, 9)))
    with pytest.raises(CellbenchError, match=r"'i0.png' has 2 files of regions"):
        open_dataset(FOLDER, folder, SPLIT)


def test_a_file_of_no_image_is_named(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "set")
    write(folder / "regions" / "i0.geojson", feature("a", square(0, 0, 40, 40)))
    write(folder / "regions" / "typo.geojson", feature("a", square(0, 0, 9, 9)))
    notes = open_dataset(FOLDER, folder, SPLIT).notes
    assert any("1 files belong to no image" in note and "typo.geojson" in note for note in notes)


def test_regions_are_no_annotations_to_learn_from(tmp_path: Path) -> None:
    for k in range(4):
        Image.fromarray(np.full((40, 60, 3), 60 * k, np.uint8)).save(tmp_path / f"i{k}.png")
        write(tmp_path / f"i{k}.geojson", feature("", square(3, 3, 20, 20), kind="cell"))
        write(tmp_path / "regions" / f"i{k}.geojson", feature("half", square(0, 0, 30, 40)))
    dataset = open_dataset(FOLDER, tmp_path, SPLIT)
    samples = [*dataset.train, *dataset.val, *dataset.test]
    assert len(samples) == 4
    for one in samples:
        classes = dataset.read_mask(one)
        assert (classes[:, 30:] == 255).all()
        assert (classes[:, :30] != 255).all()


def test_no_file_changes_nothing() -> None:
    classes = np.zeros((4, 4), np.uint8)
    assert within_regions(classes, None) is classes
