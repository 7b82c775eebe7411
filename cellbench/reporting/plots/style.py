"""The style that all figures share.

A figure that compares models is drawn for a page of 8 inches, and again for a phone (``narrow``), with letters of the same size. What its marks mean
is its caption: the page shows it below the figure, a PNG has it inside.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from cellbench.statistics.bootstrap import Interval

T = TypeVar("T")
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,  # a name with two dollars is no formula
    "svg.fonttype": "none",  # text stays text: small, sharp, and in the fonts of the reader for any script
    "svg.hashsalt": "cellbench",  # the same figure is the same file
}
PALETTE = [to_rgb(colour) for colour in (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)]  # fmt: skip
"""Distinguished by colour-blind readers: seaborn's ``colorblind``, after Wong 2011."""
WIDTH_IN, NARROW_IN = 9.6, 3.9
"""Width of a figure on a page, and on a phone."""
SHARP_DPI = 200
"""Of a PNG of a figure that compares models: two pixels for each that a page shows."""
ROW_IN, NARROW_ROW_IN = 0.3, 0.46
"""Height of a model's row; on a phone its name stands above it."""
NAME_CHARS = 46
EDGE_IN = 0.1
"""Around a PNG with its caption inside."""
GREY_TEXT = "0.35"
BACKED = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
"""Behind text that lines may cross."""


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], layout: Literal["constrained"] | None = None, **grid: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, with the arguments of pyplot's function of that name.

    pyplot would choose a backend for the whole process, in which a user may draw too, and would keep the figure until it is closed.
    """
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **grid)


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG."""
    path.write_bytes(to_png(figure))


def to_png(figure: Figure, dpi: float | None = None, note: str = "") -> bytes:
    """As the bytes of a PNG, with its caption and a note below."""
    figure.set_dpi(dpi or figure.dpi)
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)  # with one, everything is drawn twice, the first time only for the layout
    box = None
    if caption := " ".join(part for part in (get_caption(figure), note) if part):
        for legend in figure.legends:  # stays where it is when the picture grows downwards
            legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
        lines = "\n".join(textwrap.wrap(caption, int(figure.get_figwidth() * 15.5)))
        text = figure.text(0.01, 0, lines, va="top", fontsize=8, color=GREY_TEXT)
        # The layout leaves nothing else outside; cutting to size ("tight") would measure and draw everything a second time.
        bottom, (width, height) = text.get_window_extent().y0 / figure.dpi, figure.get_size_inches()
        box = Bbox([[-EDGE_IN, bottom - EDGE_IN], [width + EDGE_IN, height + EDGE_IN]])
    out = io.BytesIO()
    # Level 1 packs a micrograph in a third of the time, 14 % larger.
    figure.savefig(out, dpi=dpi or "figure", bbox_inches=box, facecolor="white", pil_kwargs={"compress_level": 1})
    return out.getvalue()


def to_svg(figure: Figure) -> bytes:
    """As SVG, without the caption. The figure keeps its layout, for :func:`to_png`."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine(None)
    return out.getvalue()


def set_caption(figure: Figure, *sentences: str) -> None:
    figure.set_label(" ".join(one for one in sentences if one))


def get_caption(figure: Figure) -> str:
    return str(figure.get_label())


def first_that_fit(items: Sequence[T], most: int) -> tuple[list[T], str]:
    """The items that fit in one figure, and a sentence on the rest."""
    return list(items[:most]), f"{len(items) - most} more are in the table." if len(items) > most else ""


def rows_figure(names: Sequence[str], narrow: bool, extra_in: float = 0.75) -> tuple[Figure, Axes]:
    """A figure with one row for each name, the first on top; ``extra_in``: the height of everything else."""
    row = NARROW_ROW_IN if narrow else ROW_IN
    size = (NARROW_IN if narrow else WIDTH_IN, row * len(names) + extra_in)
    figure, axes = subplots(figsize=size, layout="constrained")
    name_rows(axes, names, narrow)
    return figure, axes


def name_rows(axes: Axes, names: Sequence[str], narrow: bool) -> None:
    """Writes the names of rows beside the axes, or for a phone above each row."""
    axes.set_ylim(len(names) - 0.5, -0.75 if narrow else -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="0.93", linewidth=0.6)
    axes.set_axisbelow(True)
    if narrow:
        axes.set_yticks([])
        for y, name in enumerate(names):
            axes.annotate(
                shorten(name, 44), (0, y - 0.24), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8.5, bbox=BACKED
            )
        return
    axes.set_yticks(range(len(names)), [wrap_name(name) for name in names])
    some_long = any(len(name) > NAME_CHARS for name in names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontsize(7 if len(name) > NAME_CHARS else 8 if some_long else 9)
        label.set_linespacing(1.0)


def wrap_name(name: str) -> str:
    r"""A long name in two lines; a longer one loses its middle.

    >>> wrap_name("uni · fpn"), wrap_name("dinobloom-s · transposed-conv · epochs 20 · lr 0.001")
    ('uni · fpn', 'dinobloom-s · transposed-conv · epochs 20 ·\nlr 0.001')
    """
    lines = _lines(name)
    return "\n".join(lines if len(lines) <= 2 else _lines(shorten(name, 2 * NAME_CHARS - 16))[:2])


def _lines(name: str) -> list[str]:
    parts = name.replace(" ", "\u00a0").replace("\u00a0·\u00a0", "\u00a0· ")  # breaks between settings only
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(parts, NAME_CHARS, break_on_hyphens=False)]


def shorten(name: str, most: int) -> str:
    """A name without its middle, where it is longer than ``most``.

    >>> shorten("uni · fpn", 20), shorten("dinobloom-s · transposed-conv · lr 0.001", 21)
    ('uni · fpn', 'dinobloom-… · lr 0.001')
    """
    return name if len(name) <= most else f"{name[: most // 2].rstrip()}…{name[-(most - most // 2) :]}"


def draw_span(axes: Axes, at: float, interval: Interval, *, upright: bool = False, **look: Any) -> None:
    """Draws an interval as a line at height ``at``, or ``upright`` at that x; a rough one dashed, a missing one not at all."""
    if interval.low is None or interval.high is None:
        return
    ends, here = [interval.low, interval.high], [at, at]
    style = (0, (2.5, 1.2)) if interval.rough else "-"
    axes.plot(*((here, ends) if upright else (ends, here)), linestyle=style, **look)


def lower_end(one: Interval) -> float:
    """The lower end, or the mean if there is no interval."""
    return one.mean if one.low is None else one.low


def upper_end(one: Interval) -> float:
    """The upper end, or the mean if there is no interval."""
    return one.mean if one.high is None else one.high


def draw_reliability(axes: Axes, curve: Mapping[str, Sequence[float]], marks: str, **look: Any) -> None:
    """The observed share of cells against the predicted probability. ``curve``: pixels, probability and share_cell by bin."""
    pixels, predicted, observed = (np.array(curve[key]) for key in ("pixels", "probability", "share_cell"))
    axes.plot(predicted[pixels > 0], observed[pixels > 0], marks, **look)


def axis_range(ends: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The range of an axis for points with their lower and upper ends, which a few points far away do not squeeze.

    ``ends``: (low, middle, high) of each. Up to 40 % of the points are left out on either side where they are further from the rest than twice the
    rest's whole range.

    >>> axis_range([(0.9, 0.9, 0.9), (0.92, 0.92, 0.92), (0.91, 0.91, 0.91), (0.3, 0.3, 0.3)])
    (0.9, 0.92)
    >>> axis_range([(0.9, 0.9, 0.9), (0.8, 0.8, 0.8)])
    (0.8, 0.9)
    """
    kept = sorted(ends, key=lambda one: one[1])
    most = int(0.4 * len(kept))
    for sign in (1, -1):
        order = kept[::sign]
        for k in range(min(most, len(order) - 2), 0, -1):
            rest = order[k:]
            if sign * (rest[0][1] - order[k - 1][1]) > 2 * (_high(rest) - _low(rest)):
                kept = sorted(rest, key=lambda one: one[1])
                break
    return _low(kept), _high(kept)


def _low(ends: Iterable[tuple[float, float, float]]) -> float:
    return min(low for low, _, _ in ends)


def _high(ends: Iterable[tuple[float, float, float]]) -> float:
    return max(high for _, _, high in ends)


def set_range(axes: Axes, points: Iterable[Interval], margin: float = 0.05, include: Sequence[float] = ()) -> str:
    """Sets the x axis to the range of the points without outliers; returns a sentence on those, which :func:`draw_outside` marks."""
    points = list(points)
    low, high = axis_range([(lower_end(one), one.mean, upper_end(one)) for one in points])
    low, high = min(low, *include) if include else low, max(high, *include) if include else high
    pad = margin * (high - low) or 0.01
    axes.set_xlim(low - pad, high + pad)
    outside = any(one.mean < low or one.mean > high for one in points)
    return "Arrows: outside the range of the axis." if outside else ""


def draw_outside(axes: Axes, at: float, value: float, **look: Any) -> bool:
    """Draws an arrow at the edge for a value outside the x axis; whether it is outside."""
    left, right = axes.get_xlim()
    if left <= value <= right:
        return False
    marker, edge = ("<", 0.008) if value < left else (">", 0.992)
    axes.plot([edge], [at], marker, transform=axes.get_yaxis_transform(), markersize=6, clip_on=False, **look)
    return True


def note_at_right(axes: Axes, at: float, text: str, narrow: bool) -> None:
    """Writes numbers beside a row; for a phone at the right end of its name."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": 8.5, "annotation_clip": False}
    if narrow:
        axes.annotate(text, (1, at - 0.24), ha="right", va="bottom", bbox=BACKED, **place)
    else:
        axes.annotate(text, (1.015, at), ha="left", va="center", **place)


def describe_intervals(found: Iterable[Interval], line: str = "line") -> str:
    """The caption of a figure's intervals, which are all of the same images.

    >>> few, some = (Interval(mean=0.9, low=low, high=low, num=num) for low, num in ((None, 3), (0.8, 9)))
    >>> describe_intervals([few]), describe_intervals([some])
    ('no intervals: 3 images are too few', 'dashed line: 95 % interval, rough, of 9 images')
    """
    one = next(iter(found), None)
    if one is None:
        return "no image has a score"
    units = f"{one.num} {'images' if one.unit == 'image' else 'groups of images'}" if one.num > 1 else f"1 {one.unit}"
    if one.low is None:
        return f"no intervals: {units} {'are' if one.num > 1 else 'is'} too few"
    return f"dashed {line}: 95 % interval, rough, of {units}" if one.rough else f"{line}: 95 % interval over {units}"


def intervals_sentence(found: Iterable[Interval], line: str = "line") -> str:
    """:func:`describe_intervals` as a sentence."""
    text = describe_intervals(found, line)
    return f"{text[:1].upper()}{text[1:]}."


def jitter(num: int, spread: float = 0.16) -> np.ndarray:
    """The same small shifts in every figure, so that equal values do not hide each other."""
    return np.random.default_rng(0).uniform(-spread, spread, num) if num > 3 else np.zeros(num)
