"""Opens an image file, identified by its first bytes, checks it for damage and decodes it. `images` interprets the values.

Every fault of a file becomes one `CellbenchError` that names it. Decoders do not detect them all: Pillow leaves the missing rows of a truncated
PNG black, libtiff the strips that a TIFF does not list, and tifffile inflates without a limit; so these are checked, here,
in `file_checks` and in `tiff_checks`.

Not detected: JPEG has no checksum, so flipped bits, or a JPEG cut short and closed again, give wrong pixels.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from cellbench.data.io.file_checks import (
    FileError,
    bmp_alpha,
    check_jpeg,
    check_jpeg2000,
    check_png,
    check_png_stream,
    jpeg2000_bits,
    png_bits,
    png_chunks,
)
from cellbench.data.io.tiff_checks import channel_axis, check_channels, check_deflate, check_tiff, is_plain, tiff_page
from cellbench.errors import CellbenchError, one_line

# Not through Image.open: it applies a process-wide limit, and tries dozens of other formats (one of which runs Ghostscript).
_READERS: dict[bytes, tuple[str, type[ImageFile.ImageFile]]] = {
    b"\x89PNG\r\n\x1a\n": ("PNG", PngImagePlugin.PngImageFile), b"\xff\xd8\xff": ("JPEG", JpegImagePlugin.JpegImageFile),
    b"II*\0": ("TIFF", TiffImagePlugin.TiffImageFile), b"MM\0*": ("TIFF", TiffImagePlugin.TiffImageFile),
    b"II+\0": ("TIFF", TiffImagePlugin.TiffImageFile), b"MM\0+": ("TIFF", TiffImagePlugin.TiffImageFile),
    b"BM": ("BMP", BmpImagePlugin.BmpImageFile), b"RIFF": ("WebP", WebPImagePlugin.WebPImageFile),
    b"GIF87a": ("GIF", GifImagePlugin.GifImageFile), b"GIF89a": ("GIF", GifImagePlugin.GifImageFile),
    b"\0\0\0\x0cjP  \r\n\x87\n": ("JPEG 2000", Jpeg2KImagePlugin.Jpeg2KImageFile),
    b"\xff\x4f\xff\x51": ("JPEG 2000", Jpeg2KImagePlugin.Jpeg2KImageFile),
}  # fmt: skip
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "YCbCr", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
"""Pillow's modes of grey, palette and RGB, optionally with alpha, at all depths."""


@dataclass(frozen=True, kw_only=True)
class OpenImage:
    """An open file with a valid header. ``shape`` is (height, width) upright; ``turn`` the EXIF orientation, 1 to 8."""

    fp: BinaryIO
    kind: str
    num_bytes: int
    shape: tuple[int, int]
    turn: int
    page: Any = None  # tifffile's page, for TIFF only
    info: Mapping[str, Any] = field(default_factory=dict)
    """Pillow's metadata; empty for a TIFF."""
    mode: str = ""
    """Pillow's mode by the header; empty for a TIFF."""
    wide: bool = False
    """Whether values have more than 8 bits although the mode has 8: colours of a 16-bit PNG."""
    bits: int = 0
    """Significant bits of each value, where a PNG or JPEG 2000 states them; else 0."""


def printable_path(path: str | os.PathLike[str]) -> str:
    """The path for a one-line message; escaped if it contains line breaks or bytes that are not UTF-8."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str], limit: int, stack: bool = False) -> Iterator[OpenImage]:
    """The open file; its header may claim ``limit`` pixels at most. With ``stack`` a TIFF may hold each channel as a page.

    Every fault of the file, inside the ``with`` as well, becomes one `CellbenchError`.
    """
    kind = "an image"
    try:
        _silence_decoders()
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would block
            raise FileError("is a folder or a device, not a file")
        with open(path, "rb") as fp:
            start = fp.read(64)
            kind = _kind(start)
            if about.st_size > 2**26 + 8 * limit:
                full = f"has {about.st_size / 1e9:.2g} GB, more than {limit / 1e6:g} megapixels can fill"
                raise FileError(f"{full}. Crop it or raise CELLBENCH_MAX_PIXELS")
            picture = _header(fp, kind, about.st_size, stack)
            height, width = picture.shape
            if height < 1 or width < 1:
                raise FileError("has no pixels by its header. Export it again")
            if height * width > limit:
                raise FileError(
                    f"has {width}x{height} = {height * width / 1e6:.4g} megapixels by its header; the limit is {limit / 1e6:g}. "
                    f"Crop it, or set CELLBENCH_MAX_PIXELS={height * width} if you trust it"
                )
            yield picture
    except FileError as error:
        raise CellbenchError(f"{printable_path(path)}: {error}.") from None
    except MemoryError as error:
        raise CellbenchError(f"{printable_path(path)}: does not fit into memory. Crop it, or free some memory.") from error
    except Image.DecompressionBombError:
        raise CellbenchError(
            f"{printable_path(path)}: is larger than the reader of {kind} allows. Crop it, or save it as PNG or TIFF."
        ) from None
    except OSError as error:
        if error.errno is None:  # Pillow's own
            raise CellbenchError(_damaged(path, kind, error)) from error
        raise CellbenchError(f"{printable_path(path)}: cannot be opened ({error.strerror}). Check the name and the rights.") from error
    except Exception as error:
        # Decoders raise a dozen types on damaged files (struct.error, SyntaxError, KeyError, zlib.error, ...).
        raise CellbenchError(_damaged(path, kind, error)) from error


def _damaged(path: str | os.PathLike[str], kind: str, error: Exception) -> str:
    why = one_line(error)[:160].rstrip(".")
    return f"{printable_path(path)}: cannot be read as {kind} ({why}). It is damaged or of a rare kind: copy it again, or save it as PNG."


def _silence_decoders() -> None:
    """Hides Pillow's warnings and tifffile's log lines, since faults are raised. Called for each file, because other code resets filters."""
    if not any(entry[0] == "ignore" and getattr(entry[3], "pattern", "") == r"PIL\." for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=r"PIL\.")
    for name in ("tifffile", "PIL.TiffImagePlugin"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _kind(start: bytes) -> str:
    for magic, (kind, _) in _READERS.items():
        if start.startswith(magic) and (kind != "WebP" or start[8:12] == b"WEBP"):
            return kind
    if not start:
        raise FileError("is empty (0 bytes). Copy it again or remove it")
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise FileError("holds a web page or XML, not a picture. Download it again")
    if start.startswith(b"version https://git-lfs"):
        raise FileError("is a Git LFS pointer, not the picture. Run `git lfs pull`")
    raise FileError(f"is not a PNG, JPEG, TIFF, BMP, WebP, GIF or JPEG 2000 file (it starts with {start[:8]!r}). Save it as PNG")


def _reader(fp: BinaryIO, kind: str) -> ImageFile.ImageFile:
    fp.seek(0)
    return next(reader for name, reader in _READERS.values() if name == kind)(fp)


def _header(fp: BinaryIO, kind: str, num_bytes: int, stack: bool) -> OpenImage:
    if kind == "TIFF":
        page = tiff_page(fp, stack)
        turn, shape = page.tags.valueof(274, 1), (page.imagelength, page.imagewidth)
        return OpenImage(fp=fp, kind=kind, num_bytes=num_bytes, page=page, turn=turn, shape=shape[::-1] if turn in (5, 6, 7, 8) else shape)
    image = _reader(fp, kind)
    num_frames = getattr(image, "n_frames", 1)
    if kind in ("PNG", "WebP", "GIF") and num_frames > 1:
        raise FileError(f"is an animation of {num_frames} pictures. Save each as a file of its own")
    if kind == "GIF" and any(tile.extents != (0, 0, *image.size) for tile in image.tile):
        raise FileError("is a GIF whose picture leaves a part of its canvas empty. Save it again")
    bits = jpeg2000_bits(fp, num_bytes) if kind == "JPEG 2000" else png_bits(fp, num_bytes) if kind == "PNG" else 0
    if kind == "PNG" and "exif" not in image.info:
        for name, offset, length in png_chunks(fp, num_bytes):  # Pillow would decode the pixels to find it behind them
            if name == b"eXIf":
                fp.seek(offset)
                image.info["exif"] = fp.read(length)
    exif = Image.Image.getexif(image)
    turn = exif.get(274, 1)
    if "dpi" not in image.info and exif.get(296, 2) in (2, 3) and 282 in exif and 283 in exif:
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
            image.info["dpi"] = tuple(float(exif[tag]) * (2.54 if exif.get(296, 2) == 3 else 1) for tag in (282, 283))
    shape = image.size if turn in (5, 6, 7, 8) else image.size[::-1]
    info = {str(key): value for key, value in image.info.items()}
    wide = kind == "PNG" and bool(image.tile) and "16" in str(image.tile[0].args)
    return OpenImage(fp=fp, kind=kind, num_bytes=num_bytes, turn=turn, shape=shape, info=info, mode=image.mode, wide=wide, bits=bits)


def decode_pixels(picture: OpenImage, channels: tuple[int, ...] = ()) -> Image.Image | np.ndarray:
    """Up to 8 bits usually a loaded Pillow image; else an upright array (H, W, 1 to 4), a 2nd or 4th channel being alpha.

    With ``channels`` always an array, of these channels only; without, channels of unknown meaning raise FileError.
    """
    return _chosen(picture, channels) if channels else _decoded(picture)


def _decoded(picture: OpenImage, any_channels: bool = False) -> Image.Image | np.ndarray:
    fp, page = picture.fp, picture.page
    if page is not None:
        check_tiff(page, fp, picture.num_bytes)
        check_channels(page)
        too_large = math.prod(picture.shape) > 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # for Pillow
        plain = page.dtype == np.uint8 and page.photometric in (0, 1, 2) and page.bitspersample == 8 and is_plain(page)
        if page.dtype is None or page.dtype.itemsize > 1 or page.dtype.kind not in "ub" or (too_large and plain):
            return _tiff_values(picture)
    elif picture.kind == "PNG":
        check_png(fp, picture.num_bytes)
    elif picture.kind == "JPEG":
        fp.seek(0)
        check_jpeg(fp.read())
    image = _reader(fp, picture.kind)
    if image.mode not in _MODES:
        raise FileError(f"is in {image.mode} colours. Save it as grey or RGB")
    if picture.kind == "JPEG 2000":
        check_jpeg2000(fp, picture.num_bytes, any_channels)
    if picture.kind == "BMP" and image.mode == "RGB" and (alpha := bmp_alpha(fp)) is not None:
        image.load()
        image.putalpha(Image.fromarray(alpha))
        return image
    if picture.kind == "PNG" and (picture.wide or image.mode.startswith("I;16")):
        return _wide_png(picture, image)
    image.load()
    if image.mode.startswith("I;16"):  # JPEG 2000; Pillow spreads fewer bits over 16
        pixels = np.array(image)
        return to_upright(pixels.astype(pixels.dtype.newbyteorder("=")) >> (16 - picture.bits), picture)
    # Pillow leaves rows black that a PNG's stream does not hold. Inflate it again only where the last row is black.
    last_row = (0, image.height - 1, image.width, image.height)
    if picture.kind == "PNG" and (image.info.get("interlace") or not np.asarray(image.crop(last_row)).any()):
        check_png_stream(fp, picture.num_bytes)
    return image


def _chosen(picture: OpenImage, channels: tuple[int, ...]) -> np.ndarray:
    """(H, W, C) values of these channels, upright; alpha is a channel like any other."""
    pixels = _all_channels(picture) if picture.page is not None else None
    if pixels is None:
        image = _decoded(picture, any_channels=True)
        if isinstance(image, Image.Image):
            clear = image.has_transparency_data or image.mode in ("La", "RGBa")
            grey = image.mode in ("1", "L", "LA", "La")
            wanted = ("LA" if grey else "RGBA") if clear else ("L" if grey else "RGB")
            pixels = to_upright(np.array(image if image.mode == wanted else image.convert(wanted)), picture)
        else:
            pixels = image
    if pixels.shape[2] <= max(channels):
        raise FileError(
            f"has {pixels.shape[2]} channels, but channels {list(channels)} (counted from 0) are read, as the dataset's card says or said at "
            "training. Correct the card, or name a file with these channels"
        )
    return pixels[..., list(channels)]


def _all_channels(picture: OpenImage) -> np.ndarray | None:
    """(H, W, C) values of a TIFF, upright, with channels in one page or in one page each; None for plain grey or RGB."""
    page, tif = picture.page, picture.page.parent
    axis, series = channel_axis(tif), tif.series[0]
    if axis is None or series.axes[axis] == "S":
        with contextlib.suppress(FileError):
            check_channels(page)
            return None
    if axis is None:
        raise FileError(f"has {page.samplesperpixel} channels in an unknown order. Save it again")
    pages = [other.aspage() for other in series.pages if other is not None]
    for other in pages:
        if not is_plain(other):
            raise FileError("has a compression for which channels cannot be selected. Save it without compression, or with deflate")
        check_tiff(other, picture.fp, picture.num_bytes)
        check_deflate(other, picture.fp)
    if series.shape[axis] > 64:
        raise FileError(f"has {series.shape[axis]} channels; at most 64 are read")
    order = [series.axes.index("Y"), series.axes.index("X"), axis]
    pixels = series.asarray(maxworkers=1).transpose(*order, *(k for k in range(len(series.axes)) if k not in order))
    pixels = pixels.reshape(pixels.shape[:3])  # all other axes are of length 1
    return to_upright(_turned(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), picture.turn), picture)


def to_upright(pixels: np.ndarray, picture: OpenImage) -> np.ndarray:
    """(H, W, C) upright, of pixels as stored; those of a TIFF are turned when decoded."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    pixels = pixels if picture.kind == "TIFF" else _turned(pixels, picture.turn)
    if pixels.shape[:2] != picture.shape:
        raise FileError(f"decodes to {pixels.shape[:2]} pixels where its header says {picture.shape}. Save it again")
    return pixels


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Undoes an EXIF orientation: 3, 6 and 8 are turned by 180, 90 and 270 degrees; 2, 4, 5, 7 are mirrored; others are upright."""
    pixels = pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels
    pixels = pixels[::-1] if turn in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels


def _wide_png(picture: OpenImage, image: ImageFile.ImageFile) -> np.ndarray:
    """More than 8 bits through OpenCV, because Pillow gives only the upper byte of 16-bit colours."""
    check_png_stream(picture.fp, picture.num_bytes)
    pixels = _opencv(picture.fp)
    if picture.mode == "LA":  # OpenCV gives grey with alpha as RGBA
        pixels = pixels[..., [0, 3]]
    key = image.info.get("transparency")
    if key is not None and pixels.ndim == 2:  # of colours OpenCV makes alpha itself
        pixels = np.dstack([pixels, np.where(pixels == key, 0, 65535).astype(np.uint16)])
    return to_upright(pixels, picture)


def _opencv(fp: BinaryIO) -> np.ndarray:
    """(H, W) or (H, W, 3 or 4) values at the file's depth, RGB; of a TIFF upright, of other files as stored."""
    import cv2  # takes 0.1 s, and most folders do not need it

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # as for the other decoders
    fp.seek(0)
    pixels = cv2.imdecode(np.frombuffer(fp.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise FileError("cannot be decoded: it is damaged or of a rare kind. Copy it again, or save it as PNG")
    return pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def _tiff_values(picture: OpenImage) -> np.ndarray:
    """(H, W, C) values of a TIFF, upright, through tifffile or else (LZW) OpenCV."""
    page = picture.page
    if page.photometric not in (0, 1, 2):
        raise FileError(
            f"is in {getattr(page.photometric, 'name', page.photometric)} colours of {page.bitspersample} bits. Save it as grey or RGB"
        )
    if is_plain(page):
        check_deflate(page, picture.fp)
        pixels = page.asarray(maxworkers=1)
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and page.planarconfig == 2 else pixels
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        pixels = _turned(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), picture.turn)
    else:
        pixels = _opencv(picture.fp)
    if page.photometric == 0:
        if pixels.dtype not in (np.uint8, np.uint16):
            raise FileError("counts brightness from white and has more than 16 bits. Save it with 0 as black")
        pixels = np.iinfo(pixels.dtype).max - pixels
    return to_upright(pixels, picture)
