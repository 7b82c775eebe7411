"""Turns are the eight symmetries of the square; colours are torchvision's where nothing clips, in one linear map a pixel."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cellbench.data.transforms.augmentation import ColourJitter, StainJitter, rotate_flip

TILE = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
MILD = 0.35 + 0.3 * torch.rand(3, 3, 8, 9, generator=torch.Generator().manual_seed(0))  # far enough from 0 and 1 that nothing clips


@pytest.fixture(scope="module")
def tv():
    """torchvision's functions. Their import takes seconds, which nobody else who collects these tests should wait for."""
    from torchvision.transforms.v2 import functional

    return functional


def changed(pixels: Tensor, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0) -> Tensor:
    return ColourJitter().apply(pixels, [(brightness, contrast, saturation, hue)] * len(pixels))


def test_turns_are_the_eight_symmetries_of_a_square() -> None:
    """By coordinates, not by rot90: each code moves pixel (y, x) by a matrix, and the eight matrices are the signed permutations."""
    centred = np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3), indexing="ij"), -1)
    moves = set()
    for code in range(8):
        where = rotate_flip(centred, code)
        # Where an output pixel came from is linear in its place: read the matrix off two unit steps, then hold it everywhere.
        matrix = np.stack([where[3, 2], where[2, 3]], 1)
        np.testing.assert_array_equal(where, centred @ matrix.T)
        moves.add(tuple(matrix.ravel()))
    signs = [(a, b) for a in (1, -1) for b in (1, -1)]
    assert moves == {(a, 0, 0, b) for a, b in signs} | {(0, a, b, 0) for a, b in signs}


def test_code_zero_changes_nothing_and_four_mirrors_left_to_right() -> None:
    np.testing.assert_array_equal(rotate_flip(TILE, 0), TILE)
    np.testing.assert_array_equal(rotate_flip(TILE, 4), TILE[:, ::-1])


def test_image_and_mask_turn_together() -> None:
    for code in range(8):
        np.testing.assert_array_equal(rotate_flip(TILE, code)[..., 0], rotate_flip(TILE[..., 0], code))


def test_untouched_colours_are_the_very_same_tiles() -> None:
    assert ColourJitter().apply(MILD, [ColourJitter.NEUTRAL] * 3) is MILD


def test_an_untouched_tile_beside_a_changed_one_keeps_its_colours() -> None:
    out = ColourJitter().apply(MILD, [ColourJitter.NEUTRAL, (1.1, 0.9, 1.2, 0.1), ColourJitter.NEUTRAL])
    torch.testing.assert_close(out[[0, 2]], MILD[[0, 2]])
    assert (out[1] - MILD[1]).abs().max() > 0.01


@pytest.mark.parametrize("factor", [0.8, 0.93, 1.07, 1.2])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_each_change_is_torchvisions(tv, kind: str, factor: float) -> None:
    # torchvision rounds its grey to 0.2989 R + 0.587 G + 0.114 B, which sums to 0.9999.
    torch.testing.assert_close(changed(MILD, **{kind: factor}), getattr(tv, f"adjust_{kind}")(MILD, factor), atol=1e-4, rtol=0)


def test_all_changes_together_are_torchvisions_in_its_order(tv) -> None:
    expected = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(MILD, 1.15), 0.85), 1.2)
    torch.testing.assert_close(changed(MILD, 1.15, 0.85, 1.2), expected, atol=2e-4, rtol=0)


def test_a_turn_of_hue_keeps_brightness_and_comes_back_after_the_full_circle() -> None:
    grey = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    turned = changed(MILD, hue=0.1)
    assert (turned - MILD).abs().max() > 0.02
    torch.testing.assert_close((turned * grey).sum(1), (MILD * grey).sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(changed(MILD, hue=1.0), MILD, atol=1e-5, rtol=0)
    torch.testing.assert_close(changed(turned, hue=-0.1), MILD, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hue", [-0.1, 0.05, 0.1])
def test_hue_turns_about_as_far_as_torchvisions(tv, hue: float) -> None:
    """YIQ's circle is not HSV's, and runs the other way round; as many turns go either way, so that makes no difference."""
    pixel = torch.tensor([0.6, 0.45, 0.5]).view(1, 3, 1, 1)  # the rose of a Giemsa stain

    def angle(x: Tensor) -> float:
        return colorsys.rgb_to_hsv(*x.flatten().tolist())[0]

    def turned(x: Tensor) -> float:
        return (angle(x) - angle(pixel) + 0.5) % 1 - 0.5

    assert turned(tv.adjust_hue(pixel, hue)) == pytest.approx(hue, abs=1e-3)
    assert turned(changed(pixel, hue=hue)) == pytest.approx(-hue, rel=0.5)


def test_grey_stays_grey() -> None:
    grey = torch.linspace(0, 1, 72).view(1, 1, 8, 9).expand(2, 3, 8, 9)
    out = ColourJitter().apply(grey, [(1.2, 0.8, 1.1, 0.05), (0.7, 1.3, 0.5, -0.4)])
    torch.testing.assert_close(out[:, :1].expand_as(out), out, atol=1e-6, rtol=0)


def test_saturation_and_hue_leave_a_grey_tile_as_it_is() -> None:
    grey = MILD[:, :1].expand_as(MILD)
    torch.testing.assert_close(changed(grey, saturation=0.3, hue=0.3), grey)


def test_each_tile_has_its_own_colour() -> None:
    colours = [(0.9, 1.1, 1.0, 0.0), (1.1, 0.9, 1.2, 0.02), (1.0, 1.0, 0.8, -0.05)]
    together = ColourJitter().apply(MILD, colours)
    for k, colour in enumerate(colours):
        torch.testing.assert_close(together[k : k + 1], ColourJitter().apply(MILD[k : k + 1], [colour]))


def test_results_stay_within_zero_and_one_and_the_tiles_given_are_not_changed() -> None:
    wide = torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(1))
    before = wide.clone()
    out = changed(wide, 1.9, 1.9, 1.9, 0.3)
    assert out.min() == 0
    assert out.max() == 1
    torch.testing.assert_close(wide, before, atol=0, rtol=0)


def test_the_layout_in_memory_makes_no_difference() -> None:
    torch.testing.assert_close(changed(MILD.to(memory_format=torch.channels_last), 1.1, 0.9, 1.1, 0.1), changed(MILD, 1.1, 0.9, 1.1, 0.1))


def test_colours_are_changed_where_the_pixels_are() -> None:
    """On a GPU that only pretends: its tensors hold no values, but refuse to meet those of another device as real ones do."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.rand(2, 3, 8, 8, device="cuda")
        assert ColourJitter().apply(pixels, [(1.1, 0.9, 1.1, 0.1)] * 2).device.type == "cuda"
        assert StainJitter().apply(pixels, [(1.1, 0.9, 1.0, 0.1, 0.0, 0.0)] * 2).device.type == "cuda"
