"""Plots by name, so that another process can draw them. Importing this module imports no matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def find_plot(plot: str) -> Callable[..., Figure]:
    """The function ``module:name`` of this package."""
    module, _, name = plot.partition(":")
    function: Callable[..., Figure] = getattr(importlib.import_module(f"cellbench.reporting.plots.{module}"), name)
    return function


def draw_plot(plot: str, *arguments: Any) -> bytes:
    """The PNG of the plot ``module:name`` of this package."""
    from cellbench.reporting.plots import style

    return style.to_png(find_plot(plot)(*arguments))
