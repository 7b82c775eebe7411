"""The pictures of a run as PNGs, drawn by functions that another process can call. Importing this module imports no matplotlib."""

from __future__ import annotations

from typing import Any

from cellbench.reporting.plots.example import draw_example

__all__ = ["draw_agreement", "draw_curves", "draw_example", "draw_scores"]


def draw_curves(*arguments: Any) -> bytes:
    """:func:`~cellbench.reporting.plots.run.plot_curves`."""
    from cellbench.reporting.plots import run, style

    return style.to_png(run.plot_curves(*arguments))


def draw_scores(*arguments: Any) -> bytes:
    """:func:`~cellbench.reporting.plots.run.plot_scores`."""
    from cellbench.reporting.plots import run, style

    return style.to_png(run.plot_scores(*arguments))


def draw_agreement(*arguments: Any) -> bytes:
    """:func:`~cellbench.reporting.plots.counts.plot_agreement`."""
    from cellbench.reporting.plots import counts, style

    return style.to_png(counts.plot_agreement(*arguments))
