"""The picture of one image and its prediction, as plain pixels: outlines, probability and errors. No matplotlib: three of these a run.

Shapes: H x W pixels of the image, h x w of its thumbnail. A panel shows each pixel of the thumbnail as a square of whole pixels.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cellbench.data.io.images import SHOWN_PX, thumbnail
from cellbench.data.io.overlay import CYAN, LIME, ORANGE, RED, YELLOW, draw_outlines
from cellbench.metrics.instance import OUTCOMES, CellOutcomes
from cellbench.metrics.pixel import IGNORE

# Green, red, blue as usual, and light, middle, dark so that they differ in grey too.
ERROR_COLOURS = {"found": (0, 168, 107), "false alarm": (230, 48, 26), "missed": (0, 33, 168)}
ERROR_SHARES = {"found": 0.45, "false alarm": 0.85, "missed": 0.85}
"""The weight of a colour over the grey image."""
# Of outlines on stained and dark images: light ones, distinguished by most colour-blind readers.
OUTCOME_COLOURS = {"found": LIME, "missed": (120, 170, 255), "split": YELLOW, "merged": ORANGE}
EXTRA_COLOUR = RED
TITLE_PX, CAPTION_PX, GAP_PX = 15, 13, 12
WIDE = 2.5
"""Images that are wider than so many times their height are shown one below the other."""
SMALLEST_WIDTH_PX = 760
"""So that titles and captions fit above small images."""

Key = tuple[str, np.ndarray]
"""An entry of a legend: its text, and the colours (N, 3) of the bar before it."""


def draw_example(
    image: np.ndarray,
    truth: np.ndarray,
    classes: np.ndarray,
    cell: np.ndarray | None,
    title: str,
    cells: CellOutcomes | None = None,
) -> bytes:
    """A PNG of one image four times: with the true outlines, with the predicted ones, the probability of a cell, and the errors.

    With ``cells`` the outlines are those of single cells, coloured by what became of each.

    ``image`` (H, W, 3) and ``truth`` (H, W) at full size, all uint8; ``classes`` and ``cell`` (h, w) as
    :func:`cellbench.data.io.images.thumbnail` gives them, as the numbers of ``cells``. ``title``: one or more lines.
    """
    image, truth = thumbnail(image), thumbnail(truth)
    columns = 1 if image.shape[1] > WIDE * image.shape[0] else 2
    zoom = max(1, 2 * SHOWN_PX // columns // max(image.shape[:2]))
    errors = error_overlay(image, truth, classes)
    image, truth, classes, errors = (np.repeat(np.repeat(x, zoom, 0), zoom, 1) for x in (image, truth, classes, errors))
    third: tuple[np.ndarray, str, Sequence[Key]]
    if cell is None:
        table = _viridis(int(classes.max(initial=1)) + 1)
        third = table[classes], "predicted classes (this method gives no probability)", []
    else:
        table = _viridis(256)
        third = table[np.repeat(np.repeat(cell, zoom, 0), zoom, 1)], "probability of a cell: 0", [("1", table)]
    panels: list[tuple[np.ndarray, str, Sequence[Key]]] = [
        *(_outlines(image, truth, classes) if cells is None else _cells(image, cells, zoom)),
        third,
        (errors, "errors:", [(name, _bar(colour)) for name, colour in ERROR_COLOURS.items()]),
    ]
    # Unfiltered rows: half the time of Pillow's choice for each row, and no larger.
    how = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return cv2.imencode(".png", _page(panels, title, columns)[..., ::-1], how)[1].tobytes()


def _outlines(image: np.ndarray, truth: np.ndarray, classes: np.ndarray) -> list[tuple[np.ndarray, str, Sequence[Key]]]:
    """The two panels of outlines."""
    return [
        (draw_outlines(image, np.where(truth == IGNORE, 0, truth)), "true outlines", [("", _bar(YELLOW))]),
        (draw_outlines(image, classes, CYAN), "predicted outlines", [("", _bar(CYAN))]),
    ]


def _cells(image: np.ndarray, cells: CellOutcomes, zoom: int) -> list[tuple[np.ndarray, str, Sequence[Key]]]:
    """The same of single cells, coloured by their outcomes; the legend names those that occur."""
    true, found = (np.repeat(np.repeat(ids, zoom, 0), zoom, 1) for ids in (cells.true_ids, cells.found_ids))
    colours = [OUTCOME_COLOURS[name] for name in OUTCOMES]
    used = np.bincount(cells.outcomes[1:], minlength=len(OUTCOMES)) > 0
    keys = [(name, _bar(colour)) for name, colour, there in zip(OUTCOMES, colours, used, strict=True) if there]
    return [
        (draw_outlines(image, true, np.array(colours, np.uint8)[cells.outcomes], width_px=2), "true cells:", keys),
        (
            draw_outlines(
                image, found, np.array([EXTRA_COLOUR, OUTCOME_COLOURS["found"]], np.uint8)[cells.matched.astype(int)], width_px=2
            ),
            "predicted cells:",
            [("match a true cell", _bar(OUTCOME_COLOURS["found"])), ("match none", _bar(EXTRA_COLOUR))],
        ),
    ]


def error_overlay(image: np.ndarray, truth: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The image in grey with true positive (green), false positive (red) and false negative (blue) cell pixels, RGB uint8.

    A wrong class counts as missed. Ignored pixels are half white. All arguments uint8, (h, w) or (h, w, 3).
    """
    grey = np.linspace(0, 1, 256)[:, None] ** 0.8
    looks = [(0.0, (0, 0, 0)), *((ERROR_SHARES[name], colour) for name, colour in ERROR_COLOURS.items()), (0.5, (255, 255, 255))]
    table = np.stack([((1 - share) * 255 * grey + share * np.array(colour)).round().astype(np.uint8) for share, colour in looks])
    kind = np.where(truth > 0, np.where(classes == truth, 1, 3), np.where(classes > 0, 2, 0))
    return table[np.where(truth == IGNORE, 4, kind), image.mean(-1).astype(np.uint8)]


def _page(panels: Sequence[tuple[np.ndarray, str, Sequence[Key]]], title: str, columns: int) -> np.ndarray:
    """Four panels of one size in one or two columns, each with its caption above it, below the title."""
    height, width = panels[0][0].shape[:2]
    column = max(width, (SMALLEST_WIDTH_PX - GAP_PX) // columns)
    bold, plain = _font(TITLE_PX), _font(CAPTION_PX)
    lines = [part for line in title.splitlines() for part in _wrap(line, bold, columns * column)]
    top, line_px, caption_px = GAP_PX, round(1.4 * TITLE_PX), round(1.7 * CAPTION_PX)
    first = top + line_px * len(lines)
    row = caption_px + height + GAP_PX
    size = (columns * (column + GAP_PX) + GAP_PX, first + len(panels) // columns * row + GAP_PX)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for k, line in enumerate(lines):
        pen.text((GAP_PX, top + k * line_px), line, "black", bold)
    for k, (picture, caption, keys) in enumerate(panels):
        x, y = GAP_PX + (k % columns) * (column + GAP_PX), first + (k // columns) * row
        page.paste(Image.fromarray(picture), (x, y + caption_px))
        y += caption_px // 2
        pen.text((x, y), caption, "black", plain, anchor="lm")
        x += round(plain.getlength(caption)) + 8
        for text, colours in keys:
            bar = Image.fromarray(colours[None]).resize((60 if len(colours) > 1 else 14, 10), Image.Resampling.NEAREST)
            page.paste(bar, (x, y - 5))
            pen.text((x + bar.width + 6, y), text, "black", plain, anchor="lm")
            x += bar.width + round(plain.getlength(text)) + 18
    return np.asarray(page)


def _wrap(line: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """The line in parts that fit. Breaks anywhere: a file's name may be longer than the picture is wide.

    >>> _wrap("", _font(15), 100)
    ['']
    """
    parts = []
    while font.getlength(line) > width_px:
        fitting = next(num for num in range(len(line) - 1, 0, -1) if num == 1 or font.getlength(line[:num]) <= width_px)
        parts.append(line[:fitting])
        line = line[fitting:]
    return [*parts, line]


def _bar(colour: tuple[int, int, int]) -> np.ndarray:
    return np.array([colour], np.uint8)


@functools.cache
def _viridis(num: int) -> np.ndarray:
    """``num`` colours (num, 3), from dark blue to yellow."""
    levels = np.linspace(0, 255, num).round().astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1])


@functools.cache
def _font(height_px: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font lacks accented letters. Matplotlib's file is found without importing it.
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", height_px)
