"""Large images in little memory: windows of a TIFF are its rows, rows of a PNG its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from small_data import discs

from cellbench.data.io import windowed
from cellbench.data.io.images import read_image
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.io.png_stream import PngWriter, read_png_text
from cellbench.errors import CellbenchError

PICTURE = discs(3, 301, 277)[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiles", {"tile": (64, 48)}),
        ("deflate", {"tile": (64, 64), "compression": "zlib", "predictor": True}),
        ("strips", {"rowsperstrip": 37, "compression": "zlib"}),
        ("big", {"tile": (64, 64), "bigtiff": True}),
    ],
)
def test_windows_are_the_rows_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict) -> None:
    monkeypatch.setattr(windowed, "LARGE_PX", 1000 * 48)
    for picture in (PICTURE, PICTURE[..., 0]):
        tifffile.imwrite(tmp_path / f"{name}.tif", picture, photometric="rgb" if picture.ndim == 3 else "minisblack", **options)
        source = windowed.open_source(tmp_path / f"{name}.tif")
        assert isinstance(source, windowed.WindowedTiff)
        assert source.size_px == (301, 277)
        whole = read_image(tmp_path / f"{name}.tif")
        for top, bottom in ((0, 64), (10, 200), (290, 400), (0, 301), (63, 65)):
            assert (source.rows(top, bottom) == whole[top:bottom]).all()
        source.close()


@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "L"])
def test_windows_of_jpeg_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(windowed, "LARGE_PX", 64 * 64)
    Image.fromarray(PICTURE).convert(mode).save(
        tmp_path / "a.tif", compression="jpeg", quality=95, tiffinfo={278: 64}
    )  # strips, with common tables
    source = windowed.open_source(tmp_path / "a.tif")
    assert isinstance(source, windowed.WindowedTiff)
    assert np.abs(source.rows(0, 301).astype(int) - read_image(tmp_path / "a.tif")).max() <= 8  # two decoders of chroma
    source.close()


def test_channels_of_no_stated_meaning_are_refused_in_large_images_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed, "LARGE_PX", 64 * 64)
    options = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unspecified"] * 2}
    tifffile.imwrite(tmp_path / "a.tif", PICTURE, **options)
    with pytest.raises(CellbenchError, match="3 channels"):
        windowed.open_source(tmp_path / "a.tif")
    assert (windowed.open_source(tmp_path / "a.tif", IntensityScaling(channels=(2, 1, 0))).rows(0, 301) == PICTURE[..., ::-1]).all()


def test_a_window_that_is_not_in_the_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed, "LARGE_PX", 64 * 64)
    tifffile.imwrite(tmp_path / "a.tif", PICTURE, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        middle = tif.pages[0].dataoffsets[12]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[middle : middle + 40] = bytes(40)
    (tmp_path / "a.tif").write_bytes(data)
    source = windowed.open_source(tmp_path / "a.tif")
    source.rows(0, 64)
    with pytest.raises(CellbenchError, match="cannot be decoded"):
        source.rows(0, 301)
    source.close()


@pytest.mark.parametrize("picture", [PICTURE, PICTURE[..., 0], PICTURE[:1, :1], PICTURE[:5, :1, 0]])
def test_rows_make_the_png(tmp_path: Path, picture: np.ndarray) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        rows = PngWriter(file, picture.shape[:2], 3 if picture.ndim == 3 else 1, "größe")
        for top in range(0, len(picture), 100):
            rows.add(picture[top : top + 100])
        rows.end()
    assert (np.array(Image.open(tmp_path / "a.png")) == picture).all()
    assert read_png_text(tmp_path / "a.png") == "größe"
    assert read_png_text(tmp_path) is None
