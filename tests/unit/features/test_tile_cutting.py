"""Claims about cutting tiles on the device of the backbone: the same tiles as cutting arrays, for every turn, size and kind of array."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.features.tile_cutting import DeviceCutter, HostCutter
from cellbench.metrics.instances import numbered_instances
from cellbench.metrics.pixel import IGNORE

CPU = torch.device("cpu")
LEARNED = [TARGETS["cell+border+distance"], TARGETS["flows"], TARGETS["stars"]]
SIZES = [(90, 70), (64, 64), (50, 33), (200, 64)]


def framed_images(*, learned=(), ignored: bool = False):
    rng = np.random.default_rng(0)
    images = []
    for size in SIZES:
        mask = rng.integers(0, 3, size, np.uint8)
        if ignored and size == SIZES[0]:
            mask[0, 0] = IGNORE
        more = [rng.integers(0, 256, (*size, len(target.channels)), np.uint8) for target in learned]
        images.append((rng.integers(0, 256, (*size, 3), np.uint8), mask, *more))
    return images.__getitem__


def places(tile_px, turns):
    rng = np.random.default_rng(1)
    for image, size in enumerate(SIZES):
        for turn in turns:
            y, x = (int(rng.integers(max(side - tile, 0) + 1)) for side, tile in zip(size, tile_px, strict=True))
            yield image, y, x, turn, 0


@pytest.mark.parametrize("learned", [[], LEARNED], ids=["plain", "targets"])
@pytest.mark.parametrize(("tile_px", "turns"), [((64, 64), range(8)), ((48, 80), (0, 2, 4, 6))])
def test_a_device_cuts_the_tiles_that_are_cut_from_arrays(tile_px, turns, learned):
    framed = framed_images(learned=learned)
    host, device = HostCutter(framed, tile_px, CPU, learned), DeviceCutter(framed, range(len(SIZES)), tile_px, CPU, learned)
    wanted = np.array(list(places(tile_px, turns)))
    expected, found = (cutter.cut(cutter.prepare(wanted)) for cutter in (host, device))
    assert torch.equal(found.pixels, expected.pixels)
    assert found.pixels.stride() == expected.pixels.stride()
    assert torch.equal(found.target, expected.target)
    assert len(found.cell_targets) == len(learned)
    assert all(torch.equal(a, b) for a, b in zip(found.cell_targets, expected.cell_targets, strict=True))


def test_only_the_images_that_are_used_are_held():
    framed = framed_images()
    cutter = DeviceCutter(framed, (1, 3), (64, 64), CPU)
    expected = HostCutter(framed, (64, 64), CPU)
    wanted = np.array([(3, 100, 0, 5, 0), (1, 0, 0, 0, 0)])
    assert torch.equal(cutter.cut(cutter.prepare(wanted)).pixels, expected.cut(expected.prepare(wanted)).pixels)
    with pytest.raises(IndexError):
        cutter.prepare(np.array([(0, 0, 0, 0, 0)]))


def test_ignored_pixels_of_an_image_are_announced_for_each_of_its_tiles():
    cutter = DeviceCutter(framed_images(ignored=True), range(len(SIZES)), (32, 32), CPU)
    assert cutter.cut(cutter.prepare(np.array([(0, 40, 30, 0, 0), (1, 0, 0, 0, 0)]))).ignoring
    assert not cutter.cut(cutter.prepare(np.array([(1, 0, 0, 0, 0), (2, 0, 0, 0, 0)]))).ignoring


def test_the_bytes_of_images_are_those_that_are_held():
    cutter = DeviceCutter(framed_images(learned=LEARNED), range(len(SIZES)), (16, 16), CPU, LEARNED)
    assert sum(array.nbytes for array in cutter._arrays) == DeviceCutter.bytes_of(SIZES, LEARNED)


def test_a_device_magnifies_crops_as_arrays_are_magnified():
    framed, learned = framed_images(learned=LEARNED), LEARNED
    host = HostCutter(framed, (64, 64), CPU, learned)
    device = DeviceCutter(framed, range(len(SIZES)), (64, 64), CPU, learned, (90, 90))
    wanted = np.array(
        [
            (image, 0 if crop > 60 else 3, 0, turn, crop)
            for image in range(len(SIZES))
            for turn, crop in enumerate((45, 0, 90, 64, 71, 50, 83, 46))
        ]
    )
    expected, found = (cutter.cut(cutter.prepare(wanted)) for cutter in (host, device))
    off = (255 * (found.pixels - expected.pixels)).abs()
    assert off.max() <= 1.001
    assert (off > 0.5).float().mean() < 1e-3  # halves may be rounded to either side
    assert torch.equal(found.target, expected.target)
    assert all(torch.equal(a, b) for a, b in zip(found.cell_targets, expected.cell_targets, strict=True))


@pytest.mark.parametrize("crop_px", [46, 64, 90])
def test_a_magnified_crop_is_the_resized_square(crop_px):
    framed = framed_images()
    cut = HostCutter(framed, (64, 64), CPU)
    tile = cut.cut(cut.prepare(np.array([(0, 0, 0, 0, crop_px)])))
    square = np.pad(framed(0)[0], ((0, 0), (0, 20), (0, 0)), mode="symmetric")[:crop_px, :crop_px]
    expected = cv2.resize(square, (64, 64), interpolation=cv2.INTER_LINEAR)
    assert np.abs(255 * tile.pixels[0].permute(1, 2, 0).numpy() - expected).max() <= 1.001


def test_class_maps_are_enlarged_pixel_by_pixel_and_flows_lead_to_the_enlarged_cells_centres():
    y, x = np.mgrid[:40, :40]
    ids = np.where((y - 18) ** 2 + (x - 12) ** 2 < 90, 1, np.where((y - 20) ** 2 / 2 + (x - 28) ** 2 < 45, 2, 0)).astype(np.int32)
    flows = TARGETS["flows"]

    def truth(numbers):
        return flows.encode(numbered_instances(numbers, (numbers > 0).astype(np.uint8)), (1.0, 1.0))

    framed = np.repeat(ids[..., None].astype(np.uint8), 3, axis=2), (ids > 0).astype(np.uint8), truth(ids)
    cutter = HostCutter(lambda image: framed, (80, 80), CPU, [flows])
    tile = cutter.cut(cutter.prepare(np.array([(0, 0, 0, 0, 40)])))
    large = np.kron(ids, np.ones((2, 2), np.int32))
    assert np.array_equal(tile.target[0].numpy(), large > 0)
    found, expected = (2 * array.astype(float) / 255 - 1 for array in (tile.cell_targets[0][0].numpy(), truth(large)))
    assert (found * expected).sum(2)[large > 0].mean() > 0.97
