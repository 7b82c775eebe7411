"""Exported folders may come from anybody: their code is asked about, their records are checked, and nothing is written outside of the new folder."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.stain import Reinhard
from cellbench.errors import CellbenchError
from cellbench.inference.export import read_export, write_export
from cellbench.inference.onnx import left_to_caller, write_readme
from cellbench.inference.records import ExportRecord, FramingRecord, PreparationRecord, ReadingRecord, SeenRecord, SeparationRecord
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.calibration import Calibration
from cellbench.metrics.separation import SeparationParams

CODE = "import numpy as np\n\n\ndef all_cell(image, num_classes):\n    return np.ones(image.shape[:2], np.uint8)\n"
ALSO = "open('it-ran', 'w').write('')\n"


def write_card(folder: Path, builder: str) -> Registry:
    place = folder / "baselines"
    place.mkdir(parents=True, exist_ok=True)
    (place / "mine.toml").write_text(f"# Mine\nbuilder = {json.dumps(builder)}\ntrained = false\n")
    return Registry(folder)


def run_of(registry: Registry) -> TrainedRun:
    run = registry.complete(RunSpec(baseline="mine"))
    preparation = Preparation(framing=Framing.of(run), normaliser=Reinhard(mean=(60.0, 1.0, 2.0), deviation=(9.0, 1.0, 1.0)))
    separation = SeparationParams(saddle_ratio=0.3, val_ap50={"0.3": 0.5}, num_images=2, owners=(0, 1))
    seen = {"format": 1, "train": [["a.png", "/a.png", "0" * 16, "f" * 64]], "val": []}
    return TrainedRun(
        name="mine", run=run, classes=("background", "cell"), preparation=preparation, separation=separation, seen=seen, config="# all\n"
    )


def test_what_an_onnx_file_leaves_to_its_caller_is_listed(tmp_path: Path) -> None:
    run = RunSpec(backbone="uni", head="fpn", normalise="reinhard", tile_scale=2.0, tta="d4", edge_cells="tuned")
    trained = replace(run_of(write_card(tmp_path, "mine.py:all_cell")), run=run)
    trained = replace(
        trained,
        preparation=replace(trained.preparation, framing=Framing.of(run), reading=IntensityScaling(int_range=(0, 4095))),
        calibration=Calibration(temperature=1.5, edge_share=0.1),
    )
    write_readme(tmp_path / "README.md", trained)
    text = (tmp_path / "README.md").read_text()
    for words in (
        "`reading`",
        'normalise = "reinhard"',
        "scaled by 2",
        "tiles of 224 px that overlap by 50%",
        'tta = "d4"',
        "temperature 1.5",
    ):
        assert words in text
    assert 'edge_cells = "tuned"' in text
    assert "watershed, saddle_ratio 0.3" in text
    assert "(B, 3, 224, 224) float32" in text
    plain = replace(
        trained,
        run=RunSpec(backbone="uni", head="fpn"),
        calibration=Calibration(),
        preparation=Preparation(framing=Framing(kind="resize", side_px=96)),
    )
    assert left_to_caller(plain) == ["the image resized to 96 x 96 px", "single cells (watershed, saddle_ratio 0.3)"]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder that this user has exported, of a run with code of its own."""
    (tmp_path / "parts" / "baselines").mkdir(parents=True)
    (tmp_path / "parts" / "baselines" / "mine.py").write_text(CODE)
    registry = write_card(tmp_path / "parts", "mine.py:all_cell")
    write_export(tmp_path / "model", run_of(registry), registry, None, "auto")
    return tmp_path / "model"


def predicted(folder: Path, **named: Any) -> np.ndarray:
    return Segmenter.load(folder, device="cpu", **named).predict(np.zeros((20, 30, 3), np.uint8)).classes


def test_own_code_of_an_own_export_runs(exported: Path) -> None:
    assert predicted(exported).all()


def test_code_that_was_changed_runs_only_when_trusted(exported: Path, tmp_path: Path) -> None:
    (exported / "registry" / "baselines" / "mine.py").write_text(CODE + ALSO)
    with pytest.raises(CellbenchError, match=r"mine.toml: would run Python code \(mine.py:all_cell\) .* add --trust"):
        predicted(exported)
    assert not (tmp_path / "it-ran").exists()
    assert predicted(exported, trust=True).all()
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("builder", ["os:system", "cellbench.files:make_folder"])
def test_a_card_that_names_any_other_function_is_asked_about(exported: Path, builder: str) -> None:
    write_card(exported / "registry", builder)
    with pytest.raises(CellbenchError, match="add --trust"):
        predicted(exported)


def test_code_of_another_user_is_asked_about(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "other"))
    with pytest.raises(CellbenchError, match="was not exported by this user"):
        predicted(exported)


@pytest.mark.parametrize("builder", ["../../code/two.py:all_cell", "{}/code/two.py:all_cell", "../two.py:all_cell", "link.py:all_cell"])
def test_code_elsewhere_is_refused_before_anything_is_written(builder: str, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    registry = write_card(tmp_path / "parts", builder.format(tmp_path))
    for path in (tmp_path / "code" / "two.py", tmp_path / "parts" / "two.py"):
        path.write_text(CODE)
    (tmp_path / "parts" / "baselines" / "link.py").symlink_to(tmp_path / "code" / "two.py")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CellbenchError, match="names code outside of the card's folder"):
        write_export(tmp_path / "to" / "model", run_of(registry), registry, None, "auto")
    assert sorted(tmp_path.rglob("*")) == before


def test_code_in_a_folder_below_the_card_is_copied(tmp_path: Path) -> None:
    (tmp_path / "parts" / "baselines" / "below").mkdir(parents=True)
    (tmp_path / "parts" / "baselines" / "below" / "mine.py").write_text(CODE)
    registry = write_card(tmp_path / "parts", "below/mine.py:all_cell")
    write_export(tmp_path / "model", run_of(registry), registry, None, "auto")
    assert predicted(tmp_path / "model").all()


@pytest.mark.parametrize("name", ["run.json", "registry/baselines/mine.py"])
def test_links_in_an_exported_folder_are_refused(exported: Path, tmp_path: Path, name: str) -> None:
    (exported / name).rename(tmp_path / "elsewhere")
    (exported / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CellbenchError, match="is a link"):
        read_export(exported)


def test_a_named_pipe_in_an_exported_folder_is_refused_and_not_waited_for(exported: Path) -> None:
    (exported / "run.json").unlink()
    os.mkfifo(exported / "run.json")
    with pytest.raises(CellbenchError, match="neither a file nor a folder"):
        read_export(exported)


def places_in(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree of JSON, as container and key."""
    inner = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [(tree, key) for key, _ in inner] + [place for _, value in inner for place in places_in(value)]


def test_a_record_with_a_fault_anywhere_is_one_line(exported: Path) -> None:
    path, rng, refused = exported / "run.json", random.Random(0), list[str]()
    text = path.read_text()
    values: list[Any] = [None, -1, 2**70, 1.5, float("nan"), "", "x" * 9, "\udcfc", [], [[]], {}, {"a": 1}, True]
    num = len(places_in(json.loads(text)))
    for k in range(num * len(values)):
        tree = json.loads(text)
        container, key = places_in(tree)[k % num]
        if rng.random() < 0.1:
            del container[key]
        else:
            container[key] = values[k // num]
        path.write_text(json.dumps(tree))
        try:
            read_export(exported)
        except CellbenchError as error:
            refused.append(str(error))
    assert len(refused) > num * len(values) / 2
    assert not [line for line in refused if "\n" in line or len(line) > 600]


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}', b'{"format": 1}', b"null"])
def test_a_file_that_is_no_record_is_one_line(exported: Path, data: bytes) -> None:
    (exported / "run.json").write_bytes(data)
    with pytest.raises(CellbenchError, match=r"run\.json: .{5,200}$"):
        read_export(exported)


def test_no_field_is_lost_between_what_is_written_and_its_record(exported: Path) -> None:
    written = json.loads((exported / "run.json").read_text())
    assert written.keys() - {"format", "backbone"} == ExportRecord.model_fields.keys()
    for part, record in (("preparation", PreparationRecord), ("separation", SeparationRecord), ("seen", SeenRecord)):
        assert written[part].keys() == record.model_fields.keys()
    assert written["preparation"]["framing"].keys() == FramingRecord.model_fields.keys()
    assert written["preparation"]["reading"].keys() == ReadingRecord.model_fields.keys()


def test_a_folder_is_read_back_as_it_was_written(exported: Path, tmp_path: Path) -> None:
    written, read = run_of(Registry(tmp_path / "parts")), read_export(exported)
    for name in ("name", "run", "classes", "preparation", "separation", "config"):
        assert getattr(read, name) == getattr(written, name), name
    assert read.seen is not None
    assert [list(row) for row in read.seen["train"]] == [["a.png", "", "0" * 16, "f" * 64]]
