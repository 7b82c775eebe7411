"""Pictures of a search, by Optuna's own plotting on matplotlib, and its table."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
from optuna.visualization import matplotlib as draw

from cellbench.figures import STYLE, png
from cellbench.space import Space
from cellbench.study import Study, Told


def pictures(study: Study, space: Space) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each picture that the told trials allow."""
    done = [t for t in study.told() if t.state == "complete"]
    if len(done) < 2:
        return
    names = list(space.settings.objectives)
    varied = [one.name for one in space.dimensions if len(one.choices) != 1]
    always = [one.name for one in space.dimensions if one.name in varied and not one.head]
    for k, name in enumerate(names):
        mark = "" if len(names) == 1 else f"-{name.replace('/', '-')}"
        about: dict[str, Any] = {"target_name": name}
        if len(names) > 1:
            about["target"] = lambda t, k=k: t.values[k]
        yield f"history{mark}", _drawn(lambda about=about: draw.plot_optimization_history(study.optuna, **about), (7, 4))
        yield (
            f"slice{mark}",
            _drawn(lambda about=about: draw.plot_slice(study.optuna, params=always, **about), (2.6 * len(always) + 1, 3.6)),
        )
        yield f"parallel{mark}", _drawn(lambda about=about: draw.plot_parallel_coordinate(study.optuna, params=always, **about), (9, 4.5))
        values = {t.values[k] for t in done}
        if len(done) >= 4 and len(values) > 1:
            yield f"importance{mark}", _drawn(lambda about=about: draw.plot_param_importances(study.optuna, **about), (7, 3.5))
    if space.settings.pruner != "none":
        yield "curves", _drawn(lambda: _without_legend(draw.plot_intermediate_values(study.optuna)), (7, 4))
    if len(names) in (2, 3):
        yield "pareto", _drawn(lambda: draw.plot_pareto_front(study.optuna, target_names=names), (6.5, 4.5))


def _without_legend(axes: Any) -> Any:
    if (legend := axes.get_legend()) is not None:
        legend.remove()  # a line for each trial: more names than picture
    return axes


def _drawn(make: Callable[[], Any], size_inches: tuple[float, float]) -> bytes:
    with plt.rc_context(STYLE), warnings.catch_warnings():  # Optuna changes the style for everybody
        warnings.simplefilter("ignore")
        made = make()
        figure = (made.flat[0] if hasattr(made, "flat") else made).figure
        figure.set_size_inches(*size_inches)
        figure.set_layout_engine("none")  # Optuna's own places; a constrained layout cannot have the parallel axes
        return png(figure)


def table(told: Sequence[Told], space: Space) -> str:
    """All trials as CSV."""
    out = io.StringIO()
    names = [one.name for one in space.dimensions]
    metrics = sorted({name for t in told for name in t.metrics})
    writer = csv.writer(out)
    writer.writerow(["trial", "state", *names, *metrics, "seconds", "mlflow_run", "reason"])
    for t in told:
        row = [t.point.get(name, "") for name in names] + [t.metrics.get(name, "") for name in metrics]
        writer.writerow([t.number, t.state, *row, round(t.seconds, 1), t.run_id, t.reason])
    return out.getvalue()
