"""Figures of a dataset, and of the features of backbones for one of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from cellbench.data.audit.image_statistics import ImageStatistics
from cellbench.data.io.images import brightened, thumbnail
from cellbench.metrics.pixel import IGNORE
from cellbench.reporting.plots.style import PALETTE, STYLE, shorten, subplots

MOST_SAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class Panel:
    """An image (H, W) or (H, W, 3) with a title; with ``scale``, values between these limits."""

    title: str
    picture: np.ndarray
    scale: tuple[float, float] | None = None


def plot_samples(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], classes: Sequence[str]) -> Figure:
    """Images (H, W, 3) uint8 in the upper row, their class maps (H, W) below; (name, image, classes) each. No ``classes``: images alone."""
    pairs = pairs[:MOST_SAMPLES]
    rows = 2 if classes else 1
    with matplotlib.rc_context(STYLE):
        size = (min(11, 2.8 * len(pairs)), 2.3 * rows)
        figure, panels = subplots(rows, len(pairs), figsize=size, layout="constrained", squeeze=False)
        for column, (name, image, mask) in enumerate(pairs):
            shown, times = brightened(thumbnail(image))
            _show(panels[0][column], shown)
            panels[0][column].set_title(shorten(name, 23) + (f", {times:.0f} x as bright" if times > 1 else ""), fontsize=8)
            if not classes:
                continue
            drawn = np.ma.masked_equal(thumbnail(mask), IGNORE)  # ignored pixels stay white
            _show(panels[1][column], drawn, cmap="gray" if len(classes) == 2 else "viridis", vmin=0, vmax=len(classes) - 1)
            height, width = mask.shape
            panels[1][column].set_title(f"{width} x {height} px, {((mask > 0) & (mask != IGNORE)).mean():.0%} cells", fontsize=8)
    return figure


def plot_statistics(images: Sequence[ImageStatistics]) -> Figure:
    """Share of cell pixels, cells per image, diameters, and the mean colours of cells and background, one point an image."""
    diameters = np.concatenate([one.diameters_px for one in images]) if images else np.zeros(0)
    with matplotlib.rc_context(STYLE):
        figure, ((a, b), (c, d)) = subplots(2, 2, figsize=(9, 5.4), layout="constrained")
        _histogram(a, [100 * one.cell_share for one in images], "cell pixels, % of an image", "images")
        _histogram(b, [one.num_cells for one in images], "cells in an image", "images")
        _histogram(c, diameters, "diameter of a cell, px (not cut by the border)", "cells")
        for label, marker, colours in (
            ("cells", "o", [one.cell_rgb for one in images]),
            ("background", "s", [one.ground_rgb for one in images]),
        ):
            rgb = np.array([colour for colour in colours if np.isfinite(colour).all()]).reshape(-1, 3)
            # Red minus blue separates rose from violet. A dot has its own colour.
            d.scatter(rgb[:, 0] - rgb[:, 2], rgb.mean(1), c=rgb / 255, marker=marker, s=42, edgecolors="0.2", linewidths=0.7, label=label)
        d.set_xlabel("red minus blue, levels")
        d.set_ylabel("brightness, levels")
        d.set_title("mean colours, one point an image")
        d.legend(loc="best", fontsize=8)
    return figure


def plot_feature_maps(
    image: np.ndarray, rows: Mapping[str, Sequence[Panel]], title: str, point: tuple[float, float] | None = None
) -> Figure:
    """Feature maps of one image by several backbones (rows) in several framings (columns), after the image itself.

    ``point``: (x, y) in pixels of the image, marked everywhere.
    """
    columns = 1 + max(len(panels) for panels in rows.values())
    height, width = image.shape[:2]
    with matplotlib.rc_context(STYLE):
        figure, grid = subplots(
            len(rows),
            columns,
            figsize=(2.9 * columns, 2.75 * height / width * len(rows) + 0.3 * len(rows) + 0.3),
            layout="constrained",
            squeeze=False,
        )
        drawn = None
        for line, (name, panels) in zip(grid, rows.items(), strict=True):
            _show(line[0], thumbnail(image))
            line[0].set_ylabel(name)
            for axes, panel in zip(line[1:], panels, strict=False):
                low, high = panel.scale or (None, None)
                drawn = _show(axes, thumbnail(panel.picture), cmap="cividis", vmin=low, vmax=high)
                axes.set_title(panel.title, fontsize=8)
            for axes in line[1 + len(panels) :]:
                axes.axis("off")
            if point is not None:
                step = -(-max(height, width) // 600)
                for axes in line[: 1 + len(panels)]:
                    axes.plot(point[0] / step, point[1] / step, "+", color="white", markersize=11, markeredgewidth=3.2)
                    axes.plot(point[0] / step, point[1] / step, "+", color="black", markersize=10, markeredgewidth=1.4)
        if drawn is not None and any(panel.scale for panels in rows.values() for panel in panels):
            figure.colorbar(drawn, ax=grid, shrink=0.6, label="cosine")
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _show(axes: Axes, array: np.ndarray, **look: Any) -> AxesImage:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes.imshow(array, interpolation="nearest", **look)


def _histogram(axes: Axes, values: Sequence[float] | np.ndarray, label: str, what: str) -> None:
    values = np.asarray(values, float)
    if len(values):
        axes.hist(values, bins=min(30, max(5, len(values) // 3)), color=PALETTE[0], alpha=0.8, edgecolor="white")
        axes.axvline(np.median(values), color="black", linewidth=1.2)
        axes.set_title(f"median {np.median(values):.3g}, mean {values.mean():.3g} (line: median)")
    axes.set_xlabel(label)
    axes.set_ylabel(what)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))  # a count
