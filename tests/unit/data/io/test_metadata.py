"""The size of a pixel as each kind of file states it, and that what only looks like one is not taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellbench.data.io.images import read_pixel_size

RGB = np.zeros((20, 30, 3), np.uint8)
GREY = RGB[..., 0]
DPI_QUARTER_UM = 25400 / 0.25


def written(place: Path, name: str, **options) -> Path:
    """A TIFF by tifffile with its options, any other by Pillow."""
    if name.endswith(".tif"):
        tifffile.imwrite(place / name, GREY, **options)
    else:
        Image.fromarray(RGB).save(place / name, **options)
    return place / name


def exif(across: float, down: float, unit: int) -> Image.Exif:
    out = Image.Exif()
    out[282], out[283], out[296] = across, down, unit
    return out


def ome(**pixels: object) -> dict:
    return {"metadata": {"axes": "YX", **pixels}}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cm.tif", {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}),
        ("inch.tif", {"resolution": (DPI_QUARTER_UM, DPI_QUARTER_UM), "resolutionunit": "INCH"}),
        ("um.ome.tif", ome(PhysicalSizeX=0.25, PhysicalSizeY=0.25)),
        ("nm.ome.tif", ome(PhysicalSizeX=250, PhysicalSizeY=250, PhysicalSizeXUnit="nm", PhysicalSizeYUnit="nm")),
        ("x-alone.ome.tif", ome(PhysicalSizeX=0.25)),
        ("imagej.tif", {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}),
        ("imagej-micron.tif", {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "micron"}}),
        ("aperio.tif", {"description": "Aperio Image Library v1|AppMag = 40|MPP = 0.25", "metadata": None}),
        ("phys.png", {"dpi": (DPI_QUARTER_UM, DPI_QUARTER_UM)}),
        ("a.bmp", {"dpi": (DPI_QUARTER_UM, DPI_QUARTER_UM)}),
        ("exif.jpg", {"exif": exif(40_000, 40_000, 3)}),
        ("exif.webp", {"exif": exif(40_000, 40_000, 3)}),
    ],
)
def test_the_side_of_a_pixel_is_a_quarter_micrometre(tmp_path: Path, name: str, options: dict) -> None:
    size = read_pixel_size(written(tmp_path, name, **options))
    assert size is not None
    assert (size.height_um, size.width_um) == pytest.approx((0.25, 0.25), rel=1e-3)
    assert size.square


@pytest.mark.parametrize("dpi", [1, 72, 96, 150, 300, 600, 1200, 2400])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "pillow.tiff"])
def test_a_resolution_for_screens_print_or_scanners_is_no_size(tmp_path: Path, name: str, dpi: int) -> None:
    assert read_pixel_size(written(tmp_path, name, dpi=(dpi, dpi))) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("none.tif", {"resolution": (40_000, 40_000), "resolutionunit": "NONE"}),
        ("one.tif", {"resolution": (1, 1), "resolutionunit": "CENTIMETER"}),
        ("pixel.ome.tif", ome(PhysicalSizeX=1, PhysicalSizeY=1, PhysicalSizeXUnit="pixel", PhysicalSizeYUnit="pixel")),
        ("imagej-inch.tif", {"imagej": True, "resolution": (72, 72), "metadata": {"unit": "inch"}}),
        ("zero.webp", {"exif": exif(0, 0, 3)}),
        ("plain.png", {}),
        ("plain.gif", {}),
        ("plain.jp2", {}),
    ],
)
def test_what_states_no_size_gives_none(tmp_path: Path, name: str, options: dict) -> None:
    assert read_pixel_size(written(tmp_path, name, **options)) is None


def test_pixels_that_are_not_square_keep_both_sides_also_where_the_picture_is_turned(tmp_path: Path) -> None:
    size = read_pixel_size(written(tmp_path, "a.png", dpi=(25400 / 0.25, 25400 / 0.5)))
    assert (size.width_um, size.height_um, size.square) == (pytest.approx(0.25), pytest.approx(0.5), False)
    assert size.side_um == pytest.approx((0.25 * 0.5) ** 0.5)
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn
    size = read_pixel_size(written(tmp_path, "a.jpg", dpi=(25400, 50800), exif=turned))
    assert (size.width_um, size.height_um) == pytest.approx((0.5, 1.0))


def test_of_two_sizes_in_one_file_the_first_is_taken_and_the_other_named(tmp_path: Path) -> None:
    tags = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
    size = read_pixel_size(written(tmp_path, "a.ome.tif", **tags, **ome(PhysicalSizeX=0.5, PhysicalSizeY=0.5)))
    assert size.side_um == 0.5
    assert "resolution tags 0.25" in size.contradicted
