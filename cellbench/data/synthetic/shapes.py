"""Shapes of drawn smears: outlines of cells, each in a small window of the picture, and the optical density that fills them.

Every outline gives a ``Shape``: signed depth in px (positive inside), so that mask (``depth > 0``) and soft edge (a ramp over
``depth``) are one and the same line. Paint is optical density: the natural logarithm of the bare glass's grey value over the cell's.
Lengths are px, angles radians, y points down. Legend: H height and W width of the picture, h and w of a window.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

Field = NDArray[np.floating]

# What a cell of thickness 1 absorbs in red, green and blue. The first three are medians of BCCD smears (log of background over cell),
# the last is the rose of a Wright stain. One smear's stain is a mixture of all four.
BLUE, GREY, VIOLET, ROSE = (1.02, 0.90, 0.56), (0.57, 0.58, 0.50), (1.20, 1.32, 0.55), (0.10, 0.50, 0.37)
NUCLEUS = np.array([1.15, 1.75, 0.62])
PURPLE, LILAC, DIRT = (0.62, 1.05, 0.35), (0.10, 0.32, 0.10), (1.2, 1.25, 1.1)

ANGLES = np.linspace(-np.pi, np.pi, 361)


class Form(enum.Enum):
    """What a cell looks like."""

    PLAIN = enum.auto()
    SICKLE = enum.auto()
    TARGET = enum.auto()
    BURR = enum.auto()
    """An echinocyte: small, dark, with spikes all round."""
    NEUTROPHIL = enum.auto()
    LYMPHOCYTE = enum.auto()
    MONOCYTE = enum.auto()
    EOSINOPHIL = enum.auto()
    PLATELET = enum.auto()


@dataclass(frozen=True, kw_only=True)
class _White:
    """Shape parameters of a kind of white cell; lengths in radii of the cell."""

    size: float = 1.0
    num_lobes: tuple[int, int]
    ring: float
    """How far the lobes of the nucleus lie from the centre, on an arc with ``step`` radians from one to the next."""
    lobe: float
    step: float
    plasm: tuple[float, float, float]
    granules: float
    """How much the density of the cytoplasm varies from grain to grain."""


WHITES = {
    Form.NEUTROPHIL: _White(num_lobes=(3, 5), ring=0.44, lobe=0.23, step=1.28, plasm=(0.16, 0.27, 0.10), granules=0.16),
    Form.LYMPHOCYTE: _White(size=0.78, num_lobes=(1, 1), ring=0.12, lobe=0.73, step=0, plasm=(0.37, 0.37, 0.13), granules=0.06),
    Form.MONOCYTE: _White(num_lobes=(5, 5), ring=0.3, lobe=0.33, step=0.62, plasm=(0.30, 0.33, 0.14), granules=0.12),
    Form.EOSINOPHIL: _White(num_lobes=(2, 2), ring=0.42, lobe=0.37, step=2.3, plasm=(0.14, 0.42, 0.37), granules=0.5),
}


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of a picture around a centre; ``x`` (1, w) and ``y`` (h, 1) are px from that centre, float32."""

    rows: slice
    cols: slice
    x: Field
    y: Field

    def turned(self, angle: float) -> tuple[Field, Field]:
        """Coordinates (h, w) along and across an axis at ``angle``."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return self.x * cos + self.y * sin, self.y * cos - self.x * sin


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An outline in its window. Both fields are (h, w) float32."""

    depth: Field
    """px to the outline, negative outside; exact near the outline, which is all that an edge needs."""
    rho: Field
    """0 at the heart, 1 on the outline, greater outside."""

    def cover(self, soft_px: float) -> Field:
        """How much of each pixel is inside, 0 to 1, as a ramp ``soft_px`` wide; 0.5 is on the outline."""
        ramp = np.clip(0.5 + self.depth / soft_px, 0, 1)
        return ramp * ramp * (3 - 2 * ramp)


def window(centre: tuple[float, float], reach_px: float, size: tuple[int, int]) -> Window | None:
    """The pixels of a (height, width) picture at most ``reach_px`` from ``centre`` (x, y) along each axis; None if there are none."""
    (cx, cy), (height, width) = centre, size
    x0, x1 = max(0, int(cx - reach_px)), min(width, int(cx + reach_px) + 2)
    y0, y1 = max(0, int(cy - reach_px)), min(height, int(cy + reach_px) + 2)
    if x0 >= x1 or y0 >= y1:
        return None
    x, y = np.arange(x0, x1, dtype=np.float32)[None] - np.float32(cx), np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(cy)
    return Window(rows=slice(y0, y1), cols=slice(x0, x1), x=x, y=y)


def wobble(rng: np.random.Generator, strength: float, waves: range = range(2, 7)) -> NDArray[np.float64]:
    """A closed, irregular line around 1 at ``ANGLES``: a few slow waves, the slower the stronger."""
    line = np.ones_like(ANGLES)
    for wave in waves:
        line += rng.normal(0, strength / wave) * np.cos(wave * ANGLES + rng.uniform(0, 2 * np.pi))
    return line


def spikes(rng: np.random.Generator, count: int, height: float) -> NDArray[np.float64]:
    """What ``count`` sharp, unevenly spaced spikes add to a closed line at ``ANGLES``."""
    line = np.zeros_like(ANGLES)
    for spike in range(count):
        at = (spike + rng.uniform(-0.28, 0.28)) * 2 * np.pi / count
        away = np.abs((ANGLES - at + np.pi) % (2 * np.pi) - np.pi) * count / np.pi
        line += height * rng.uniform(0.4, 1.3) * np.maximum(0, 1 - away / rng.uniform(0.7, 1.2)) ** 1.4
    return line


def polar(at: Window, radius_px: NDArray[np.float64]) -> Shape:
    """The shape whose outline lies ``radius_px`` (361,) from the centre at ``ANGLES``."""
    r = np.hypot(at.x, at.y)
    theta = np.arctan2(at.y, at.x)
    edge = np.interp(theta, ANGLES, radius_px).astype(np.float32)
    slope = np.interp(theta, ANGLES, np.gradient(radius_px, ANGLES)).astype(np.float32)
    # A radial gap overstates the distance to a slanting edge; without the slope, the flanks of a spike would be blurred.
    depth = (edge - r) / np.sqrt(1 + (slope / np.maximum(r, 0.3 * edge)) ** 2)
    return Shape(depth=depth, rho=r / edge)


def ellipse(aspect: float, angle: float) -> NDArray[np.float64]:
    """Radius of an ellipse of area pi at ``ANGLES``; ``aspect`` is length over width."""
    along, across = np.cos(ANGLES - angle), np.sin(ANGLES - angle)
    return 1 / np.sqrt(along**2 / aspect + across**2 * aspect)


def crescent(at: Window, half_length_px: float, half_width_px: float, bend: float, angle: float) -> Shape:
    """A bent lens with two tips; ``bend`` is how far the tips lie off the axis, in half lengths."""
    u, v = at.turned(angle)
    along = u / half_length_px
    arc = v - bend * half_length_px * (along**2 - 0.33)
    level = half_width_px * (1 - along**2) - np.abs(arc)
    slope = 2 * along * (half_width_px / half_length_px + abs(bend))
    ends = half_length_px - np.abs(u)  # beyond the tips the sides would go on as one thin line
    return Shape(depth=np.minimum(level / np.sqrt(1 + slope**2), ends), rho=1 - level / half_width_px)


def lobes(at: Window, centres_px: Sequence[tuple[float, float]], radii_px: Sequence[float]) -> Shape:
    """Soft balls that flow together where they are near, as the lobes of a nucleus do."""
    total = np.zeros(np.broadcast_shapes(at.x.shape, at.y.shape), np.float32)
    for (x, y), radius in zip(centres_px, radii_px, strict=True):
        total += np.exp(1 - ((at.x - np.float32(x)) ** 2 + (at.y - np.float32(y)) ** 2) / np.float32(radius**2))
    # -log turns the sum back into a squared radius, so that one ball alone has exactly its own radius.
    rho = np.sqrt(np.maximum(1 - np.log(np.maximum(total, 1e-6)), 0))
    return Shape(depth=((1 - rho) * np.mean(radii_px)).astype(np.float32), rho=rho.astype(np.float32))


def texture(rng: np.random.Generator, grain_px: float, side_px: int = 512) -> Field:
    """Seamless noise (side, side), mean 0 and deviation 1, with grains about ``grain_px`` wide."""
    noise = gaussian_filter(rng.standard_normal((side_px, side_px), dtype=np.float32), max(grain_px, 0.3) / 2, mode="wrap", truncate=3)
    return (noise - noise.mean()) / noise.std()


def cropped(rng: np.random.Generator, noise: Field, at: Window) -> Field:
    """A random piece of a seamless texture, as large as the window."""
    side = len(noise)
    dy, dx = rng.integers(0, side, 2)
    return noise[np.ix_((np.arange(at.y.size) + dy) % side, (np.arange(at.x.size) + dx) % side)]


def slow(rng: np.random.Generator, size: tuple[int, int], grain_px: float) -> Field:
    """Smooth noise (H, W), mean about 0 and deviation below 1, that changes over ``grain_px``."""
    height, width = size
    grid = rng.standard_normal((max(3, round(height / grain_px) + 1), max(3, round(width / grain_px) + 1)), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


class Slide:
    """The smear under the microscope: ``density_3HW`` is what it absorbs in red, green and blue, float32."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], unit_px: float, stain_jitter: float) -> None:
        """Bare glass of (height, width) px. ``unit_px`` is the diameter of a red cell; ``stain_jitter`` 0 is always the same stain."""
        self.size, self.unit_px = size, unit_px
        self.density_3HW = np.zeros((3, *size), np.float32)
        even, mixed = np.array([0.2, 0.3, 0.15, 0.35]), rng.dirichlet([0.5, 0.7, 0.3, 1.1])
        mix = even + stain_jitter * (mixed - even)
        self.stain = mix @ np.array([BLUE, GREY, VIOLET, ROSE]) * (1 + stain_jitter * rng.uniform(-0.12, 0.12))
        self.white_stain = np.ones(3)
        """What white cells absorb in each colour, relative to their usual stain."""
        self.pallor = rng.uniform(0.5, 0.85)
        self.soft_px = max(1.2, 0.03 * unit_px)
        self.fine = texture(rng, 0.03 * unit_px)
        self.coarse = texture(rng, 0.11 * unit_px)

    def absorb(self, at: Window, thickness: Field, stain: tuple[float, float, float] | NDArray[np.float64]) -> None:
        for channel, strength in enumerate(stain):
            self.density_3HW[channel, at.rows, at.cols] += np.float32(strength) * thickness

    def cell(
        self, rng: np.random.Generator, form: Form, centre: tuple[float, float], diameter_px: float
    ) -> tuple[Window, NDArray[np.bool_]] | None:
        """Draws one cell; returns its window and the pixels (h, w) in it. None if it lies outside the picture."""
        at = window(centre, 0.66 * diameter_px + 4, self.size)  # no outline reaches farther
        if at is None:
            return None
        if form in WHITES:
            shape = self._white(rng, at, diameter_px / 2, WHITES[form])
        elif form is Form.PLATELET:
            shape = self._platelet(rng, at, diameter_px / 2)
        else:
            shape = self._red(rng, at, diameter_px / 2, form)
        return at, shape.depth > 0

    def _red(self, rng: np.random.Generator, at: Window, radius: float, form: Form) -> Shape:
        angle = rng.uniform(0, np.pi)
        aspect = 1 + abs(rng.normal(0, 0.13))
        if form is Form.SICKLE:
            shape = crescent(at, radius * rng.uniform(1.05, 1.22), radius * rng.uniform(0.24, 0.34), rng.uniform(0.3, 0.6), angle)
        else:
            line = ellipse(aspect, angle) * wobble(rng, 0.05)
            if form is Form.BURR:
                line = 0.86 * line + spikes(rng, int(rng.integers(13, 21)), 0.13)
            elif rng.random() < 0.03:  # drawn out into a tail by the smearing
                away = (ANGLES - rng.uniform(0, 2 * np.pi) + np.pi) % (2 * np.pi) - np.pi
                line = line + 0.5 * np.exp(-np.abs(away) / 0.2)
            shape = polar(at, np.minimum(radius * line, 1.3 * radius))

        rho, depth = shape.rho, np.maximum(shape.depth, 0)
        thickness = 0.62 + 0.38 * (1 - np.exp(-depth / (0.09 * radius)))  # thin at the very edge, as a disc with round sides
        thickness += rng.uniform(0.08, 0.3) * np.exp(-(((rho - 0.78) / 0.16) ** 2))
        u, v = at.turned(rng.uniform(0, np.pi))
        dx, dy = rng.normal(0, 0.08) * radius, rng.normal(0, 0.08) * radius
        if form is Form.TARGET:
            centre = np.hypot(u, v) / radius
            thickness *= 1 - rng.uniform(0.55, 0.85) * np.exp(-(((centre - rng.uniform(0.45, 0.55)) / rng.uniform(0.16, 0.24)) ** 2))
        elif form is not Form.SICKLE:
            depth_of_pallor = float(np.clip(rng.normal(self.pallor, 0.3), 0, 0.97)) * (0.35 if form is Form.BURR else 1)
            slit = rng.uniform(1.6, 3) if rng.random() < 0.1 else rng.uniform(1, 1.25)
            wide = radius * rng.uniform(0.38, 0.6)
            if rng.random() < 0.17:  # the hollow runs out over the edge and lies open to the background
                depth_of_pallor, dx, dy, wide = rng.uniform(0.88, 0.98), rng.uniform(0.35, 0.6) * radius, 0.0, 0.62 * radius
            hollow = np.hypot((u - dx) / math.sqrt(slit), (v - dy) * math.sqrt(slit)) / wide
            thickness *= 1 - depth_of_pallor * np.exp(-(hollow ** rng.uniform(1.8, 4)))
        grain = cropped(rng, self.fine, at) * 0.025 + cropped(rng, self.coarse, at) * 0.04
        if form is Form.BURR:
            grain += 0.3 * np.tanh(1.5 * cropped(rng, self.coarse, at))
            thickness *= 1.25
        thickness = thickness * (1 + grain) * math.exp(rng.normal(0, 0.14)) * shape.cover(self.soft_px)
        # Light bent away at the edge brightens the background just outside.
        thickness -= rng.uniform(0.02, 0.07) * np.exp(-((shape.depth / (0.07 * radius) + 1.1) ** 2))
        self.absorb(at, thickness, self.stain)
        return shape

    def _white(self, rng: np.random.Generator, at: Window, radius: float, kind: _White) -> Shape:
        size, start = radius * kind.size, rng.uniform(0, 2 * np.pi)
        body = polar(at, size * ellipse(1 + abs(rng.normal(0, 0.08)), start) * wobble(rng, 0.06))
        turns = [start + kind.step * i + rng.normal(0, 0.12) for i in range(int(rng.integers(*kind.num_lobes, endpoint=True)))]
        rings = [kind.ring * size * rng.uniform(0.82, 1.12) for _ in turns]
        radii = [kind.lobe * size * rng.uniform(0.93, 1.2) for _ in turns]
        nucleus = lobes(at, [(r * math.cos(t), r * math.sin(t)) for t, r in zip(turns, rings, strict=True)], radii)
        fine, coarse = cropped(rng, self.fine, at), cropped(rng, self.coarse, at)
        rim = 1 + 0.35 * np.exp(-np.maximum(body.depth, 0) / (0.07 * size))
        plasm = body.cover(1.3 * self.soft_px) * rim * (1 + kind.granules * np.tanh(fine) + 0.08 * coarse)
        self.absorb(at, plasm * rng.uniform(0.85, 1.2), np.array(kind.plasm) * self.white_stain)
        chromatin = 0.88 + 0.2 * np.tanh(1.4 * coarse) + 0.1 * fine - 0.12 * np.exp(-np.maximum(nucleus.depth, 0) / (0.05 * size))
        within = np.clip((body.depth - 0.03 * size) / (2 * self.soft_px), 0, 1)  # a nucleus never leaves its cell
        self.absorb(at, nucleus.cover(1.3 * self.soft_px) * within * chromatin * rng.uniform(0.85, 1.1), NUCLEUS * self.white_stain)
        return body

    def _platelet(self, rng: np.random.Generator, at: Window, radius: float) -> Shape:
        line = ellipse(rng.uniform(1, 1.6), rng.uniform(0, np.pi)) * wobble(rng, 0.25, range(2, 9))
        shape = polar(at, radius * np.clip(line, 0.5, 1.4))
        heart = np.exp(-((shape.rho / 0.75) ** 4)) * (0.55 + 0.4 * np.tanh(1.5 * cropped(rng, self.fine, at)))
        thickness = shape.cover(self.soft_px) * (0.32 + heart) * rng.uniform(0.8, 1.25)
        self.absorb(at, thickness, PURPLE)
        return shape

    def _anywhere(self, rng: np.random.Generator, reach_px: float) -> Window:
        height, width = self.size
        at = window((rng.uniform(0, width), rng.uniform(0, height)), reach_px, self.size)
        assert at is not None
        return at

    def _blob(self, rng: np.random.Generator, radius_px: float, uneven: float, longest: float = 1.5) -> tuple[Window, Shape]:
        at = self._anywhere(rng, 1.6 * radius_px + 3)
        line = ellipse(rng.uniform(1, longest), rng.uniform(0, np.pi)) * wobble(rng, uneven)
        return at, polar(at, radius_px * np.clip(line, 0.3, 1.6))

    def background(self, rng: np.random.Generator, debris: float) -> None:
        """Draws artefacts on the glass: dried plasma, ghosts, blots, fibres, specks."""
        unit = self.unit_px
        plasma = np.abs(slow(rng, self.size, 0.8 * unit)) * 0.016 + slow(rng, self.size, 0.1 * unit) * 0.006
        for channel, strength in enumerate((0.6, 1.1, 0.8)):
            self.density_3HW[channel] += np.float32(strength) * plasma

        for _ in range(rng.poisson(0.06 * debris)):  # ghosts: cells that have lost their haemoglobin
            at, shape = self._blob(rng, unit * rng.uniform(0.4, 0.6), 0.1)
            thickness = shape.cover(4 * self.soft_px) * (0.7 + 0.5 * np.exp(-(((shape.rho - 0.9) / 0.12) ** 2))) * rng.uniform(0.06, 0.16)
            self.absorb(at, thickness * (1 + 0.25 * cropped(rng, self.coarse, at)), (0.35, 1.1, 0.6))
        for _ in range(rng.poisson(0.02 * debris)):  # a burst cell: a torn cloud of granules
            at, shape = self._blob(rng, unit * rng.uniform(0.6, 1.3), 0.3)
            cloud = np.clip(1.15 - shape.rho, 0, 1) * np.clip(0.5 + 0.6 * cropped(rng, self.coarse, at), 0, 2)
            self.absorb(at, cloud * rng.uniform(0.3, 0.7), (0.35, 0.95, 0.22))
        for _ in range(rng.poisson(0.015 * debris)):  # a fibre
            reach = unit * rng.uniform(1, 2.5)
            at = self._anywhere(rng, reach)
            u, v = at.turned(rng.uniform(0, np.pi))
            off = v - rng.normal(0, 0.3) * u**2 / reach - 0.08 * reach * np.sin(u / reach * 4 + rng.uniform(0, 6))
            strand = np.exp(-((off / (0.06 * unit)) ** 2)) + 0.5 * np.exp(-((off / (0.2 * unit)) ** 2))
            strand *= np.clip(1 - (u / reach) ** 2, 0, 1) * np.clip(0.8 + 0.25 * cropped(rng, self.coarse, at), 0, 2)
            self.absorb(at, strand * rng.uniform(0.08, 0.2), (0.9, 0.65, 0.5))
        for _ in range(rng.poisson(0.5 * debris)):  # faint stain
            at, shape = self._blob(rng, unit * rng.uniform(0.05, 0.16), 0.35)
            self.absorb(at, shape.cover(3 * self.soft_px) * rng.uniform(0.2, 0.9), LILAC)
        for _ in range(rng.poisson(debris)):  # specks, most of them tiny
            at, shape = self._blob(rng, max(0.9, unit * 0.016 * rng.lognormal(0, 0.55)), 0.2)
            stain = np.array(PURPLE if rng.random() < 0.6 else DIRT)
            self.absorb(at, shape.cover(0.7 * self.soft_px) * rng.uniform(0.2, 1.2), stain)

    def artefacts(self, rng: np.random.Generator, debris: float) -> None:
        """Draws what a threshold takes for cells: smeared nuclei, precipitate of the stain, cells and dust far out of focus."""
        unit = self.unit_px
        for _ in range(rng.poisson(0.05 * debris)):  # the nucleus of a crushed cell, without a cell around it
            at, shape = self._blob(rng, unit * rng.uniform(0.35, 0.75), 0.35, 2.5)
            veil = np.clip(1.2 - shape.rho, 0, 0.6) * np.clip(
                0.8 + 0.28 * cropped(rng, self.coarse, at) + 0.15 * cropped(rng, self.fine, at), 0, 2
            )
            self.absorb(at, veil * rng.uniform(0.3, 0.9), NUCLEUS * self.white_stain)
        for _ in range(rng.poisson(0.1 * debris)):  # grains of stain, in heaps
            reach, num = unit * rng.uniform(0.08, 0.3), int(rng.integers(5, 25))
            at = self._anywhere(rng, 3 * reach + 3)
            centres = [(float(x), float(y)) for x, y in rng.normal(0, 0.6 * reach, (num, 2))]
            shape = lobes(at, centres, (unit * rng.lognormal(-3.4, 0.4, num)).tolist())
            self.absorb(at, shape.cover(self.soft_px) * rng.uniform(0.4, 1.1), DIRT if rng.random() < 0.4 else PURPLE)
        for _ in range(rng.poisson(0.06 * debris)):  # a cell in another plane
            radius = unit * rng.uniform(0.4, 0.55)
            at, shape = self._blob(rng, radius, 0.05)
            self.absorb(at, shape.cover(radius * rng.uniform(0.7, 1.4)) * rng.uniform(0.15, 0.45), self.stain)
        for _ in range(rng.poisson(0.02 * debris)):  # dust on the lens
            radius = unit * rng.uniform(0.15, 0.6)
            at, shape = self._blob(rng, radius, 0.15)
            self.absorb(at, shape.cover(radius * rng.uniform(0.4, 0.9)) * rng.uniform(0.15, 0.5), (1.0, 1.0, 1.0))
