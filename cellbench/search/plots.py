"""Plots of a search by ``optuna.visualization.matplotlib``, and the table of its trials."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.category import StrCategoryFormatter
from matplotlib.ticker import NullFormatter
from optuna.visualization import matplotlib as draw

from cellbench.config.search_space import Space
from cellbench.escaping import to_csv
from cellbench.reporting.plots.style import STYLE, to_png
from cellbench.search.study import CompletedTrial, Study


def write_trials(folder: Path, study: Study, space: Space) -> None:
    """Writes ``trials.csv`` and ``figures/*.png``."""
    (folder / "trials.csv").write_text(trials_table(study.trials(), space), encoding="utf-8")
    (folder / "figures").mkdir()
    for title, data in plot_study(study, space):
        (folder / "figures" / f"{title}.png").write_bytes(data)


def plot_study(study: Study, space: Space) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each plot that the completed trials allow."""
    done = [t for t in study.trials() if t.state == "complete"]
    if len(done) < 2:
        return
    names = list(space.settings.objectives)
    varied = [one.name for one in space.dimensions if len(one.choices) != 1]
    always = [one.name for one in space.dimensions if one.name in varied and not one.head]
    # Tick labels need space between panels. A single panel with its colour bar is too much for a constrained layout.
    apart: Literal["none", "constrained"] = "constrained" if len(always) > 1 else "none"
    for k, name in enumerate(names):
        mark = "" if len(names) == 1 else f"-{name.replace('/', '-')}"
        about: dict[str, Any] = {"target_name": name}
        if len(names) > 1:
            about["target"] = lambda t, k=k: t.values[k]
        yield f"history{mark}", _render(partial(_history, study, about), (7, 4))
        yield (
            f"slice{mark}",
            _render(
                partial(_slices, study, always, about),
                (max(5, 2 * len(always) + 1), 3.8),
                apart,
            ),
        )
        yield f"parallel{mark}", _render(partial(draw.plot_parallel_coordinate, study.optuna, params=always, **about), (11, 5))
        values = {t.values[k] for t in done}
        if len(done) >= 4 and len(values) > 1:
            yield f"importance{mark}", _render(partial(draw.plot_param_importances, study.optuna, **about), (7, 3.5))
    if space.settings.pruner != "none":
        yield "curves", _render(lambda: _curves(draw.plot_intermediate_values(study.optuna), names[0]), (7, 4))
    if len(names) in (2, 3):
        yield "pareto", _render(lambda: draw.plot_pareto_front(study.optuna, target_names=names), (6.5, 4.5))


def _history(study: Study, about: dict[str, Any]) -> Any:
    axes = draw.plot_optimization_history(study.optuna, **about)
    axes.legend(loc="lower right", frameon=True)  # Optuna's legend is half outside of the axes
    return axes


def _slices(study: Study, params: list[str], about: dict[str, Any]) -> Any:
    """A slice plot without overlapping tick labels: rotated, without quotes and minor ticks."""
    panels = draw.plot_slice(study.optuna, params=params, **about)
    for axes in panels.flat if hasattr(panels, "flat") else [panels]:
        axes.xaxis.set_minor_formatter(NullFormatter())
        labels = [label.get_text().strip("'") for label in axes.get_xticklabels()]
        if isinstance(axes.xaxis.get_major_formatter(), StrCategoryFormatter):
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    return panels


def _curves(axes: Any, name: str) -> Any:
    """Limits the y axis to start at the lower 10 % of the values: a few trials that start near 0 would flatten all others."""
    if (legend := axes.get_legend()) is not None:
        legend.remove()  # it has an entry for each trial and would cover the plot
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()] or [np.zeros(1)])
    low, high = np.nanquantile(values, 0.1), np.nanmax(values)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(title="All trials, epoch by epoch", xlabel="epoch", ylabel=name)
    return axes


def _render(make: Callable[[], Any], size_inches: tuple[float, float], layout: Literal["none", "constrained"] = "none") -> bytes:
    # Optuna's axes show powers of ten as TeX, and contain no file names that TeX could misread.
    with plt.rc_context({**STYLE, "text.parse_math": True}), warnings.catch_warnings():  # Optuna changes the global style
        warnings.simplefilter("ignore")
        made = make()
        figure = (made.flat[0] if hasattr(made, "flat") else made).figure
        figure.set_size_inches(*size_inches)
        figure.set_layout_engine(layout)  # "none" where a constrained layout fails, as for parallel coordinates
        try:
            return to_png(figure)
        finally:
            plt.close(figure)


def trials_table(trials: Sequence[CompletedTrial], space: Space) -> str:
    """All trials as CSV."""
    names = [one.name for one in space.dimensions]
    metrics = sorted({name for t in trials for name in t.metrics})
    rows: list[list[object]] = []
    for t in trials:
        row = [t.point.get(name, "") for name in names] + [t.metrics.get(name, "") for name in metrics]
        rows.append([t.number, t.state, *row, round(t.seconds, 1), t.run_id, t.reason])
    return to_csv(["trial", "state", *names, *metrics, "seconds", "mlflow_run", "reason"], rows)
