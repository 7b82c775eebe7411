"""Which TIFF files are read: their pages, channels and tables, and the damage that tifffile and libtiff do not detect."""

from __future__ import annotations

import math
import zlib
from typing import Any, BinaryIO

from cellbench.data.io.file_checks import FileError, check_jpeg

CHANNELS = (
    "the channels to read as a grey or RGB file. Data to train on may instead name them on its card, such as channels = [0, 1, 2]; `predict` reads "
    "those that its model was trained on"
)
"""The advice for channels of unknown meaning, whoever reads the file."""


def tiff_page(fp: BinaryIO, stack: bool) -> Any:
    """The first page of a TIFF. Raises FileError for several, unless with ``stack`` they are channels."""
    import tifffile  # takes 0.15 s, and most folders do not need it

    fp.seek(0)
    tif = tifffile.TiffFile(fp)
    page: Any = tif.pages[0]
    # Thumbnails, smaller copies and transparency masks (NewSubfileType 1 and 4) are no pages. After 16 of them no other page is expected.
    others: list[Any] = tif.pages[1:17]
    more = any(not (other.is_reduced or other.is_mask) for other in others)
    pages = max(len(tif.pages) if more else 1, page.imagedepth)
    if tif.is_imagej:  # a stack in one page
        pages = max(pages, int((tif.imagej_metadata or {}).get("images", 1)))
    if pages > 1 and not (stack and channel_axis(tif) is not None):
        todo = f"Save each page as a file of its own; if they are channels, save {CHANNELS}"
        raise FileError(f"has {pages} pages (a stack or a film). {todo}")
    return page


def channel_axis(tif: Any) -> int | None:
    """The channel axis of a TIFF's first series; None if there is none, or if there is another axis (depth, time)."""
    series = tif.series[0]
    more = [k for k, (axis, num) in enumerate(zip(series.axes, series.shape, strict=True)) if axis not in "YX" and num > 1]
    return more[0] if len(more) == 1 and series.axes[more[0]] in "CSIQ" else None


def check_tiff(page: Any, fp: BinaryIO, num_bytes: int) -> None:
    """The table must list every strip or tile, whole and inside the file: decoders leave others black."""
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))[: math.prod(page.chunked)]
    if len(parts) < math.prod(page.chunked) or any(count < 1 or start < 1 or start + count > num_bytes for start, count in parts):
        raise FileError("is truncated: its table points at pixels that are not in the file. Copy it again")
    if page.compression == 1 and sum(count for _, count in parts) * 8 < math.prod(page.shape) * page.bitspersample:
        raise FileError("is truncated: it holds fewer bytes than pixels. Copy it again")
    if page.is_tiled and page.tilewidth * page.tilelength > max(4 * page.imagewidth * page.imagelength, 2**22):
        raise FileError("claims tiles far larger than the image. Save it again")
    if page.compression == 7:  # JPEG with a header in each part; libtiff leaves black what a smaller one does not fill
        high, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        for index, (start, count) in enumerate(parts):
            top = 0 if page.is_tiled else index % -(-page.imagelength // high) * high
            fp.seek(start)
            height, width = check_jpeg(fp.read(count))
            if width < wide or height < (high if page.is_tiled else min(high, page.imagelength - top)):
                raise FileError("is damaged: its JPEG data are smaller than their place. Copy it again")


def check_channels(page: Any) -> None:
    """Raises FileError for a TIFF whose channels are not those of grey, palette or RGB, optionally with one alpha.

    One rule for all depths: Pillow silently drops a fourth channel of 8 bits without a stated meaning, and a fifth.
    """
    num, extra = page.samplesperpixel, tuple(page.extrasamples)
    colours = {0: 1, 1: 1, 2: 3, 3: 1, 6: 3}.get(int(page.photometric))
    if colours is None:
        raise FileError(f"is in {getattr(page.photometric, 'name', page.photometric)} colours. Save it as grey or RGB")
    if not (num == colours or (num == colours + 1 and extra[:1] in ((1,), (2,)))):
        raise FileError(
            f"has {num} channels of {page.bitspersample} bits, of which {num - colours} have no stated meaning. Save {CHANNELS}"
        )


def is_plain(page: Any) -> bool:
    """Whether tifffile decodes it without a further package."""
    return page.compression in (1, 8, 32946, 32773) and page.predictor in (1, 2) and page.bitspersample % 8 == 0


def check_deflate(page: Any, fp: BinaryIO) -> None:
    """No strip or tile may inflate to more than an image: tifffile, without imagecodecs, inflates without a limit."""
    if page.compression not in (8, 32946):
        return
    bound = max(2**22, 4 * math.prod(page.shape) * page.dtype.itemsize)
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        fp.seek(start)
        if len(zlib.decompressobj().decompress(fp.read(count), bound)) >= bound:
            raise FileError("inflates to far more than its picture. Save it again")
