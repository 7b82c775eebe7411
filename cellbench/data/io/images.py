"""Reads images and masks from disk, and interprets the values in a file.

A file gives correct values or one `CellbenchError` that names it: never a partly read image, a crash, a hang or silent zeros. The format is
identified by the first bytes, not by the name; EXIF orientation is applied, colour profiles are not; an image above 500
megapixels, or ``CELLBENCH_MAX_PIXELS``, is refused by its header. Of a multi-picture JPEG (phones) the first is read; other multi-page and animated
files are refused. `decode` opens and checks files.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from cellbench.data.io.decode import OpenImage, decode_pixels, open_image, to_upright
from cellbench.data.io.file_checks import FileError
from cellbench.data.io.intensity import WHITES, IntensityScaling, Note, Range, scale_to_uint8
from cellbench.data.io.metadata import PixelSize, pixel_size, stated_range
from cellbench.data.io.png_stream import TEXT_KEY
from cellbench.errors import CellbenchError

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".j2k"}
)  # compare with ``suffix.lower()``
MAX_PIXELS = 500_000_000


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) in pixels, upright, from the header alone: no limit, nothing decoded."""
    with open_image(path, sys.maxsize) as picture:
        return picture.shape


def exif_turn(path: str | os.PathLike[str]) -> int:
    """The EXIF orientation, 1 (upright) to 8, from the header alone."""
    with open_image(path, sys.maxsize) as picture:
        return picture.turn


def read_image(path: str | os.PathLike[str], reading: IntensityScaling | None = None) -> np.ndarray:
    """The image as (height, width, 3) uint8 RGB, C-contiguous and owned by the caller.

    Grey gives three equal channels, 1 bit gives 0 and 255, palettes become RGB, and transparency is laid over white. Files that are not grey or
    RGB, optionally with alpha, are refused at every depth, unless ``reading.channels`` selects channels (alpha is then one of them). Values of more
    than 8 bits are scaled by the range in ``reading``, which applies to the whole dataset, and clipped; without one, by the range that the file
    states, else 0..65535. Floats must lie in 0..1.

    Raises `CellbenchError`, in one line: missing, empty, truncated, damaged, no image, too large, of many pages, of unknown meaning, of another
    depth than ``reading``.
    """
    return read_image_with_notes(path, reading)[0]


def read_image_with_notes(path: str | os.PathLike[str], reading: IntensityScaling | None = None) -> tuple[np.ndarray, tuple[Note, ...]]:
    """`read_image`, and notes on how the values were read: clipped, assumed, transparent."""
    reading = reading or IntensityScaling()
    with open_image(path, pixel_limit(), stack=bool(reading.channels)) as picture:
        colour, alpha = _numbers(picture, reading.channels)
        notes: list[Note] = []
        if colour.dtype != np.uint8:
            stated = stated_range(picture)
            white = reading.range_of(colour.dtype, float(colour.max()), stated)[0][1]
            colour, notes = scale_to_uint8(colour, reading, stated)
            alpha = _eight_bit_alpha(alpha, white) if alpha is not None else None
        elif reading.int_range is not None or reading.float_range is not None:
            notes.append(Note(message="images of 8 bits beside ones of more: read as 0..255"))
        if alpha is not None and alpha.min() < 255:
            notes.append(
                Note(message="has transparent parts, laid over white", detail=f"{np.count_nonzero(alpha < 255) / alpha.size:.2%} of it")
            )
            premultiplied = picture.page is not None and picture.page.dtype != np.uint8 and 1 in tuple(picture.page.extrasamples)
            colour = _over_white(colour, alpha, premultiplied)
        return np.ascontiguousarray(colour if colour.shape[2] == 3 else np.repeat(colour, 3, axis=2)), tuple(notes)


Pixels = np.ndarray | Image.Image
"""An image in memory."""


def to_pixels(image: Pixels) -> np.ndarray:
    """An array (H, W, 3) or (H, W) uint8, or a Pillow image of 8 bits, as (H, W, 3) uint8 RGB, read as :func:`read_image` reads a file.

    Raises CellbenchError for any other: floats and 16 bits have no known white.
    """
    if isinstance(image, Image.Image):
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"):
            raise CellbenchError(
                f"a Pillow image here is grey or RGB of 8 bits, not of mode {image.mode}. Convert it, or give the file's path."
            )
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return np.array(upright.convert("RGB"))
        pixels = np.array(upright.convert("RGBA"))
        return np.ascontiguousarray(_over_white(pixels[..., :3], pixels[..., 3]))
    if not isinstance(image, np.ndarray):
        raise CellbenchError(f"an image is a path, an array or a Pillow image, not {type(image).__name__}. Give one of them.")
    if image.dtype != np.uint8 or not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise CellbenchError(
            f"an image here is (H, W, 3) or (H, W) uint8, RGB or grey, not {image.shape} {image.dtype}. Convert it, or give the file's path."
        )
    return np.ascontiguousarray(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))


def _over_white(colour: np.ndarray, alpha: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """Colours (H, W, 1 or 3) uint8 laid over white by ``alpha`` (H, W) uint8."""
    weight = alpha[..., None].astype(np.uint16)
    over = colour.astype(np.uint16) if premultiplied else (colour * weight + 127) // 255
    laid: np.ndarray = np.minimum(over + (255 - weight), 255).astype(np.uint8)
    return laid


def _numbers(picture: OpenImage, channels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W, 1 or 3) of any dtype, upright, and alpha (H, W) where the file has it."""
    pixels = decode_pixels(picture, channels)
    if isinstance(pixels, Image.Image):
        clear = pixels.has_transparency_data or pixels.mode in ("La", "RGBa")
        pixels = pixels.convert("LA") if pixels.mode == "La" else pixels
        mode = "RGBA" if clear else "RGB"
        pixels = to_upright(np.array(pixels if pixels.mode == mode else pixels.convert(mode)), picture)
    if not channels and pixels.shape[2] in (2, 4):
        return pixels[..., :-1], pixels[..., -1]
    return pixels, None


def _eight_bit_alpha(alpha: np.ndarray, white: float) -> np.ndarray:
    """Alpha of more than 8 bits as uint8: opaque is the dtype's maximum, or white where no value is above (12 bits in 16)."""
    if alpha.dtype.kind == "f":
        return (np.clip(alpha, 0, 1) * 255 + 0.5).astype(np.uint8)
    full = white if alpha.max() <= white else np.iinfo(alpha.dtype).max
    return (np.clip(alpha.astype(np.float64), 0, full) * (255 / full) + 0.5).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What an image file holds and states, before its values are scaled."""

    dtype: str
    """Dtype of its values, such as ``uint8``."""
    low: float = 0.0
    high: float = 255.0
    """Extremes of its colours; of 8 bits those of the dtype, not measured."""
    stated: Range | None = None
    """Black and white that the file states, for more than 8 bits."""
    clear: bool = False
    """Whether parts of it are transparent."""
    pixel: PixelSize | None = None

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    @property
    def bits(self) -> str:
        """The kind of values, for messages."""
        return "floats" if self.is_float else f"{8 * np.dtype(self.dtype).itemsize} bits"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`of` reads it back."""
        return asdict(self)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ImageFacts:
        pixel, stated = facts["pixel"], facts["stated"]
        return cls(**{**facts, "pixel": PixelSize(**pixel) if pixel else None, "stated": tuple(stated) if stated else None})


def read_image_facts(path: str | os.PathLike[str], channels: tuple[int, ...] = ()) -> ImageFacts:
    """The facts of an image file; decodes pixels only of more than 8 bits or with possible transparency. Raises `CellbenchError`."""
    with open_image(path, pixel_limit(), stack=bool(channels)) as picture:
        size = pixel_size(picture)
        if _is_plain(picture):
            return ImageFacts(dtype="uint8", pixel=size)
        colour, alpha = _numbers(picture, channels)
        clear = alpha is not None and not _opaque(alpha)
        if colour.dtype == np.uint8:
            return ImageFacts(dtype="uint8", clear=clear, pixel=size)
        low, high = float(colour.min()), float(colour.max())
        return ImageFacts(dtype=colour.dtype.name, low=low, high=high, stated=stated_range(picture), clear=clear, pixel=size)


def _opaque(alpha: np.ndarray) -> bool:
    low = alpha.min()
    full = (255,) if alpha.dtype == np.uint8 else (1.0,) if alpha.dtype.kind == "f" else WHITES
    return bool(low == alpha.max() and low in full)


def _is_plain(picture: OpenImage) -> bool:
    """Whether the header alone shows 8 bits and no alpha."""
    if picture.page is not None:
        return picture.page.dtype == np.uint8 and picture.page.samplesperpixel in (1, 3)
    return (
        picture.kind != "BMP"
        and picture.mode in ("1", "L", "P", "RGB", "YCbCr")
        and "transparency" not in picture.info
        and not picture.wide
    )


def read_pixel_size(path: str | os.PathLike[str]) -> PixelSize | None:
    """The pixel size that a file states, from its header alone; None if it states none. Raises `CellbenchError`."""
    with open_image(path, sys.maxsize, stack=True) as picture:
        return pixel_size(picture)


def read_labels(path: str | os.PathLike[str], *, colors: Mapping[tuple[int, int, int], int] | None = None) -> np.ndarray:
    """The values of a mask: (height, width) uint8, uint16 or int32, neither scaled nor interpolated.

    - 8- and 16-bit grey unchanged; 32 and 64 bits, and floats that are integers, as int32. 1-, 2- and 4-bit grey is a *grey*: 0..255.
    - Palette: where every colour in use is grey, that grey (a 0/255 mask saved with a palette); otherwise the index.
    - RGB with three equal channels is one channel. Other colours are refused unless ``colors`` gives a value for each of them.
    - Opaque alpha is ignored, any other is refused. A JPEG keeps its noise (values *near* the true ones); `labels_to_classes` rounds it off.

    With ``colors``, every mask of up to 8 bits is read as RGB and each colour must be listed. Raises `CellbenchError` as `read_image` does.
    """
    with open_image(path, pixel_limit()) as picture:
        pixels = decode_pixels(picture)
        if isinstance(pixels, Image.Image):
            pixels = to_upright(_plain(pixels, as_colours=colors is not None), picture)
        channels = pixels.shape[2]
        if channels in (2, 4):
            full = 255 if pixels.dtype == np.uint8 else np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
            if (pixels[..., -1] != full).any():
                raise FileError("is a mask with transparent parts, which have no value. Save it without an alpha channel")
            pixels = pixels[..., : channels - 1]
        if colors is not None:
            return _coloured(pixels, colors)
        if pixels.shape[2] == 3:
            # Plane by plane: several times faster than any(axis=2).
            unequal = (pixels[..., 0] != pixels[..., 1]) | (pixels[..., 1] != pixels[..., 2])
            if unequal.any():
                found = _colour(pixels[unequal][0])
                raise FileError(f"is a mask with colours such as {found}. Say which value each stands for, or save it as grey")
        pixels = pixels[..., 0]
        if pixels.dtype in (np.uint8, np.uint16):
            return np.ascontiguousarray(pixels)
        if not (np.isfinite(pixels).all() and (pixels == np.floor(pixels)).all() and pixels.min() >= 0 and pixels.max() < 2**31):
            raise FileError("is a mask with values that are no integers from 0 to 2147483647. Save it with one id for each object")
        return pixels.astype(np.int32)


def labels_to_classes(labels: np.ndarray, values: tuple[int, ...] = ()) -> np.ndarray:
    """Class of each pixel, uint8, shaped like ``labels`` (integers): the index of the nearest of ``values``, the first of two equally near.

    Without ``values``, labels are object ids: 0 is background (class 0), all others are class 1.

    >>> labels_to_classes(np.array([0, 9, 120, 250]), (0, 128, 255)).tolist()
    [0, 0, 1, 2]
    """
    if labels.dtype.kind not in "iu" or len(values) > 256 or len(set(values)) != len(values) or any(not 0 <= v < 65536 for v in values):
        raise ValueError(f"labels must be integers and values distinct, from 0 to 65535: {labels.dtype}, {values}")
    if not values:
        return (labels != 0).astype(np.uint8)
    table = _nearest(tuple(values), 256 if labels.dtype == np.uint8 else 65536)
    if labels.dtype == np.uint8:  # bytes.translate: 2 ms where numpy's take needs 6, on 1600x1200
        return np.frombuffer(bytearray(labels.tobytes().translate(table.tobytes())), dtype=np.uint8).reshape(labels.shape)
    # "clip": beyond both ends of the table the nearest value stays the same.
    return table.take(labels, mode="clip")


@functools.lru_cache(maxsize=64)
def _nearest(values: tuple[int, ...], length: int) -> np.ndarray:
    distance = np.abs(np.arange(length)[:, None] - np.array(values)[None, :])
    return distance.argmin(axis=1).astype(np.uint8)


def decode_png(data: bytes) -> np.ndarray:
    """A PNG inside another file as (H, W) uint8 grey. Raises ValueError and OSError for damaged bytes or too many pixels."""
    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as picture:
            if picture.width * picture.height > pixel_limit():
                raise ValueError(f"a mask of {picture.width} x {picture.height} px is too large")
            return np.array(picture.convert("L"))
    except SyntaxError as error:  # Pillow's for bytes that are no PNG
        raise ValueError(str(error)) from None


def png_bytes(array: np.ndarray, *, text: str = "") -> bytes:
    """A PNG of (H, W) uint8 or uint16, or (H, W, 3) uint8; ``png_stream.read_png_text`` reads ``text``."""
    wanted = (array.ndim == 2 and array.dtype in (np.uint8, np.uint16)) or (array.shape[2:] == (3,) and array.dtype == np.uint8)
    if not (wanted and array.size):
        raise ValueError(f"a PNG is (H, W) uint8 or uint16, or (H, W, 3) uint8, not {array.shape} {array.dtype}")
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_itxt(TEXT_KEY, text)
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", compress_level=1, pnginfo=info)
    return buffer.getvalue()


def tiff_bytes(labels: np.ndarray, *, text: str = "") -> bytes:
    """A compressed TIFF of (H, W) uint32, with an ASCII ``text`` that :func:`read_tiff_text` reads."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, labels, compression="zlib", description=text, metadata=None)
    return buffer.getvalue()


def read_tiff_text(path: str | os.PathLike[str]) -> str:
    """The description in a TIFF of :func:`tiff_bytes`."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        return str(file.pages.first.description)


def jpeg_bytes(image: np.ndarray) -> bytes:
    """A JPEG of (H, W, 3) uint8, for a look: a tenth of the size of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def pixel_limit() -> int:
    """The most pixels an image may have: ``CELLBENCH_MAX_PIXELS``, or 500 megapixels."""
    text = os.environ.get("CELLBENCH_MAX_PIXELS", "") or str(MAX_PIXELS)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise CellbenchError(f"CELLBENCH_MAX_PIXELS is '{text}'. Set it to a number of pixels such as {MAX_PIXELS}.")
    return int(text)


def _plain(image: Image.Image, *, as_colours: bool) -> np.ndarray:
    """(H, W) or (H, W, C) uint8 of a mask; a 2nd or 4th channel is alpha."""
    keyed = image.has_transparency_data
    if as_colours:
        return np.array(image.convert("RGBA" if keyed else "RGB"))
    if image.mode in ("P", "PA"):
        index = np.array(image).reshape(image.height, image.width, -1)[..., 0]
        palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        used = np.flatnonzero(np.bincount(index.ravel(), minlength=256))
        if used[-1] >= len(palette):
            raise FileError(f"uses colour {used[-1]} of a palette of {len(palette)}. Save it again")
        if (palette[used] != palette[used, :1]).any():
            return index
        grey = np.pad(palette[:, 0], (0, 256 - len(palette)))[index]
        return np.dstack([grey, np.array(image.convert("RGBA"))[..., 3]]) if keyed else grey
    if keyed and image.mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    if image.mode in ("1", "YCbCr"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.array(image)


def _coloured(pixels: np.ndarray, colors: Mapping[tuple[int, int, int], int]) -> np.ndarray:
    if pixels.dtype != np.uint8:
        raise FileError("has more than 8 bits, but the card gives colours. Save it as 8-bit RGB")
    code = (pixels.astype(np.int32) * np.array([65536, 256, 1], dtype=np.int32)).sum(axis=2, dtype=np.int32)
    labels = np.full(code.shape, -1, dtype=np.int32)
    for (red, green, blue), value in colors.items():
        labels[code == (red << 16 | green << 8 | blue)] = value
    if (labels < 0).any():
        known = ", ".join(str(tuple(colour)) for colour in list(colors)[:8])
        raise FileError(f"has the colour {_colour(pixels[labels < 0][0])}, which stands for no class. Known: {known}")
    top = max(colors.values())
    return labels.astype(np.uint8 if top < 256 else np.uint16 if top < 65536 else np.int32)


def _colour(pixel: np.ndarray) -> str:
    return f"({', '.join(str(int(part)) for part in np.broadcast_to(pixel, 3))})"


SHOWN_PX = 600
"""Longer side of a thumbnail: more than a figure's panel shows."""


def thumbnail(array: np.ndarray) -> np.ndarray:
    """Every n-th pixel of an image or map (H, W, ...), so that its longer side is at most ``SHOWN_PX``."""
    step = -(-max(array.shape[:2]) // SHOWN_PX)
    return array[::step, ::step]


def brightened(image: np.ndarray) -> tuple[np.ndarray, float]:
    """A dark image times a power of 2, and that power; other images unchanged."""
    bright = float(np.percentile(image, 99.5))
    times = 2.0 ** np.floor(np.log2(255 / max(bright, 8)))
    return (image.astype(np.float32) * times).clip(0, 255).astype(np.uint8) if times > 1 else image, float(max(times, 1))
