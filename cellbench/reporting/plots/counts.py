"""Figures of counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cellbench.reporting.plots.style import NARROW_IN, STYLE, set_caption, shorten, subplots
from cellbench.statistics.agreement import agreement

MOST_PANELS = 6


def plot_agreement(counts: Mapping[str, tuple[Sequence[float], Sequence[float]]], unit: str = "image", narrow: bool = False) -> Figure:
    """Bland and Altman's plot: predicted minus true count against their mean, a panel a name; ``counts``: true and predicted ones by name."""
    shown = list(counts.items())[:MOST_PANELS]
    columns = 1 if narrow or len(shown) == 1 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    width = min(NARROW_IN, 8.0) if narrow else max(4.6, 3.0 * columns)
    with matplotlib.rc_context(STYLE):
        figure, grid = subplots(rows, columns, figsize=(width, 2.9 * rows + 0.5), layout="constrained", squeeze=False)
        for axes, (name, (true, predicted)) in zip(grid.flat, shown, strict=False):
            one = agreement(true, predicted)
            x, y = np.asarray(true, float), np.asarray(predicted, float)
            places, times = np.unique(np.stack([(x + y) / 2, y - x], 1), axis=0, return_counts=True)
            axes.scatter(places[:, 0], places[:, 1], s=14 + 8 * times, alpha=0.6, zorder=3)
            axes.axhline(0, color="0.6", linewidth=0.8)
            for value, style in ((one.bias.mean, "-"), (one.low, "--"), (one.high, "--")):
                if value is not None:
                    axes.axhline(value, color="C3", linestyle=style, linewidth=1)
                    axes.annotate(f"{value:+.1f}", (1.01, value), xycoords=("axes fraction", "data"), fontsize=8, va="center")
            axes.margins(y=0.15)
            bottom, top = axes.get_ylim()
            axes.set_ylim(min(bottom, -1.2), max(top, 1.2))  # counts: a difference of less than one cell fills no picture
            axes.set_title(shorten(name, 34), fontsize=9)
            axes.set_xlabel("mean of predicted and true count")
            axes.set_ylabel("predicted minus true")
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        set_caption(
            figure,
            f"A dot: one {unit}, larger where several share a place. Solid line: bias. Dashed: limits of agreement, between which 95 % of the",
            "differences lie if they are normal.",
        )
    return figure
