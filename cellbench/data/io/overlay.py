"""Lines, colours and numbers drawn on images, for every picture that shows cells: ``predict``, ``check``, and the examples of runs.

All functions take and return arrays, RGB uint8, and leave their arguments as they are. A line has a bright core and a dark rim, so that it
stands out on dark, pale, blue, purple and pink images alike. To draw on a thumbnail, make both thumbnails first (``images.thumbnail``): a
line has the same width in every picture.
"""

from __future__ import annotations

import cv2
import numpy as np

Colour = tuple[int, int, int]
"""Red, green, blue; 0..255."""

YELLOW, CYAN, LIME, ORANGE, WHITE, RED = (255, 225, 0), (0, 235, 255), (120, 255, 60), (255, 140, 0), (255, 255, 255), (255, 60, 60)
INSTANCE_COLOURS: tuple[Colour, ...] = (YELLOW, CYAN, ORANGE, LIME, (255, 150, 255), WHITE, (150, 190, 255))
"""Told apart from each other by most colour-blind readers, and none of them a stain's."""
RIM: Colour = (20, 20, 30)


def draw_outlines(image: np.ndarray, regions: np.ndarray, colours: Colour | np.ndarray = YELLOW, *, width_px: int = 1) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 with a line along the inner border of every region.

    ``regions`` (H, W): bool, class numbers or cell numbers, 0 is the background; regions that touch are parted by the dark rim. ``colours``:
    one for all, or (num + 1, 3) by the region's number. ``width_px``: of the bright core; the rim takes a pixel on either side. There is no
    line along the image's frame. Pixels to ignore (255) are a region too: set them to 0 first.
    """
    numbers = regions if regions.dtype == np.uint8 else regions.astype(np.uint8 if regions.dtype == bool else np.float32)
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
