"""The picture door: what the numbers in each kind of file mean, and that what is written is read back."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_samples import GREY, IDS, RGB, RNG, WIDE, chunk, png, refused, saved
from PIL import Image, ImageOps
from small_data import SHARED

from cellbench.data.io.images import (
    EXTENSIONS,
    image_size,
    labels_to_classes,
    png_bytes,
    read_image,
    read_image_facts,
    read_image_with_notes,
    read_labels,
)
from cellbench.data.io.intensity import IntensityScaling


def to_8(array, top):
    return np.rint(array.astype(np.float64) * 255 / top).astype(np.uint8)


# ---- pictures: what the numbers mean


@pytest.mark.parametrize("suffix", sorted(EXTENSIONS - {".jpg", ".jpeg", ".jpe", ".jfif", ".gif"}))
def test_lossless_kinds_give_back_every_pixel(tmp_path, suffix):
    path = saved(tmp_path / f"a{suffix}", RGB, **({"lossless": True} if suffix == ".webp" else {}))
    got = read_image(path)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert got.flags.writeable
    np.testing.assert_array_equal(got, RGB)
    assert image_size(path) == (30, 41)


def test_a_jpeg_reads_as_pillow_reads_it_and_a_wrong_suffix_does_not_matter(tmp_path):
    path = saved(tmp_path / "a.png", RGB, format="JPEG")
    np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path)))


def test_grey_gives_three_equal_channels(tmp_path):
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", GREY)), np.dstack([GREY] * 3))


def test_one_bit_gives_0_and_255(tmp_path):
    bits = GREY > 100
    for name in ("a.png", "a.tif", "a.bmp"):
        path = saved(tmp_path / name, bits)
        np.testing.assert_array_equal(read_image(path)[..., 1], np.where(bits, 255, 0))
        np.testing.assert_array_equal(read_labels(path), np.where(bits, 255, 0))


def test_a_palette_gives_its_colours(tmp_path):
    image = Image.fromarray((GREY % 3).astype(np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 100, 7, 8, 9])
    image.save(tmp_path / "a.png")
    want = np.array([[10, 20, 30], [200, 0, 100], [7, 8, 9]], dtype=np.uint8)[GREY % 3]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), want)


def test_a_gif_gives_its_256_colours_and_its_greys(tmp_path):
    few = RGB & 0b11100000  # fewer colours than a palette holds
    few[..., 1:] &= 0b11000000
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.gif", few)), few)
    np.testing.assert_array_equal(read_labels(saved(tmp_path / "b.gif", GREY)), GREY)


def test_a_film_and_a_gif_with_an_empty_margin_are_refused(tmp_path):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert "2 pictures" in refused(tmp_path / "a.gif")
    data = bytearray(saved(tmp_path / "b.gif", GREY).read_bytes())
    data[6:8] = struct.pack("<H", GREY.shape[1] + 5)  # a canvas wider than its picture
    (tmp_path / "b.gif").write_bytes(data)
    assert "empty" in refused(tmp_path / "b.gif")


def test_jpeg_2000_keeps_16_bits_of_grey_and_is_refused_where_it_ends_early(tmp_path):
    path = saved(tmp_path / "a.jp2", IDS)
    np.testing.assert_array_equal(read_labels(path), IDS)
    data = path.read_bytes()
    for end in range(100, len(data), 301):
        path.write_bytes(data[:end])
        refused(path)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_cmyk_is_refused_as_it_is_neither_grey_nor_rgb(tmp_path, name):
    Image.fromarray(np.zeros((16, 16, 4), np.uint8), "CMYK").save(tmp_path / name)
    assert "Save it as grey or RGB" in refused(tmp_path / name)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    image.putalpha(Image.fromarray(RGB[::-1, :, 1].copy()))
    image.save(tmp_path / "a.png")
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(read_image(tmp_path / "a.png"), rgba[..., :3] * alpha + 255 * (1 - alpha), atol=0.51)


def test_opaque_alpha_changes_nothing(tmp_path):
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", RGB, "RGBA")), RGB)


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    image = Image.fromarray((GREY % 2).astype(np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 100])
    image.save(tmp_path / "a.png", transparency=1)
    assert set(map(tuple, read_image(tmp_path / "a.png").reshape(-1, 3).tolist())) == {(10, 20, 30), (255, 255, 255)}


@pytest.mark.parametrize(("array", "colour_type"), [(IDS, 0), (WIDE, 2)], ids=["grey", "rgb"])
@pytest.mark.parametrize(("top", "scale"), [(255, 255), (4095, 4095), (65535, 65535)], ids=["8-bit", "12-bit", "16-bit"])
@pytest.mark.parametrize("kind", ["png", "tif-plain", "tif-deflate", "tif-lzw", "tif-big-endian"])
def test_wide_numbers_are_scaled_by_the_range_of_their_set(tmp_path, array, colour_type, top, scale, kind):
    array = (array.astype(np.uint32) * top // 65535).astype(np.uint16)
    array[0, 0] = top
    path = tmp_path / f"a.{kind[:3]}"
    if kind == "png":
        png(path, array, colour_type)
    elif kind == "tif-lzw":
        lzw_tiff(path, array)
    else:
        deflate = {"compression": "zlib", "predictor": True} if kind == "tif-deflate" else {}
        tifffile.imwrite(path, array, byteorder=">" if kind == "tif-big-endian" else "<", **deflate)
    want = to_8(array, scale)
    got = read_image(path, IntensityScaling(int_range=(0, top)))
    np.testing.assert_array_equal(got, want if want.ndim == 3 else np.dstack([want] * 3))
    assert image_size(path) == array.shape[:2]
    if array.ndim == 2:
        labels = read_labels(path)
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, array)


def lzw_tiff(path: Path, array: np.ndarray) -> None:
    """tifffile cannot write LZW without imagecodecs: the encoder that never finds a repetition, in 9-bit codes, is LZW all the same."""
    codes, data = [], array.astype("<u2").tobytes()
    for at in range(0, len(data), 200):  # a clear code (256) before the code width would have to grow
        codes += [256, *data[at : at + 200]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    strip = int(bits, 2).to_bytes(len(bits) // 8, "big")
    num = 1 if array.ndim == 2 else 3
    tags = [(256, 4, 1, array.shape[1]), (257, 4, 1, array.shape[0]), (258, 3, num, 16), (259, 3, 1, 5), (262, 3, 1, 1 if num == 1 else 2)]
    tags += [(273, 4, 1, 0), (277, 3, 1, num), (278, 4, 1, array.shape[0]), (279, 4, 1, len(strip))]
    start = 8 + 2 + 12 * len(tags) + 4
    ifd = b""
    for tag, kind, count, value in tags:
        value = {258: 16 if num == 1 else start, 273: start + 6}.get(tag, value)
        ifd += struct.pack("<HHII", tag, kind, count, value)
    depths = struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + ifd + b"\0\0\0\0" + depths + strip)


@pytest.mark.parametrize("colour_type", [4, 6], ids=["grey", "rgb"])
def test_16_bit_alpha_is_laid_over_white(tmp_path, colour_type):
    colour = WIDE[..., : 1 if colour_type == 4 else 3]
    path = png(tmp_path / "a.png", np.dstack([colour, IDS]), colour_type)
    alpha = IDS[..., None] / 65535
    want = np.broadcast_to(colour / 257 * alpha + 255 * (1 - alpha), RGB.shape)
    np.testing.assert_allclose(read_image(path), want, atol=1.5)


def test_a_transparent_colour_of_a_16_bit_png_becomes_white(tmp_path):
    path = png(tmp_path / "a.png", IDS, 0, before=chunk(b"tRNS", struct.pack(">H", int(IDS[3, 4]))))
    assert read_image(path)[3, 4].tolist() == [255, 255, 255]
    assert read_image(path)[3, 5].tolist() == [int(to_8(IDS[3, 5], 65535))] * 3


def test_a_tiff_that_counts_from_white_is_turned_round(tmp_path):
    for array in (GREY, IDS):
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
        full = np.iinfo(array.dtype).max
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], to_8(full - array, full))


def test_planar_16_bit_rgb_is_read_by_channel(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(WIDE, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), to_8(WIDE, 65535))


def test_floats_from_0_to_1_are_scaled_and_others_refused_with_a_remedy(tmp_path):
    path = tmp_path / "a.tif"
    for dtype in (np.float32, np.float64):
        tifffile.imwrite(path, (RGB / 255).astype(dtype))
        np.testing.assert_array_equal(read_image(path), RGB)
    for bad in (3.0, -0.1, np.nan):
        tifffile.imwrite(path, np.full((4, 4), bad, np.float32))
        assert "0..1" in refused(path)


def test_numbers_beyond_16_bits_are_refused_with_a_remedy(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), 70_000, np.int32))
    assert "0..65535" in refused(tmp_path / "a.tif")


def test_channels_without_a_meaning_are_refused_with_a_remedy(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 9, 5), np.uint16), photometric="minisblack", planarconfig="contig")
    assert "5 channels" in refused(tmp_path / "a.tif")


# ---- channels: one rule for all formats and depths

PLANES = RNG.integers(0, 256, (30, 41, 6), dtype=np.uint8)
ALL_PLANES = IntensityScaling(int_range=(0, 65535), channels=(4, 1, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("num", "photometric"), [(2, "minisblack"), (4, "minisblack"), (4, "rgb"), (5, "rgb"), (6, "rgb")])
def test_channels_beyond_grey_and_rgb_are_refused_at_every_depth(tmp_path, dtype, num, photometric):
    more = num - (1 if photometric == "minisblack" else 3)
    options = {"photometric": photometric, "planarconfig": "contig", "extrasamples": ["unspecified"] * more}
    tifffile.imwrite(tmp_path / "a.tif", PLANES[..., :num].astype(dtype), **options)
    assert f"{num} channels" in refused(tmp_path / "a.tif")
    advice = refused(tmp_path / "a.tif")
    assert "Save the channels to read as a grey or RGB file." in advice  # helps everywhere, the card in training only
    assert "channels = [0, 1, 2]; `predict` reads those that its model was trained on" in advice


@pytest.mark.parametrize("scale", [1, 257], ids=["8-bit", "16-bit"])
@pytest.mark.parametrize("kind", ["samples", "deflate", "planar", "pages", "ome", "imagej"])
def test_the_channels_that_a_card_names_are_read_in_its_order(tmp_path, scale, kind):
    planes = PLANES if scale == 1 else PLANES.astype(np.uint16) * 257
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    if kind in ("samples", "deflate"):
        tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="contig", compression="zlib" if kind == "deflate" else None)
    else:
        first = np.moveaxis(planes, -1, 0).copy()
        options = (
            {"planarconfig": "separate"}
            if kind == "planar"
            else {"metadata": {"axes": "CYX"}, "ome": kind == "ome", "imagej": kind == "imagej"}
        )
        tifffile.imwrite(path, first, photometric="minisblack", **options)
    np.testing.assert_array_equal(read_image(path, ALL_PLANES), PLANES[..., [4, 1, 0]])
    np.testing.assert_array_equal(read_image(path, IntensityScaling(channels=(5,), int_range=(0, 65535))), np.dstack([PLANES[..., 5]] * 3))
    refused(path)
    other = refused(path, reading=IntensityScaling(channels=(6,)))
    assert "6 channels, but channels [6]" in other
    assert "or name a file with these channels" in other


def test_a_stack_in_depth_is_refused_whatever_the_channels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(PLANES, -1, 0).copy(), photometric="minisblack", metadata={"axes": "ZYX"})
    assert "6 pages" in refused(tmp_path / "a.tif", reading=ALL_PLANES)


def test_channels_of_a_plain_picture_take_alpha_as_one_of_them(tmp_path):
    rgba = PLANES[..., :4].copy()
    for name, options in (
        ("a.png", {}),
        ("a.webp", {"lossless": True, "exact": True}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.jp2", {}),
        ("a.j2k", {}),
    ):
        path = saved(tmp_path / name, rgba, **options)
        np.testing.assert_array_equal(read_image(path, IntensityScaling(channels=(0, 1, 2))), rgba[..., :3])
        np.testing.assert_array_equal(read_image(path, IntensityScaling(channels=(3,)))[..., 0], rgba[..., 3])
    assert "channels" in refused(saved(tmp_path / "b.png", RGB), reading=IntensityScaling(channels=(3,)))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.bmp", "a.jp2"])
def test_alpha_that_is_not_opaque_is_laid_over_white_and_named_in_every_format(tmp_path, name):
    rgba = PLANES[..., :4].copy()
    rgba[0, 0, 3] = 0
    lossless = {"lossless": True, "exact": True} if name == "a.webp" else {}
    image, (note,) = read_image_with_notes(saved(tmp_path / name, rgba, **lossless))
    want = rgba[..., :3] * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:].astype(float)
    np.testing.assert_allclose(image, want, atol=0.51)
    assert "transparent" in note.message
    assert read_image_facts(tmp_path / name).clear
    rgba[..., 3] = 255
    image, notes = read_image_with_notes(saved(tmp_path / name, rgba, **lossless))
    np.testing.assert_array_equal(image, rgba[..., :3])
    assert notes == ()


def test_a_fourth_channel_of_a_jpeg_2000_that_is_not_said_to_be_alpha_is_refused(tmp_path):
    assert "no stated meaning" in refused(saved(tmp_path / "a.j2k", PLANES[..., :4].copy()))


def test_the_alpha_of_a_16_bit_tiff_is_read_associated_and_not(tmp_path):
    colour, alpha = WIDE, IDS.copy()
    for kind, over in (("unassalpha", colour / 257 * (alpha / 65535)[..., None]), ("assocalpha", colour / 257)):
        tifffile.imwrite(tmp_path / "a.tif", np.dstack([colour, alpha]), photometric="rgb", extrasamples=[kind])
        want = np.minimum(over + (255 - alpha / 257)[..., None], 255)
        np.testing.assert_allclose(read_image(tmp_path / "a.tif"), want, atol=1.5)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_obeyed_as_pillow_does(tmp_path, name, turn):
    exif = Image.Exif()
    exif[274] = turn
    path = saved(tmp_path / name, RGB, exif=exif)
    with Image.open(path) as image:
        want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_image(path), want)
    assert image_size(path) == want.shape[:2]
    if turn in (1, 3, 6):
        assert np.array_equal(want, np.rot90(RGB, {1: 0, 3: 2, 6: -1}[turn])) or name in ("a.jpg", "a.webp")


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_of_wide_pictures_and_behind_the_pixels_is_obeyed(tmp_path, turn):
    exif = Image.Exif()
    exif[274] = turn
    want = np.asarray(ImageOps.exif_transpose(_oriented(GREY, exif)))
    png(tmp_path / "a.png", IDS, 0, after=chunk(b"eXIf", exif.tobytes()[6:]))
    tifffile.imwrite(tmp_path / "a.tif", IDS, extratags=[(274, "H", 1, turn, True)])
    lookup = np.asarray(ImageOps.exif_transpose(_oriented(np.arange(GREY.size, dtype=np.int32).reshape(GREY.shape), exif)))
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_labels(tmp_path / name), IDS.ravel()[lookup])
        assert image_size(tmp_path / name) == want.shape


def _oriented(array, exif):
    image = Image.fromarray(array)
    image.getexif()[274] = exif[274]
    return image


# ---- masks: what the numbers are


def test_rgb_masks_with_equal_channels_are_one_channel(tmp_path):
    for mode in ("RGB", "RGBA"):
        labels = read_labels(saved(tmp_path / "a.png", GREY, mode))
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, GREY)


def test_16_bit_rgb_masks_keep_every_bit(tmp_path):
    np.testing.assert_array_equal(read_labels(png(tmp_path / "a.png", np.dstack([IDS] * 3), 2)), IDS)


def test_a_coloured_mask_is_refused_unless_its_colours_are_listed(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    classes = GREY % 3
    path = saved(tmp_path / "a.png", colours[classes])
    assert "colours such as" in refused(path, read_labels)
    np.testing.assert_array_equal(read_labels(path, colors={(0, 0, 0): 0, (255, 0, 0): 1, (0, 0, 255): 2}), classes)
    assert "(0, 0, 255), which stands for no class" in refused(path, read_labels, colors={(0, 0, 0): 0, (255, 0, 0): 1})


def test_a_palette_of_greys_gives_the_grey_and_any_other_the_index(tmp_path):
    image = Image.fromarray((GREY % 2).astype(np.uint8)).convert("P")
    for palette, values in (([0, 0, 0, 255, 255, 255], (0, 255)), ([0, 0, 0, 128, 0, 0], (0, 1))):
        image.putpalette(palette)
        image.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), np.array(values)[GREY % 2])


def test_a_mask_with_transparent_parts_is_refused_with_a_remedy(tmp_path):
    image = Image.fromarray(GREY).convert("RGBA")
    image.putalpha(Image.fromarray(GREY))
    image.save(tmp_path / "a.png")
    assert "transparent" in refused(tmp_path / "a.png", read_labels)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.float32])
def test_ids_beyond_16_bits_are_kept_as_int32(tmp_path, dtype):
    ids = (IDS.astype(np.int64) * 7).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", ids, compression="zlib")
    labels = read_labels(tmp_path / "a.tif")
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, IDS.astype(np.int64) * 7)


def test_masks_of_fractions_or_negative_numbers_are_refused_with_a_remedy(tmp_path):
    for bad in (np.float32(0.5), np.int32(-1), np.uint32(2**31), np.float32("nan")):
        tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), bad))
        assert "no integers" in refused(tmp_path / "a.tif", read_labels)


def test_a_jpeg_mask_is_near_its_values_and_class_map_sets_it_right(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[13:45, 9:40] = 255  # not on the 8-pixel blocks
    labels = read_labels(saved(tmp_path / "a.jpg", mask, "RGB", quality=60))
    assert set(np.unique(labels)) != {0, 255}
    np.testing.assert_array_equal(labels_to_classes(labels, (0, 255)), mask // 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_class_map_takes_the_nearest_value(dtype):
    labels = np.arange(256, dtype=dtype).reshape(8, 32)
    want = np.abs(labels[..., None].astype(int) - np.array([0, 128, 255])).argmin(axis=-1)
    got = labels_to_classes(labels, (0, 128, 255))
    assert got.dtype == np.uint8
    assert got.flags.writeable
    np.testing.assert_array_equal(got, want)


def test_class_map_takes_the_last_value_beyond_it():
    assert labels_to_classes(np.array([-5, 300, 2_000_000_000], np.int32), (0, 255)).tolist() == [0, 1, 1]


def test_class_map_without_values_separates_objects_from_background():
    assert labels_to_classes(np.array([[0, 1, 256, 65_535]], np.uint16)).tolist() == [[0, 1, 1, 1]]


def test_class_map_refuses_invalid_arguments():
    for labels, values in ((np.zeros(3), (0, 255)), (np.zeros(3, np.uint8), (0, 0)), (np.zeros(3, np.uint8), (-1, 1))):
        with pytest.raises(ValueError, match="labels must be"):
            labels_to_classes(labels, values)


def test_class_map_is_fast():
    labels = np.zeros((1200, 1600), np.uint8)
    labels_to_classes(labels, (0, 128, 255))

    def wall_s():
        start = time.perf_counter()
        labels_to_classes(labels, (0, 128, 255))
        return time.perf_counter() - start

    assert min(wall_s() for _ in range(10)) < 0.010  # 2 ms measured; the best of ten, as the machine may be busy


# ---- writing


@pytest.mark.parametrize("array", [RGB, GREY, IDS, IDS[::2, ::-1]], ids=["rgb", "grey", "16-bit", "strided"])
def test_png_bytes_are_read_back_to_the_bit(array):
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(array)))), array)


def test_png_bytes_of_floats_are_a_mistake():
    with pytest.raises(ValueError, match=r"not .* float64"):
        png_bytes(GREY / 2)


@pytest.mark.parametrize("name", ["with two  spaces.png", "Zellen–细胞 ñ.png", "x" * 251 + ".png", "UPPER.PNG"])
def test_odd_names_are_read(tmp_path, name):
    np.testing.assert_array_equal(read_image(saved(tmp_path / name, RGB)), RGB)


# ---- real files


def real(*parts: str) -> list[Path]:
    files = sorted(SHARED.joinpath(*parts).glob("*"))
    if not files:
        pytest.skip(f"no real data in {SHARED.joinpath(*parts)}")
    return files


def test_bccd_masks_hold_0_and_255():
    for path in real("bccd", "train", "mask")[:3]:
        labels = read_labels(path)
        assert labels.shape == image_size(path) == (1200, 1600)
        assert np.unique(labels).tolist() == [0, 255]


def test_wbc_masks_give_their_three_classes():
    for path in real("wbc", "mask")[:30]:
        labels, want = read_labels(path), np.asarray(Image.open(path)).astype(int)
        classes = labels_to_classes(labels, (0, 128, 255))
        assert set(np.unique(classes)) == {0, 1, 2}
        np.testing.assert_array_equal(classes, np.digitize(want, [64.5, 192]))


def test_dsb2018_masks_keep_their_ids():
    for path in real("dsb2018", "mask")[:20]:
        labels = read_labels(path)
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, np.asarray(Image.open(path)))
        assert image_size(path) == image_size(path.parents[1] / "original" / path.name)


@pytest.mark.parametrize("folder", ["bccd/test/original", "wbc/original", "dsb2018/original"])
def test_real_pictures_read_as_pillow_reads_them(folder):
    for path in real(*folder.split("/"))[:5]:
        np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))
