"""Outlines drawn strip by strip are those of the whole image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cellbench.data.io.overlay import class_colours, draw_outlines
from cellbench.data.io.png_stream import PngWriter
from cellbench.inference.writers import _OutlineStrips


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
def test_outlines_of_strips_are_those_of_the_whole_image(rows: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 50, 3), np.uint8)
    classes = np.kron(rng.integers(0, 4, (8, 10), np.uint8), np.ones((8, 5), np.uint8))
    file = io.BytesIO()
    strips = _OutlineStrips(PngWriter(file, (64, 50), 3, ""), width_px=2, num_classes=4)
    for top in range(0, 64, rows):
        strips.add(image[top : top + rows], classes[top : top + rows], last=top + rows >= 64)
    strips.png.end()
    assert (np.array(Image.open(file)) == draw_outlines(image, classes, class_colours(4), width_px=2)).all()
