"""Pictures for people: readable at the size they are shown, colour-blind safe, and still told apart in grey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# True positive, false positive, false negative as published: green, red, blue. Blended over the grey picture so that shapes stay visible.
ERROR_COLOURS = {"found": (0.0, 0.62, 0.38), "false alarm": (0.86, 0.15, 0.1), "missed": (0.1, 0.35, 0.95)}

STYLE: dict[str, Any] = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def save(figure: Figure, path: Path) -> None:
    """As PNG; closes the figure."""
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def curves(history: list[dict[str, float]], best_epoch: int) -> Figure:
    """Training and validation loss, and validation Dice, over epochs, the best epoch marked."""
    epochs = np.arange(1, len(history) + 1)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        colours = sns.color_palette("colorblind")
        marker = "o" if len(history) < 25 else None
        for name, label, colour, line in (("train/loss", "training", colours[0], "-"), ("val/loss", "validation", colours[1], "--")):
            left.plot(epochs, [row[name] for row in history], line, color=colour, label=label, marker=marker, markersize=3)
        right.plot(epochs, [row["val/dice"] for row in history], color=colours[2], marker=marker, markersize=3)
        best = history[best_epoch]["val/dice"]
        right.plot([best_epoch + 1], [best], "D", color="black", markersize=5)
        right.set_title(f"best: {best:.4f} after epoch {best_epoch + 1}")
        for axes in (left, right):
            axes.axvline(best_epoch + 1, color="0.6", linewidth=0.8, linestyle=":")
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylabel("loss")
        left.legend()
        right.set_ylabel("validation Dice")
        right.margins(y=0.15)
    return figure


def error_map(image: np.ndarray, truth: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The picture in grey with found (green), false (red) and missed (blue) cell pixels; a cell of the wrong class is missed. RGB 0..1."""
    grey = np.repeat((image.mean(-1, keepdims=True) / 255) ** 0.8, 3, axis=-1)
    out = grey.copy()
    marks = {
        "found": (truth > 0) & (classes == truth),
        "false alarm": (truth == 0) & (classes > 0),
        "missed": (truth > 0) & (classes != truth),
    }
    for name, where in marks.items():
        share = 0.45 if name == "found" else 0.85
        out[where] = (1 - share) * grey[where] + share * np.array(ERROR_COLOURS[name])
    return out


def case(image: np.ndarray, truth: np.ndarray, classes: np.ndarray, cell: np.ndarray | None, title: str) -> Figure:
    """One image four ways: as it is, with the truth's and the prediction's outlines, the probability of a cell, and the errors."""
    step = -(-max(image.shape[:2]) // 900)
    image, truth, classes = (array[::step, ::step] for array in (image, truth, classes))
    tall = image.shape[0] / image.shape[1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9, 9 * tall + 0.9), layout="constrained")
        (first, second), (third, fourth) = axes
        first.imshow(image)
        first.set_title("image with the truth's outlines (yellow)")
        first.contour(truth > 0, levels=[0.5], colors=["#f5c400"], linewidths=0.9)
        second.imshow(image)
        second.set_title("image with the prediction's outlines (blue)")
        second.contour(classes > 0, levels=[0.5], colors=["#0a5cff"], linewidths=0.9)
        if cell is not None:
            shown = third.imshow(cell[::step, ::step] / 255, cmap="viridis", vmin=0, vmax=1)
            figure.colorbar(shown, ax=third, shrink=0.8, pad=0.01)
            third.set_title("probability of a cell")
        else:
            third.imshow(classes, cmap="viridis", interpolation="nearest")
            third.set_title("predicted classes (this method gives no probability)")
        fourth.imshow(error_map(image, truth, classes))
        fourth.set_title("errors")
        fourth.legend(
            handles=[Patch(color=colour, label=name) for name, colour in ERROR_COLOURS.items()],
            loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3,
        )  # fmt: skip
        for one in axes.flat:
            one.set_axis_off()
        figure.suptitle(title)
    return figure


def scoreboard(rows: list[dict[str, Any]], unit: str) -> Figure:
    """Mean test Dice of each model, best on top, with its 95 % interval over images; baselines hatched."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.34 * len(rows) + 1.1), layout="constrained")
        colours = sns.color_palette("colorblind")
        low = min(min(r["low"], r["dice"]) for r in rows)
        start = max(0.0, low - 0.25 * (1 - low))
        for y, row in enumerate(rows):
            is_base = row["baseline"]
            axes.barh(y, row["dice"] - start, left=start, color=colours[7] if is_base else colours[0], alpha=0.75, hatch="///" if is_base else None,
                      edgecolor="white", height=0.7)  # fmt: skip
            axes.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1.2)
        right = max(max(r["high"], r["dice"]) for r in rows)
        span = right - start
        for y, row in enumerate(rows):
            axes.text(right + 0.02 * span, y, f"{row['dice']:.4f}", va="center")
        axes.set_xlim(start, right + 0.1 * span)
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"test Dice, {unit} (the axis does not start at 0)")
        axes.set_title("line: 95 % interval over images; hatched: baselines", loc="left", fontsize=8, color="0.35")
    return figure
