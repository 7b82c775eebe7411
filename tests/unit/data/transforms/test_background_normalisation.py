"""Background normalisation: light, stain strength and the number of cells leave no trace, and images that it does not fit stay usable."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.measure import block_reduce

from cellbench.data.io.images import read_image
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.transforms.background_normalisation import AMOUNT, WHITE, Background, estimate, noise_deviation, thumbnail
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation

STAIN = np.array([0.9, 1.2, 0.6])
HEIGHT, WIDTH = 480, 640


def discs(num: int, seed: int = 0, radius: int = 20) -> np.ndarray:
    """(H, W) bool."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    out = np.zeros((HEIGHT, WIDTH), bool)
    for cy, cx in rng.uniform((0, 0), (HEIGHT, WIDTH), (num, 2)):
        out |= (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    return out


def smear(cells: np.ndarray, *, strength: float = 0.7, light=(230, 230, 230), vignette: float = 0.0, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 in bright field, with noise; ``vignette``: loss of light in the corners."""
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    clear = np.array(light) * (1 - vignette * (x**2 + y**2) / 2)[..., None]
    noise = np.random.default_rng(seed).normal(0, 1.5, (HEIGHT, WIDTH, 3))
    return (clear * np.exp(-strength * STAIN * cells[..., None]) + noise).clip(0, 255).round().astype(np.uint8)


def fluorescence(cells: np.ndarray, *, brightness: float = 90, background: float = 12, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 1.5, (HEIGHT, WIDTH))
    return np.repeat((background + brightness * cells + noise).clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=-1)


def colours(image: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Median colours of cells and of background."""
    return np.array([np.median(image[where], axis=0) for where in (cells, ~cells)])


CELLS = discs(60)
NORMALISED = colours(Background().image(smear(CELLS)), CELLS)


@pytest.mark.parametrize(
    "changed",
    [
        {"light": (250, 245, 120)},
        {"light": (110, 140, 150)},
        {"vignette": 0.4},
        {"strength": 0.25},
        {"strength": 1.2},
        {"light": (200, 180, 230), "vignette": 0.3, "strength": 0.4},
    ],
    ids=str,
)
def test_light_vignette_and_stain_strength_leave_no_trace(changed) -> None:
    out = Background().image(smear(CELLS, **changed))
    np.testing.assert_allclose(colours(out, CELLS), NORMALISED, atol=6)


def test_the_background_becomes_white_and_level() -> None:
    out = Background().image(smear(CELLS, light=(240, 200, 150), vignette=0.4)).astype(float)
    blocks = [out[y : y + 96, x : x + 128][~CELLS[y : y + 96, x : x + 128]].mean(axis=0) for y in (0, 192, 384) for x in (0, 256, 512)]
    np.testing.assert_allclose(blocks, WHITE, atol=4)


def test_the_foregrounds_median_gets_the_fixed_density_and_keeps_its_hue() -> None:
    density = -np.log(NORMALISED[0] / NORMALISED[1])
    assert density.mean() == pytest.approx(AMOUNT, abs=0.03)
    np.testing.assert_allclose(density / density.mean(), STAIN / STAIN.mean(), atol=0.05)


@pytest.mark.parametrize("num", [3, 15, 400])
def test_the_number_of_cells_leaves_no_trace(num: int) -> None:
    cells = discs(num, seed=1)
    out = Background().image(smear(cells, vignette=0.2))
    np.testing.assert_allclose(colours(out, cells), NORMALISED, atol=6)


def test_many_dark_white_cells_among_pale_red_ones_do_not_become_the_only_foreground() -> None:
    red, white = discs(80, seed=2), discs(25, seed=3)
    amounts = np.where(white, 4.0, red)
    out = Background().image(smear(amounts, strength=0.25))
    red_only = red & ~white
    assert -np.log(out[red_only].mean() / out[~(red | white)].mean()) > 0.8 * AMOUNT


@pytest.mark.parametrize("brightness", [12, 60, 230])
def test_dark_field_is_inverted_to_the_same_scale(brightness: float) -> None:
    out = colours(Background().image(fluorescence(CELLS, brightness=brightness)), CELLS)
    np.testing.assert_allclose(out[:, 0], [WHITE * np.exp(-AMOUNT), WHITE], atol=9)


def test_the_halo_of_bright_nuclei_is_not_taken_for_the_foreground() -> None:
    nuclei = discs(40, radius=6)
    halo = gaussian_filter(nuclei.astype(float), 12)
    out = colours(Background(dark_field=0.3).image(fluorescence(nuclei + 0.5 * halo, brightness=100)), nuclei)
    assert -np.log(out[0, 0] / out[1, 0]) == pytest.approx(AMOUNT, abs=0.15)


def test_an_uneven_background_between_crowded_cells_does_not_take_in_their_pale_parts() -> None:
    cells = discs(250, seed=5)
    texture = gaussian_filter(np.random.default_rng(0).normal(0, 1, cells.shape), 3)
    texture /= texture.std()
    tissue = np.where(cells, 0.7 + 0.25 * texture, 0.1 + 0.08 * np.roll(texture, 50))
    out = colours(Background().image(smear(tissue, strength=0.8)), cells)
    assert -np.log(out[0] / out[1]).mean() == pytest.approx(AMOUNT, abs=0.05)


@pytest.mark.parametrize("num", [2, 60, 250])
def test_bright_and_dark_field_are_told_apart_with_few_and_many_cells(num: int) -> None:
    cells = discs(num, seed=4)
    for image, dark in (
        (smear(cells), False),
        (smear(cells, vignette=0.3), False),
        (fluorescence(cells), True),
        (fluorescence(cells, brightness=200), True),
    ):
        assert estimate(image).dark_field is dark


def test_too_dark_a_photograph_of_a_smear_is_still_bright_field() -> None:
    assert not estimate(smear(CELLS, light=(80, 80, 80))).dark_field


@pytest.mark.parametrize(
    "image", [smear(np.zeros((HEIGHT, WIDTH)), vignette=0.3), fluorescence(np.zeros((HEIGHT, WIDTH)))], ids=["glass", "dark"]
)
def test_the_noise_of_an_empty_image_does_not_become_cells(image) -> None:
    out = Background(bright_field=0.5, dark_field=0.3).image(image)
    assert (out > WHITE - 20).mean() > 0.995


def test_the_dust_of_an_empty_image_does_not_become_cells() -> None:
    dust = discs(60, radius=6)
    assert 0.01 < dust.mean() < 0.03
    target = Background.fitted([smear(CELLS, seed=k) for k in range(3)])
    assert colours(target.image(smear(dust, strength=0.07)), dust)[0].min() > WHITE * np.exp(-AMOUNT / 2)


def test_a_single_cell_is_scaled_as_those_of_the_training_images() -> None:
    cells = discs(1, radius=5)
    assert cells.mean() < 0.0005
    target = Background.fitted([smear(CELLS, seed=k) for k in range(3)])
    np.testing.assert_allclose(colours(target.image(smear(cells)), cells)[0], NORMALISED[0], atol=12)


def test_phase_contrast_is_unchanged() -> None:
    cells = discs(40)
    halo = discs(40, radius=25) & ~cells
    image = np.repeat(
        (120 + 50 * halo - 40 * cells + np.random.default_rng(0).normal(0, 2, cells.shape)).astype(np.uint8)[..., None], 3, axis=-1
    )
    assert np.array_equal(Background().image(image), image)
    assert Background.fitted([image, image, smear(CELLS)]) is None


def test_grey_stays_grey() -> None:
    grey = np.repeat(smear(CELLS)[..., :1], 3, axis=-1)
    out = Background().image(grey)
    assert np.array_equal(out[..., 0], out[..., 1])
    assert np.array_equal(out[..., 0], out[..., 2])


# --- noise


def noisy(deviation: float, seed: int = 0) -> np.ndarray:
    """Dim fluorescence whose noise has this deviation, the same in all channels."""
    noise = np.random.default_rng(seed).normal(0, deviation, (HEIGHT, WIDTH, 1))
    return (20 + 30 * CELLS[..., None] + noise + np.zeros(3)).clip(0, 255).round().astype(np.uint8)


def background_noise(image: np.ndarray) -> float:
    """The deviation of the pixels that are away from cells."""
    return float(image[..., 0][gaussian_filter(CELLS.astype(float), 4) < 1e-3].std())


@pytest.mark.parametrize("deviation", [1.5, 4, 6])
@pytest.mark.parametrize("rows", [slice(0, 40), slice(None)])
def test_the_noise_that_was_added_is_measured(deviation: float, rows: slice) -> None:
    assert noise_deviation(noisy(deviation)[rows]) == pytest.approx(deviation, abs=0.25)  # of whole numbers the median is one, too


@pytest.mark.parametrize("deviation", [3, 5])
def test_an_image_with_more_noise_than_the_training_images_is_smoothed_to_the_noise_of_these(deviation: float) -> None:
    fitted = Background.fitted([noisy(1, seed) for seed in range(3)])
    usual = background_noise(fitted.image(noisy(1, 9)))
    assert background_noise(replace(fitted, most_noise=None).image(noisy(deviation, 9))) > 2 * usual
    assert background_noise(fitted.image(noisy(deviation, 9))) == pytest.approx(usual, rel=0.25)


def test_an_image_with_the_noise_of_the_training_images_is_not_smoothed() -> None:
    fitted = Background.fitted([noisy(deviation, seed) for seed, deviation in enumerate((2, 4, 4.5))])
    assert fitted.most_noise > 1.5
    assert np.array_equal(fitted.image(noisy(2, 9)), replace(fitted, most_noise=None).image(noisy(2, 9)))


def test_a_clean_set_leaves_a_little_noise() -> None:
    assert Background.fitted([noisy(0.3, seed) for seed in range(3)]).most_noise == 1.5


def test_a_run_of_an_earlier_version_never_smooths() -> None:
    record = Preparation(framing=Framing(kind="tile", side_px=224), normaliser=Background(most_noise=2.0)).to_dict()
    assert Preparation.of(record).normaliser.most_noise == 2
    del record["normaliser"]["most_noise"]
    assert Preparation.of(record).normaliser.most_noise is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 5000), (5000, 3), (401, 7)])
@pytest.mark.parametrize("fill", [0, 255, "noise"])
def test_any_size_passes_without_a_warning(shape, fill) -> None:
    image = (
        np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
        if fill == "noise"
        else np.full((*shape, 3), fill, np.uint8)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = Background.fitted([image])
        out = (out or Background()).image(image)
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    if fill != "noise":
        assert np.array_equal(out, image)


@pytest.mark.parametrize("size", [(300, 200), (801, 1203), (2000, 900)])
def test_a_thumbnail_is_the_mean_of_blocks(size) -> None:
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    step = -(-max(size) // 400)
    even = image[: size[0] // step * step, : size[1] // step * step].astype(float)
    side = min(step, 4)
    kept = even.reshape(even.shape[0] // step, step, -1, step, 3)[:, :side, :, :side].reshape(even.shape[0] // step * side, -1, 3)
    np.testing.assert_allclose(thumbnail(image), block_reduce(kept, (side, side, 1), np.mean), atol=1e-3)


def test_strips_of_a_large_image_fit_together() -> None:
    cells = np.tile(CELLS, (3, 1))
    slide = np.concatenate([smear(CELLS, seed=k) for k in range(3)]) * np.linspace(1, 0.6, 3 * HEIGHT)[:, None, None]
    out = Background().image(slide.astype(np.uint8)).astype(float)
    means = out.mean(axis=(1, 2), where=~cells[..., None])
    assert np.abs(np.diff(means)).max() < 1.5
    assert np.abs(means - WHITE).max() < 6


def test_an_image_of_16_bits_is_normalised_like_one_of_8(tmp_path) -> None:
    eight = smear(CELLS)[..., 0]
    Image.fromarray(eight).save(tmp_path / "eight.png")
    Image.fromarray(eight.astype(np.uint16) * 16).save(tmp_path / "sixteen.png")  # 12 bits of 16
    reading = IntensityScaling(int_range=(0, 4095))
    one, other = (Background().image(read_image(tmp_path / name, reading)) for name in ("eight.png", "sixteen.png"))
    np.testing.assert_allclose(colours(other, CELLS), colours(one, CELLS), atol=8)
