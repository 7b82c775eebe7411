"""Figures that compare models: scores with intervals, distributions over images, backbones by heads, costs, learning curves.

Each shows at most ``MOST`` models, the best first, and states how many it leaves out. Models with a backbone and a head are blue, baselines are
grey and hatched. Shapes and fills repeat the meaning of colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TypeVar

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from cellbench.reporting.model_groups import PlotRow
from cellbench.reporting.plots.style import PALETTE, STYLE, describe_intervals, draw_span
from cellbench.statistics.bootstrap import Interval

T = TypeVar("T")
MOST = 30
"""Models in one figure: as many rows as a page holds."""
BLUE, GREY = PALETTE[0], PALETTE[7]
MARKERS = "osD^vP*X<>hp"


def plot_leaderboard(lines: Sequence[PlotRow], metric: str = "Dice") -> Figure:
    """Each model's mean over the test images with its 95 % interval, best on top; baselines hatched."""
    lines, left_out = first_that_fit(lines)
    means = [line.metrics[metric] for line in lines]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.3 * len(lines) + 1.1), layout="constrained")
        low = min(lower_end(one) for one in means)
        start = max(0.0, low - 0.25 * (1 - low))
        for y, (line, one) in enumerate(zip(lines, means, strict=True)):
            axes.barh(
                y, one.mean - start, left=start, color=GREY if line.baseline else BLUE, alpha=0.75, hatch="///" if line.baseline else None,
                edgecolor="white", height=0.7,
            )  # fmt: skip
            draw_span(axes, y, one, color="black", linewidth=1.2)
        right = max(upper_end(one) for one in means)
        span = right - start or 1.0
        for y, one in enumerate(means):
            axes.text(right + 0.02 * span, y, f"{one.mean:.4f}", va="center")
        axes.set_xlim(start, right + 0.12 * span)
        _model_axis(axes, lines)
        zero = "" if start == 0 else " (the axis does not start at 0)"
        axes.set_xlabel(f"test {metric}, mean over images{zero}")
        axes.set_title(f"{describe_intervals(means)}; hatched: baselines{left_out}", fontsize=8, color="0.35")
    return figure


def plot_metrics(lines: Sequence[PlotRow]) -> Figure:
    """Several metrics, one panel each, with the models in the same order."""
    lines, left_out = first_that_fit(lines)
    names = [name for name in lines[0].metrics if all(name in line.metrics for line in lines)]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(names), figsize=(9, 0.27 * len(lines) + 1.2), sharey=True, layout="constrained", squeeze=False)
        for axes, name in zip(panels[0], names, strict=True):
            for y, line in enumerate(lines):
                one = line.metrics[name]
                draw_span(axes, y, one, color="0.45", linewidth=1.4, zorder=1)
                axes.plot(one.mean, y, "s" if line.baseline else "o", color=GREY if line.baseline else BLUE, markersize=4.5, zorder=2)
            best = max(line.metrics[name].mean for line in lines)
            axes.axvline(best, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            axes.set_title(name, fontsize=9)
            axes.grid(axis="y", color="0.92", linewidth=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.margins(x=0.12)
            axes.tick_params(axis="y", length=0)
        _model_axis(panels[0][0], lines)
        caption = describe_intervals([lines[0].metrics[names[0]]])
        figure.supxlabel(f"mean over images; {caption}; dotted: the best; squares: baselines{left_out}", fontsize=8, color="0.35")
    return figure


def plot_distributions(names: Sequence[str], values: Sequence[np.ndarray], metric: str = "Dice") -> Figure:
    """Box plot of the per-image scores of each model, with the images as dots, the best mean on top."""
    names, left_out = first_that_fit(names)
    values = [np.asarray(one)[~np.isnan(one)] for one in values[: len(names)]]  # images without any cell have no score
    rng = np.random.default_rng(0)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.34 * len(names) + 1.2), layout="constrained")
        for y, one in enumerate(values):
            if len(one) >= 5:
                axes.boxplot(
                    one, positions=[y], orientation="horizontal", widths=0.55, showfliers=False, manage_ticks=False, patch_artist=True,
                    boxprops={"facecolor": (*BLUE, 0.25), "edgecolor": "0.3"}, medianprops={"color": "black", "linewidth": 1.6},
                    whiskerprops={"color": "0.4"}, capprops={"color": "0.4"},
                )  # fmt: skip
            spread = rng.uniform(-0.16, 0.16, len(one)) if len(one) > 3 else np.zeros(len(one))
            axes.plot(one, y + spread, ".", color=BLUE, alpha=0.8 if len(one) < 50 else 0.35, markersize=6 if len(one) < 50 else 3.5)
            if len(one):
                axes.plot(one.mean(), y, "D", color="white", markeredgecolor="black", markersize=5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(f"{metric} of each test image")
        axes.set_title(f"dots: images; box: the middle half, its line the median; diamond: the mean{left_out}", fontsize=8, color="0.35")
        axes.grid(axis="x", color="0.92", linewidth=0.6)
    return figure


def plot_heatmap(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, metric: str = "Dice") -> Figure:
    """Heat map of backbones (rows) by heads (columns); NaN: the pair was not run."""
    with plt.rc_context(STYLE):
        size = (min(9.0, 2.6 + 1.15 * len(columns)), 0.36 * len(rows) + 1.3)
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        cells = axes.pcolormesh(np.ma.masked_invalid(values), cmap="cividis", edgecolors="white", linewidth=1)
        figure.colorbar(cells, ax=axes, label=f"test {metric}").outline.set_visible(False)  # type: ignore[operator]
        axes.set_facecolor("0.9")
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=20 if len(columns) > 4 else 0)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if cells.norm(value) < 0.5 else "black"
                axes.text(x + 0.5, y + 0.5, f"{value:.4f}", ha="center", va="center", fontsize=8, color=colour)
        row, column = divmod(int(np.nanargmax(values)), values.shape[1])
        axes.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False))
        missing = "; empty: not run" if np.isnan(values).any() else ""
        axes.set_title(f"mean over images and seeds; framed: the best{missing}", fontsize=8, color="0.35")
    return figure


def plot_pareto(lines: Sequence[PlotRow], costs: Mapping[str, Sequence[float]], metric: str = "Dice") -> Figure:
    """Score against cost, one panel per cost (lower is better), with the Pareto front as a line with names."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(costs), figsize=(9, 4.9), sharey=True, layout="constrained", squeeze=False)
        backbones = list(dict.fromkeys(line.backbone for line in lines if not line.baseline))
        look = {name: (PALETTE[k % len(PALETTE)], MARKERS[k % len(MARKERS)]) for k, name in enumerate(backbones[: len(MARKERS)])}
        score = np.array([line.metrics[metric].mean for line in lines])
        for axes, (label, values) in zip(panels[0], costs.items(), strict=True):
            cost = np.maximum(np.asarray(values, float), 0)
            zero = bool((cost <= 0).any())
            for k, line in enumerate(lines):
                colour, marker = look.get(line.backbone, ("0.35", "x") if line.baseline else ("0.7", "."))
                axes.plot(cost[k], score[k], marker, color=colour, markersize=6.5, alpha=0.85)
            front = pareto_front(cost, score)
            axes.plot(cost[front], score[front], color="black", linewidth=0.9, drawstyle="steps-post", zorder=0)
            positive = cost[cost > 0]
            if len(positive) and positive.max() > 20 * positive.min():
                axes.set_xscale("symlog", linthresh=float(positive.min())) if zero else axes.set_xscale("log")
                axes.xaxis.set_major_locator(
                    SymmetricalLogLocator(base=10, linthresh=float(positive.min())) if zero else LogLocator(subs=(1, 3))
                )
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
                axes.xaxis.set_minor_locator(NullLocator())
            # Names would overlap where the front is steep, so points get numbers and the names are listed below.
            for number, k in enumerate(front, 1):
                axes.annotate(
                    str(number), (cost[k], score[k]), xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=8, weight="bold"
                )
            names = "; ".join(f"{number}\u00a0{lines[k].model}".replace(" ", "\u00a0") for number, k in enumerate(front, 1))
            axes.set_xlabel(f"{label}\n" + "\n".join(textwrap.wrap(names, 62)[:5]), linespacing=1.4)
            axes.grid(color="0.93", linewidth=0.6)
            axes.margins(x=0.12, y=0.12)
        panels[0][0].set_ylabel(f"test {metric}, mean over images")
        handles = [plt.Line2D([], [], linestyle="", marker=m, color=c, label=name) for name, (c, m) in look.items()]
        if any(line.baseline for line in lines):
            handles.append(plt.Line2D([], [], linestyle="", marker="x", color="0.35", label="baseline"))
        if len(backbones) > len(look):
            handles.append(plt.Line2D([], [], linestyle="", marker=".", color="0.7", label=f"{len(backbones) - len(look)} more backbones"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8)
        figure.suptitle("stepped line: nothing is both cheaper and better (Pareto front)", fontsize=8, color="0.35", x=0.01, ha="left")
    return figure


def plot_learning_curves(
    names: Sequence[str], curves: Sequence[Sequence[tuple[float, Interval]]], label: str, metric: str = "Dice"
) -> Figure:
    """Score by the number (or share) of training images, one line a model with its 95 % intervals; the axis is logarithmic."""
    names, left_out = first_that_fit(names)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        for k, (name, points) in enumerate(zip(names, curves, strict=False)):
            x = np.array([one for one, _ in points], float) * 1.015 ** (
                k - (len(names) - 1) / 2
            )  # side by side, or intervals hide each other
            mean = np.array([interval.mean for _, interval in points])
            some = all(interval.low is not None for _, interval in points)
            ends = (
                np.array([[interval.mean - lower_end(interval), upper_end(interval) - interval.mean] for _, interval in points]).T
                if some
                else None
            )
            axes.errorbar(
                x, mean, ends, color=PALETTE[k % len(PALETTE)], marker=MARKERS[k % len(MARKERS)], linestyle=("-", "--", ":", "-.")[k % 4],
                markersize=5.5, linewidth=1.4, elinewidth=0.9, capsize=2.5, label=name,
            )  # fmt: skip
        axes.set_xscale("log")
        ticks = sorted({one for points in curves for one, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label)
        axes.set_ylabel(f"test {metric}, mean over images")
        caption = describe_intervals([interval for points in curves for _, interval in points], "bars").replace("dashed bars", "bars")
        axes.set_title(f"{caption}{left_out}", fontsize=8, color="0.35")
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def plot_speeds(facts: Mapping[str, float]) -> Figure:
    """Results of ``bench``: seconds for the same nine runs in five ways, and tiles per second of each part."""
    ways = [
        ("naive, images opened each time", "naive_reopen_s"),
        ("naive, decoded images held", "naive_held_s"),
        ("this harness, one by one", "alone_s"),
        ("one cohort, fresh views", "cohort_s"),
        ("one cohort, repeat_views_every = 1", "cohort_kept_s"),
    ]
    heads = [(name[5:-12], value) for name, value in facts.items() if name.startswith("head_")]
    parts = [("bare forward", facts["bare_tiles_per_s"]), ("feature pass", facts["pass_tiles_per_s"]), *heads]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3), layout="constrained")
        colours = PALETTE
        seconds = [facts[key] for _, key in ways]
        left.barh(range(len(ways)), seconds, color=[colours[7]] * 3 + [colours[0]] * 2)
        for y, value in enumerate(seconds):
            left.text(value, y, f" {value:,.0f} s, {max(seconds) / value:.1f} x", va="center")
        left.set_yticks(range(len(ways)), [name for name, _ in ways])
        left.set_xlim(0, max(seconds) * 1.3)
        left.set_xlabel("seconds for nine runs")
        right.barh(range(len(parts)), [value for _, value in parts], color=[colours[0]] * 2 + [colours[2]] * len(heads))
        for y, (_, value) in enumerate(parts):
            right.text(value, y, f" {value:,.0f}", va="center")
        right.set_yticks(range(len(parts)), [name for name, _ in parts])
        right.set_xlim(0, max(value for _, value in parts) * 1.2)
        right.set_xlabel("tiles per second (green: a head's training step)")
        for axes in (left, right):
            axes.invert_yaxis()
    return figure


def pareto_front(cost: np.ndarray, score: np.ndarray) -> list[int]:
    """Indices of the Pareto-optimal points, cheapest first."""
    front: list[int] = []
    for k in np.lexsort((-score, cost)).tolist():
        if not front or score[k] > score[front[-1]]:
            front.append(k)
    return front


def _model_axis(axes: Axes, lines: Sequence[PlotRow]) -> None:
    axes.set_yticks(range(len(lines)), [line.model for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)


def first_that_fit(items: Sequence[T]) -> tuple[list[T], str]:
    """The items that fit in one figure, and a note on the rest."""
    return list(items[:MOST]), f"; {len(items) - MOST} more are not drawn" if len(items) > MOST else ""


def lower_end(one: Interval) -> float:
    """The lower end, or the mean if there is no interval."""
    return one.mean if one.low is None else one.low


def upper_end(one: Interval) -> float:
    """The upper end, or the mean if there is no interval."""
    return one.mean if one.high is None else one.high
