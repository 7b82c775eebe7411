"""Models lined up: seeds of one model together, best first, and whether the differences are real."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cellbench import escaping
from cellbench.reporting.model_groups import MEASURES, ModelGroup, PlotRow, TestSet
from cellbench.reporting.verdict import describe_verdict
from cellbench.statistics.bootstrap import Interval
from cellbench.statistics.comparison import compare_all
from cellbench.statistics.scores import Difference, swap_sides
from cellbench.system_load import describe_load as words_of_load


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """One model: the mean over its seeds of each score. None: its runs have no such score."""

    model: str
    backbone: str
    head: str
    baseline: bool
    num_seeds: int
    dice: float | None
    """Pooled over all pixels of the test images, cell class. This and all scores: NaN where there is nothing to score, None in JSON."""
    seed_sd: float | None
    image_dice: float | None
    """Mean over test images of the Dice of each; rows are sorted by it, since it is what is tested."""
    low: float | None
    high: float | None
    """95 % interval of ``image_dice`` over images, or over groups of them."""
    iou: float | None
    precision: float | None
    recall: float | None
    nsd: float | None
    ap50: float | None
    ap50_95: float | None
    aji: float | None
    pq: float | None
    count_error: float | None
    num_empty: int
    """Test images without a cell."""
    num_empty_found: float
    """Those of them in which something was found."""
    head_params: int
    backbone_params: int
    train_s: float
    images_per_s: float
    peak_mib: float
    features_mib: float
    pooled_by_seed: tuple[float, ...]
    run_ids: tuple[str, ...]
    rough: bool = False
    """Whether the interval is of few images."""
    train_cpu_s: float | None = None
    image_cpu_s: float | None = None
    other_load_pct: float | None = None
    """The most of the processor that other processes used, in training or testing any of its runs."""


def leaderboard_rows(here: TestSet) -> list[LeaderboardRow]:
    """The models of one test set, best mean Dice first."""
    return [_row(model, interval) for model, interval in zip(here.models, here.intervals("dice"), strict=True)]


def _row(model: ModelGroup, interval: Interval) -> LeaderboardRow:
    pooled = model.pooled("dice")

    def cost(name: str) -> float:
        return model.mean(f"cost/{name}") or 0.0

    names = ("cost/train_other_load_pct", "cost/test_other_load_pct")
    loads = [run.stored.metrics[name] for run in model.runs for name in names if name in run.stored.metrics]

    return LeaderboardRow(
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
        num_empty=model.empty()[0],
        num_empty_found=model.empty()[1],
        head_params=int(cost("head_params")),
        backbone_params=int(cost("backbone_params")),
        train_s=cost("train_s"),
        images_per_s=cost("images_per_s"),
        peak_mib=cost("peak_mib"),
        features_mib=cost("features_mib"),
        pooled_by_seed=tuple(pooled),
        run_ids=tuple(run.stored.run_id for run in model.runs),
        rough=interval.rough,
        train_cpu_s=model.mean("cost/train_cpu_s"),
        image_cpu_s=model.mean("cost/image_cpu_s"),
        other_load_pct=max(loads, default=None),
    )


ALL_PAIRS = 40
"""Up to so many models every pair is compared, 0.8 s a measure; of more, each with the best."""


def pairwise_differences(here: TestSet, measure: str = "dice") -> list[Difference]:
    """Every pair of models, or with more than ``ALL_PAIRS`` models each with the best; p is adjusted for every pair either way."""
    if measure not in here.differences:
        models = [model.scores(measure) for model in here.models]
        if len(models) < 2:
            here.differences[measure] = []
        elif len(models) <= ALL_PAIRS:
            here.differences[measure] = compare_all(models)
        else:
            here.differences[measure] = compare_all(models, against=best_model(here, measure), picked=True)
    return here.differences[measure]


def differences_to_best(here: TestSet, measure: str = "dice") -> list[Difference]:
    """Every model against the best by this measure, the best as second; empty for a single model.

    The best was picked by the scores that are tested, so p is adjusted for every pair that might have been asked about, not for these alone.
    """
    best = best_model(here, measure)
    return [d if d.b == best else swap_sides(d) for d in pairwise_differences(here, measure) if best in (d.a, d.b)]


BUSY_PCT = 10.0
"""From so much load by other processes on, seconds are said to be longer than they need be."""


def describe_load(table: Sequence[LeaderboardRow]) -> str:
    """How busy other processes kept the machine while the costs were measured, in a sentence."""
    loads = [row.other_load_pct for row in table if row.other_load_pct is not None]
    if not loads:
        return "How busy other processes kept the machine is not recorded."
    few = f" (not recorded for {len(table) - len(loads)} of {len(table)} models)" if len(loads) < len(table) else ""
    said = f"measured {words_of_load(max(loads))}"
    if max(loads) < BUSY_PCT:
        return f"Costs were {said} at most{few}."
    least = f", for some models only {min(loads):.0f} %" if min(loads) < max(loads) / 2 else ""
    return (
        f"Costs were {said}{least}{few}: on an idle machine seconds would be fewer. Processor seconds depend on that least: compare those."
    )


def best_model(here: TestSet, measure: str) -> str:
    """The model with the highest mean over images."""
    return max(here.models, key=lambda model: model.rating(measure)).name


def tied_winners(here: TestSet, most: int = 3) -> list[ModelGroup]:
    """The best model and, best first, those that do not differ significantly from it, up to ``most`` in all.

    The best alone where the images are too few to decide anything: there a useless model does not differ significantly either.
    """
    tied = {d.a for d in differences_to_best(here) if d.better is None} if here.decidable else set()
    return [model for model in here.models if model is here.best or model.name in tied][:most]


def describe(here: TestSet) -> list[str]:
    """What the data can tell about the best model against the others, in sentences, and by which rule it is the best."""
    if all(model.scores().empty.all() for model in here.models):
        return ["No test image has a cell, and no model found one: there is nothing to compare."]
    found = differences_to_best(here)
    if not found:
        return ["One model alone: there is nothing to compare."]
    said = describe_verdict(found, what="Dice")
    return [*said[:2], f"{here.best.name} was {describe_ranking_rule(here)}.", *said[2:]]


def describe_ranking_rule(here: TestSet) -> str:
    """By which rule the best model is the best; empty for one model alone."""
    num = len(here.models)
    if num < 2:
        return ""
    return f"chosen by its test score, the highest mean Dice over images among {num} models; the score of the chosen is optimistic"


def describe_test_sets(sets: Sequence[TestSet]) -> list[str]:
    """Of several test sets, which one is meant by the best and the verdict, and what the others are; nothing to say of a single one."""
    if len(sets) < 2:
        return []
    first, *others = sets
    kind = "newest whole test set" if not first.limit else "newest test set"
    listed = "; ".join(f"{here.data}, best {here.best.name} with {here.best.scores().mean:.3f}" for here in others[:MOST_SETS])
    more = f"; {len(others) - MOST_SETS} more" if len(others) > MOST_SETS else ""
    return [
        f"This is about the {kind}, {first.data}. {len(others)} more {'is' if len(others) == 1 else 'are'} not compared with it: {listed}{more}."
    ]


MOST_SETS = 4
"""Test sets that a sentence names."""


def describe_other_winners(here: TestSet) -> list[str]:
    """One sentence a measure where outlines or cells name another winner than Dice, or the same."""
    out = []
    for measure in (name for name in ("nsd", "ap50", "pq") if name in here.measures()):
        found = differences_to_best(here, measure)
        if not found:
            continue
        best = found[0].b
        num = sum(d.better == best for d in found)
        if all(model.scores(measure).empty.all() for model in here.models):
            continue
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


def format_row(row: LeaderboardRow) -> list[str]:
    """A row as text, under ``HEADINGS``."""
    return [
        row.model + (" (baseline)" if row.baseline else ""),
        str(row.num_seeds),
        format_number(row.dice, 4),
        format_number(row.seed_sd, 4),
        format_number(row.image_dice, 4),
        format_interval(row.low, row.high, row.rough),
        format_number(row.iou, 4),
        format_number(row.precision, 4),
        format_number(row.recall, 4),
        format_number(row.nsd, 3),
        format_number(row.ap50, 3),
        format_count(row.head_params),
        f"{row.train_s:.0f}",
        f"{row.images_per_s:.2f}",
    ]


def format_table(table: Sequence[LeaderboardRow]) -> str:
    """The leaderboard for a terminal."""
    lines = [list(HEADINGS), *(format_row(row) for row in table)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADINGS))]
    out = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]) for line in lines]
    return "\n".join([out[0], "-" * len(out[0]), *out[1:]])


def describe_class_mean(classes: Sequence[str]) -> list[str]:
    """What one number of several cell classes is; nothing to say where there is one. ``classes``: the background first.

    >>> class_words(["background", "cytoplasm", "nucleus"])
    ['Dice and the other measures are means over cytoplasm, nucleus; MLflow has each alone, as test_cytoplasm/dice.']
    """
    if len(classes) < 3:
        return []
    return [f"Dice and the other measures are means over {', '.join(classes[1:])}; MLflow has each alone, as test_{classes[1]}/dice."]


def describe_empty_images(here: TestSet) -> list[str]:
    """Test images without a cell, and classes that no test mask holds: how many, and which models found something there all the same."""
    num, out = here.models[0].empty()[0], []
    if num:
        found = [f"{model.name} ({where:g})" for model in here.models if (where := model.empty()[1])]
        finds = f"Something was found there by {_some(found)}: these images score 0" if found else "No model found anything there"
        out.append(f"Mind: {num} of {len(here.images)} test images have no cell. {finds}. Means leave out those where nothing is found.")
    unused = here.models[0].runs[0].told.get("unused", [])
    for name in absent_classes(here.models[0]):
        where = "mask of the data" if name in unused else "test mask"
        found = [f"{model.name} ({images:g})" for model in here.models if (images := _predicted(model, name))]
        predicted = f"of {len(here.images)} test images some have it predicted: {_some(found)}" if found else "no model predicts it"
        means = "Means leave it out." if name in unused else "Pooled means leave it out; an image in which it is predicted scores 0 for it."
        out.append(f"Mind: no {where} holds '{name}'; {predicted}. {means}")
    return out


def absent_classes(model: ModelGroup) -> list[str]:
    """Of several classes of cells those that no test mask holds; none where runs did not record their pixel counts."""
    if not model.has("confusion") or len(model.runs[0].told["classes"]) < 3:
        return []
    truth = np.sum([np.sum(run.told["confusion"], axis=(0, 2)) for run in model.by_seed[0]], axis=0)
    names = model.runs[0].told["classes"]
    return [names[k] for k in range(1, len(truth)) if not truth[k]]


def _predicted(model: ModelGroup, name: str) -> float:
    """Test images in which a class is predicted, in the mean of the seeds."""
    k = model.runs[0].told["classes"].index(name)
    return float(np.mean([sum(np.count_nonzero(np.sum(run.told["confusion"], axis=1)[:, k]) for run in runs) for runs in model.by_seed]))


def _some(items: Sequence[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


OUTCOME_HEADINGS = ("model", "cells", "found", "missed", "split", "merged", "extra")


def outcome_rows(here: TestSet) -> list[list[str]]:
    """What became of the cells of all test images, one line a model, the mean of its seeds; under ``OUTCOME_HEADINGS``. Models of older versions
    are left out."""
    names = ("num_true", "num_found", "num_missed", "num_split", "num_merged", "num_extra")
    lines = []
    for model in here.models:
        if all(model.has(name) for name in names):
            totals = [np.mean([sum(sum(run.told[name]) for run in runs) for runs in model.by_seed]) for name in names]
            lines.append([model.name, *(f"{total:.10g}" if total == round(total) else f"{total:.1f}" for total in totals)])
    return lines


def to_markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a README or MLflow's notes; the first column is text."""
    out = ["| " + " | ".join(map(escaping.escape_markdown, headings)) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join(out + ["| " + " | ".join(map(escaping.escape_markdown, line)) + " |" for line in lines])


def to_json(table: Sequence[LeaderboardRow]) -> list[dict[str, Any]]:
    """The rows, with None for what has no value."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return [{name: plain(value) for name, value in asdict(row).items()} for row in table]


def plot_rows(here: TestSet) -> list[PlotRow]:
    """What the pictures draw of each model: the measures that all have, with intervals. Models without any score are left out."""
    names = [name for name in ("dice", "nsd", "ap50", "pq") if name in here.measures()]
    names = [name for name in names if name == "dice" or not any(math.isnan(one.mean) for one in here.intervals(name))]
    return [
        PlotRow(
            model=model.name,
            baseline=model.baseline,
            backbone=model.backbone,
            measures={MEASURES[name]: here.intervals(name)[k] for name in names},
        )
        for k, model in enumerate(here.models)
        if not math.isnan(here.intervals("dice")[k].mean)
    ]


def format_interval(low: float | None, high: float | None, rough: bool, style: str = ".3f") -> str:
    """An interval as text, a rough one marked; empty where there is none.

    >>> span(0.9, 0.95, True)
    '≈ 0.900 to 0.950'
    """
    return "" if low is None or high is None else f"{'≈ ' * rough}{low:{style}} to {high:{style}}"


def format_number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def format_count(num: int) -> str:
    """A count as people say it.

    >>> short(22_056_576), short(37_000), short(0)
    ('22.1 M', '37 k', '0')
    """
    return f"{num / 1e6:.1f} M" if num >= 1e6 else f"{num / 1e3:.0f} k" if num >= 1e3 else str(num)
