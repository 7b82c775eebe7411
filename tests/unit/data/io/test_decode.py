"""The picture door: no damaged, endless or foreign file gets through it as a picture."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from image_samples import GREY, IDS, RGB, WIDE, chunk, png, refused, saved
from PIL import Image, PngImagePlugin

from cellbench.data.io.images import image_size, read_image, read_labels
from cellbench.errors import CellbenchError

# ---- what is refused


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"hello, world", "not a PNG"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GIF89a" + bytes(20), "GIF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not a PNG"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, content, word):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert word in refused(path)
    assert word in refused(path, read_labels)
    refused(path, image_size)


def test_a_missing_file_a_folder_and_a_pipe_are_named(tmp_path):
    assert "No such file" in refused(tmp_path / "no.png")
    assert "folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a file" in refused(tmp_path / "pipe.png")
    for odd in ("a\nb.png", "a\0b.png", os.fsdecode(b"\xff.png")):
        with pytest.raises(CellbenchError) as caught:
            read_image(odd)
        assert ".png" in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_named(tmp_path):
    saved(tmp_path / "a.png", GREY).chmod(0)
    assert "Permission" in refused(tmp_path / "a.png")


def test_a_pixel_of_a_png_that_flipped_on_disk_is_noticed(tmp_path):
    data = bytearray(saved(tmp_path / "a.png", RGB, compress_level=0).read_bytes())
    data[data.index(b"IDAT") + 500] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    assert "checksum" in refused(tmp_path / "a.png")


@pytest.mark.parametrize(("array", "colour_type"), [(RGB, 2), (GREY, 0), (IDS, 0), (WIDE, 2)])
def test_a_png_whose_stream_ends_early_is_no_half_black_picture(tmp_path, array, colour_type):
    assert "last row" in refused(png(tmp_path / "a.png", array, colour_type, rows=20))


def test_a_black_last_row_is_no_damage(tmp_path):
    black = RGB.copy()
    black[-3:] = 0
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", black)), black)


def test_a_jpeg_filled_up_with_zeros_is_refused(tmp_path):
    data = saved(tmp_path / "a.jpg", np.kron(RGB, np.ones((8, 8, 1), np.uint8))).read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2] + bytes(len(data)))
    assert "end marker" in refused(tmp_path / "a.jpg")


def test_a_tiff_that_lists_too_few_strips_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY, rowsperstrip=10)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        tif.pages[0].tags[279].overwrite([410, 410, 0])
    assert "truncated" in refused(tmp_path / "a.tif")


def test_a_wide_tiff_with_an_empty_compression_tag_is_no_half_black_picture(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", WIDE, rowsperstrip=7)  # found by the mutations: only its first strip came out
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.index(struct.pack("<HHI", 259, 3, 1))
    data[at + 4] = 0
    (tmp_path / "a.tif").write_bytes(data)
    assert "cannot be decoded" in refused(tmp_path / "a.tif")


@pytest.mark.parametrize("height", [1, 60])
def test_a_jpeg_within_a_tiff_that_does_not_fill_its_strip_is_refused(tmp_path, height):
    path = saved(tmp_path / "a.tif", np.kron(RGB, np.ones((3, 1, 1), np.uint8)), compression="jpeg", tiffinfo={278: 64})
    want = read_image(path)
    np.testing.assert_array_equal(want, np.asarray(Image.open(path)))
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5  # the first strip's own height, 64
    assert data[at : at + 2] == b"\0\x40"
    data[at + 1] = height  # found by the mutations
    path.write_bytes(data)
    assert "smaller than their place" in refused(path)


def test_stacks_and_animations_are_refused_with_a_remedy(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 20, 20), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((4, 20, 20), np.uint8), imagej=True)
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    for name in ("c.webp", "d.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    for name, word in (("a.tif", "3 pages"), ("b.tif", "4 pages"), ("c.webp", "animation"), ("d.png", "animation")):
        assert word in refused(tmp_path / name)


def test_a_thumbnail_beside_the_picture_is_no_page(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(RGB, photometric="rgb")
        tif.write(RGB[::4, ::4].copy(), photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)


def test_of_a_multi_picture_jpeg_the_first_is_read(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.fromarray(RGB[::2, ::2].copy())])
    assert read_image(tmp_path / "a.jpg").shape == RGB.shape


def test_a_bomb_is_refused_by_its_header_and_the_limit_can_be_raised(tmp_path, monkeypatch):
    path = png(tmp_path / "a.png", GREY, 0)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "60000x60000 = 3600 megapixels" in refused(path)
    monkeypatch.setenv("CELLBENCH_MAX_PIXELS", "1000")
    assert "limit is 0.001" in refused(png(path, GREY, 0))
    monkeypatch.setenv("CELLBENCH_MAX_PIXELS", "1230")
    assert read_image(path).shape == RGB.shape
    monkeypatch.setenv("CELLBENCH_MAX_PIXELS", "many")
    with pytest.raises(CellbenchError, match="CELLBENCH_MAX_PIXELS is 'many'"):
        read_image(path)


def test_a_large_picture_within_the_limit_is_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # so every picture is a large one to Pillow
    for name in ("a.png", "a.jpg", "a.bmp", "a.tif"):
        path = saved(tmp_path / name, RGB)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(path).shape == RGB.shape
    assert "larger than the reader of WebP allows" in refused(saved(tmp_path / "a.webp", RGB))  # from 179 megapixels, in fact


def test_a_png_whose_stream_never_ends_is_not_inflated_to_its_end(tmp_path):
    path = png(tmp_path / "a.png", np.zeros((4, 4), np.uint8), 0)
    data = path.read_bytes()
    endless = chunk(b"IDAT", zlib.compress(bytes(100_000_000)))
    path.write_bytes(data[:33] + endless + chunk(b"IEND", b""))
    start = time.process_time()
    assert not read_image(path).any()
    assert time.process_time() - start < 0.1  # 0.3 s to inflate it, 2 ms measured


def test_a_strip_that_inflates_to_more_than_its_picture_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint16), compression="zlib")
    bomb = zlib.compress(bytes(20_000_000))
    length = (tmp_path / "a.tif").stat().st_size
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        tif.pages[0].tags[273].overwrite(length)
        tif.pages[0].tags[279].overwrite(len(bomb))
    with open(tmp_path / "a.tif", "ab") as fp:
        fp.write(bomb)
    assert "inflates" in refused(tmp_path / "a.tif")


# ---- mutations


def originals() -> dict[str, bytes]:
    def pil(array, kind, **options):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, kind, **options)
        return buffer.getvalue()

    def tiff(array, **options):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[274] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "v" * 50, zip=True)
    return {
        "rgb.png": pil(RGB, "PNG", pnginfo=text),
        "wide.png": pil(IDS, "PNG"),
        "a.jpg": pil(RGB, "JPEG", exif=exif),
        "progressive.jpg": pil(RGB, "JPEG", progressive=True),
        "plain.tif": pil(RGB, "TIFF"),
        "lzw.tif": pil(RGB, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": pil(RGB, "TIFF", compression="jpeg"),
        "lzw-16.tif": pil(IDS, "TIFF", compression="tiff_lzw"),
        "wide.tif": tiff(WIDE, rowsperstrip=7),
        "deflate.tif": tiff(IDS, compression="zlib", predictor=True),
        "float.tif": tiff((GREY / 255).astype(np.float32), tile=(16, 16), compression="zlib"),
        "a.bmp": pil(RGB, "BMP"),
        "palette.bmp": pil(GREY, "BMP"),
        "a.webp": pil(RGB, "WEBP", lossless=True),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    kind = rng.choice(["flip", "flips", "cut", "insert", "remove", "header", "zeros", "numbers"])
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 20):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del out[rng.randrange(len(out)) :]
    elif kind == "insert":
        at = rng.randrange(len(out))
        out[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == "remove":
        at = rng.randrange(len(out))
        del out[at : at + rng.randrange(1, 40)]
    elif kind == "header":
        out[rng.randrange(8, min(60, len(out)))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
    elif kind == "zeros":
        at = rng.randrange(len(out))
        out[at : at + 64] = bytes(len(out[at : at + 64]))
    else:
        at = rng.randrange(8, len(out) - 8)
        out[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice([0, 1, 2, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
    if rng.random() < 0.5:  # half of the PNGs with right sums, or all would stop at the first
        out = bytearray(resummed(bytes(out)))
    return bytes(out)


def resummed(data: bytes) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + length > len(out):
            break
        out[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


@pytest.mark.slow
def test_no_mutation_gets_through_but_as_an_error_or_a_picture_of_its_headers_size(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLBENCH_MAX_PIXELS", "1000000")
    rng = random.Random(20_240_607)
    start, given, stopped = time.perf_counter(), 0, 0
    files = originals()
    for index in range(420):
        name = list(files)[index % len(files)]
        path = tmp_path / name
        path.write_bytes(mutated(files[name], rng))
        for read in (read_image, read_labels):
            try:
                got = read(path)
            except CellbenchError as error:
                got = error
            if isinstance(got, CellbenchError):
                assert name in str(got)
                assert "\n" not in str(got)
                stopped += 1
            else:
                assert got.shape[:2] == image_size(path)
                assert got.size > 0
                given += 1
    assert given > 40
    assert stopped > 200
    assert time.perf_counter() - start < 20


def test_a_file_cut_short_is_an_error_or_has_lost_no_pixel(tmp_path):
    rng = random.Random(5)
    for name, data in originals().items():
        path = tmp_path / name
        path.write_bytes(data)
        whole, errors = read_image(path), 0
        for length in [*(rng.randrange(len(data)) for _ in range(15)), len(data) - 1, len(data) - 12]:
            path.write_bytes(data[:length])
            try:
                got = read_image(path)
            except CellbenchError:
                errors += 1
            else:
                np.testing.assert_array_equal(got, whole)
        assert errors > 12, name
