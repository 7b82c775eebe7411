"""Figures of the tests: each model against the best, every pair, and mean ranks with the critical difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cellbench.reporting.plots.comparison import BLUE, first_that_fit
from cellbench.reporting.plots.style import STYLE, describe_intervals, draw_span
from cellbench.reporting.verdict import format_p
from cellbench.statistics.bootstrap import negate
from cellbench.statistics.ranking import CriticalDifference
from cellbench.statistics.scores import Difference

LIGHT_BLUE, LIGHT_ORANGE = (0.62, 0.8, 0.92), (0.98, 0.82, 0.6)
MOST_PAIRED = 16
"""Models in the figure of all pairs: the numbers must be readable on a page."""


def plot_differences(differences: Sequence[Difference], best: str, metric: str = "Dice") -> Figure:
    """Each model minus the best, paired by image, with its 95 % interval; filled where the difference is significant."""
    order = sorted(differences, key=lambda d: abs(d.interval.mean))
    order, left_out = first_that_fit(order)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.3 * len(order) + 1.3), layout="constrained")
        axes.axvline(0, color="black", linewidth=1)
        for y, d in enumerate(order):
            one, other = (d.interval, d.a) if d.b == best else (negate(d.interval), d.b)
            colour = BLUE if d.significant else "0.45"
            draw_span(axes, y, one, color=colour, linewidth=1.6)
            axes.plot(one.mean, y, "o", color=colour, markerfacecolor=colour if d.significant else "white", markersize=6)
            numbers = f"{one.mean:+.4f}   {format_p(d.p_adjusted)}"
            axes.annotate(numbers, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False)
            axes.annotate(other, (-0.01, y), xycoords=("axes fraction", "data"), va="center", ha="right", fontsize=9, annotation_clip=False)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"difference in {metric} to {best}, paired by image")
        caption = describe_intervals([d.interval for d in order])
        axes.set_title(
            f"filled: significant (p adjusted for every pair); open: not significant{left_out}\n{caption}", fontsize=8, color="0.35"
        )
    return figure


def plot_pairs(names: Sequence[str], differences: Sequence[Difference], metric: str = "Dice") -> Figure:
    """Every pair: the row's model minus the column's. Blue where the row's is significantly better, orange where worse, else empty.

    ``names``: the models to show, best first; the first ``MOST_PAIRED`` are drawn.
    """
    names, rest = list(names[:MOST_PAIRED]), len(names) - MOST_PAIRED
    place = {name: k for k, name in enumerate(names)}
    num = len(names)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(min(9.0, max(5.5, 3.4 + 0.5 * num)), 0.32 * num + 1.2), layout="constrained")
        for d in differences:
            if d.a not in place or d.b not in place:
                continue
            for row, column, value in ((place[d.a], place[d.b], d.interval.mean), (place[d.b], place[d.a], -d.interval.mean)):
                # The weight of the number repeats what the fill says, for grey.
                fill = "white" if d.better is None else LIGHT_BLUE if d.better == names[row] else LIGHT_ORANGE
                axes.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=fill, edgecolor="0.85", linewidth=0.8))
                look: dict[str, Any] = {"color": "0.55"} if d.better is None else {"weight": "bold"}
                text = f"{value:+.3f}".replace("0.", ".") if abs(value) >= 0.0005 else "0"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, **look)
        for k in range(num):
            axes.add_patch(plt.Rectangle((k - 0.5, k - 0.5), 1, 1, facecolor="0.93", edgecolor="0.85", linewidth=0.8))
        axes.set_xlim(-0.5, num - 0.5)
        axes.set_ylim(num - 0.5, -0.5)
        axes.set_yticks(range(num), [f"{name}  {k + 1}" for k, name in enumerate(names)])
        axes.set_xticks(range(num), [str(k + 1) for k in range(num)])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        left_out = f"; {rest} more are not drawn" if rest > 0 else ""
        figure.supxlabel(f"{metric} of the row minus the column; bold and filled: significant{left_out}", fontsize=8, color="0.35")
    return figure


def plot_critical_difference(ranking: CriticalDifference, metric: str = "Dice") -> Figure:
    """The critical-difference diagram (Demsar 2006): mean ranks on a line, bars over models whose ranks do not differ significantly (Nemenyi's test)."""
    names, ranks = list(ranking.models), list(ranking.ranks)
    half = -(-len(names) // 2)
    cliques = [(ranks[names.index(c[0])], ranks[names.index(c[-1])]) for c in ranking.cliques]
    bars: list[list[tuple[float, float]]] = []  # rows of bars that do not meet
    for clique in cliques:
        row = next((row for row in bars if row[-1][1] < clique[0] - 0.02 * len(names)), None)
        bars.append([clique]) if row is None else row.append(clique)
    apart = ranking.critical_difference
    low, high = 1, len(names)
    line, first = 0.24, 0.3 + 0.16 * len(bars)  # inches
    above, below = 0.75, 0.4
    with plt.rc_context(STYLE):
        height = above + first + line * half + below
        figure, axes = plt.subplots(figsize=(8, height))
        figure.subplots_adjust(left=0.3, right=0.7, top=1 - above / height, bottom=below / height)
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_ylim(first + line * half, 0)
        axes.xaxis.tick_top()
        axes.xaxis.set_major_locator(MaxNLocator(min(10, len(names)), integer=True))
        axes.spines[["bottom", "left", "right"]].set_visible(False)
        axes.spines["top"].set_visible(True)
        axes.set_yticks([])
        for n, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            on_left = n < half
            y = first + line * (n if on_left else len(names) - 1 - n)
            edge = axes.get_xlim()[0 if on_left else 1]
            axes.plot([rank, rank, edge], [0, y, y], color="0.4", linewidth=0.9)
            label = f"{name}  {rank:.2f}" if on_left else f"{rank:.2f}  {name}"
            place: dict[str, Any] = {
                "xytext": (-4 if on_left else 4, 0),
                "textcoords": "offset points",
                "ha": "right" if on_left else "left",
                "va": "center",
            }
            axes.annotate(label, (edge, y), fontsize=8, annotation_clip=False, **place)
        for k, row in enumerate(bars):
            for a, b in row:
                axes.plot([a - 0.008 * high, b + 0.008 * high], [0.15 + 0.16 * k] * 2, color="black", linewidth=4, solid_capstyle="round")
        if apart is not None and apart < high - low:
            axes.plot([low, low + apart], [-0.5, -0.5], color="black", linewidth=1.5, clip_on=False, marker="|", markersize=7)
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
            axes.annotate(f"critical difference {apart:.2f}", (low + apart, -0.5), fontsize=8, **place)
        unit = "images" if ranking.num_units == ranking.num_images else "groups of images"
        caption = f"mean rank by {metric} over {ranking.num_units} {unit}, 1 is best; thick bars: no significant difference"
        figure.text(0.5, 0.08 / height, caption, fontsize=8, color="0.35", ha="center", va="bottom")
    return figure
