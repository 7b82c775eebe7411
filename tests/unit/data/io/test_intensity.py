"""One range of greys for a whole data set: decided over all images, kept with the run, and what does not fit it is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from cohorts import features_of, run_of
from image_samples import chunk, png, refused
from PIL import Image
from small_data import enter

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.data.io.images import ImageFacts, read_image, read_image_facts, read_image_with_notes
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.loading import open_dataset
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.uniformity import decide_scaling
from cellbench.inference.segmenter import Segmenter
from cellbench.run import main

GROUND, CELL = 3900, 1800  # of a camera of 12 bits


def scene(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A bright field (H, W) uint16 with two dark discs, and their mask (H, W) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    field, mask = np.full((size, size), GROUND, np.uint16), np.zeros((size, size), np.uint8)
    for middle in (26, 70):
        disc = np.hypot(y - middle - rng.uniform(-6, 6), x - middle - rng.uniform(-6, 6)) < rng.uniform(11, 15)
        field[disc], mask[disc] = CELL, 255
    return field, mask


def folder_of(root: Path, scale=lambda field: field, num: int = 6, **tags) -> Path:
    for part, count in (("train", num), ("test", 2)):
        for kind in ("original", "mask"):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            field, mask = scene(k + 10 * (part == "test"))
            tifffile.imwrite(root / part / "original" / f"{part}{k}.tif", scale(field), **tags)
            Image.fromarray(mask).save(root / part / "mask" / f"{part}{k}.png")
    return root


def opened(root: Path, **spec):
    return open_dataset(Registry().dataset("folder"), root, DataSpec(group="none", **spec))  # the scenes are so plain that they look alike


def facts_of(*highs: float, stated=None, dtype: str = "uint16") -> list[ImageFacts]:
    return [ImageFacts(dtype=dtype, low=0, high=high, stated=stated) for high in highs]


# ---- the decision


def test_the_range_comes_from_the_largest_number_of_all_images_and_not_of_one() -> None:
    assert decide_scaling(facts_of(300, 3950, 900))[0].int_range == (0, 4095)
    assert decide_scaling(facts_of(300, 4108, 900))[0].int_range == (0, 16383)
    assert decide_scaling(facts_of(200, 250))[0].int_range == (0, 255)


def test_what_all_files_state_alike_goes_before_the_largest_number_and_the_card_before_both() -> None:
    found = facts_of(300, 900, stated=(0.0, 4095.0))
    assert decide_scaling(found)[0].int_range == (0, 4095)
    assert decide_scaling(found, (100, 2000))[0].int_range == (100, 2000)


def test_a_statement_that_differs_or_is_exceeded_is_not_used() -> None:
    assert decide_scaling([*facts_of(900, stated=(0.0, 1023.0)), *facts_of(3000, stated=(0.0, 3000.0))])[0].int_range == (0, 4095)
    assert decide_scaling(facts_of(5000, stated=(0.0, 4095.0)))[0].int_range == (0, 16383)


def test_decimal_numbers_keep_0_to_1_so_that_a_later_image_that_is_a_little_brighter_is_clipped_and_named(tmp_path: Path) -> None:
    reading = decide_scaling(facts_of(0.5, 0.97, dtype="float32"))[0]
    assert reading == IntensityScaling(float_range=(0, 1))
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0.5, 1.02]], np.float32))
    image, (note,) = read_image_with_notes(tmp_path / "a.tif", reading)
    assert image[0, :, 0].tolist() == [128, 255]
    assert "beyond the range 0..1" in note.message
    assert decide_scaling(facts_of(0.5, 180, dtype="float32"))[0] == IntensityScaling()
    tifffile.imwrite(tmp_path / "b.tif", np.array([[0.5, 180]], np.float32))
    assert "another depth" in refused(tmp_path / "b.tif", reading=reading)
    assert "0..1" in refused(tmp_path / "b.tif")
    assert "`predict`: --range BLACK,WHITE" in refused(tmp_path / "b.tif")


def test_8_bit_images_have_no_range_of_their_own() -> None:
    assert decide_scaling([ImageFacts(dtype="uint8")])[0] == IntensityScaling()


def test_a_range_comes_back_from_its_file() -> None:
    reading = IntensityScaling(int_range=(0, 4095), float_range=(0.0, 2.0), channels=(1, 2, 3))
    assert IntensityScaling.of(reading.to_dict()) == reading


# ---- what files state


def test_statements_of_12_bits_are_read_from_tags_ome_and_png(tmp_path: Path) -> None:
    field = scene(1)[0]
    files = {
        "max.tif": {"extratags": [(281, "H", 1, 4095, True)]},
        "smax.tif": {"extratags": [(341, "H", 1, 4095, True)]},
        "bits.ome.tif": {"metadata": {"axes": "YX", "SignificantBits": 12}},
    }
    for name, options in files.items():
        tifffile.imwrite(tmp_path / name, field, **options)
    png(tmp_path / "sbit.png", field, 0, before=chunk(b"sBIT", b"\x0c"))
    for name in (*files, "sbit.png"):
        assert read_image_facts(tmp_path / name).stated == (0, 4095), name
        assert read_image(tmp_path / name)[0, 0, 0] == round(GROUND * 255 / 4095)


def test_numbers_that_a_type_fills_in_by_itself_state_nothing(tmp_path: Path) -> None:
    for number, options in enumerate(
        ({}, {"extratags": [(281, "H", 1, 65535, True)]}, {"metadata": {"axes": "YX", "SignificantBits": 16}})
    ):
        tifffile.imwrite(tmp_path / f"{number}.ome.tif" if number == 2 else tmp_path / f"{number}.tif", scene(1)[0], **options)
    assert [read_image_facts(path).stated for path in sorted(tmp_path.iterdir())] == [None] * 3


# ---- reading


def test_12_bits_that_count_from_white_are_stated_from_the_other_end(tmp_path: Path) -> None:
    field = scene(1)[0]
    tifffile.imwrite(tmp_path / "a.tif", 4095 - field, photometric="miniswhite", extratags=[(281, "H", 1, 4095, True)])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], np.rint(field * (255 / 4095)))


def test_numbers_beyond_the_range_are_clipped_and_named(tmp_path: Path) -> None:
    field = scene(1)[0]
    field[0, :48] = 4108
    tifffile.imwrite(tmp_path / "a.tif", field)
    image, notes = read_image_with_notes(tmp_path / "a.tif", IntensityScaling(int_range=(0, 4095)))
    assert image[0, 0, 0] == 255
    assert image[5, 0, 0] == round(GROUND * 255 / 4095)
    (note,) = notes
    assert "beyond the range 0..4095" in note.message
    assert "4108" in note.detail
    assert "0.52%" in note.detail  # 48 of 96 x 96


def test_an_image_far_beyond_the_range_is_of_another_depth_and_refused_but_a_hot_pixel_is_not(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", scene(1)[0] * 16)
    assert "another depth" in refused(tmp_path / "a.tif", reading=IntensityScaling(int_range=(0, 4095)))
    field = scene(1)[0]
    field[3, 3] = 65535
    tifffile.imwrite(tmp_path / "b.tif", field)
    assert read_image(tmp_path / "b.tif", IntensityScaling(int_range=(0, 4095)))[3, 3, 0] == 255


def test_an_image_that_uses_a_fraction_of_the_range_is_named(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", scene(1)[0])
    (note,) = read_image_with_notes(tmp_path / "a.tif", IntensityScaling(int_range=(0, 65535)))[1]
    assert "sixteenth" in note.message


def test_an_assumed_range_is_named(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", scene(1)[0] * 16)
    image, (note,) = read_image_with_notes(tmp_path / "a.tif")
    assert image[0, 0, 0] == round(GROUND * 16 * 255 / 65535)
    assert "0..65535, an assumption" in note.message


@pytest.mark.parametrize(
    ("numbers", "reading"),
    [
        (lambda field: field.astype(np.int16) - 2000, IntensityScaling(int_range=(-2000, 2095))),
        (lambda field: field.astype(np.uint32) * 100, IntensityScaling(int_range=(0, 409500))),
        (lambda field: field.astype(np.float32) / 16, IntensityScaling(float_range=(0, 4095 / 16))),
    ],
    ids=["signed", "32-bit", "float"],
)
def test_a_range_gives_signed_wide_and_decimal_numbers_their_meaning(tmp_path: Path, numbers, reading: IntensityScaling) -> None:
    field = scene(1)[0]
    tifffile.imwrite(tmp_path / "a.tif", numbers(field))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", reading)[..., 0], np.rint(field * (255 / 4095)))


# ---- data sets


def test_a_data_set_is_read_in_one_range_that_its_notes_name(tmp_path: Path) -> None:
    data = opened(folder_of(tmp_path / "data"))
    assert data.reading.int_range == (0, 4095)
    assert any("0..4095" in note and str(GROUND) in note for note in data.notes)
    assert {int(data.read(sample)[0][0, 0, 0]) for sample in (*data.train, *data.test)} == {round(GROUND * 255 / 4095)}


def test_images_of_one_name_in_two_splits_both_count(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    for kind, ending in (("original", "tif"), ("mask", "png")):
        (root / "train" / kind / f"train0.{ending}").rename(root / "train" / kind / f"test0.{ending}")
    tifffile.imwrite(root / "train" / "original" / "test0.tif", scene(0)[0] * 16)
    assert any(note.startswith("range: ") and "'train/test0.tif'" in note for note in opened(root).notes)


def test_the_range_does_not_depend_on_limit(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    tifffile.imwrite(root / "train" / "original" / "train5.tif", (scene(5)[0] // 16).astype(np.uint16))
    assert opened(root, limit=1).reading == opened(root).reading


def test_the_range_of_the_card_counts_and_changes_the_digest(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    before = opened(root)
    (root / "dataset.toml").write_text("range = [0, 7800]\n")
    after = opened(root)
    assert after.reading.int_range == (0, 7800)
    assert after.digest != before.digest
    assert after.read(after.train[0])[0][0, 0, 0] == round(GROUND * 255 / 7800)


@pytest.mark.parametrize("text", ["range = [5, 5]", "range = [4095]", "range = ['a', 2]", "channels = [0, 1]", "channels = [-1]"])
def test_a_card_with_an_invalid_range_or_channels_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of(tmp_path / "data")
    (root / "dataset.toml").write_text(f"{text}\n")
    assert main(["check", str(root), "--set", "data.group=none", "--out", str(tmp_path / "out")]) == 2
    assert text.split()[0] in capsys.readouterr().err


def mixed_depths(root: Path) -> None:
    for k in (0, 1):
        path = root / "train" / "original" / f"train{k}.tif"
        tifffile.imwrite(path, (scene(k)[0] // 16).astype(np.uint8))


def mixed_ranges(root: Path) -> None:
    for k in (0, 1):
        tifffile.imwrite(root / "train" / "original" / f"train{k}.tif", scene(k)[0] * 16)


def mixed_kinds(root: Path) -> None:
    for k in (0, 1):
        tifffile.imwrite(root / "train" / "original" / f"train{k}.tif", (scene(k)[0] / 4095).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("mixture", "kind"), [(mixed_depths, "depth"), (mixed_ranges, "range"), (mixed_kinds, "depth")])
def test_check_and_grid_name_a_mixture(tmp_path: Path, mixture, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of(tmp_path / "data")
    mixture(root)
    main(["check", str(root), "--set", "data.group=none", "--out", str(tmp_path / "out")])
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith(f"  look    {kind}: "))
    names = output.splitlines()[output.splitlines().index(line) + 1]
    assert [name.strip() for name in names.split(",")] == ["train0.tif", "train1.tif"]
    assert any(note.startswith(f"{kind}: ") and "train0.tif" in note for note in opened(root).notes)


# ---- a run in use


@pytest.fixture(scope="module")
def of_12_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run on 12-bit images in a store of its own."""
    folder = tmp_path_factory.mktemp("of-12-bits")
    folder_of(folder / "data", resolution=(20_000, 20_000), resolutionunit="CENTIMETER")  # 0.5 um
    (folder / "tiny.toml").write_text(
        'experiment = "tiny"\ndataset = "folder"\nbaselines = ["otsu"]\n[data]\ngroup = "none"\n[baseline.otsu]\ncells = "dark"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        assert main(["grid", "tiny.toml", "--data", "data", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def trained(of_12_bits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(of_12_bits, monkeypatch)
    return of_12_bits


def test_training_images_keep_the_range_of_their_data_set(tmp_path: Path) -> None:
    preparation = features_of(opened(folder_of(tmp_path / "data")), [run_of()]).preparation
    assert preparation.reading.int_range == (0, 4095)
    assert Preparation.of(json.loads(json.dumps(preparation.to_dict()))) == preparation


def cell_greys(out: Path) -> dict[str, float]:
    tables = {path.name.split(".")[0]: path.read_text().splitlines() for path in out.glob("*.cells.csv")}
    return {name: float(next(csv.DictReader(lines))["red"]) for name, lines in tables.items()}


def test_greys_change_by_as_much_as_the_exposure_in_every_use_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain").mkdir()
    field = scene(30)[0]
    for percent in (95, 100, 105, 106):  # 105 % of 3900 is 4095; 106 % is beyond 12 bits
        tifffile.imwrite(f"plain/e{percent}.tif", (field * (percent / 100)).astype(np.uint16))
    assert main(["export", "otsu · seed 0", "--out", "exported"]) == 0
    for run in ("otsu · seed 0", "exported"):
        capsys.readouterr()
        assert main(["predict", run, "plain", "--out", f"out-{run}", "--instances", "--device", "cpu"]) == 0
        output = capsys.readouterr().err
        for name, grey in cell_greys(Path(f"out-{run}")).items():
            assert grey == pytest.approx(CELL * int(name[1:]) / 100 * 255 / 4095, abs=0.6), name
        assert "e106.tif" in output
        assert "e105.tif" not in output
        with Path(f"out-{run}", "counts.csv").open() as counts:
            assert {row["cells"] for row in csv.DictReader(counts)} == {"2"}
    assert "beyond the range 0..4095" in Segmenter.load("exported", device="cpu").predict("plain/e106.tif").notes[0].message
    assert (
        main(["predict", "otsu · seed 0", "plain/e100.tif", "--out", "again", "--instances", "--range", "0,65535", "--device", "cpu"]) == 0
    )
    assert "0..65535 is used instead of 0..4095" in capsys.readouterr().out
    assert cell_greys(Path("again"))["e100"] == round(CELL * 255 / 65535)
    assert main(["predict", "otsu · seed 0", "plain/e100.tif", "--out", "again", "--range", "9,1"]) == 2


def test_images_of_another_magnification_than_those_learned_from_are_named(trained: Path, tmp_path: Path, capsys) -> None:
    for name, per_cm in (("same", 20_000), ("finer", 40_000)):
        tifffile.imwrite(tmp_path / f"{name}.tif", scene(30)[0], resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
    ask = ("predict", "otsu · seed 0", str(tmp_path / "same.tif"), str(tmp_path / "finer.tif"), "--out", "sized", "--device", "cpu")
    assert main([*ask]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "trained on pixels of 0.5 um" in line]
    assert "finer.tif (0.25 um)" in line
    assert "same.tif" not in line
    assert main([*ask, "--instances", "--um-per-px", "0.5"]) == 0
    assert "trained on pixels" not in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_reads_other_images_in_the_range_of_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(Path("brighter"), lambda field: (field * 1.06).astype(np.uint16))
    assert main(["evaluate", "otsu · seed 0", "--data", "brighter", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "beyond the range 0..4095, clipped: test0.tif" in output
    assert Segmenter.load("otsu · seed 0").predict("brighter/test/original/test0.tif").share < 0.5
