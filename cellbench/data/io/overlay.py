"""Lines, colours and numbers drawn on images, for every picture that shows cells: ``predict``, ``check``, and the examples of runs.

All functions take and return arrays, RGB uint8, and leave their arguments as they are. A line has a bright core and a dark rim, so that it
stands out on dark, pale, blue, purple and pink images alike. To draw on a thumbnail, make both thumbnails first (``images.thumbnail``): a
line has the same width in every picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Colour = tuple[int, int, int]
"""Red, green, blue; 0..255."""

YELLOW, CYAN, LIME, ORANGE, WHITE, RED = (255, 225, 0), (0, 235, 255), (120, 255, 60), (255, 140, 0), (255, 255, 255), (255, 60, 60)
INSTANCE_COLOURS: tuple[Colour, ...] = (YELLOW, CYAN, ORANGE, LIME, (255, 150, 255), WHITE, (150, 190, 255))
"""Distinguished from each other by most colour-blind readers, and none of them a stain's."""
RIM: Colour = (20, 20, 30)


def draw_outlines(image: np.ndarray, regions: np.ndarray, colours: Colour | np.ndarray = YELLOW, *, width_px: int = 1) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 with a line along the inner border of every region.

    ``regions`` (H, W): bool, class numbers or cell numbers, 0 is the background; regions that touch are parted by the dark rim. ``colours``:
    one for all, or (num + 1, 3) by the region's number. ``width_px``: of the bright core; the rim takes a pixel on either side. There is no
    line along the image's frame. Pixels to ignore (255) are a region too: set them to 0 first.
    """
    numbers = _as_pixels(regions)
    # Where two regions touch, the pixels of the lower number become the gap: a line one pixel wide.
    numbers = np.where(cv2.dilate(numbers, np.ones((3, 3), np.uint8)) != numbers, numbers.dtype.type(0), numbers)
    core = (numbers > 0) & (cv2.erode(numbers, _disc(width_px)) != numbers)
    out = image.copy()
    out[cv2.dilate(core.view(np.uint8), _disc(1)).view(bool)] = RIM
    palette = np.asarray(colours, np.uint8)
    out[core] = palette if palette.ndim == 1 else palette[regions[core]]
    return out


def _disc(radius_px: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1, 2 * radius_px + 1))


USUAL_DIGITS_PX, MIN_DIGITS_PX = 12, 7
"""Heights of digits: of the usual cell, if need be by drawing the picture larger, and of any cell."""
MAX_ENLARGED_PX = 2400
"""Longer side of a picture that is drawn larger than the image."""


def draw_instances(image: np.ndarray, ids: np.ndarray, num: int) -> np.ndarray:
    """An image (H, W, 3) uint8 in which each of the cells ``ids`` (H, W), 1..num, has a colour, an outline and its number.

    Cells that touch or lie close to each other have different colours. A number is as large as its cell allows, and is left out where it would
    cover its cell or others. A small image, or one with small cells, comes back 2, 3 or 4 times as large, so that the numbers can be read.
    """
    spots = _inner_circles(ids)
    usual_px = float(np.quantile([_digits_px(radius, cell) for cell, (_, _, radius) in spots.items()], 0.3)) if spots else USUAL_DIGITS_PX
    zoom = 1
    while zoom < 4 and zoom * usual_px < USUAL_DIGITS_PX and (zoom + 1) * max(ids.shape) <= MAX_ENLARGED_PX:
        zoom += 1
    palette = np.array([RIM, *INSTANCE_COLOURS], np.uint8)[_colours_of_neighbours(ids, num)]
    if zoom > 1:
        image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        ids = np.kron(ids, np.ones((zoom, zoom), ids.dtype))
    tinted = cv2.addWeighted(image, 0.8, palette[ids], 0.2, 0)
    width_px = round(np.median([radius for _, _, radius in spots.values()]) * zoom / 8) if spots else 1
    picture = draw_outlines(np.where(ids[..., None] > 0, tinted, image), ids, palette, width_px=min(max(width_px, 1), 3))
    return _with_numbers(picture, ids, spots, zoom, 1.25 * usual_px)


def class_colours(num: int) -> np.ndarray:
    """For ``draw_outlines``: a colour for each of ``num`` classes, the background included."""
    return np.array([RIM, *(INSTANCE_COLOURS[k % len(INSTANCE_COLOURS)] for k in range(num - 1))], np.uint8)


def draw_boxes(image: np.ndarray, boxes_px: Iterable[tuple[float, float, float, float]]) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 with a frame around each place: x, y, width, height. Small places get a frame of 18 px."""
    out = image.copy()
    for x, y, width, height in boxes_px:
        grow_x, grow_y = max(4.0, (18 - width) / 2), max(4.0, (18 - height) / 2)
        corners = (round(x - grow_x), round(y - grow_y)), (round(x + width + grow_x), round(y + height + grow_y))
        cv2.rectangle(out, *corners, RIM, 4)
        cv2.rectangle(out, *corners, RED, 2)
    return out


def _as_pixels(numbers: np.ndarray) -> np.ndarray:
    """The same in the smallest type that OpenCV's filters take."""
    high = int(numbers.max(initial=0))
    return numbers.astype(np.uint8 if high < 2**8 else np.uint16 if high < 2**16 else np.float32, copy=False)


def _inner_circles(ids: np.ndarray) -> dict[int, tuple[int, int, float]]:
    """For each cell x, y and radius of the largest circle inside it, in px."""
    found = {}
    for cell, box in enumerate(ndimage.find_objects(ids), 1):
        if box is not None:
            inside = np.pad((ids[box] == cell).view(np.uint8), 1)
            _, radius, _, (x, y) = cv2.minMaxLoc(cv2.distanceTransform(inside, cv2.DIST_L2, 5))
            found[cell] = (box[1].start + x - 1, box[0].start + y - 1, radius)
    return found


def _digits_px(radius: float, number: int) -> float:
    """The height of a number that fits into a circle; a digit is about 0.6 times as wide as high."""
    return 1.3 * radius / math.hypot(1, 0.6 * len(str(number)))


def _colours_of_neighbours(ids: np.ndarray, num: int) -> np.ndarray:
    """For each cell a number of ``INSTANCE_COLOURS`` from 1, (num + 1,) with 0 for the background; greedily, in the order of the cells."""
    near: list[set[int]] = [set() for _ in range(num + 1)]
    for step in (1, 4, 9):
        for here, there in (
            (np.s_[:, :-step], np.s_[:, step:]),
            (np.s_[:-step], np.s_[step:]),
            (np.s_[:-step, :-step], np.s_[step:, step:]),
            (np.s_[:-step, step:], np.s_[step:, :-step]),
        ):
            a, b = ids[here], ids[there]
            meet = (a != b) & (a > 0) & (b > 0)
            a, b = a[meet].astype(np.int64), b[meet]
            for pair in np.unique(np.minimum(a, b) * (num + 1) + np.maximum(a, b)).tolist():
                near[pair % (num + 1)].add(pair // (num + 1))
    count, out = len(INSTANCE_COLOURS), np.zeros(num + 1, int)
    for cell in range(1, num + 1):
        used = [out[other] for other in near[cell]]
        out[cell] = min(((cell + k) % count + 1 for k in range(count)), key=used.count)
    return out


def _with_numbers(picture: np.ndarray, ids: np.ndarray, spots: dict[int, tuple[int, int, float]], zoom: int, most_px: float) -> np.ndarray:
    canvas = Image.fromarray(picture)
    pen, taken = ImageDraw.Draw(canvas), np.zeros(ids.shape, bool)
    for cell, (x, y, radius) in spots.items():
        fitting_px = zoom * _digits_px(radius, cell)
        if fitting_px < 0.6 * MIN_DIGITS_PX:
            continue
        height_px = max(min(fitting_px, zoom * most_px), MIN_DIGITS_PX)
        look: dict[str, Any] = {"font": _font(round(1.35 * height_px)), "anchor": "mm", "stroke_width": max(1, round(height_px / 9))}
        centre = ((x + 0.5) * zoom, (y + 0.5) * zoom)
        left, top, right, bottom = (max(0, round(side)) for side in pen.textbbox(centre, str(cell), **look))
        here = np.s_[top:bottom, left:right]
        if (((ids[here] != cell) & (ids[here] > 0)) | taken[here]).mean() < 0.2:
            taken[here] = True
            pen.text(centre, str(cell), fill=WHITE, stroke_fill=RIM, **look)
    return np.array(canvas)


@cache
def _font(height_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height_px)
