"""Plots of a search, and the table of its trials.

Every trial is in view: what lies far from the others is an arrow at the edge. Completed, pruned and failed trials have different marks.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cellbench.config.search_space import Dimension, Space
from cellbench.escaping import to_csv
from cellbench.reporting.plots.style import PALETTE, STYLE, subplots, to_png
from cellbench.search.study import CompletedTrial, Study

MARKS = {"complete": "o", "over a bound": "s", "pruned": "x", "failed": "|"}
COLOURS: dict[str, Any] = {"complete": PALETTE[0], "over a bound": PALETTE[1], "pruned": "0.55", "failed": PALETTE[3]}
LATER = matplotlib.colormaps["cividis_r"]
"""Colour map over the number of a trial: the darker, the later."""


def write_trials(folder: Path, study: Study, space: Space) -> None:
    """Writes ``trials.csv`` and ``figures/*.png``."""
    (folder / "trials.csv").write_text(trials_table(study.trials(), space), encoding="utf-8")
    (folder / "figures").mkdir()
    for title, data in plot_study(study, space):
        (folder / "figures" / f"{title}.png").write_bytes(data)


def _signed(k: int, sign: int, trial: optuna.trial.FrozenTrial) -> float:
    return sign * float(trial.values[k])


def plot_study(study: Study, space: Space) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each plot that the completed trials allow."""
    trials = [t for t in study.trials() if t.state != "running"]
    done = [t for t in trials if t.state == "complete"]
    if len(done) < 2:
        return
    names = list(space.settings.objectives)
    varied = [one for one in space.dimensions if len(one.choices) != 1]
    best = {t.number for t in study.best()}
    curves = {t.number: t.intermediate_values for t in study.optuna.get_trials(deepcopy=False)}
    for k, (name, direction) in enumerate(zip(names, space.directions, strict=True)):
        mark = "" if len(names) == 1 else f"-{name.replace('/', '-')}"
        points = [_point(t, k, name, study, curves[t.number]) for t in trials]
        shown = _Shown(name=name, higher=direction == "maximize", points=points, best=best)
        yield f"history{mark}", _png(partial(_history, shown, steps=len(names) == 1))
        yield f"slice{mark}", _png(partial(_slices, shown, varied))
        yield f"parallel{mark}", _png(partial(_parallel, shown, [one for one in varied if not one.head]))
        if len(done) >= 4 and len({t.values[k] for t in done}) > 1:
            sign = -1 if direction == "maximize" else 1  # Optuna's evaluator asks which settings make a target low
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = optuna.importance.get_param_importances(study.optuna, target=partial(_signed, k, sign))
            yield f"importance{mark}", _png(partial(_importances, found, name))
    if space.settings.pruner != "none":
        yield "curves", _png(lambda: _curves(trials, curves, names[0], best, space.directions[0] == "maximize"))
    if len(names) > 1:
        yield "pareto", _png(lambda: _pareto(done, names, space.directions, best))


@dataclass(frozen=True, kw_only=True)
class _Point:
    trial: CompletedTrial
    kind: str
    """A key of ``MARKS``."""
    value: float
    """The objective; of a pruned trial the last reported one, nan of a failed one."""


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """The trials by one objective."""

    name: str
    higher: bool
    """Whether higher values are better."""
    points: Sequence[_Point]
    best: set[int]

    @property
    def span(self) -> tuple[float, float]:
        return view_span([p.value for p in self.points], self.higher)

    @property
    def label(self) -> str:
        return _label(self.name, self.higher)


def _label(name: str, higher: bool) -> str:
    return f"{name} ({'higher' if higher else 'lower'} is better)"


def _point(t: CompletedTrial, k: int, name: str, study: Study, curve: dict[int, float]) -> _Point:
    kind, value = t.state, math.nan
    if t.state == "complete":
        value = t.values[k]
        kind = kind if study.settings.within_bounds(t.metrics) else "over a bound"
    elif t.state == "pruned":
        value = t.metrics.get(name, curve[max(curve)] if curve else math.nan)
    return _Point(trial=t, kind=kind, value=value)


def view_span(values: Sequence[float], higher_is_better: bool) -> tuple[float, float]:
    """The ends of an axis: all values, but those that are worse than the rest by three times the spread of its middle half.

    >>> view_span([0.90, 0.91, 0.92, 0.93, 0.10], True)[0] > 0.8
    True
    """
    known = np.array([value for value in values if math.isfinite(value)])
    if not known.size:
        return 0.0, 1.0
    middle_low, middle_high = np.quantile(known, [0.25, 0.75])
    reach = 3 * max(middle_high - middle_low, 0.02 * abs(middle_high), 1e-9)
    inside = known[known >= middle_low - reach] if higher_is_better else known[known <= middle_high + reach]
    low, high = inside.min(), inside.max()
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return float(low - margin), float(high + margin)


def _draw(axes: Axes, x: Sequence[float], points: Sequence[_Point], shown: _Shown, by_number: bool = False) -> None:
    """One mark a trial; the best are ringed, values outside the axis are arrows at its edge, failed trials ticks at the worse edge."""
    low, high = shown.span
    size = float(np.clip(2000 / max(len(points), 1), 9, 34))
    last = max((p.trial.number for p in shown.points), default=1)
    worse = low if shown.higher else high
    for at, p in zip(x, points, strict=True):
        colour = LATER(0.15 + 0.85 * p.trial.number / max(last, 1)) if by_number and p.kind == "complete" else COLOURS[p.kind]
        mark, y = MARKS[p.kind], p.value
        if math.isnan(y):
            mark, y = MARKS["failed"], worse
        elif not low <= y <= high:
            mark, y = ("v", low) if y < low else ("^", high)
        hollow: dict[str, Any] = {"facecolors": "none"} if p.kind == "over a bound" else {}
        axes.scatter([at], [y], s=size, marker=mark, color=colour, linewidths=1.1, clip_on=False, zorder=3, **hollow)
        if p.trial.number in shown.best:
            axes.scatter([at], [y], s=size + 60, marker="o", facecolors="none", edgecolors="black", linewidths=1.3, zorder=4, clip_on=False)
    axes.set_ylim(low, high)


def _legend(figure: Figure, points: Sequence[_Point], span: tuple[float, float], best: str = "best") -> None:
    kinds = [kind for kind in MARKS if any(p.kind == kind for p in points)]
    handles = [
        Line2D([], [], linestyle="", marker=MARKS[kind], color=COLOURS[kind], label=kind, markerfacecolor="none" if kind == "over a bound" else None)
        for kind in kinds
    ]  # fmt: skip
    handles.append(Line2D([], [], linestyle="", marker="o", color="black", markerfacecolor="none", markersize=9, label=best))
    if any(math.isfinite(p.value) and not span[0] <= p.value <= span[1] for p in points):
        handles.append(
            Line2D([], [], linestyle="", marker="v" if span[0] > min(_finite(points)) else "^", color="0.3", label="beyond the axis")
        )
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)


def _finite(points: Sequence[_Point]) -> list[float]:
    return [p.value for p in points if math.isfinite(p.value)]


def _history(shown: _Shown, *, steps: bool) -> Figure:
    figure, axes = subplots(figsize=(7.5, 3.8), layout="constrained")
    _draw(axes, [p.trial.number for p in shown.points], shown.points, shown)
    within = [p for p in shown.points if p.kind == "complete"]
    if steps and within:
        best = list(itertools.accumulate((p.value for p in within), max if shown.higher else min))
        numbers = [p.trial.number for p in within]
        axes.step([*numbers, shown.points[-1].trial.number], [*best, best[-1]], where="post", color="black", linewidth=1.2, zorder=2)
    axes.set(xlabel="trial" + (" (line: the best so far)" if steps else ""), ylabel=shown.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, shown.points, shown.span, "best" if steps else "Pareto front")
    return figure


def _slices(shown: _Shown, dimensions: Sequence[Dimension]) -> Figure:
    columns = min(4, len(dimensions))
    rows = -(-len(dimensions) // columns)
    figure, panels = subplots(
        rows, columns, figsize=(2.9 * columns + 0.6, 3.1 * rows + 0.3), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, one in itertools.zip_longest(panels.flat, dimensions):
        if one is None:
            axes.set_axis_off()
            continue
        points = [p for p in shown.points if one.name in p.trial.point]
        places = _places(one, [p.trial.point[one.name] for p in points])
        if one.choices:  # side by side, in the order of the trials
            places = [at + 0.5 * ((p.trial.number * 0.618) % 1 - 0.5) for at, p in zip(places, points, strict=True)]
            axes.set_xticks(
                range(len(one.choices)),
                [str(choice) for choice in one.choices],
                rotation=30,
                ha="right",
                rotation_mode="anchor",
                fontsize=8,
            )
            axes.set_xlim(-0.5, len(one.choices) - 0.5)
        elif one.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlim(one.low / 1.15, one.high * 1.15)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=one.whole))
            axes.margins(x=0.06)
        _draw(axes, places, points, shown, by_number=True)
        axes.set_title(one.name)
    for line in panels:
        line[0].set_ylabel(shown.label, fontsize=8)
    _legend(figure, shown.points, shown.span, f"best; the darker, the later of {len(shown.points)} trials")
    return figure


def _places(one: Dimension, values: Sequence[object]) -> list[float]:
    """Settings as numbers: choices by their position."""
    return [float(one.choices.index(value)) if one.choices else float(value) for value in values]  # type: ignore[arg-type]


def _parallel(shown: _Shown, dimensions: Sequence[Dimension]) -> Figure:
    """A line a completed trial over all settings; the better the darker, and the best black and on top."""
    figure, axes = subplots(figsize=(max(6.0, 1.7 * len(dimensions)), 4.2), layout="constrained")
    low, high = shown.span
    points = sorted((p for p in shown.points if p.kind == "complete"), key=lambda p: p.value if shown.higher else -p.value)
    heights = {one.name: _share(one) for one in dimensions}
    for p in points:
        goodness = float(np.clip((p.value - low) / (high - low), 0, 1))
        goodness = goodness if shown.higher else 1 - goodness
        ys = [heights[one.name](p.trial.point[one.name]) for one in dimensions]
        is_best = p.trial.number in shown.best
        colour = "black" if is_best else LATER(goodness)
        axes.plot(range(len(ys)), ys, color=colour, linewidth=2.2 if is_best else 0.9, alpha=1 if is_best else 0.35 + 0.5 * goodness)
    for k, one in enumerate(dimensions):
        axes.axvline(k, color="0.75", linewidth=0.8, zorder=0)
        ticks = [(heights[one.name](choice), str(choice)) for choice in one.choices] or [(0.0, f"{one.low:g}"), (1.0, f"{one.high:g}")]
        for y, text in ticks:
            axes.annotate(text, (k, y), xytext=(4, 4), textcoords="offset points", fontsize=7.5, backgroundcolor=(1, 1, 1, 0.6))
    axes.set_xticks(range(len(dimensions)), [one.name for one in dimensions])
    axes.set_xlim(-0.1, len(dimensions) - 0.4)
    axes.set_ylim(-0.08, 1.14)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(f"completed trials; the darker, the better by {shown.name}; black: the best")
    return figure


def _share(one: Dimension) -> Callable[[object], float]:
    """The height of a setting's value, 0..1."""

    def share(value: object) -> float:
        place = _places(one, [value])[0]
        if one.choices:
            return place / max(len(one.choices) - 1, 1)
        return math.log(place / one.low) / math.log(one.high / one.low) if one.log else (place - one.low) / ((one.high - one.low) or 1)

    return share


def _importances(found: dict[str, float], name: str) -> Figure:
    figure, axes = subplots(figsize=(6.5, 0.32 * len(found) + 1.1), layout="constrained")
    bars = axes.barh(list(found), list(found.values()), color=PALETTE[0], alpha=0.85)
    axes.bar_label(bars, [f"{share:.0%}" for share in found.values()], fontsize=8, padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(found.values(), default=1) or 1)
    axes.set(xlabel=f"how much a setting decides on a good {name} (PED-ANOVA, in all 100 %)")
    return figure


def _curves(trials: Sequence[CompletedTrial], curves: dict[int, dict[int, float]], name: str, best: set[int], higher: bool) -> Figure:
    figure, axes = subplots(figsize=(7.5, 4), layout="constrained")
    low, high = view_span([value for curve in curves.values() for epoch, value in curve.items() if epoch > 1 or len(curve) == 1], higher)
    alpha = float(np.clip(12 / max(len(trials), 1), 0.12, 0.7))
    states = set()
    for t in sorted(trials, key=lambda t: (t.number in best, t.state == "complete")):
        if not (curve := curves[t.number]):
            continue
        states.add(t.state)
        epochs, values = list(curve), np.array(list(curve.values()))
        is_best, pruned = t.number in best, t.state == "pruned"
        colour = "black" if is_best else COLOURS[t.state]
        axes.plot(epochs, values.clip(low, high), color=colour, linewidth=1.8 if is_best else 1, alpha=1 if is_best else alpha,
                  zorder=3 if is_best else 2, marker="o" if len(epochs) == 1 and not pruned else None, markersize=3)  # fmt: skip
        if pruned:
            axes.plot(
                epochs[-1], values[-1].clip(low, high), MARKS["pruned"], color=COLOURS["pruned"], markersize=4.5, alpha=max(alpha, 0.5)
            )
        for outside, edge, mark in ((values < low, low, "v"), (values > high, high, "^")):
            axes.plot(
                np.array(epochs)[outside],
                np.full(outside.sum(), edge),
                mark,
                color=colour,
                markersize=4,
                alpha=max(alpha, 0.4),
                clip_on=False,
            )
    handles = [
        Line2D([], [], color=COLOURS[kind], marker=MARKS[kind] if kind == "pruned" else "", label=kind) for kind in MARKS if kind in states
    ]
    figure.legend(
        handles=[*handles, Line2D([], [], color="black", linewidth=1.8, label="best")], loc="outside upper right", ncols=4, fontsize=8
    )
    axes.set_ylim(low, high)
    axes.set(xlabel="epoch (arrows: values beyond the axis)", ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _pareto(done: Sequence[CompletedTrial], names: Sequence[str], directions: Sequence[str], best: set[int]) -> Figure:
    """Each pair of objectives; trials of the front are numbered."""
    pairs = list(itertools.combinations(range(len(names)), 2))
    figure, panels = subplots(1, len(pairs), figsize=(6 if len(pairs) == 1 else 4.2 * len(pairs), 4.2), squeeze=False, layout="constrained")
    for axes, (second, first) in zip(panels.flat, pairs, strict=True):
        spans = [view_span([t.values[k] for t in done], directions[k] == "maximize") for k in (first, second)]
        for t in sorted(done, key=lambda t: t.number in best):
            inside = [float(np.clip(t.values[k], *span)) for k, span in zip((first, second), spans, strict=True)]
            beyond = inside != [t.values[first], t.values[second]]
            colour = PALETTE[1] if t.number in best else PALETTE[0]
            axes.plot(*inside, "D" if beyond else "o", color=colour, markersize=6 if t.number in best else 4, alpha=1 if t.number in best else 0.5,
                      clip_on=False, markerfacecolor="none" if beyond else None)  # fmt: skip
            if t.number in best and len(best) <= 25:
                axes.annotate(str(t.number), inside, xytext=(4, 4), textcoords="offset points", fontsize=7.5)
        if len(names) == 2:
            front = sorted(t.values for t in done if t.number in best)
            axes.step([values[first] for values in front], [values[second] for values in front], color=PALETTE[1], linewidth=1,
                      where="pre" if directions[second] == "minimize" else "post", zorder=1)  # fmt: skip
        axes.set_xlim(*spans[0])
        axes.set_ylim(*spans[1])
        xlabel, ylabel = (_label(names[k], directions[k] == "maximize") for k in (first, second))
        axes.set(xlabel=xlabel, ylabel=ylabel)
    handles = [
        Line2D([], [], linestyle="", marker="o", color=PALETTE[k], label=label)
        for k, label in ((1, "Pareto front, by trial"), (0, "other trials"))
    ]
    handles.append(Line2D([], [], linestyle="", marker="D", color="0.3", markerfacecolor="none", label="beyond the axis"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8)
    return figure


def _png(draw: Callable[[], Figure]) -> bytes:
    with matplotlib.rc_context({**STYLE, "text.parse_math": True}):  # powers of ten on a logarithmic axis
        return to_png(draw())


def trials_table(trials: Sequence[CompletedTrial], space: Space) -> str:
    """All trials as CSV."""
    names = [one.name for one in space.dimensions]
    metrics = sorted({name for t in trials for name in t.metrics})
    rows: list[list[object]] = []
    for t in trials:
        row = [t.point.get(name, "") for name in names] + [t.metrics.get(name, "") for name in metrics]
        rows.append([t.number, t.state, *row, round(t.seconds, 1), t.run_id, t.reason])
    return to_csv(["trial", "state", *names, *metrics, "seconds", "mlflow_run", "reason"], rows)
