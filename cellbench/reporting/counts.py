"""How well counts agree with true ones, in words and as a table: bias, limits of agreement, concordance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cellbench.errors import quantity
from cellbench.metrics.counting import CountRow
from cellbench.reporting.leaderboard import format_interval, format_number
from cellbench.reporting.model_groups import ModelGroup
from cellbench.statistics.agreement import Agreement, agreement
from cellbench.tracking.schema import COUNTED, RunRecord

MEANING = (
    "Bias: mean of predicted minus true. Limits of agreement: 95 % of the differences lie between them, if they are normal (Bland and Altman 1986). "
    "Concordance: Lin's coefficient, 1 where every count is right."
)


def agreements(rows: Sequence[CountRow]) -> dict[str, Agreement]:
    """The agreement of each class over all images, or regions."""
    out = {}
    for label in dict.fromkeys(row.label for row in rows):
        some = [row for row in rows if row.label == label]
        groups = [row.image for row in some] if any(row.region for row in some) else None
        out[label] = agreement([row.true for row in some], [row.predicted for row in some], groups)
    return out


def describe_counts(rows: Sequence[CountRow]) -> list[str]:
    """A sentence a class."""
    unit = "region" if any(row.region for row in rows) else "image"
    lines = []
    for label, one in agreements(rows).items():
        some = [row for row in rows if row.label == label]
        total = f"{sum(row.predicted for row in some):,} counted, {sum(row.true for row in some):,} there, in {quantity(one.num, unit)}"
        ends = format_interval(one.bias.low, one.bias.high, one.bias.rough, "+.2f")
        bias = f"bias {one.bias.mean:+.2f}{f' (95 % {ends})' if ends else ''} {'a' if unit == 'region' else 'an'} {unit}"
        limits = format_interval(one.low, one.high, False, "+.2f")
        lines.append(
            f"{label}: {total}; {bias}{f', limits of agreement {limits}' if limits else ''}, concordance {format_concordance(one)}."
        )
    return lines


def format_concordance(one: Agreement) -> str:
    """``0.981 (0.95 to 0.99)``."""
    if one.ccc is None:
        return "none (all counts are the same)"
    ends = format_interval(one.ccc_low, one.ccc_high, False)
    return f"{one.ccc:.3f}{f' ({ends})' if ends else ''}"


def agreement_row(name: str, one: Agreement) -> dict[str, str]:
    """The cells of a table, by heading."""
    return {
        "model": name,
        "bias": f"{one.bias.mean:+.2f}",
        "95 %": format_interval(one.bias.low, one.bias.high, one.bias.rough, "+.2f"),
        "limits of agreement": format_interval(one.low, one.high, False, "+.2f"),
        "concordance": format_concordance(one),
        "mean absolute error": format_number(one.error, 2),
    }


def model_counts(models: Sequence[ModelGroup]) -> dict[str, list[CountRow]]:
    """By model, the cells in each test image by each of its runs; without models whose runs are of older versions and have no counts."""
    return {
        model.name: [
            CountRow(image=f"{run.fold} {image}", region="", label=model.name, true=true, predicted=predicted)
            for run in model.runs
            for image, true, predicted in zip(*(run.per_image[key] for key in ("images", "num_true", "num_predicted")), strict=True)
        ]
        for model in models
        if model.has("num_true", "num_predicted")
    }


def model_rows(counts: Mapping[str, Sequence[CountRow]]) -> list[dict[str, str]]:
    """How well the counts of each model agree, a row a model; the seeds of an image are one unit."""
    return [
        agreement_row(name, agreement([one.true for one in rows], [one.predicted for one in rows], [one.image for one in rows]))
        for name, rows in counts.items()
    ]


def evaluation_rows(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """The evaluations of counts on images without masks, the latest of each: a row a class, by images."""
    latest = {(run.tags[COUNTED], run.tags.get("model", run.name)): run for run in sorted(runs, key=lambda run: run.start_s)}
    rows = []
    for (images, model), run in sorted(latest.items()):
        prefixes = sorted({key.rpartition("/")[0] for key in run.metrics if key.startswith("count") and key.endswith("/bias")})
        for prefix in prefixes:
            known = {key: run.metrics.get(f"{prefix}/{key}") for key in ("bias", "limit_low", "limit_high", "concordance", "error_abs")}
            rows.append({
                "images": images.rpartition(" ")[0],
                "model": model,
                "class": prefix.removeprefix("count").removeprefix("_") or "all cells",
                "bias": f"{known['bias']:+.2f}",
                "limits of agreement": format_interval(known["limit_low"], known["limit_high"], False, "+.2f"),
                "concordance": format_number(known["concordance"], 3),
                "mean absolute error": format_number(known["error_abs"], 2),
            })  # fmt: skip
    return rows


def count_metrics(rows: Sequence[CountRow]) -> dict[str, float]:
    """For MLflow: ``count/bias`` and others, with several classes ``count_NAME/bias``."""
    found = agreements(rows)
    out: dict[str, float] = {}
    for label, one in found.items():
        prefix = "count" if len(found) == 1 else f"count_{label}"
        values = {"bias": one.bias.mean, "limit_low": one.low, "limit_high": one.high, "concordance": one.ccc, "error_abs": one.error}
        out |= {f"{prefix}/{name}": round(value, 6) for name, value in values.items() if value is not None}
    return out
