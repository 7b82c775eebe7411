"""Figures of one run: training curves and scores. Its example images are in :mod:`~cellbench.reporting.plots.example`.

Figures fit on a page, are safe for colour-blind readers and readable in grey: shapes, hatches and line styles repeat the meaning of colours.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellbench.metrics import catalog
from cellbench.metrics.calibration import expected_calibration_error
from cellbench.metrics.catalog import Metric
from cellbench.reporting.plots.style import PALETTE, STYLE, describe_intervals, draw_reliability, draw_span, subplots
from cellbench.statistics.bootstrap import mean_interval


def plot_curves(history: list[dict[str, float]], best_epoch: int) -> Figure:
    """Training and validation loss, and validation Dice, over epochs, the best epoch marked."""
    epochs = np.arange(1, len(history) + 1)
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = subplots(1, 2, figsize=(8, 3), layout="constrained")
        colours = PALETTE
        marker = "o" if len(history) < 25 else None
        for name, label, colour, line in (("train/loss", "training", colours[0], "-"), ("val/loss", "validation", colours[1], "--")):
            left.plot(epochs, [row[name] for row in history], line, color=colour, label=label, marker=marker, markersize=3)
        if "val/dice" in history[best_epoch]:
            right.plot(epochs, [row["val/dice"] for row in history], color=colours[2], marker=marker, markersize=3)
            best = history[best_epoch]["val/dice"]
            right.plot([best_epoch + 1], [best], "D", color="black", markersize=5)
            right.set_title(f"best: {best:.4f} after epoch {best_epoch + 1}")
        else:
            right.set_title("no validation image has a cell")
        for axes in (left, right):
            axes.axvline(best_epoch + 1, color="0.6", linewidth=0.8, linestyle=":")
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylabel("loss")
        left.legend()
        right.set_ylabel("validation Dice")
        right.margins(y=0.15)
    return figure


POOLED = {metric.key: metric.label for metric in catalog.per_image() if metric.pooled}
"""Labels of the overlap scores."""


def plot_scores(
    name: str,
    each: dict[str, np.ndarray],
    pooled: dict[str, dict[str, float]],
    calibration: dict[str, list[float]] | None,
    units: Sequence[Hashable] | None = None,
    own: Sequence[Metric] = (),
    corrected: dict[str, list[float]] | None = None,
) -> Figure:
    """A run's scores: metrics with intervals, each class, the distribution over images, and the calibration of probabilities.

    ``each``: scores of each image by metric, (N,); ``pooled``: the overlap scores over all pixels, by class name; ``units``: the group of each
    image, over which the intervals are; ``own``: metrics of a user among ``each``. ``corrected``: the calibration after temperature scaling.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(2, 2, figsize=(9, 6.6), layout="constrained")
        _metrics(axes[0, 0], each, units, own)
        _classes(axes[0, 1], pooled)
        _distribution(axes[1, 0], each["dice"])
        _reliability(axes[1, 1], calibration, corrected)
        figure.suptitle(name, fontsize=11)
    return figure


def _metrics(axes: Axes, each: dict[str, np.ndarray], units: Sequence[Hashable] | None, own: Sequence[Metric]) -> None:
    labels = {metric.key: metric.label for metric in catalog.per_image(own)}
    known = {key: ~np.isnan(each[key]) for key in labels if key in each}
    names = [key for key, scored in known.items() if scored.any()]
    found = [
        mean_interval(each[key][known[key]], groups=None if units is None else [units[k] for k in np.flatnonzero(known[key]).tolist()])
        for key in names
    ]
    for x, (key, interval) in enumerate(zip(names, found, strict=True)):
        pixels = key in POOLED
        axes.bar(
            x,
            interval.mean,
            0.7,
            color=PALETTE[0] if pixels else PALETTE[1],
            alpha=0.75,
            edgecolor="white",
            hatch=None if pixels else "///",
        )
        draw_span(axes, x, interval, upright=True, color="black", linewidth=1.2)
        top = max(interval.mean, interval.high or 0)
        axes.text(x, top + 0.015, f"{interval.mean:.3f}".replace("0.", "."), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(names)), [labels[key] for key in names], fontsize=7, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_ylim(0, 1.08)
    axes.set_title(f"mean over images; hatched: outlines and cells\n{describe_intervals(found)}", fontsize=8)


def _classes(axes: Axes, pooled: dict[str, dict[str, float]]) -> None:
    pooled = {name: values for name, values in pooled.items() if not np.isnan(list(values.values())).any()}  # absent classes
    names = list(pooled)
    width = 0.8 / len(names)
    lowest = min(min(values.values()) for values in pooled.values())
    start = max(0.0, lowest - 0.3 * (1 - lowest) - 0.02)
    for k, name in enumerate(names):
        at = np.arange(len(POOLED)) + (k - (len(names) - 1) / 2) * width
        heights = [pooled[name][key] for key in POOLED]
        bars = axes.bar(
            at, np.array(heights) - start, width * 0.94, bottom=start, color=PALETTE[(7, 0, 1, 2, 4, 5, 8)[k % 7]], alpha=0.8, label=name,
            hatch=(None, "///", "...", "xxx")[k % 4], edgecolor="white",
        )  # fmt: skip
        if len(names) <= 3:
            axes.bar_label(bars, [f"{h:.3f}".replace("0.", ".") for h in heights], fontsize=6.5, padding=1)
    axes.set_xticks(range(len(POOLED)), list(POOLED.values()))
    axes.set_ylim(start, 1 + 0.16 * (1 - start))
    axes.set_title(f"each class, over all pixels (the axis starts at {start:.2f})" if start else "each class, over all pixels", fontsize=8)
    axes.legend(ncols=len(names), loc="upper left", fontsize=7, borderaxespad=0)


def _distribution(axes: Axes, dice: np.ndarray) -> None:
    num_images, dice = len(dice), dice[~np.isnan(dice)]
    num = len(dice)
    axes.set_title(f"{num_images} test images" + (f", {num_images - num} of them without any cell" if num < num_images else ""), fontsize=8)
    if not num:
        axes.set_axis_off()
        return
    if num >= 12:
        axes.hist(dice, bins=min(30, max(6, int(np.sqrt(num) * 2))), color=PALETTE[0], alpha=0.7, edgecolor="white")
        axes.set_ylabel("images")
    else:  # a histogram of so few is bars of one image each
        axes.plot(dice, np.zeros(num), "o", color=PALETTE[0], markersize=7, alpha=0.7)
        axes.set_yticks([])
        axes.set_ylim(-1, 1)
        axes.margins(x=0.15)
    axes.axvline(float(dice.mean()), color="black", linewidth=1.2, label=f"mean {dice.mean():.4f}")
    axes.axvline(float(np.median(dice)), color="black", linewidth=1.2, linestyle=":", label=f"median {np.median(dice):.4f}")
    axes.set_xlabel("Dice of an image")
    axes.legend(fontsize=7, loc="upper left")


def _reliability(axes: Axes, calibration: dict[str, list[float]] | None, corrected: dict[str, list[float]] | None) -> None:
    axes.set_title("calibration of the probabilities", fontsize=8)
    if calibration is None:
        axes.text(0.5, 0.5, "this method gives no probability", ha="center", va="center", color="0.4")
        axes.set_axis_off()
        return
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--", label="perfect")
    label = f"this run, mean error {expected_calibration_error(calibration):.3f}"
    draw_reliability(axes, calibration, "o-", color=PALETTE[0], markersize=4, label=label)
    if corrected is not None:
        label = f"as predict gives them, {expected_calibration_error(corrected):.3f}"
        draw_reliability(axes, corrected, "s:", color=PALETTE[1], markersize=3, label=label)
    pixels = np.array(calibration["pixels"])
    # All pixels together are a quarter of the height: a background for the curve.
    axes.bar((np.arange(len(pixels)) + 0.5) / len(pixels), pixels / pixels.sum() / 4, 0.9 / len(pixels), color="0.82", zorder=0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of a cell (grey bars: share of the pixels)")
    axes.set_ylabel("share that is cell")
    axes.legend(fontsize=7, loc="best")
