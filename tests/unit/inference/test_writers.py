"""Outlines drawn strip by strip are those of the whole image; files of an image that fails are removed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.data.io.overlay import class_colours, draw_outlines
from cellbench.data.io.png_stream import PngWriter
from cellbench.inference.writers import PredictionWriter, _OutlineStrips


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_unfinished_files_on_a_full_disk_are_removed_and_hide_no_error(tmp_path: Path) -> None:
    part = tmp_path / "p0.part"
    part.touch()
    writer = object.__new__(PredictionWriter)
    writer._stack, writer._parts = contextlib.ExitStack(), [part]
    writer._stack.enter_context(open("/dev/full", "wb")).write(b"not yet written")  # noqa: SIM115  closed by the stack
    with pytest.raises(ValueError, match="what failed first"), writer:
        raise ValueError("what failed first")
    assert not part.exists()
