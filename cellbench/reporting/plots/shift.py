"""The figure of shift: how far each model falls on perturbed images, other appearances and other test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cellbench.reporting.plots.style import (
    NARROW_IN,
    PALETTE,
    STYLE,
    draw_reliability,
    first_that_fit,
    note_at_right,
    rows_figure,
    set_caption,
    subplots,
)
from cellbench.reporting.shift import FallRow

MOST = 15
"""Models in the figure."""
COLOURS = (PALETTE[4], PALETTE[1], PALETTE[0], "0.3", PALETTE[5], PALETTE[2], PALETTE[3], "black")
MARKERS = "osD^vP*X"


def plot_falls(rows: Sequence[FallRow], kinds: Mapping[str, str], narrow: bool = False) -> Figure:
    """A row a model: a bar from the own images down to the lowest condition, a mark for each condition. ``kinds``: labels by kind."""
    rows, left_out = first_that_fit(rows, MOST)
    with matplotlib.rc_context(STYLE):
        legend_rows = -(-(len(kinds) + 1) // (3 if narrow else 10))
        figure, axes = rows_figure([row.model for row in rows], narrow, extra_in=0.8 + 0.25 * legend_rows)
        low = min(row.lowest[1] for row in rows)
        high = max(value for row in rows for value in (row.own, *(value for _, _, value in row.conditions)))
        pad = 0.04 * (high - low) or 0.01
        axes.set_xlim(low - pad, high + pad)
        look = {kind: (COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]) for k, kind in enumerate(kinds)}
        for y, row in enumerate(rows):
            axes.plot([row.lowest[1], row.own], [y, y], color="0.8", linewidth=5, solid_capstyle="butt", zorder=1)
            shifts = np.linspace(-0.16, 0.16, len(kinds)) if len(kinds) > 1 else np.zeros(1)
            for (kind, (colour, marker)), shift in zip(look.items(), shifts, strict=True):
                values = [value for other, _, value in row.conditions if other == kind]
                axes.plot(values, [y + shift] * len(values), marker, color=colour, markersize=4, markeredgewidth=0, alpha=0.85, zorder=2)
            axes.plot([row.own], [y], "|", color="black", markersize=13, markeredgewidth=2, zorder=3)
            note_at_right(axes, y, f"{row.lowest[1]:.3f}, {row.lowest[0]}{' (safest)' if row.safest else ''}", narrow)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("test Dice, mean over images")
        handles = [Line2D([], [], color="black", marker="|", linestyle="none", markersize=11, markeredgewidth=2, label="own test images")]
        handles += [
            Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=5, label=kinds[kind])
            for kind, (colour, marker) in look.items()
        ]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=3 if narrow else 10, fontsize=8, handletextpad=0.2, columnspacing=1.0
        )
        set_caption(
            figure,
            "Mean Dice of each model: on the own test images (line), and under each condition (marks).",
            "Perturbations have three strengths, so three marks." if any(kind not in ("appearance", "test set") for kind in kinds) else "",
            "Beside each row: the lowest mean and its condition. The safest model has the highest.",
            left_out,
        )
    return figure


def plot_reliability(model: str, curves: Mapping[str, Mapping[str, Sequence[float]]], narrow: bool = False) -> Figure:
    """The observed share of cells against the predicted probability, a line a test set. ``curves``: pixels, probability and share_cell by bin."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(figsize=(NARROW_IN, NARROW_IN) if narrow else (5.2, 4.2), layout="constrained")
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--", label="perfect")
        for k, (name, curve) in enumerate(curves.items()):
            draw_reliability(axes, curve, f"{MARKERS[k % len(MARKERS)]}-", color=COLOURS[k % len(COLOURS)], markersize=4, label=name)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("probability of a cell")
        axes.set_ylabel("share that is cell")
        axes.legend(fontsize=8, loc="upper left")
        set_caption(
            figure,
            f"Calibration of {model} on each test set, its probabilities as predict gives them.",
            "Below the line it is too sure of cells.",
        )
    return figure
