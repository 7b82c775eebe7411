"""Figures of single cells."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cellbench.reporting.plots.style import NARROW_IN, STYLE, set_caption, shorten, subplots


def plot_cell_confusion(classes: Sequence[str], confusion: np.ndarray, narrow: bool = False) -> Figure:
    """What each true cell (rows) was taken for (columns); the last column is missed cells, the last row predicted cells without a true one.

    ``confusion`` (K, K) as of ``cellbench.metrics.cell_classes``, K ``classes`` with the background.
    """
    used = [k for k in range(1, len(classes)) if confusion[k].any() or confusion[:, k].any()]
    order = [*used, 0]
    counts = confusion[np.ix_(order, order)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shares[-1] = counts[-1] / np.maximum(counts.sum(0), 1)
    with matplotlib.rc_context(STYLE):
        width = min(NARROW_IN, 8.0) if narrow else min(8.0, 2.4 + 1.2 * len(order))
        figure, axes = subplots(figsize=(width, 1.3 + 0.5 * len(order)), layout="constrained")
        shown = np.ma.masked_array(shares, mask=np.eye(len(order), dtype=bool) & (np.arange(len(order)) == len(used)))
        axes.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for row, column in np.ndindex(counts.shape):
            if row < len(used) or column < len(used):
                text = f"{counts[row, column]:,.1f}".removesuffix(".0")
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if shares[row, column] > 0.6 else "white")
        names = [shorten(classes[k], 14 if narrow else 24) for k in used]
        axes.set_xticks(range(len(order)), [*names, "missed"])
        axes.set_yticks(range(len(order)), [*names, "no true cell"])
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        set_caption(
            figure,
            "Single cells by class, matched where their IoU is above 0.5, whatever their class.",
            "Colour: share of the true cells of a row; in the last row, of the predicted cells of a column.",
        )
    return figure
