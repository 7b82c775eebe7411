"""Pictures of many runs side by side: who leads, by how much, on which images, and what it costs.

Each draws at most ``MOST`` models, the best first, and says how many it leaves out. Colours mean the same everywhere: a model of a backbone
with a head is blue, a baseline grey and hatched; shapes and fills repeat what colours say.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from cellbench.figures import PALETTE, STYLE
from cellbench.ranking import Ranking, p_words
from cellbench.significance import Interval
from cellbench.stats import Difference

MOST = 30
"""Models in one picture: as many lines as a page holds."""
BLUE, GREY = PALETTE[0], PALETTE[7]
MARKERS = "osD^vP*X<>hp"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model as it is drawn: ``measures`` by label, each the interval of its mean over images."""

    model: str
    baseline: bool
    measures: Mapping[str, Interval]
    backbone: str = ""


def scoreboard(lines: Sequence[Line], measure: str = "Dice") -> Figure:
    """Each model's mean over the test images with its 95 % interval, best on top; baselines hatched."""
    lines, left_out = _most(lines)
    means = [line.measures[measure] for line in lines]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.3 * len(lines) + 1.1), layout="constrained")
        low = min(_low(one) for one in means)
        start = max(0.0, low - 0.25 * (1 - low))
        for y, (line, one) in enumerate(zip(lines, means, strict=True)):
            axes.barh(
                y, one.mean - start, left=start, color=GREY if line.baseline else BLUE, alpha=0.75, hatch="///" if line.baseline else None,
                edgecolor="white", height=0.7,
            )  # fmt: skip
            axes.plot([_low(one), _high(one)], [y, y], color="black", linewidth=1.2)
        right = max(_high(one) for one in means)
        span = right - start or 1.0
        for y, one in enumerate(means):
            axes.text(right + 0.02 * span, y, f"{one.mean:.4f}", va="center")
        axes.set_xlim(start, right + 0.12 * span)
        _models(axes, lines)
        zero = "" if start == 0 else " (the axis does not start at 0)"
        axes.set_xlabel(f"test {measure}, mean over images{zero}")
        axes.set_title(f"line: 95 % interval over images; hatched: baselines{left_out}", fontsize=8, color="0.35")
    return figure


def measures(lines: Sequence[Line]) -> Figure:
    """Several measures side by side, one panel each, models in the same order: where Dice hardly differs, cells and outlines may."""
    lines, left_out = _most(lines)
    names = [name for name in lines[0].measures if all(name in line.measures for line in lines)]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(names), figsize=(9, 0.27 * len(lines) + 1.2), sharey=True, layout="constrained", squeeze=False)
        for axes, name in zip(panels[0], names, strict=True):
            for y, line in enumerate(lines):
                one = line.measures[name]
                axes.plot([_low(one), _high(one)], [y, y], color="0.45", linewidth=1.4, zorder=1)
                axes.plot(one.mean, y, "s" if line.baseline else "o", color=GREY if line.baseline else BLUE, markersize=4.5, zorder=2)
            best = max(line.measures[name].mean for line in lines)
            axes.axvline(best, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            axes.set_title(name, fontsize=9)
            axes.grid(axis="y", color="0.92", linewidth=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.margins(x=0.12)
            axes.tick_params(axis="y", length=0)
        _models(panels[0][0], lines)
        figure.supxlabel(f"mean over images with 95 % interval; dotted: the best; squares: baselines{left_out}", fontsize=8, color="0.35")
    return figure


def distributions(names: Sequence[str], values: Sequence[np.ndarray], measure: str = "Dice") -> Figure:
    """The scores of the single images, one box and its images a model, best mean on top."""
    names, left_out = _most(names)
    values = [np.asarray(one) for one in values[: len(names)]]
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
            axes.plot(one.mean(), y, "D", color="white", markeredgecolor="black", markersize=5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(f"{measure} of each test image")
        axes.set_title(f"dots: images; box: the middle half, its line the median; diamond: the mean{left_out}", fontsize=8, color="0.35")
        axes.grid(axis="x", color="0.92", linewidth=0.6)
    return figure


def heatmap(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, measure: str = "Dice") -> Figure:
    """Backbones (rows) by heads (columns); NaN where a pair has not been run."""
    with plt.rc_context(STYLE):
        size = (min(9.0, 2.6 + 1.15 * len(columns)), 0.36 * len(rows) + 1.3)
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        sns.heatmap(
            values, mask=np.isnan(values), annot=True, fmt=".4f", cmap="cividis", xticklabels=list(columns), yticklabels=list(rows), linewidths=1,
            cbar_kws={"label": f"test {measure}"}, annot_kws={"fontsize": 8}, ax=axes,
        )  # fmt: skip
        axes.set_facecolor("0.9")
        axes.tick_params(axis="y", rotation=0, length=0)
        axes.tick_params(axis="x", rotation=20 if len(columns) > 4 else 0, length=0)
        best = np.unravel_index(np.nanargmax(values), values.shape)
        axes.add_patch(plt.Rectangle((best[1], best[0]), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False))
        missing = "; empty: not run" if np.isnan(values).any() else ""
        axes.set_title(f"mean over images and seeds; framed: the best{missing}", fontsize=8, color="0.35")
    return figure


def forest(differences: Sequence[Difference], best: str, measure: str = "Dice") -> Figure:
    """Each model minus the best, paired by image, with its 95 % interval; filled where the difference is certain."""
    order = sorted(differences, key=lambda d: abs(d.interval.mean))
    order, left_out = _most(order)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.3 * len(order) + 1.3), layout="constrained")
        axes.axvline(0, color="black", linewidth=1)
        for y, d in enumerate(order):
            one, other = (d.interval, d.a) if d.b == best else (_negative(d.interval), d.b)
            colour = BLUE if d.decided else "0.45"
            axes.plot([_low(one), _high(one)], [y, y], color=colour, linewidth=1.6)
            axes.plot(one.mean, y, "o", color=colour, markerfacecolor=colour if d.decided else "white", markersize=6)
            said = f"{one.mean:+.4f}   {p_words(d.p_adjusted)}"
            axes.annotate(said, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False)
            axes.annotate(other, (-0.01, y), xycoords=("axes fraction", "data"), va="center", ha="right", fontsize=9, annotation_clip=False)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"difference in {measure} to {best}, paired by image")
        axes.set_title(f"filled: certain (p after Holm's correction); open: this data cannot tell{left_out}", fontsize=8, color="0.35")
    return figure


def critical(ranking: Ranking, measure: str = "Dice") -> Figure:
    """The critical-difference diagram (Demsar 2006): mean ranks on a line, bars over what Nemenyi's test does not tell apart."""
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
            told = f"{name}  {rank:.2f}" if on_left else f"{rank:.2f}  {name}"
            place = {
                "xytext": (-4 if on_left else 4, 0),
                "textcoords": "offset points",
                "ha": "right" if on_left else "left",
                "va": "center",
            }
            axes.annotate(told, (edge, y), fontsize=8, annotation_clip=False, **place)
        for k, row in enumerate(bars):
            for a, b in row:
                axes.plot([a - 0.008 * high, b + 0.008 * high], [0.15 + 0.16 * k] * 2, color="black", linewidth=4, solid_capstyle="round")
        if apart is not None and apart < high - low:
            axes.plot([low, low + apart], [-0.5, -0.5], color="black", linewidth=1.5, clip_on=False, marker="|", markersize=7)
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
            axes.annotate(f"critical difference {apart:.2f}", (low + apart, -0.5), fontsize=8, **place)
        told = f"mean rank by {measure} over {ranking.num_units} images, 1 is best; thick bars: not told apart"
        figure.text(0.5, 0.08 / height, told, fontsize=8, color="0.35", ha="center", va="bottom")
    return figure


def pareto(lines: Sequence[Line], costs: Mapping[str, Sequence[float]], measure: str = "Dice") -> Figure:
    """Score against cost, one panel a cost (its label says the unit; lower is better), the Pareto front as a line with names."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(costs), figsize=(9, 4.9), sharey=True, layout="constrained", squeeze=False)
        backbones = list(dict.fromkeys(line.backbone for line in lines if not line.baseline))
        look = {name: (PALETTE[k % len(PALETTE)], MARKERS[k % len(MARKERS)]) for k, name in enumerate(backbones[: len(MARKERS)])}
        score = np.array([line.measures[measure].mean for line in lines])
        for axes, (label, values) in zip(panels[0], costs.items(), strict=True):
            cost = np.maximum(np.asarray(values, float), 0)
            zero = bool((cost <= 0).any())
            for k, line in enumerate(lines):
                colour, marker = look.get(line.backbone, ("0.35", "x") if line.baseline else ("0.7", "."))
                axes.plot(cost[k], score[k], marker, color=colour, markersize=6.5, alpha=0.85)
            front = front_of(cost, score)
            axes.plot(cost[front], score[front], color="black", linewidth=0.9, drawstyle="steps-post", zorder=0)
            positive = cost[cost > 0]
            if len(positive) and positive.max() > 20 * positive.min():
                axes.set_xscale("symlog", linthresh=float(positive.min())) if zero else axes.set_xscale("log")
                axes.xaxis.set_major_locator(
                    SymmetricalLogLocator(base=10, linthresh=float(positive.min())) if zero else LogLocator(subs=(1, 3))
                )
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
                axes.xaxis.set_minor_locator(NullLocator())
            # Names would lie over each other where a front is steep: numbers there, names below.
            for number, k in enumerate(front, 1):
                axes.annotate(
                    str(number), (cost[k], score[k]), xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=8, weight="bold"
                )
            names = "; ".join(f"{number}\u00a0{lines[k].model}".replace(" ", "\u00a0") for number, k in enumerate(front, 1))
            axes.set_xlabel(f"{label}\n" + "\n".join(textwrap.wrap(names, 62)[:5]), linespacing=1.4)
            axes.grid(color="0.93", linewidth=0.6)
            axes.margins(x=0.12, y=0.12)
        panels[0][0].set_ylabel(f"test {measure}, mean over images")
        handles = [plt.Line2D([], [], linestyle="", marker=m, color=c, label=name) for name, (c, m) in look.items()]
        if any(line.baseline for line in lines):
            handles.append(plt.Line2D([], [], linestyle="", marker="x", color="0.35", label="baseline"))
        if len(backbones) > len(look):
            handles.append(plt.Line2D([], [], linestyle="", marker=".", color="0.7", label=f"{len(backbones) - len(look)} more backbones"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8)
        figure.suptitle("stepped line: nothing is both cheaper and better (Pareto front)", fontsize=8, color="0.35", x=0.01, ha="left")
    return figure


def speeds(facts: Mapping[str, float]) -> Figure:
    """What ``bench`` measured: seconds for the same nine runs four ways, and tiles a second through each part."""
    ways = [
        ("naive, images opened each time", "naive_reopen_s"),
        ("naive, decoded images held", "naive_held_s"),
        ("this harness, one by one", "alone_s"),
        ("one cohort, fresh views", "cohort_s"),
        ("one cohort, views = 1", "cohort_kept_s"),
    ]
    heads = [(name[5:-12], value) for name, value in facts.items() if name.startswith("head_")]
    parts = [("bare forward", facts["bare_tiles_per_s"]), ("feature pass", facts["pass_tiles_per_s"]), *heads]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3), layout="constrained")
        colours = sns.color_palette("colorblind")
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
        right.set_xlabel("tiles a second (green: a head's training step)")
        for axes in (left, right):
            axes.invert_yaxis()
    return figure


def front_of(cost: np.ndarray, score: np.ndarray) -> list[int]:
    """The numbers of the points that no other point beats in both, cheapest first."""
    front: list[int] = []
    for k in np.lexsort((-score, cost)).tolist():
        if not front or score[k] > score[front[-1]]:
            front.append(k)
    return front


def _models(axes: Axes, lines: Sequence[Line]) -> None:
    axes.set_yticks(range(len(lines)), [line.model for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)


def _most(items: Sequence) -> tuple[list, str]:
    return list(items[:MOST]), f"; {len(items) - MOST} more are not drawn" if len(items) > MOST else ""


def _low(one: Interval) -> float:
    return one.mean if one.low is None else one.low


def _high(one: Interval) -> float:
    return one.mean if one.high is None else one.high


def _negative(one: Interval) -> Interval:
    ends = (None, None) if one.low is None or one.high is None else (-one.high, -one.low)
    return Interval(mean=-one.mean, low=ends[0], high=ends[1], num=one.num, note=one.note, level=one.level)
