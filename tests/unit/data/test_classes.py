"""Classes inferred from masks: which are parts of others, which are absent, and which images are empty."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.cli.check import check_folder
from cellbench.config.base import checked
from cellbench.config.cards import DatasetCard
from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.class_content import class_content
from cellbench.data.classes import describe_absent_classes, infer_owners
from cellbench.data.dataset import Dataset
from cellbench.data.loading import open_dataset
from cellbench.errors import CellbenchError
from cellbench.hardware import detect_hardware
from cellbench.inference.prediction import find_images, output_paths, write_masks
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.tables import existing_masks, write_counts
from cellbench.inference.trained_run import Preparation, TrainedRun
from cellbench.inference.writers import OutputFormats
from cellbench.metrics.measurements import count_by_class
from cellbench.metrics.separation import SeparationParams
from cellbench.models.baselines.build import FoundClasses

Y, X = np.mgrid[:120, :160]
NESTED = ("background", "cytoplasm", "nucleus")


def disc(cy, cx, radius):
    return (Y - cy) ** 2 + (X - cx) ** 2 < radius**2


def cells_with_nuclei(*centres):
    """Class map of cells of radius 20 with a nucleus of radius 10 each; the first nucleus lies at the edge of its cell."""
    out = np.zeros(Y.shape, np.uint8)
    for cy, cx in centres:
        out[disc(cy, cx, 20)] = 1
    for k, (cy, cx) in enumerate(centres):
        out[disc(cy - 7 * (k == 0), cx, 10)] = 2
    return out


def card_of(classes=NESTED, **keys):
    return checked(DatasetCard, {"id": "mine", "title": "", "path": "mine.toml", "classes": classes, **keys}, "mine.toml")


def owners(*maps, card=None, num=3):
    card = card or card_of(NESTED[:num] if num <= 3 else (*NESTED, *(f"class {k}" for k in range(3, num))))
    return infer_owners(card, [class_content(one, len(card.classes))[0] for one in maps])


CENTRES = ((30, 30), (30, 100), (85, 60))


def test_a_nucleus_in_its_cytoplasm_is_a_part_of_it_and_that_is_reported():
    found, notes = owners(cells_with_nuclei(*CENTRES), cells_with_nuclei((60, 80)))
    assert found == (0, 1, 1)
    assert len(notes) == 1
    assert "'nucleus' lies along 'cytoplasm': taken as a part of it" in notes[0]


def test_cells_that_touch_one_another_are_no_parts():
    kinds = np.zeros(Y.shape, np.uint8)
    for k, (cy, cx) in enumerate(((30, 30), (30, 62), (30, 94), (75, 40), (75, 73))):
        kinds[disc(cy, cx, 17)] = 1 + k % 2
    assert owners(kinds) == ((), [])


def test_a_rim_of_between_values_does_not_make_a_cell_a_part():
    """A mask of 0 and 255, smoothed, passes through 128, which the card gives to another class."""
    mask = disc(40, 40, 20) * 2 + disc(40, 110, 20) * 2 + disc(95, 80, 15) * 1
    kinds = mask.astype(np.uint8)
    for cx in (40, 110):
        kinds[disc(40, cx, 21) & ~disc(40, cx, 20)] = 1
    assert owners(kinds)[0] == ()


def test_many_cells_in_a_sheet_of_others_are_no_parts_and_the_doubt_is_reported():
    sheet = np.ones(Y.shape, np.uint8)
    for cy in range(15, 120, 25):
        for cx in range(15, 160, 25):
            sheet[disc(cy, cx, 7)] = 2
    found, notes = owners(sheet)
    assert found == ()
    assert "taken as an object of its own. If it is a part of it, give `parts`" in notes[0]


def test_lobes_of_a_nucleus_and_a_nucleolus_are_parts_of_the_same_cell():
    lobed = disc(60, 60, 35).astype(np.uint8)
    lobed[disc(50, 50, 9) | disc(70, 60, 9) | disc(50, 75, 9)] = 2
    lobed[disc(50, 50, 4)] = 3
    assert owners(lobed, num=4)[0] == (0, 1, 1, 1)


def test_the_card_decides_where_it_says_something():
    nested = cells_with_nuclei(*CENTRES)
    assert owners(nested, card=card_of(objects=["cytoplasm", "nucleus"]))[0] == ()
    for keys in (
        {"objects": ["cytoplasm"]},
        {"parts": ["nucleus"]},
        {"parts": {"nucleus": "cytoplasm"}},
        {"objects": ["cytoplasm"], "parts": ["nucleus"]},
    ):
        assert owners(np.zeros(Y.shape, np.uint8), card=card_of(**keys))[0] == (0, 1, 1)
    # The other way round: a cell is named after its nucleus.
    assert owners(nested, card=card_of(objects=["nucleus"]))[0] == (0, 2, 2)


def test_a_part_of_several_classes_of_objects_belongs_to_the_one_that_it_touches_most():
    four = (*NESTED, "red cell")
    mixed = cells_with_nuclei(*CENTRES)
    mixed[disc(85, 120, 15)] = 3
    assert owners(mixed, card=card_of(four, objects=["cytoplasm", "red cell"]))[0] == (0, 1, 1, 3)
    with pytest.raises(CellbenchError, match=r"'nucleus' touches none of cytoplasm, red cell"):
        owners(np.zeros(Y.shape, np.uint8), card=card_of(four, parts=["nucleus"]))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"parts": ["nukleus"]}, "parts names 'nukleus'"),
        ({"objects": ["background"]}, "objects names 'background'"),
        ({"objects": ["nucleus"], "parts": ["nucleus"]}, "in objects and in parts"),
        ({"parts": ["nucleus", "cytoplasm"]}, "none is an object"),
        ({"parts": {"nucleus": "nucleus"}}, "a part belongs to a class of objects"),
        ({"classes": [*NESTED, "x"], "objects": ["x"], "parts": ["nucleus"]}, "'cytoplasm' is neither in objects nor in parts"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(keys, says):
    with pytest.raises(CellbenchError, match=says):
        card_of(**keys)


FEW = DataSpec(limit=20, group="none")


def test_the_real_white_cells_say_what_their_card_says(shared):
    card = Registry().dataset("wbc")
    dataset = open_dataset(card.model_copy(update={"objects": (), "parts": ()}), shared / "wbc", FEW)
    assert dataset.owners == (0, 1, 1)
    assert open_dataset(card, shared / "wbc", FEW).owners == (0, 1, 1)


# --- a folder -----------------------------------------------------------------------------------------------------------------------------


def folder_of(root: Path, card: str, **maps) -> Path:
    """A dataset in original/ and mask/ by part; an image is white where its mask is 0, and darker by class."""
    for part, found in maps.items():
        for kind in ("original", "mask"):
            (root / part / kind).mkdir(parents=True)
        for k, classes in enumerate(found):
            image = np.repeat((240 - 70 * classes.astype(int) + k)[..., None], 3, 2).astype(np.uint8)
            Image.fromarray(image).save(root / part / "original" / f"{part}{k}.png")
            Image.fromarray(classes).save(root / part / "mask" / f"{part}{k}.png")
    (root / "dataset.toml").write_text(card)
    return root


def opened(folder: Path) -> Dataset:
    return open_dataset(Registry().dataset("folder"), folder, DataSpec(group="none"))


PLAIN = 'classes = ["background", "cytoplasm", "nucleus"]\nvalues = [0, 1, 2]\n'


@pytest.fixture
def nested(tmp_path):
    maps = [cells_with_nuclei((30 + k, 30), (40, 100 + k), (85, 60 - k)) for k in range(8)]
    return folder_of(tmp_path / "nested", PLAIN, train=maps[:6], test=maps[6:])


def test_parts_are_in_the_digest_of_the_data_and_nothing_else_is(nested):
    inferred = opened(nested)
    (nested / "dataset.toml").write_text(PLAIN + 'parts = ["nucleus"]\n')
    declared = opened(nested)
    (nested / "dataset.toml").write_text(PLAIN + 'objects = ["cytoplasm", "nucleus"]\n')
    single = opened(nested)
    assert inferred.owners == declared.owners == (0, 1, 1)
    assert inferred.digest == declared.digest != single.digest
    assert single.owners == ()


def segmenter_of(owners=()) -> Segmenter:
    run = Registry().complete(RunSpec(baseline="otsu"))
    from cellbench.data.transforms.framing import Framing

    trained = TrainedRun(
        name="otsu",
        run=run,
        classes=NESTED,
        preparation=Preparation(framing=Framing.of(run)),
        separation=SeparationParams(owners=owners),
        fingerprint="f",
    )
    return Segmenter(trained, Registry(), detect_hardware("cpu", "fp32"))


def test_counts_are_of_cells_and_of_each_class(nested, tmp_path, monkeypatch):
    for owner, cells, columns in (((0, 1, 1), "3", ["3", "3"]), ((), "6", ["3", "3"])):
        one = segmenter_of(owner)
        truth = iter([cells_with_nuclei((36, 30), (40, 106), (85, 54)), cells_with_nuclei((37, 30), (40, 107), (85, 53))])
        monkeypatch.setattr(one, "_function", lambda image, num, truth=truth, **options: FoundClasses(classes=next(truth)))
        out = tmp_path / f"out{len(owner)}"
        out.mkdir()
        targets = output_paths(one, find_images([nested / "test" / "original"], out)[0], out, {})
        assert write_masks(one, targets, OutputFormats(instances=True, separation=one.trained.separation), print)[:2] == ({}, [])
        with write_counts(existing_masks(out), out, NESTED, owner).open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert [[line["cells"], line["cytoplasm"], line["nucleus"]] for line in lines] == [[cells, *columns]] * 2
        table = (out / "test0.cells.csv").read_text().splitlines()
        assert len(table) == 1 + int(cells)
        assert ("nucleus_area_px" in table[0]) == bool(owner)


def test_a_cell_without_its_part_is_no_cell_less():
    rows = [{"class": "cytoplasm", "nucleus_area_um2": area} for area in ("12.5", "0.0", "3.0")]
    assert count_by_class(rows, NESTED, (0, 1, 1), 0.5) == {"cytoplasm": 3, "nucleus": 2}
    assert count_by_class(rows, ("background", "cell")) == {}


# --- what is not there --------------------------------------------------------------------------------------------------------------------


def test_classes_that_are_missing_somewhere_are_named_with_the_consequence():
    pixels = {"train": np.array([[9, 1, 0, 0]]), "val": np.array([[9, 0, 1, 0]]), "test": np.array([[9, 1, 1, 0], [9, 0, 0, 0]])}
    assert describe_absent_classes(("background", "red", "white", "platelet"), pixels) == [
        ("red", "class 'red' is in no validation mask: it has no part in choosing epochs."),
        ("white", "class 'white' is in no training mask: no model can learn it."),
        ("platelet", "class 'platelet' is in no mask of this data. It has no score, and means leave it out."),
    ]


@pytest.mark.slow
def test_a_missing_class_and_empty_images_are_reported_by_grid_and_check(tmp_path, capsys):
    empty, red, white = np.zeros(Y.shape, np.uint8), disc(40, 40, 15).astype(np.uint8), disc(70, 90, 15) * np.uint8(2)
    card = 'classes = ["background", "red", "white", "platelet"]\nvalues = [0, 1, 2, 3]\n'
    folder = folder_of(tmp_path / "data", card, train=[red, white, red, white, red, red | white], test=[red, empty, empty])
    dataset = opened(folder)
    notes = "\n".join(dataset.notes)
    assert dataset.unused == (3,)
    assert "class 'platelet' is in no mask of this data" in notes
    assert "class 'white' is in no" in notes
    assert "2 of 3 test images" in notes
    check_folder(folder, out=tmp_path / "report", spec=DataSpec(group="none"))
    said = {
        finding["images"][0]
        for finding in json.loads((tmp_path / "report" / "check.json").read_text())["findings"]
        if finding["kind"] == "class"
    }
    assert said == {"white", "platelet"}
    assert "class 'platelet' is in no mask of this data" in capsys.readouterr().out
