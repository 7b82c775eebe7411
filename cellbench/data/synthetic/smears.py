"""Drawn blood smears: pictures of red cells, white cells and platelets whose masks are true by construction.

They need no download, so the quickstart and the tests run anywhere. A drawing depends on the settings, the seed, the split and the
image's number only: image 7 is the same for any number of images.

Light is absorbed as in a microscope (Beer-Lambert): each cell adds optical density in red, green and blue, so overlaps darken by
themselves. A threshold does well but not perfectly on ``plain`` smears: pale centres that lie open, uneven light, ghosts, debris. ``hard``
ones, the default, differ more from each other and hold dirt of the size of cells, so that a global threshold does not win by construction.

Legend: H height, W width, 3 red-green-blue. Densities are natural logarithms of the sensor's grey values, not of linear light.
"""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from cellbench.config.base import Scalar
from cellbench.config.registry import with_defaults
from cellbench.data.synthetic import shapes
from cellbench.data.synthetic.shapes import Form
from cellbench.errors import CellbenchError, one_line, unknown_name

RED, WHITE, PLATELET = 1, 2, 3
SPLITS = ("train", "test")
STYLES = ("hard", "plain")

LIMITS: Mapping[str, tuple[float, float]] = {
    "num_train": (2, 100_000),
    "num_test": (1, 100_000),
    "width_px": (64, 8192),
    "height_px": (64, 8192),
    "cells_per_image": (1, 5000),
    "diameter_px": (8, 240),
    "white_fraction": (0, 1),
    "platelet_fraction": (0, 1),
    "sickle_fraction": (0, 1),
    "target_fraction": (0, 1),
    "burr_fraction": (0, 1),
    "stain_jitter": (0, 1),
    "uneven_light": (0, 1),
    "noise_levels": (0, 64),
    "blur_px": (0, 20),
    "debris_per_image": (0, 1000),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True, kw_only=True)
class Smears:
    """Settings of a drawing. Raises CellbenchError for a value out of range."""

    num_train: int = 10
    num_test: int = 4
    width_px: int = 1600
    height_px: int = 1200
    vary_size: bool = False
    """Half of the images are up to 6 % narrower and 3 % lower, so that not all have one size."""
    cells_per_image: float = 90.0
    """In the mean; a single image has 0.7 to 1.3 times as many, and never more than find room."""
    diameter_px: float = 95.0
    """Of a red cell; white cells are about 1.6 times as wide, platelets a quarter."""
    white_fraction: float = 0.03
    platelet_fraction: float = 0.08
    sickle_fraction: float = 0.01
    """Of the red cells, as the next two."""
    target_fraction: float = 0.04
    burr_fraction: float = 0.08
    stain_jitter: float = 1.0
    """0: all smears have one colour. 1: from rose over grey to violet."""
    uneven_light: float = 0.2
    """The loss of light from the brightest to the darkest part, about."""
    noise_levels: float = 4.0
    """Deviation of the sensor noise, in grey levels of 255."""
    blur_px: float = 1.0
    """Deviation of the blur, in the mean; a single image has 0.5 to 1.9 times as much."""
    debris_per_image: float = 30.0
    """Specks that are no cells, in the mean; larger dirt, ghosts and fibres come in proportion."""
    style: str = "hard"
    """``plain``: every smear has the settings above. ``hard``: the settings are means around which smears vary, and there is dirt that a
    threshold takes for cells (:func:`_vary`, ``Slide.artefacts``)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise unknown_name("style of smears", self.style, STYLES)
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses nan
                raise CellbenchError(f"smears: {name} = {value} is out of range. Choose a value from {low} to {high}.")
        for names in (("white_fraction", "platelet_fraction"), ("sickle_fraction", "target_fraction", "burr_fraction")):
            if sum(getattr(self, name) for name in names) > 1:
                values = ", ".join(f"{name} = {getattr(self, name)}" for name in names)
                raise CellbenchError(f"smears: {values} add up to more than 1. Lower one of them: they are shares of one whole.")


@dataclass(frozen=True, kw_only=True)
class Smear:
    """One drawn smear and the truth about it."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    instances: NDArray[np.uint16]
    """(H, W): 0 is background, 1 to n the cells without a gap; where cells overlap, the top-most one owns the pixel."""
    classes: NDArray[np.uint8]
    """(H, W): 0 background, 1 red cell, 2 white cell, 3 platelet."""


def settings_from(values: Mapping[str, Scalar]) -> Smears:
    """Settings from a card's or a user's table, the rest by default. An unknown name, type or range is a CellbenchError."""
    settings: dict[str, Any] = with_defaults(asdict(Smears()), dict(values), "smears")
    return Smears(**settings)


def image_seed(settings: Smears, split: str, index: int) -> int:
    """The seed of image ``index`` (from 0) of a split; independent for each of ``settings.seed``, split and index."""
    return int(np.random.SeedSequence([settings.seed, SPLITS.index(split), index]).generate_state(1, np.uint64)[0])


def draw(seed: int, settings: Smears) -> Smear:
    """One smear. ``seed`` alone starts the randomness: ``settings.seed`` comes in by way of ``image_seed``."""
    # Separate random streams, so that the number of cells does not affect size, stain, artefacts and light.
    for_size, for_stain, for_dirt, for_places, for_light, for_style = np.random.default_rng(seed).spawn(6)
    size = _size(for_size, settings)
    slide = shapes.Slide(for_stain, size, settings.diameter_px, settings.stain_jitter)
    if settings.style == "hard":
        settings = _vary(for_style, slide, settings)
        slide.artefacts(for_style, settings.debris_per_image)
    slide.background(for_dirt, settings.debris_per_image)
    owners, kinds = np.zeros(size, np.uint16), [0]
    places = _places(for_places, size, settings)
    for place, rng in zip(places, for_places.spawn(len(places)), strict=True):
        drawn = slide.cell(rng, place.form, place.centre, place.diameter_px)
        if drawn is not None:
            at, inside = drawn
            owners[at.rows, at.cols][inside] = len(kinds)
            kinds.append(WHITE if place.form in shapes.WHITES else PLATELET if place.form is Form.PLATELET else RED)
    seen = np.bincount(owners.ravel(), minlength=len(kinds)) > 0  # the part inside the picture may be covered whole by later cells
    seen[0] = False
    numbers = np.where(seen, np.cumsum(seen), 0).astype(np.uint16)
    image = _photograph(for_light, slide.density_3HW, settings)
    return Smear(image=image, instances=numbers[owners], classes=np.array(kinds, np.uint8)[owners])


def _vary(rng: np.random.Generator, slide: shapes.Slide, settings: Smears) -> Smears:
    """The settings of one hard smear; stains its slide.

    From smear to smear differ the strength of the stain, that of white cells more than that of red ones; the tint of the glass; the number of white
    cells, whose dark nuclei raise a global threshold above pale red cells; dirt, focus and illumination.
    """
    jitter = settings.stain_jitter
    slide.stain = slide.stain * math.exp(jitter * rng.normal(-0.1, 0.28))
    slide.white_stain = np.exp(jitter * rng.normal([0.1, 0.1, 0.1], [0.12, 0.12, 0.2])) * math.exp(jitter * rng.normal(0, 0.12))
    slide.density_3HW += (jitter * rng.uniform(0, 0.15) * rng.dirichlet([2, 2, 2])).astype(np.float32)[:, None, None]
    white_fraction = min(settings.white_fraction * rng.gamma(1.5, 1 / 1.5), 1 - settings.platelet_fraction)
    blur_px = min(settings.blur_px * math.exp(rng.normal(0, 0.5)), LIMITS["blur_px"][1])
    debris = min(settings.debris_per_image * rng.gamma(2, 0.5), LIMITS["debris_per_image"][1])
    light = min(settings.uneven_light * rng.gamma(4, 0.3), 0.8)
    return replace(settings, white_fraction=white_fraction, blur_px=blur_px, debris_per_image=debris, uneven_light=light)


def draw_dataset(folder: Path, values: Mapping[str, Scalar], progress: Callable[[], object] | None = None) -> None:
    """The builder on the card: :func:`write_dataset` with settings as in an experiment file."""
    write_dataset(folder, settings_from(values), progress)


def write_dataset(folder: Path, settings: Smears, progress: Callable[[], object] | None = None) -> None:
    """Draw ``{train,test}/{original,mask,instances,classes}/smear-0000.png`` into ``folder``, wholly or not at all.

    ``original`` is RGB, ``mask`` 8 bit with 0 and 255, ``instances`` 16 bit, ``classes`` 8 bit with the class numbers. The images of test
    are numbered on from those of train, so that no two share a name. ``progress`` is called without arguments after each image.

    All is drawn beside ``folder`` and renamed at the end, so a killed process leaves no ``folder``, only a hidden ``.NAME-*.part``.
    A finished set that is already there, or that another process finished first, is kept as it is, whatever its settings: name the
    folder after them. Raises CellbenchError if other files are in the way or the disk cannot be written.
    """
    folder = Path(folder)
    if _is_dataset(folder):
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CellbenchError(f"{folder}: holds something else than drawn smears. Name a folder that is new or empty.")
    draft = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:12]}.part"
    try:
        number = 0
        for split, count in zip(SPLITS, (settings.num_train, settings.num_test), strict=True):
            for index in range(count):
                _save(draw(image_seed(settings, split, index), settings), draft / split, f"smear-{number:04d}.png")
                number += 1
                if progress is not None:
                    progress()
        try:
            draft.rename(folder)
        except OSError as error:
            if not _is_dataset(folder):
                raise CellbenchError(f"{folder}: cannot be put there: {one_line(error)}. Name a folder that is new or empty.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone already when renamed


def _save(smear: Smear, folder: Path, name: str) -> None:
    mask = np.where(smear.classes > 0, 255, 0).astype(np.uint8)
    parts: dict[str, np.ndarray] = {"original": smear.image, "mask": mask, "instances": smear.instances, "classes": smear.classes}
    for part, pixels in parts.items():
        try:
            (folder / part).mkdir(parents=True, exist_ok=True)
            # Level 1: a third of the time of the default 6, and 8 % larger.
            Image.fromarray(pixels).save(folder / part / name, compress_level=1)
        except OSError as error:
            raise CellbenchError(f"{folder / part}: cannot be written: {one_line(error)}. Check the rights and the space left.") from error


def _is_dataset(folder: Path) -> bool:
    return all((folder / split / "original").is_dir() for split in SPLITS)


def _size(rng: np.random.Generator, settings: Smears) -> tuple[int, int]:
    height, width = settings.height_px, settings.width_px
    if settings.vary_size and rng.random() < 0.5:
        height, width = max(64, round(height * rng.uniform(0.97, 1))), max(64, round(width * rng.uniform(0.94, 1)))
    return height, width


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A cell to be drawn. The centre is (x, y)."""

    form: Form
    centre: tuple[float, float]
    diameter_px: float


def _places(rng: np.random.Generator, size: tuple[int, int], settings: Smears) -> list[_Place]:
    """Where the cells lie: scattered, some of the red ones leaning on another. Bottom-most first."""
    height, width = size
    count = max(1, round(settings.cells_per_image * rng.uniform(0.7, 1.3)))
    num_white = rng.binomial(count, settings.white_fraction)
    num_platelets = min(count - num_white, rng.binomial(count, settings.platelet_fraction))
    swelling = rng.uniform(0.93, 1.07)
    places: list[_Place] = []
    circles = np.empty((count, 3))  # x, y, radius
    num_places_white = 0
    for number in range(count):
        form, scale, red = _form(rng, settings), float(rng.normal(1, 0.075)), num_white <= number < count - num_platelets
        if number < num_white:
            # As in a healthy person's count, without the basophils.
            form, scale = list(shapes.WHITES)[rng.choice(4, p=[0.58, 0.28, 0.1, 0.04])], 1.6 * scale
        elif not red:
            form, scale = Form.PLATELET, rng.normal(0.27, 0.05)
        diameter = settings.diameter_px * swelling * float(np.clip(scale, 0.15, 2))
        taken, over = circles[: len(places)], 0.35 * diameter  # cells are cut by the border
        for _ in range(40):  # no space left: the cell is left out
            leans = red and len(places) > num_places_white and rng.random() < 0.3
            if leans:
                x, y, radius = taken[rng.integers(num_places_white, len(places))].tolist()
                away, angle = rng.uniform(0.5, 1.0) * (radius + diameter / 2), rng.uniform(0, 2 * np.pi)
                x, y = x + away * math.cos(angle), y + away * math.sin(angle)
            else:
                x, y = rng.uniform(-over, width + over), rng.uniform(-over, height + over)
            nearness = np.hypot(taken[:, 0] - x, taken[:, 1] - y) / (taken[:, 2] + diameter / 2)  # 1: the circles touch
            if leans:  # never on a white cell, nor on a heap of others
                free = nearness.min() > 0.5 and nearness[:num_places_white].min(initial=2) > 0.92 and np.sum(nearness < 0.9) < 3
            else:
                free = nearness.min(initial=2) > 0.97
            if free and -over <= x <= width + over and -over <= y <= height + over:
                circles[len(places)] = x, y, diameter / 2
                places.append(_Place(form=form, centre=(x, y), diameter_px=diameter))
                num_places_white += form in shapes.WHITES
                break
    return places


def _form(rng: np.random.Generator, settings: Smears) -> Form:
    """A red cell's form, by the fractions that are ill."""
    at = rng.random()
    for form, fraction in (
        (Form.SICKLE, settings.sickle_fraction),
        (Form.TARGET, settings.target_fraction),
        (Form.BURR, settings.burr_fraction),
    ):
        if at < fraction:
            return form
        at -= fraction
    return Form.PLAIN


def _photograph(rng: np.random.Generator, density_3HW: shapes.Field, settings: Smears) -> NDArray[np.uint8]:
    """The RGB picture (H, W, 3) of a slide: light through it, blurred by the lens, uneven over the field, with the sensor's noise."""
    size = density_3HW.shape[1:]
    height, width = size
    lamp = 235 + rng.normal(0, 2.5) + rng.normal(0, 3, 3)
    blur_px = settings.blur_px * rng.uniform(0.5, 1.9)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    (cx, cy), (tilt_x, tilt_y) = rng.uniform(-0.25, 0.25, 2).tolist(), rng.normal(0, 0.22, 2).tolist()
    falling = (0.3 * (x - cx) ** 2 + tilt_x * x) + (0.3 * (y - cy) ** 2 + tilt_y * y) + 0.12 * shapes.slow(rng, size, 0.5 * max(size))
    light = 1 - settings.uneven_light * rng.uniform(0.6, 1.2) * (falling - falling.min())
    noise_levels = settings.noise_levels * rng.uniform(0.7, 1.3)
    grain = rng.standard_normal(size, dtype=np.float32)
    grain *= 0.65 * noise_levels
    image = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        seen = np.exp(-density_3HW[channel])
        if blur_px > 0:
            seen = gaussian_filter(seen, blur_px, truncate=3)
        seen *= light
        seen *= float(lamp[channel])
        seen += grain
        if noise_levels > 0:
            # Colour noise is coarser than brightness noise: a sensor has a colour filter over groups of four pixels.
            seen += 0.6 * noise_levels * shapes.slow(rng, size, 2.0)
        seen += 0.5  # to the nearest
        image[..., channel] = np.clip(seen, 0, 255, out=seen)
    return image
