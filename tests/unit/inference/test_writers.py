"""Outlines drawn strip by strip are those of the whole image; files of an image that fails are removed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.data.io.images import read_labels
from cellbench.data.io.overlay import class_colours, draw_outlines
from cellbench.data.io.png_stream import PngWriter
from cellbench.data.io.windowed import ArraySource
from cellbench.inference import writers
from cellbench.inference.pipeline import MaskStrip
from cellbench.inference.tables import count_rows, existing_masks
from cellbench.inference.writers import OutputFormats, OutputPaths, PredictionWriter, _OutlineStrips
from cellbench.metrics.measurements import CellTable
from cellbench.metrics.separation import SeparationParams


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


def test_more_cells_than_sixteen_bits_can_number_are_written_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Measuring 66,049 cells takes 20 s, and is tested elsewhere.
    monkeypatch.setattr(writers, "measure_cells", lambda cells, *_: CellTable(columns=("class",), rows=(("cell",),) * cells.num))

    def write(side_px: int, run: str) -> tuple[list[str], dict[str, object]]:
        classes = np.zeros((side_px, side_px), np.uint8)
        classes[::2, ::2] = 1  # cells of one pixel
        source = ArraySource(np.zeros((side_px, side_px, 3), np.uint8))
        strip = MaskStrip(number=0, top=0, classes=classes, probability=None, fields=None, image="a.tif", source=source, last=True)
        target = OutputPaths(image=Path("a.tif"), stem=tmp_path / "a", facts={"run": run, "image": "a.tif"})
        wanted = OutputFormats(instances=True, separation=SeparationParams(min_area_px=1))
        with PredictionWriter(target, wanted, classes.shape, ("background", "cell")) as writer:
            writer.add(strip)
            writer.keep()
        assert target.done(wanted)
        (mask,) = existing_masks(tmp_path)
        assert mask.counted
        return sorted(path.name for path in tmp_path.iterdir()), count_rows(mask)[0]

    names, row = write(514, "first")
    assert names == ["a.cells.csv", "a.instances.tif", "a.png"]
    ids = read_labels(tmp_path / "a.instances.tif")
    assert sorted(ids[::2, ::2].ravel()) == list(range(1, 257 * 257 + 1))
    assert (row["cells"], row["left_out"]) == (257 * 257, 0)
    names, row = write(6, "second")  # the file of the other kind goes
    assert names == ["a.cells.csv", "a.instances.png", "a.png"]
    assert (row["cells"], row["left_out"]) == (9, 0)
