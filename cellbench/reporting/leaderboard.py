"""The leaderboard: one row per model, and the format of its numbers in tables. The metrics catalog declares its columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cellbench.console import WIDE, Column, format_table, number_columns
from cellbench.metrics import catalog
from cellbench.metrics.catalog import Metric
from cellbench.reporting.model_groups import ModelGroup, TestSet
from cellbench.reporting.shift import Shift
from cellbench.statistics.bootstrap import Interval
from cellbench.statistics.hypothesis_tests import DECIMALS


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """One model. Scores are means over its seeds. NaN: the score is undefined (None in JSON). None: its runs did not record the score."""

    model: str
    backbone: str
    head: str
    baseline: bool
    """No backbone with a head: a baseline, or masks of another tool."""
    kind: str
    """``baseline``, ``external`` (masks of another tool), or empty."""
    num_seeds: int
    scores: Mapping[str, float | None]
    """Score by metric: over all pixels of the test images if the metric is pooled, else the mean over test images."""
    seed_sd: float | None
    """Of the pooled Dice."""
    image_dice: float | None
    """Mean of the per-image Dice over test images. Rows are sorted by it, because the tests compare it."""
    low: float | None
    high: float | None
    """95 % interval of ``image_dice`` over images, or over groups of them."""
    rough: bool
    """Whether the interval is based on few images."""
    p_to_best: float | None
    """Of the paired test of its Dice against the best model, adjusted for every pair; None for the best."""
    num_empty: int
    """Test images without a cell."""
    num_empty_found: float
    """Those of them in which a cell was predicted."""
    costs: Mapping[str, float | None]
    """By metric."""
    other_load_pct: float | None
    """Highest CPU load by other processes during training or testing of its runs, in percent."""
    pooled_by_seed: tuple[float, ...]
    """Pooled Dice."""
    run_ids: tuple[str, ...]
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By further test set: ``dice`` (mean over its images), ``low``, ``high``, ``rough``, ``ap50`` and ``p_to_best``, as for the main one."""
    lowest_dice: float | None = None
    """The lowest mean Dice under all conditions (``reporting.shift``); None where there are none, NaN where it was not tested under all."""
    lowest_at: str = ""
    """The condition."""


def leaderboard_rows(here: TestSet, shift: Shift | None = None) -> list[LeaderboardRow]:
    """The models of one test set, best mean Dice first; ``shift``: its further conditions."""
    columns, p = catalog.leaderboard(here.own_metrics), {d.a: d.p_adjusted for d in here.differences_to_best()}
    rows = [_row(model, interval, p.get(model.name), columns) for model, interval in zip(here.models, here.intervals(), strict=True)]
    if shift is None:
        return rows
    untested = {"dice": None, "low": None, "high": None, "rough": False, "ap50": None, "p_to_best": None}
    further: dict[str, dict[str, Any]] = {row.model: {other.dataset: untested for other in shift.sets} for row in rows}
    for other in shift.sets:
        for row in leaderboard_rows(other):
            further[row.model][other.dataset] = {
                "dice": row.image_dice, "low": row.low, "high": row.high, "rough": row.rough, "ap50": row.scores.get("ap50"), "p_to_best": row.p_to_best
            }  # fmt: skip
    lowest = {model: shift.lowest(model) for model in shift.models}
    return [
        replace(
            row,
            further=further[row.model],
            lowest_dice=lowest[row.model].mean(row.model) if row.model in lowest else math.nan,
            lowest_at=lowest[row.model].name if row.model in lowest else "",
        )
        for row in rows
    ]


def _row(model: ModelGroup, interval: Interval, p_to_best: float | None, columns: Sequence[Metric]) -> LeaderboardRow:
    pooled = model.pooled("dice")
    loads = [
        load for run in model.runs for which in ("train", "test")
        if (load := run.record.metrics.get(f"cost/{which}_other_load_pct")) is not None
    ]  # fmt: skip
    return LeaderboardRow(
        model=model.name,
        backbone=model.backbone,
        head=model.head,
        baseline=model.baseline,
        kind=model.kind,
        num_seeds=len(model.by_seed),
        scores={metric.key: _score(model, metric) for metric in columns if metric.per_image},
        seed_sd=float(np.std(pooled, ddof=1)) if len(pooled) > 1 else None,
        image_dice=interval.mean,
        low=interval.low,
        high=interval.high,
        rough=interval.rough,
        p_to_best=p_to_best,
        num_empty=model.empty_images[0],
        num_empty_found=model.empty_images[1],
        costs={metric.key: model.mean(f"cost/{metric.key}") for metric in catalog.METRICS if "cost" in metric.scopes},
        other_load_pct=max(loads, default=None),
        pooled_by_seed=tuple(pooled),
        run_ids=tuple(run.record.run_id for run in model.runs),
    )


def _score(model: ModelGroup, metric: Metric) -> float | None:
    if metric.pooled:
        return float(np.mean(model.pooled(metric.key)))
    return model.scores(metric.key).mean if model.has(metric.key) else None


def to_json(rows: Sequence[LeaderboardRow]) -> list[dict[str, Any]]:
    """The rows, with None for NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(asdict(row)) for row in rows]


def format_row(row: LeaderboardRow, own: Iterable[Metric] = ()) -> dict[str, str]:
    """A row as text, by heading. ``own``: the metrics of a user among its scores."""
    cells = {"model": row.model + (f" ({row.kind})" if row.kind else ""), "seeds": str(row.num_seeds)}
    for metric in catalog.leaderboard(own):
        value = row.scores.get(metric.key) if metric.per_image else row.costs.get(metric.key)
        cells[metric.label] = format_metric(metric, value)
        if metric.key == "dice":
            cells["± seeds"] = format_number(row.seed_sd, 4)
            cells["Dice/image"] = format_number(row.image_dice, 4)
            cells["95 %"] = format_interval(row.low, row.high, row.rough)
    for name, scores in row.further.items():
        cells[f"{name}: Dice/image"] = format_number(scores["dice"], 4)
        cells[f"{name}: 95 %"] = format_interval(scores["low"], scores["high"], scores["rough"])
        cells[f"{name}: AP50"] = format_number(scores["ap50"], 3)
        cells[f"{name}: p vs best"] = format_p_cell(scores["p_to_best"])
    if row.lowest_dice is not None:
        cells["lowest Dice"] = format_number(row.lowest_dice, 4)
        cells["lowest at"] = row.lowest_at
    return cells


def format_metric(metric: Metric, value: float | None) -> str:
    """A score with 4 decimals where it is pooled, else with 3; a cost with 3 significant digits; a number of parameters in short."""
    if metric.per_image:
        return format_number(value, 4 if metric.pooled else 3)
    if value is None:
        return ""
    if not metric.unit:
        return format_count(int(value))
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def terminal_table(rows: Sequence[LeaderboardRow], own: Iterable[Metric] = (), *, wide: bool = False) -> str:
    """The leaderboard for a terminal: the columns that decide, as far as they fit its width; all columns with ``wide``.

    Dice is the mean over test images, which the tests compare. The p of a row is that of its difference to the best.
    """
    cells = [{**format_row(row, own), "p vs best": _p_cell(row, rows)} for row in rows]
    if wide:
        columns = [Column(name, right=name != "model") for name in max(cells, key=len)]
        return "\n".join(format_table(columns, [[row.get(one.heading, "") for one in columns] for row in cells], room=WIDE))
    sets = list(dict.fromkeys(name for row in rows for name in row.further))
    for row, text in zip(rows, cells, strict=True):
        for name in sets:
            text[name] = format_number(row.further.get(name, {}).get("dice"), 3)
        text["lowest"] = format_number(row.lowest_dice, 3)
        text["Dice"] = format_number(row.image_dice, 3)
        text["95 %"] = format_interval(row.low, row.high, row.rough).replace(" to ", "–").replace("≈ ", "≈")
    columns = [
        Column("model", cut=True),
        Column("Dice", right=True),
        Column("95 %", right=True, optional=1),
        Column("p vs best", right=True, optional=2),
        *number_columns(*sets, "lowest", optional=1),
        Column("AP50", right=True, optional=3),
        Column("image/s", right=True, optional=4),
        Column("train s", right=True, optional=5),
    ]
    columns = [one for one in columns if any(row.get(one.heading) for row in cells)]
    return "\n".join(format_table(columns, [[row[one.heading] for one in columns] for row in cells]))


def _p_cell(row: LeaderboardRow, rows: Sequence[LeaderboardRow]) -> str:
    is_best = row.p_to_best is None and len(rows) > 1 and row.image_dice is not None and not math.isnan(row.image_dice)
    return "best" if is_best else format_p_cell(row.p_to_best)


def outcome_rows(here: TestSet) -> list[dict[str, str]]:
    """Counts of found, missed, merged and split cells of all test images: one row per model, the mean of its seeds. Omits runs of older versions."""
    counts = catalog.counts()
    rows = []
    for model in here.models:
        if model.has(*(count.key for count in counts)):
            totals = [np.mean([sum(sum(run.per_image[count.key]) for run in runs) for runs in model.by_seed]) for count in counts]
            cells = [f"{total:.0f}" if total == round(total) else f"{total:.1f}" for total in totals]
            rows.append({"model": model.name, **dict(zip([count.label for count in counts], cells, strict=True))})
    return rows


def format_interval(low: float | None, high: float | None, rough: bool, style: str = ".3f") -> str:
    """An interval as text, a rough one marked; empty where there is none.

    >>> format_interval(0.9, 0.95, True)
    '≈ 0.900 to 0.950'
    """
    return "" if low is None or high is None else f"{'≈ ' * rough}{low:{style}} to {high:{style}}"


def format_number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def format_count(num: int) -> str:
    """A large count in short.

    >>> format_count(22_056_576), format_count(37_000), format_count(0)
    ('22.1 M', '37 k', '0')
    """
    return f"{num / 1e6:.1f} M" if num >= 1e6 else f"{num / 1e3:.0f} k" if num >= 1e3 else str(num)


def format_p(p: float) -> str:
    """Formats p with three decimals below 0.1, two above, and more if it would round up to 0.05.

    >>> format_p(0.00004), format_p(0.0016), format_p(0.049996), format_p(0.213), format_p(1.0)
    ('p < 0.001', 'p = 0.002', 'p = 0.049996', 'p = 0.21', 'p = 1.00')
    """
    digits = 3 if p < 0.1 else 2
    while p < 0.05 and digits < DECIMALS and float(f"{p:.{digits}f}") >= 0.05:
        digits += 1
    return "p < 0.001" if p < 0.001 else f"p = {p:.{digits}f}"


def format_p_cell(p: float | None) -> str:
    """Formats p for a table cell: ``0.213``, ``< 0.001``; empty for None and NaN."""
    return "" if p is None or math.isnan(p) else format_p(p).removeprefix("p = ").removeprefix("p ")
