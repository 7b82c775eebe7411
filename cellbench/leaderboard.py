"""Models lined up: seeds of one model together, best first, and whether the differences are real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cellbench import escaping
from cellbench.lineup import MEASURES, Line, Model, TestSet
from cellbench.ranking import verdict
from cellbench.scored import Difference, flipped
from cellbench.significance import Interval
from cellbench.stats import compare_all


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: the mean over its seeds of each score. None: its runs have no such score."""

    model: str
    backbone: str
    head: str
    baseline: bool
    num_seeds: int
    dice: float
    """Pooled over all pixels of the test images, cell class."""
    seed_sd: float | None
    image_dice: float
    """Mean over test images of the Dice of each; rows are sorted by it, since it is what is tested."""
    low: float | None
    high: float | None
    """95 % interval of ``image_dice`` over images."""
    iou: float
    precision: float
    recall: float
    nsd: float | None
    ap50: float | None
    ap50_95: float | None
    aji: float | None
    pq: float | None
    count_error: float | None
    head_params: int
    backbone_params: int
    train_s: float
    images_per_s: float
    peak_mib: float
    features_mib: float
    pooled_by_seed: tuple[float, ...]
    run_ids: tuple[str, ...]


def rows(here: TestSet) -> list[Row]:
    """The models of one test set, best mean Dice first."""
    return [_row(model, interval) for model, interval in zip(here.models, here.intervals("dice"), strict=True)]


def _row(model: Model, interval: Interval) -> Row:
    pooled = model.pooled("dice")

    def cost(name: str) -> float:
        return model.mean(f"cost/{name}") or 0.0

    return Row(
        model=model.name,
        backbone=model.backbone,
        head=model.head,
        baseline=model.baseline,
        num_seeds=len(model.by_seed),
        dice=float(np.mean(pooled)),
        seed_sd=float(np.std(pooled, ddof=1)) if len(pooled) > 1 else None,
        image_dice=interval.mean,
        low=interval.low,
        high=interval.high,
        iou=float(np.mean(model.pooled("iou"))),
        precision=float(np.mean(model.pooled("precision"))),
        recall=float(np.mean(model.pooled("recall"))),
        **{name: model.scores(name).mean if model.has(name) else None for name in ("nsd", "ap50", "ap50_95", "aji", "pq")},
        count_error=model.mean("test_image/count_error"),
        head_params=int(cost("head_params")),
        backbone_params=int(cost("backbone_params")),
        train_s=cost("train_s"),
        images_per_s=cost("images_per_s"),
        peak_mib=cost("peak_mib"),
        features_mib=cost("features_mib"),
        pooled_by_seed=tuple(pooled),
        run_ids=tuple(run.stored.run_id for run in model.runs),
    )


ALL_PAIRS = 40
"""Up to so many models every pair is compared, 0.8 s a measure; of more, each with the best."""


def pairs(here: TestSet, measure: str = "dice") -> list[Difference]:
    """Every pair of models, or with more than ``ALL_PAIRS`` models each with the best; p is adjusted for every pair either way."""
    if measure not in here.differences:
        models = [model.scores(measure) for model in here.models]
        if len(models) < 2:
            here.differences[measure] = []
        elif len(models) <= ALL_PAIRS:
            here.differences[measure] = compare_all(models)
        else:
            here.differences[measure] = compare_all(models, against=best_by(here, measure), picked=True)
    return here.differences[measure]


def differences(here: TestSet, measure: str = "dice") -> list[Difference]:
    """Every model against the best by this measure, the best as second; empty for a single model.

    The best was picked by the scores that are tested, so p is adjusted for every pair that might have been asked about, not for these alone.
    """
    best = best_by(here, measure)
    return [d if d.b == best else flipped(d) for d in pairs(here, measure) if best in (d.a, d.b)]


def best_by(here: TestSet, measure: str) -> str:
    """The model with the highest mean over images."""
    return max(here.models, key=lambda model: model.scores(measure).mean).name


def winners(here: TestSet, most: int = 3) -> list[Model]:
    """The best model, and up to ``most`` in all, the best first, of those that the data cannot tell from it and whose interval holds 0.

    Both, because few images cannot tell a good model from a useless one.
    """
    tied = {d.a for d in differences(here) if d.better is None and not d.interval.excludes_zero}
    return [model for model in here.models if model is here.best or model.name in tied][:most]


def words(here: TestSet) -> list[str]:
    """What the data can tell about the best model against the others, in sentences."""
    found = differences(here)
    return verdict(found, what="Dice") if found else ["One model alone: there is nothing to compare."]


def more_words(here: TestSet) -> list[str]:
    """One sentence a measure where outlines or cells name another winner than Dice, or the same."""
    out = []
    for measure in (name for name in ("nsd", "ap50", "pq") if name in here.measures()):
        found = differences(here, measure)
        if not found:
            continue
        best = found[0].b
        num = sum(d.better == best for d in found)
        means = {d.a: d.mean_a for d in found}
        spread = found[0].mean_b - min(means.values())
        beaten = f"{num} of {len(found)} others" if num else "none of the others"
        score = f"{found[0].mean_b:.3f}"
        out.append(
            f"By {MEASURES[measure]} the best is {best} with {score}; it beats {beaten} for certain; best and last are {spread:.3f} apart."
        )
    return out


HEADINGS = (
    "model", "seeds", "Dice", "± seeds", "Dice/image", "95 %", "IoU", "precision", "recall", "NSD", "AP50", "head", "train s", "image/s",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as text, under ``HEADINGS``."""
    return [
        row.model + (" (baseline)" if row.baseline else ""),
        str(row.num_seeds),
        f"{row.dice:.4f}",
        number(row.seed_sd, 4),
        f"{row.image_dice:.4f}",
        f"{row.low:.3f} to {row.high:.3f}" if row.low is not None and row.high is not None else "",
        f"{row.iou:.4f}",
        f"{row.precision:.4f}",
        f"{row.recall:.4f}",
        number(row.nsd, 3),
        number(row.ap50, 3),
        short(row.head_params),
        f"{row.train_s:.0f}",
        f"{row.images_per_s:.2f}",
    ]


def text(table: Sequence[Row]) -> str:
    """The leaderboard for a terminal."""
    lines = [list(HEADINGS), *(cells(row) for row in table)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADINGS))]
    out = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]) for line in lines]
    return "\n".join([out[0], "-" * len(out[0]), *out[1:]])


def class_words(classes: Sequence[str]) -> list[str]:
    """What one number of several cell classes is; nothing to say where there is one. ``classes``: the background first.

    >>> class_words(["background", "cytoplasm", "nucleus"])
    ['Dice and the other measures are means over cytoplasm, nucleus; MLflow has each alone, as test_cytoplasm/dice.']
    """
    if len(classes) < 3:
        return []
    return [f"Dice and the other measures are means over {', '.join(classes[1:])}; MLflow has each alone, as test_{classes[1]}/dice."]


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a README or MLflow's notes; the first column is text."""
    out = ["| " + " | ".join(map(escaping.markdown, headings)) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join(out + ["| " + " | ".join(map(escaping.markdown, line)) + " |" for line in lines])


def as_json(table: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in table]


def lines(here: TestSet) -> list[Line]:
    """What the pictures draw of each model: the measures that all have, with intervals."""
    names = [name for name in ("dice", "nsd", "ap50", "pq") if name in here.measures()]
    return [
        Line(
            model=model.name,
            baseline=model.baseline,
            backbone=model.backbone,
            measures={MEASURES[name]: here.intervals(name)[k] for name in names},
        )
        for k, model in enumerate(here.models)
    ]


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def short(num: int) -> str:
    """A count as people say it.

    >>> short(22_056_576), short(37_000), short(0)
    ('22.1 M', '37 k', '0')
    """
    return f"{num / 1e6:.1f} M" if num >= 1e6 else f"{num / 1e3:.0f} k" if num >= 1e3 else str(num)
