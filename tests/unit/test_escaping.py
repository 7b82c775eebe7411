"""Names that people give to files are data: no table computes them, no page, figure or terminal takes them for anything else."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import MODEL, discs, write_pair

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.loading import open_dataset
from cellbench.data.scan import resolve_inside
from cellbench.escaping import escape_markdown, to_csv, to_printable
from cellbench.files import file_name
from cellbench.reporting.plots.example import draw_example
from cellbench.reporting.render import to_markdown
from cellbench.reporting.report_data import Table
from cellbench.run import main
from cellbench.tracking import ui_view

NASTY = ["=1+1", "+A1", "-x", "@SUM(A1)", "\tx", "\rx", 'a,"b"', "a;b|c", "<b>&amp;", "$x$ and $y", "a_b%#{}", "zelle ä"]


@pytest.mark.parametrize("name", NASTY)
def test_a_spreadsheet_reads_each_name_as_text(name: str) -> None:
    (heading, row) = csv.reader(io.StringIO(to_csv(["image", name], [[name, -2.5]]), newline=""))
    assert row[0].removeprefix("'") == heading[1].removeprefix("'") == name
    assert row[0][0] not in "=+-@\t\r"
    assert row[1] == "-2.5"


def test_numbers_written_as_text_stay_numbers() -> None:
    assert to_csv(["d"], [["-0.012"], ["+3"], ["1e-3"], ["-1,234.5"]]) == 'd\n-0.012\n+3\n1e-3\n"-1,234.5"\n'


def test_bytes_that_are_no_text_and_control_characters_can_be_written_anywhere() -> None:
    assert to_csv(["a"], [["caf\udce9"]]) == "a\ncaf\\xe9\n"
    assert to_printable("a\nb\x1b[31m\udce9 ä") == "a\\nb\\x1b[31m\\xe9 ä"


@pytest.mark.parametrize("name", NASTY)
def test_a_name_stays_in_its_cell_of_a_markdown_table(name: str) -> None:
    for table in (to_markdown(Table(headings=["a", "b"], rows=[[name, "1"]])), ui_view.padded_table(["a", "b"], [[name, "1"]])):
        last = table.split("\n")
        assert len(last) == 3
        cells = last[2].replace("\\|", "").split("|")
        assert len(cells) == 4
        assert "<" not in last[2]
    assert escape_markdown("vit-tiny · fpn") == "vit-tiny · fpn"


def test_a_figure_draws_dollars_as_they_are() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    mask = np.zeros((20, 20), np.uint8)
    for name in ("$x$", r"$\frac{$", "a_$b^$"):
        assert draw_example(image, mask, mask, None, name).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("first", "second"), [("a/b", "a_b"), ("a/b", "a-b"), ("A", "a"), ("x" * 90, "x" * 91), ("a b", "a  b"), ("con", "con~"), ("", ".")]
)
def test_names_that_differ_have_files_that_differ(first: str, second: str) -> None:
    assert file_name(first).casefold() != file_name(second).casefold()
    assert len(file_name(first)) <= 60


def test_images_and_masks_of_two_unicode_forms_are_pairs(tmp_path: Path) -> None:
    for seed, name in enumerate(("zellé1.png", "zellé2.png", "zellé3.png", "zellé4.png")):
        write_pair(tmp_path / "train", name, seed)
        mask = tmp_path / "train" / "mask" / name
        mask.rename(mask.with_name(unicodedata.normalize("NFD", name)))
    dataset = open_dataset(Registry().dataset("folder"), tmp_path, DataSpec())
    assert len({*dataset.train, *dataset.val, *dataset.test}) == 4
    (written,) = tmp_path.glob("splits.json")
    splits = json.loads(written.read_text())
    splits |= {part: [unicodedata.normalize("NFD", name) for name in splits[part]] for part in ("train", "val", "test") if part in splits}
    written.write_text(json.dumps(splits))
    again = open_dataset(Registry().dataset("folder"), tmp_path, DataSpec())
    assert [one.name for one in again.train] == [one.name for one in dataset.train]


def test_a_manifest_may_name_a_file_in_the_other_unicode_form(tmp_path: Path) -> None:
    name = "größe/zellé.png"
    file = tmp_path / unicodedata.normalize("NFD", name)
    file.parent.mkdir()
    file.write_bytes(b"x")
    assert resolve_inside(tmp_path, unicodedata.normalize("NFC", name)) == file


def test_predict_writes_nasty_names_into_tables_that_read_back(there: Path, tmp_path: Path) -> None:
    names = ["=1+1.png", "-x.png", 'a,"b".png', "$a$ <b>.png"]
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(names):
        Image.fromarray(discs(seed, 64, 64)[0]).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    assert main(["predict", MODEL, str(tmp_path / "in"), "--out", str(out), "--instances", "--coco", "--device", "cpu"]) == 0
    with (out / "counts.csv").open(newline="", encoding="utf-8") as file:
        listed = [row["image"] for row in csv.DictReader(file)]
    assert {name.removeprefix("'") for name in listed} == {name.removesuffix(".png") for name in names}
    assert not [name for name in listed if name.startswith(("=", "-"))]
    assert {one["file_name"] for one in json.loads((out / "coco.json").read_text())["images"]} == set(names)
