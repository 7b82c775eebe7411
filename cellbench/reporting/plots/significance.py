"""Figures of the tests: each model against the best, every pair, and mean ranks with the models that do not differ significantly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cellbench.reporting.leaderboard import format_p
from cellbench.reporting.plots.comparison import BLUE, MOST
from cellbench.reporting.plots.style import (
    GREY_TEXT,
    NARROW_IN,
    STYLE,
    WIDTH_IN,
    draw_outside,
    draw_span,
    first_that_fit,
    intervals_sentence,
    note_at_right,
    rows_figure,
    set_caption,
    set_range,
    shorten,
    subplots,
)
from cellbench.statistics.bootstrap import negate
from cellbench.statistics.ranking import CriticalDifference
from cellbench.statistics.scores import Difference

LIGHT_BLUE, LIGHT_ORANGE = (0.62, 0.8, 0.92), (0.98, 0.82, 0.6)
MOST_PAIRED, MOST_PAIRED_NARROW = 16, 8
"""Models in the figure of all pairs: the numbers must be readable."""


def plot_differences(differences: Sequence[Difference], best: str, metric: str = "Dice", narrow: bool = False) -> Figure:
    """Each model minus the best, paired by image, with its 95 % interval; filled where the difference is significant."""
    order = sorted(differences, key=lambda d: abs(d.interval.mean))
    order, left_out = first_that_fit(order, MOST)
    each = [(d.interval, d.a) if d.b == best else (negate(d.interval), d.b) for d in order]
    with matplotlib.rc_context(STYLE):
        figure, axes = rows_figure([name for _, name in each], narrow)
        outside = set_range(axes, [one for one, _ in each], include=(0.0,))
        axes.axvline(0, color="0.2", linewidth=1, zorder=1)
        for y, (d, (one, _)) in enumerate(zip(order, each, strict=True)):
            colour = BLUE if d.significant else GREY_TEXT
            look: dict[str, Any] = {"color": colour, "markerfacecolor": colour if d.significant else "white"}
            if not draw_outside(axes, y, one.mean, **look):
                draw_span(axes, y, one, color=colour, linewidth=1.6)
                axes.plot(one.mean, y, "o", markersize=6, zorder=3, **look)
            note_at_right(axes, y, f"{one.mean:+.4f}  {format_p(d.p_adjusted)}", narrow)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"difference in {metric}" if narrow else f"difference in {metric} to {best}, paired by image")
        set_caption(
            figure,
            f"Each model minus {best}, paired by image. Filled: significant; open: not. p is adjusted for every pair of models.",
            intervals_sentence([d.interval for d in order]),
            outside,
            left_out,
        )
    return figure


def plot_pairs(names: Sequence[str], differences: Sequence[Difference], metric: str = "Dice", narrow: bool = False) -> Figure:
    """Every pair: the row's model minus the column's. Blue where the row's is significantly better, orange where worse, else empty.

    ``names``: the models to show, best first.
    """
    names, left_out = first_that_fit(names, MOST_PAIRED_NARROW if narrow else MOST_PAIRED)
    place = {name: k for k, name in enumerate(names)}
    num = len(names)
    with matplotlib.rc_context(STYLE):
        width = NARROW_IN if narrow else min(WIDTH_IN, max(5.5, 3.4 + 0.5 * num))
        figure, axes = subplots(figsize=(width, 0.32 * num + 0.8), layout="constrained")
        for d in differences:
            if d.a not in place or d.b not in place:
                continue
            for row, column, value in ((place[d.a], place[d.b], d.interval.mean), (place[d.b], place[d.a], -d.interval.mean)):
                # The weight of the number repeats what the fill says, for grey.
                fill = "white" if d.better is None else LIGHT_BLUE if d.better == names[row] else LIGHT_ORANGE
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=fill, edgecolor="0.85", linewidth=0.8))
                look: dict[str, Any] = {"color": "0.35"} if d.better is None else {"weight": "bold"}
                text = f"{value:+.3f}".replace("0.", ".") if abs(value) >= 0.0005 else "0"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, **look)
        for k in range(num):
            axes.add_patch(Rectangle((k - 0.5, k - 0.5), 1, 1, facecolor="0.93", edgecolor="0.85", linewidth=0.8))
        axes.set_xlim(-0.5, num - 0.5)
        axes.set_ylim(num - 0.5, -0.5)
        numbers = [str(k + 1) for k in range(num)]
        axes.set_yticks(range(num), numbers if narrow else [f"{shorten(name, 38)}  {k}" for name, k in zip(names, numbers, strict=True)])
        axes.set_xticks(range(num), numbers)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        set_caption(
            figure,
            f"{metric} of the row's model minus the column's. Filled and bold: significant, blue where the row's is better.",
            "Numbers are places in the leaderboard." if narrow else "",
            left_out,
        )
    return figure


def plot_critical_difference(ranking: CriticalDifference, metric: str = "Dice", narrow: bool = False) -> Figure:
    """Mean ranks, one model a row, and bars beside the models whose ranks do not differ significantly (Nemenyi's test; Demsar 2006)."""
    names, ranks = list(ranking.models), list(ranking.ranks)
    cliques = [(names.index(c[0]), names.index(c[-1])) for c in ranking.cliques]
    with matplotlib.rc_context(STYLE):
        labels = [f"{shorten(name, 36)}  {rank:.2f}" for name, rank in zip(names, ranks, strict=True)] if narrow else names
        figure, axes = rows_figure(labels, narrow)
        span = max(ranks) - min(ranks) or 1.0
        for y, rank in enumerate(ranks):
            axes.plot(rank, y, "o", color=BLUE, markersize=6.5, zorder=3)
            if not narrow:
                note_at_right(axes, y, f"{rank:.2f}", narrow)
        step = 0.05 * span
        for k, (first, last) in enumerate(cliques):
            at = max(ranks) + (1.5 + k) * step
            axes.plot([at] * 2, [first - 0.2, last + 0.2], color="black", linewidth=3.5, solid_capstyle="butt")
        axes.set_xlim(min(ranks) - step, max(ranks) + (1.5 + len(cliques)) * step)
        axes.xaxis.set_major_locator(MaxNLocator(min(8, len(names)), integer=True))
        unit = "images" if ranking.num_units == ranking.num_images else "groups of images"
        axes.set_xlabel(f"mean rank by {metric}, 1 is best")
        apart = f" Ranks differ significantly from {ranking.critical_difference:.2f} on." if ranking.critical_difference is not None else ""
        bars = " Bars join models that do not differ significantly." if cliques else ""
        set_caption(figure, f"Mean rank over {ranking.num_units} {unit}.{bars}{apart}")
    return figure
