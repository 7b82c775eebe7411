"""Figures that compare models: scores with intervals, distributions over images, backbones by heads, costs, learning curves.

Each shows a limited number of models, the best first, and states how many it leaves out. Shapes and fills repeat the meaning of colours. Baselines
are squares. A few values far away from the rest are arrows at the edge, so that they do not squeeze the axis.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from cellbench.reporting.plot_rows import PlotRow
from cellbench.reporting.plots.style import (
    GREY_TEXT,
    NARROW_IN,
    PALETTE,
    STYLE,
    WIDTH_IN,
    axis_range,
    draw_outside,
    draw_span,
    first_that_fit,
    intervals_sentence,
    jitter,
    lower_end,
    note_at_right,
    rows_figure,
    set_caption,
    set_range,
    shorten,
    subplots,
    upper_end,
    wrap_name,
)
from cellbench.statistics.bootstrap import Interval

MOST_LEADING = 15
"""Models in the first figure."""
MOST = 30
"""Models in another figure: as many rows as a page holds."""
MOST_CURVES = 8
MOST_HEATED = 20
MOST_NUMBERED = 15
"""Points with a number in the figure of costs."""
BLUE, GREY = PALETTE[0], PALETTE[7]
BACKBONE_COLOURS = [PALETTE[k] for k in (0, 1, 2, 4, 3, 9, 5)]
HEAD_MARKERS = "o^Dv*PX"
MARKERS = "osD^vP*X"


def plot_leaderboard(lines: Sequence[PlotRow], worse: Collection[str] = (), metric: str = "Dice", narrow: bool = False) -> Figure:
    """Each model's mean over the test images with its 95 % interval, best on top. ``worse``: models significantly worse than the best, drawn open."""
    lines, left_out = first_that_fit(lines, MOST_LEADING)
    means = [line.metrics[metric] for line in lines]
    with matplotlib.rc_context(STYLE):
        figure, axes = rows_figure([line.model for line in lines], narrow)
        outside = set_range(axes, means)
        for y, (line, one) in enumerate(zip(lines, means, strict=True)):
            colour = GREY_TEXT if line.baseline else BLUE
            fill = "white" if line.model in worse else colour
            if not draw_outside(axes, y, one.mean, color=colour, markerfacecolor=fill):
                draw_span(axes, y, one, color=colour, linewidth=1.6)
                axes.plot(one.mean, y, "s" if line.baseline else "o", color=colour, markerfacecolor=fill, markersize=6.5, zorder=3)
            note_at_right(axes, y, f"{one.mean:.4f}", narrow)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"test {metric}, mean over images")
        set_caption(
            figure,
            f"Mean {metric} of each model over the test images.",
            intervals_sentence(means),
            "Open: significantly worse than the best." if any(line.model in worse for line in lines) else "",
            _squares(lines),
            outside,
            left_out,
        )
    return figure


def plot_metrics(lines: Sequence[PlotRow], narrow: bool = False) -> Figure:
    """Several metrics, one panel each, with the models in the same order."""
    lines, left_out = first_that_fit(lines, MOST)
    names = [name for name in lines[0].metrics if all(name in line.metrics for line in lines)]
    with matplotlib.rc_context(STYLE):
        num_columns = min(len(names), 2) if narrow else len(names)
        num_rows = -(-len(names) // num_columns)
        size = (NARROW_IN if narrow else WIDTH_IN, (0.24 * len(lines) + 0.7) * num_rows + 0.2)
        figure, panels = subplots(num_rows, num_columns, figsize=size, sharey=True, layout="constrained", squeeze=False)
        outside = ""
        for axes, name in zip(panels.flat, names, strict=False):
            outside = set_range(axes, [line.metrics[name] for line in lines], 0.12) or outside
            for y, line in enumerate(lines):
                one, look = line.metrics[name], {"color": GREY_TEXT if line.baseline else BLUE}
                if not draw_outside(axes, y, one.mean, **look):
                    draw_span(axes, y, one, color="0.5", linewidth=1.4, zorder=1)
                    axes.plot(one.mean, y, "s" if line.baseline else "o", markersize=4.5, zorder=2, **look)
            axes.set_title(name, fontsize=9)
            axes.grid(axis="both", color="0.93", linewidth=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(len(lines) - 0.4, -0.6)
        for axes in panels.flat[len(names) :]:
            axes.set_axis_off()
        labels = [str(k + 1) for k in range(len(lines))] if narrow else [wrap_name(line.model) for line in lines]
        for axes in panels[:, 0]:
            axes.set_yticks(range(len(lines)), labels)
            axes.tick_params(axis="y", labelsize=8.5 if narrow or all("\n" not in label for label in labels) else 7)
        set_caption(
            figure,
            "Mean over the test images.",
            "Numbers are places in the leaderboard." if narrow else "",
            intervals_sentence([lines[0].metrics[names[0]]]),
            _squares(lines),
            outside,
            left_out,
        )
    return figure


def plot_distributions(names: Sequence[str], values: Sequence[np.ndarray], metric: str = "Dice", narrow: bool = False) -> Figure:
    """The per-image scores of each model: the images as dots over a box of the middle half, the best mean on top."""
    names, left_out = first_that_fit(names, MOST)
    values = [np.asarray(one)[~np.isnan(one)] for one in values[: len(names)]]  # images without any cell have no score
    every = np.concatenate([*values, []])
    with matplotlib.rc_context(STYLE):
        figure, axes = rows_figure(names, narrow)
        if len(every):
            low, high = np.quantile(every, [0.1, 0.9])
            kept = every[np.abs(every - (low + high) / 2) <= 2.5 * (high - low)]
            pad = 0.04 * (kept.max() - kept.min()) or 0.01
            axes.set_xlim(kept.min() - pad, kept.max() + pad)
        num_outside = 0
        for y, one in enumerate(values):
            if len(one) >= 5:
                axes.boxplot(
                    one, positions=[y], orientation="horizontal", widths=0.34 if narrow else 0.5, showfliers=False, manage_ticks=False, patch_artist=True,
                    boxprops={"facecolor": (*BLUE, 0.22), "edgecolor": "0.4"}, medianprops={"color": "0.4", "linewidth": 1.2},
                    whiskerprops={"color": "0.5"}, capprops={"color": "0.5"},
                )  # fmt: skip
            if len(one) > 1:
                reach = 0.22 if narrow else 0.34
                axes.plot([one.mean()] * 2, [y - reach, y + reach], color="black", linewidth=2.2, solid_capstyle="butt")
            few = len(one) < 50
            shifts = jitter(len(one), 0.12 if narrow else 0.16)
            axes.plot(one, y + shifts, ".", color=BLUE, alpha=0.85 if few else 0.4, markersize=6.5 if few else 3.5, zorder=3)
            num_outside += sum(draw_outside(axes, y + shift, value, color=BLUE) for value, shift in zip(one, shifts, strict=True))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{metric} of each test image")
        set_caption(
            figure,
            f"Dots: {metric} of each test image. Black line: their mean.",
            "Box: the middle half, with its median." if any(len(one) >= 5 for one in values) else "",
            f"Arrows: {num_outside} scores outside the range of the axis." if num_outside else "",
            left_out,
        )
    return figure


def plot_heatmap(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, metric: str = "Dice", narrow: bool = False) -> Figure:
    """Heat map of backbones (rows) by heads (columns); NaN: the pair was not run."""
    import seaborn as sns  # a second, with pandas: no other figure of a report needs it

    rows, left_out = first_that_fit(rows, MOST_HEATED)
    values = values[: len(rows)]
    start, stop = axis_range([(one, one, one) for one in values[~np.isnan(values)].tolist()])
    with matplotlib.rc_context(STYLE):
        width = NARROW_IN if narrow else min(WIDTH_IN, 2.6 + 1.15 * len(columns))
        digits = 2 if width / (len(columns) + 2) < 0.75 else 4
        figure, axes = subplots(figsize=(width, 0.36 * len(rows) + 1.3), layout="constrained")
        sns.heatmap(
            values, mask=np.isnan(values), vmin=start, vmax=stop, cmap="cividis", linewidths=1, annot=True, fmt=f".{digits}f",
            annot_kws={"fontsize": 8}, cbar=not narrow, cbar_kws=None if narrow else {"label": f"test {metric}"}, ax=axes,
        )  # fmt: skip
        axes.set_facecolor("0.9")
        axes.set_yticks(np.arange(len(rows)) + 0.5, [shorten(name, 16 if narrow else 30) for name in rows], rotation=0)
        slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if narrow or len(columns) > 4 else {}
        axes.set_xticks(np.arange(len(columns)) + 0.5, [shorten(name, 22) for name in columns], **slanted)
        axes.tick_params(length=0)
        row, column = divmod(int(np.nanargmax(values)), values.shape[1])
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False))
        missing = "Empty: not run." if np.isnan(values).any() else ""
        set_caption(figure, f"Mean {metric} over images and seeds, backbones by heads. Framed: the best.", missing, left_out)
    return figure


def plot_pareto(lines: Sequence[PlotRow], costs: Mapping[str, Sequence[float]], metric: str = "Dice", narrow: bool = False) -> Figure:
    """Score against cost, one panel per cost (lower is better): a colour for each backbone, a shape for each head, the Pareto front as a line."""
    with matplotlib.rc_context(STYLE):
        shape = (len(costs), 1) if narrow else (1, len(costs))
        size = (NARROW_IN, 3.1 * len(costs) + 1.3) if narrow else (WIDTH_IN, 4.7)
        figure, panels = subplots(*shape, figsize=size, sharey=True, layout="constrained", squeeze=False)
        colours, markers = _looks(lines)
        score = np.array([line.metrics[metric].mean for line in lines])
        low, high = axis_range([(one, one, one) for one in score.tolist()])
        pad = 0.1 * (high - low) or 0.01
        outside = score < low
        fronts = set()
        for axes, (label, values) in zip(panels.flat, costs.items(), strict=True):
            cost = np.maximum(np.asarray(values, float), 0)
            front = pareto_front(cost, score)
            fronts |= set(front)
            axes.plot(cost[front], score[front], color="0.55", linewidth=0.9, drawstyle="steps-post", zorder=0)
            for k, line in enumerate(lines):
                y = low - 0.6 * pad if outside[k] else score[k]
                marker, colour = markers.get(line.head, "."), colours.get(line.backbone, "0.6")
                if line.baseline:
                    marker, colour = "s", "0.25"
                # Marks lie on each other where costs and scores are equal: a thin fill and a full outline show both.
                fill, edge = [(*to_rgb(colour), 0.35)], [to_rgb(colour)]
                axes.scatter(cost[k], y, 52, marker=marker, facecolors=fill, edgecolors=edge, linewidths=1.4, zorder=3)
                if outside[k]:
                    note = f"↓ {shorten(line.model, 18)} {score[k]:.2f}"
                    axes.annotate(note, (cost[k], y), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=7.5)
            axes.set_ylim(low - (2.4 if outside.any() else 1) * pad, high + pad)
            _cost_axis(axes, cost)
            _number_points(axes, cost, np.where(outside, np.nan, score), front if len(lines) > MOST_NUMBERED else range(len(lines)))
            axes.set_xlabel(label)
            axes.grid(color="0.93", linewidth=0.6)
            axes.set_axisbelow(True)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"test {metric}, mean over images")
        handles = _cost_legend(lines, colours, markers)
        longest = max(len(str(handle.get_label())) for handle in handles)
        ncols = max(1, min(5, (55 if narrow else 135) // (longest + 7)))
        figure.legend(handles=handles, loc="outside lower left", ncols=ncols, fontsize=8)
        shown = sorted(fronts) if len(lines) > MOST_NUMBERED else range(len(lines))
        set_caption(
            figure,
            "Up and to the left is better. Line: nothing is both cheaper and better (Pareto front). Numbers are places in the leaderboard: "
            + "; ".join(f"{k + 1} {lines[k].model}" for k in shown)
            + ".",
            "Arrows: below the range of the axis." if outside.any() else "",
        )
    return figure


def _squares(lines: Sequence[PlotRow]) -> str:
    kinds = {"masks of other tools" if line.external else "baselines" for line in lines if line.baseline}
    return f"Squares: {' and '.join(sorted(kinds))}." if kinds else ""


def _looks(lines: Sequence[PlotRow]) -> tuple[dict[str, tuple[float, float, float]], dict[str, str]]:
    """Colours of backbones and marks of heads, as far as there are enough that can be distinguished."""
    trained = [line for line in lines if not line.baseline]
    backbones, heads = (list(dict.fromkeys(getattr(line, part) for line in trained)) for part in ("backbone", "head"))
    return dict(zip(backbones, BACKBONE_COLOURS, strict=False)), dict(zip(heads, HEAD_MARKERS, strict=False))


def _cost_legend(lines: Sequence[PlotRow], colours: Mapping[str, tuple[float, float, float]], markers: Mapping[str, str]) -> list[Line2D]:
    def mark(marker: str, colour: str | tuple[float, float, float], label: str) -> Line2D:
        fill = "none" if colour == "0.25" else colour
        return Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=fill, label=label)

    trained = [line for line in lines if not line.baseline]
    handles = [mark("o", colour, f"backbone {shorten(name, 24)}") for name, colour in colours.items()]
    if more := len({line.backbone for line in trained}) - len(colours):
        handles.append(mark("o", "0.6", f"{more} more backbones"))
    handles += [mark(marker, "0.25", f"head {shorten(name, 24)}") for name, marker in markers.items()]
    if more := len({line.head for line in trained}) - len(markers):
        handles.append(mark(".", "0.25", f"{more} more heads"))
    return [*handles, *([mark("s", "0.25", "baseline")] if len(trained) < len(lines) else [])]


def _cost_axis(axes: Axes, cost: np.ndarray) -> None:
    """Logarithmic where costs differ by more than a factor of 20."""
    positive = cost[cost > 0]
    if not len(positive) or positive.max() <= 20 * positive.min():
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    zero = bool((cost <= 0).any())
    least = float(positive.min())
    axes.set_xscale("symlog", linthresh=least) if zero else axes.set_xscale("log")
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=least) if zero else LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12)


def _number_points(axes: Axes, cost: np.ndarray, score: np.ndarray, shown: Sequence[int]) -> None:
    """Writes the place of each point beside it, in the direction where no other point or number is near."""
    axes.get_xlim()  # settles the scale
    to_px, px = axes.transData.transform, STYLE["figure.dpi"] / 72
    taken = [tuple(point) for point in to_px(np.column_stack([cost, np.nan_to_num(score, nan=score[~np.isnan(score)].min())]))]
    for k in shown:
        if np.isnan(score[k]):
            continue
        here = np.array(to_px((cost[k], score[k])))
        offsets = np.array([(-11, 7), (11, 7), (11, -8), (-11, -8), (0, 13), (0, -14), (-16, 0), (16, 0)])
        room = [min(np.hypot(*(here + px * offset - other)) for other in taken) for offset in offsets]
        best = offsets[int(np.argmax(np.minimum(room, 9 * px)))]
        taken.append(tuple(here + px * best))
        axes.annotate(str(k + 1), (cost[k], score[k]), xytext=best, textcoords="offset points", ha="center", va="center", fontsize=8)


def plot_learning_curves(
    names: Sequence[str], curves: Sequence[Sequence[tuple[float, Interval]]], label: str, metric: str = "Dice", narrow: bool = False
) -> Figure:
    """Score by the number (or share) of training images, one line a model with its 95 % intervals; the axis is logarithmic."""
    names, left_out = first_that_fit(names, MOST_CURVES)
    curves = curves[: len(names)]
    with matplotlib.rc_context(STYLE):
        size = (NARROW_IN, 3.2 + 0.2 * len(names)) if narrow else (WIDTH_IN, 4 + 0.1 * len(names))
        figure, axes = subplots(figsize=size, layout="constrained")
        for k, (name, points) in enumerate(zip(names, curves, strict=True)):
            # Side by side, or intervals hide each other.
            x = np.array([one for one, _ in points], float) * 1.02 ** (k - (len(names) - 1) / 2)
            mean = np.array([interval.mean for _, interval in points])
            some = all(interval.low is not None for _, interval in points)
            ends = [[i.mean - lower_end(i), upper_end(i) - i.mean] for _, i in points]
            axes.errorbar(
                x, mean, np.array(ends).T if some else None, color=PALETTE[k % len(PALETTE)], marker=MARKERS[k % len(MARKERS)],
                linestyle=("-", "--", ":", "-.")[k % 4], markersize=5.5, linewidth=1.4, elinewidth=0.9, capsize=2.5,
                label=shorten(name, 46 if narrow else 60),
            )  # fmt: skip
        axes.set_xscale("log")
        ticks = sorted({one for points in curves for one, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label)
        axes.set_ylabel(f"test {metric}, mean over images")
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        figure.legend(loc="outside lower left", ncols=1 if narrow else 2, fontsize=8)
        bars = intervals_sentence([interval for points in curves for _, interval in points], "bars").replace("Dashed bars", "Bars")
        set_caption(figure, f"Mean {metric} over the test images by the number of training images.", bars, left_out)
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
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = subplots(1, 2, figsize=(9.5, 3), layout="constrained")
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
