"""Runs lined up: seeds of one model together, best first, and whether the differences are real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cellbench.ranking import verdict
from cellbench.stats import Scores, compare_all, mean_interval
from cellbench.track import Logged


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: the mean over its seeds of each score."""

    model: str
    baseline: bool
    num_seeds: int
    dice: float
    """Pooled over all pixels of the test images, cell class."""
    seed_sd: float | None
    image_dice: float
    """Mean over test images of the Dice of each."""
    low: float | None
    high: float | None
    """95 % interval of ``image_dice`` over images."""
    iou: float
    precision: float
    recall: float
    head_params: int
    train_s: float
    images_per_s: float
    pooled_by_seed: tuple[float, ...]
    run_ids: tuple[str, ...]


def rows(finished: Mapping[str, Logged], groups: Mapping[str, str], baselines: set[str], per_image: Mapping[str, dict[str, Any]]) -> list[Row]:
    """The models of finished runs, best pooled test Dice first. ``groups`` gives each run name's model, ``per_image`` its file."""
    out = []
    for model in dict.fromkeys(groups[name] for name in finished):
        names = [name for name in finished if groups[name] == model]
        each = [finished[name].metrics for name in names]
        pooled = [m["test/dice"] for m in each]
        images = np.mean([per_image[name]["dice"] for name in names], axis=0)
        interval = mean_interval(images)

        def mean(key: str, each: list[Mapping[str, float]] = each) -> float:
            return float(np.mean([m[key] for m in each]))

        out.append(
            Row(
                model=model,
                baseline=model in baselines,
                num_seeds=len(names),
                dice=float(np.mean(pooled)),
                seed_sd=float(np.std(pooled, ddof=1)) if len(pooled) > 1 else None,
                image_dice=interval.mean,
                low=interval.low,
                high=interval.high,
                iou=mean("test/iou"),
                precision=mean("test/precision"),
                recall=mean("test/recall"),
                head_params=int(mean("cost/head_params")),
                train_s=mean("cost/train_s"),
                images_per_s=mean("cost/images_per_s"),
                pooled_by_seed=tuple(pooled),
                run_ids=tuple(finished[name].run_id for name in names),
            )
        )
    return sorted(out, key=lambda row: -row.dice)


def words(finished: Mapping[str, Logged], groups: Mapping[str, str], per_image: Mapping[str, dict[str, Any]]) -> list[str]:
    """What the data can tell about the best model against the others, in sentences; empty for a single model."""
    models = []
    for model in dict.fromkeys(groups[name] for name in finished):
        files = [per_image[name] for name in finished if groups[name] == model]
        models.append(Scores(model=model, images=tuple(files[0]["images"]), values=np.array([f["dice"] for f in files])))
    if len(models) < 2:
        return []
    best = max(models, key=lambda scores: scores.mean)
    return verdict(compare_all(models, against=best.model), what="Dice")


HEADINGS = ("model", "seeds", "Dice", "± seeds", "Dice/image", "95 %", "IoU", "precision", "recall", "head", "train s", "image/s")


def cells(row: Row) -> list[str]:
    """A row as text, under ``HEADINGS``."""
    return [
        row.model + (" (baseline)" if row.baseline else ""),
        str(row.num_seeds),
        f"{row.dice:.4f}",
        f"{row.seed_sd:.4f}" if row.seed_sd is not None else "",
        f"{row.image_dice:.4f}",
        f"{row.low:.3f} to {row.high:.3f}" if row.low is not None and row.high is not None else "",
        f"{row.iou:.4f}",
        f"{row.precision:.4f}",
        f"{row.recall:.4f}",
        _short(row.head_params),
        f"{row.train_s:.0f}",
        f"{row.images_per_s:.2f}",
    ]


def text(table: list[Row]) -> str:
    """The leaderboard for a terminal."""
    lines = [list(HEADINGS), *(cells(row) for row in table)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADINGS))]
    out = ["  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    return "\n".join([out[0], "-" * len(out[0]), *out[1:]])


def markdown(table: list[Row]) -> str:
    """The leaderboard for a README or MLflow's notes."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in table])


def as_json(table: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in table]


def bars(table: list[Row]) -> list[dict[str, Any]]:
    """What :func:`cellbench.figures.scoreboard` draws: means over images with their interval."""
    return [
        {
            "model": row.model, "baseline": row.baseline, "dice": row.image_dice,
            "low": row.image_dice if row.low is None else row.low, "high": row.image_dice if row.high is None else row.high,
        }
        for row in table
    ]  # fmt: skip


def _short(num: int) -> str:
    return f"{num / 1e6:.1f} M" if num >= 1e6 else f"{num / 1e3:.0f} k" if num >= 1e3 else str(num)
