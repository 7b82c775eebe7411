"""Boxes, points and counts of other tools' formats are true counts; what does not fit is one line."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.config.registry import Registry
from cellbench.data.count_truth import CountTruth, match_classes
from cellbench.data.layouts import scan_folder
from cellbench.data.loading import open_count_truth
from cellbench.errors import CellbenchError

WIDTH, HEIGHT = 60, 40
BOXES = {"a": [("RBC", 2, 4, 10, 12), ("RBC", 30, 4, 41, 15), ("WBC", 20, 20, 40, 38)], "b": [("RBC", 0, 0, 8, 9)], "c": []}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), len(path.stem), np.uint8)).save(path)


def voc(folder: Path) -> Path:
    """As BCCD is published."""
    for name, boxes in BOXES.items():
        picture(folder / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, x0, y0, x1, y1 in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>")
    return folder


def coco(folder: Path) -> Path:
    """As Roboflow exports boxes: with an empty segmentation."""
    images, annotations = [], []
    for k, (name, boxes) in enumerate(BOXES.items()):
        picture(folder / f"{name}.jpg")
        images.append({"id": k, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
        for label, x0, y0, x1, y1 in boxes:
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {"id": len(annotations), "image_id": k, "category_id": "RW".index(label[0]), "bbox": box, "segmentation": []}
            )
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "RBC"}, {"id": 1, "name": "WBC"}]}
    (folder / "_annotations.coco.json").write_text(json.dumps(tree))
    return folder


def table(folder: Path, heading: str, line, delimiter: str = ",") -> Path:
    lines = [heading]
    for name, boxes in BOXES.items():
        picture(folder / f"{name}.jpg")
        lines += [line(name, *box) for box in boxes] or [f"{name}.jpg" + delimiter * heading.count(delimiter)]
    (folder / "cells.csv").write_text("\n".join(lines))
    return folder


def points(folder: Path) -> Path:
    """As QuPath exports points: several of one class may be one feature."""
    for name, boxes in BOXES.items():
        picture(folder / f"{name}.jpg")
        features = []
        for kind in dict.fromkeys(label for label, *_ in boxes):
            places = [[(x0 + x1) / 2, (y0 + y1) / 2] for label, x0, y0, x1, y1 in boxes if label == kind]
            geometry = {"type": "MultiPoint", "coordinates": places} if len(places) > 1 else {"type": "Point", "coordinates": places[0]}
            about = {"objectType": "annotation", "classification": {"name": kind}}
            features.append({"type": "Feature", "geometry": geometry, "properties": about})
        (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return folder


WAYS = {
    "points of QuPath": points,
    "voc": voc,
    "coco": coco,
    "boxes in a table": lambda folder: table(
        folder, "filename,cell_type,xmin,xmax,ymin,ymax", lambda name, label, x0, y0, x1, y1: f"{name}.jpg,{label},{x0},{x1},{y0},{y1}"
    ),
    "points in a table": lambda folder: table(
        folder,
        "image;x;y;class",
        lambda name, label, x0, y0, x1, y1: f"{name}.jpg;{(x0 + x1) / 2};{(y0 + y1) / 2};{label}".replace(".5", ",5"),
        ";",
    ),
}


def read(folder: Path) -> CountTruth:
    found = open_count_truth(folder, Registry())
    assert found is not None
    return found


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_the_same_cells(way: str, tmp_path: Path) -> None:
    truth = read(WAYS[way](tmp_path))
    assert [one.name for one in truth.samples] == ["a.jpg", "b.jpg", "c.jpg"]
    assert truth.num_of == {"RBC": 3, "WBC": 1}
    for name, boxes in BOXES.items():
        (sample,) = [one for one in truth.samples if one.image.stem == name]
        cells = truth.cells(sample, {"RBC": 1, "WBC": 2})
        assert cells.classes.tolist() == [1 if label == "RBC" else 2 for label, *_ in boxes]
        assert cells.xy.tolist() == [[(x0 + x1) / 2, (y0 + y1) / 2] for _, x0, y0, x1, y1 in boxes]


def test_a_table_may_hold_the_numbers_themselves(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "counts.csv").write_text("image,class,count\na.png,RBC,12\na.png,WBC,1\nb.png,RBC,0\n")
    truth = read(tmp_path)
    assert truth.num_of == {"RBC": 12, "WBC": 1}
    assert not truth.placed


def test_the_test_split_is_used_where_there_is_one(tmp_path: Path) -> None:
    folder = voc(tmp_path)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("a\nc\n")
    truth = read(folder)
    assert [one.name for one in truth.samples] == ["a.jpg", "c.jpg"]
    assert "1 others are not counted" in truth.notes[0]


def test_a_card_leaves_a_class_out_or_gives_it_another_name(tmp_path: Path) -> None:
    folder = voc(tmp_path)
    (folder / "dataset.toml").write_text('categories = { WBC = "" }\n')
    assert read(folder).num_of == {"RBC": 3}
    (folder / "dataset.toml").write_text('categories = { WBC = "white" }\n')
    assert read(folder).num_of == {"RBC": 3, "white": 1}
    (folder / "dataset.toml").write_text('categories = { platelets = "" }\n')
    with pytest.raises(CellbenchError, match=r"categories names 'platelets', which .* does not hold"):
        read(folder)


def test_a_folder_of_masks_or_of_images_alone_has_no_such_truth(tmp_path: Path) -> None:
    for inner in ("images", "masks"):
        picture(tmp_path / "masked" / inner / "a.png")
    (tmp_path / "masked" / "cells.csv").write_text("image,x,y\na.png,1,1\n")
    assert open_count_truth(tmp_path / "masked", Registry()) is None
    picture(tmp_path / "plain" / "a.png")
    (tmp_path / "plain" / "labels.csv").write_text("image,label\na.png,3\n")
    assert open_count_truth(tmp_path / "plain", Registry()) is None


def test_faults_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    def fault(folder: Path, old: str, new: str, file: str = "Annotations/a.xml") -> str:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))
        with pytest.raises(CellbenchError) as error:
            read(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is of an image of 120 x 40 px; a.jpg has 60 x 40" in fault(voc(tmp_path / "1"), "<width>60", "<width>120")
    assert "a cell at 306, 8 is outside" in fault(voc(tmp_path / "2"), "<xmax>10", "<xmax>610")
    assert "cannot be read as a VOC file" in fault(voc(tmp_path / "3"), "<xmin>2<", "<xmin>two<")
    assert "defines entities" in fault(voc(tmp_path / "4"), "<annotation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>")
    assert "has no box" in fault(coco(tmp_path / "5"), '"bbox": [2, 4, 8, 8]', '"bbox": null', "_annotations.coco.json")
    assert "cannot be read as a VOC file" in fault(voc(tmp_path / "7"), "<width>60", "<width>inf")
    assert "cannot be read as a VOC file" in fault(voc(tmp_path / "8"), "<annotation>", '<?xml version="1.0" encoding="none"?><annotation>')
    beyond = "1" + 400 * "0"
    assert "has no box" in fault(coco(tmp_path / "9"), '"bbox": [2, 4, 8, 8]', f'"bbox": [2, 4, {beyond}, 8]', "_annotations.coco.json")
    folder = WAYS["points in a table"](tmp_path / "6")
    assert "line 2: could not convert string" in fault(folder, "a.jpg;6.0", "a.jpg;six", "cells.csv")
    assert "is x, y a corner or a centre?" in fault(folder, "class", "width", "cells.csv")


def test_images_without_truth_and_the_reverse_are_named(tmp_path: Path) -> None:
    folder = voc(tmp_path)
    picture(folder / "JPEGImages" / "unseen.jpg")
    (folder / "JPEGImages" / "b.jpg").unlink()
    notes = " ".join(read(folder).notes)
    assert "1 images have no truth and do not count: 'unseen.jpg'" in notes
    assert "1 images that it names are not in the folder and do not count: 'b.jpg'" in notes


@pytest.mark.parametrize("named", ["{}.jpg", "other.jpg"])
def test_names_may_be_decomposed_as_macos_writes_them(tmp_path: Path, named: str) -> None:
    folder, name = voc(tmp_path), unicodedata.normalize("NFD", "\u00e9")
    (folder / "JPEGImages" / "a.jpg").rename(folder / f"{name}.jpg")
    text = (folder / "Annotations" / "a.xml").read_text()
    (folder / "Annotations" / "a.xml").unlink()
    (folder / "Annotations" / f"{name}.xml").write_text(text.replace("a.jpg", named.format(name)), encoding="utf-8")
    truth = read(folder)
    assert [one.name for one in truth.samples] == ["b.jpg", "c.jpg", "\u00e9.jpg"]
    assert len(truth.marks["\u00e9.jpg"]) == 3


def test_classes_are_compared_where_both_tell_them_apart(tmp_path: Path) -> None:
    truth = read(voc(tmp_path))
    both = match_classes(truth, {1: "rbc", 2: "WBC", 3: "platelet"}, "m")
    assert (both.of_label, dict(both.names)) == ({"RBC": 1, "WBC": 2}, {1: "rbc", 2: "WBC"})
    assert "not counted: platelet" in both.note
    one = match_classes(truth, {1: "cell"}, "m")
    assert (one.of_label, dict(one.names)) == ({"RBC": 1, "WBC": 1}, {1: "cell"})
    with pytest.raises(CellbenchError, match="the truth has the class 'WBC'; m counts rbc, platelet"):
        match_classes(truth, {1: "rbc", 2: "platelet"}, "m")


def test_points_are_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(CellbenchError, match=r"mark 4 points and no outline. Points are enough to compare counts"):
        scan_folder(Registry().dataset("folder"), points(tmp_path))


def test_whoever_trains_on_boxes_is_told_what_they_are_good_for(tmp_path: Path) -> None:
    for folder in (voc(tmp_path / "folders"), tmp_path / "flat"):
        if folder.name == "flat":
            for inner in ("JPEGImages", "Annotations"):
                for path in (tmp_path / "folders" / inner).iterdir():
                    folder.mkdir(exist_ok=True)
                    (folder / path.name).write_bytes(path.read_bytes())
        with pytest.raises(CellbenchError, match="Boxes are enough to compare counts"):
            scan_folder(Registry().dataset("folder"), folder)
        assert len(read(folder).samples) == 3
