"""The chapters of a report: from evidence to sentences, tables and pictures.

``cellbench.reporting.report`` writes them; ``cellbench.reporting.html`` knows how a page looks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cellbench.metrics.pixel import nan_mean
from cellbench.reporting import html, leaderboard, learning_curves, provenance
from cellbench.reporting.collect import ExperimentResults
from cellbench.reporting.leaderboard import LeaderboardRow, format_count
from cellbench.reporting.model_groups import MEASURES, ModelGroup, PlotRow, TestSet
from cellbench.reporting.plots import comparison as comparison_plots
from cellbench.reporting.plots import significance as significance_plots
from cellbench.reporting.plots import style
from cellbench.reporting.verdict import format_p
from cellbench.statistics.ranking import critical_difference, marginal_scores
from cellbench.statistics.scores import Difference, ModelScores
from cellbench.tracking.tracker import Tracker

MOST_RANKED = 20
"""Models in a critical-difference diagram; more are not readable, and the best ones are what is asked about."""
Draw = Callable[..., str]


@dataclass(kw_only=True)
class Report:
    """A page of HTML; tables by name, headings and lines; pictures by name, PNG; the verdict, one sentence an item."""

    html: str = ""
    tables: dict[str, tuple[Sequence[str], list[list[str]]]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    verdict: list[str] = field(default_factory=list)


def build_report(evidence: ExperimentResults, trackers: Sequence[Tracker], known: dict[str, Any]) -> Report:
    """The report of what was collected. ``known``: what :func:`cellbench.reporting.report.report_metadata` recorded; empty for runs of unknown origin."""
    report = Report()
    sections: list[tuple[str, str]] = []
    many = len(evidence.sets) > 1
    if many:
        sections.append(("Different test images", html.render_paragraphs(_apart(evidence))))
    for k, here in enumerate(evidence.sets):
        prefix = f"set{k + 1}-" if k else ""
        label = f" ({here.data}; {here.digest[:8]})" if many else ""
        sections += [(heading + label, body) for heading, body in _about_set(here, trackers, report, prefix)]
    sections.append(("Runs without a result", provenance.describe_missing_runs(evidence)))
    sections.append(("What the measures mean", html.render_paragraphs(provenance.glossary(evidence))))
    sections.append(("How it was made", provenance.describe_environment(evidence, known)))
    num_models = sum(len(here.models) for here in evidence.sets)
    subtitle = f"{evidence.num_runs} finished runs, {num_models} models, {_images(evidence)}; made {time.strftime('%Y-%m-%d %H:%M')}"
    report.verdict = leaderboard.describe(evidence.sets[0]) + leaderboard.describe_other_winners(evidence.sets[0])
    report.verdict += leaderboard.describe_empty_images(evidence.sets[0])
    absent = leaderboard.absent_classes(evidence.sets[0].models[0])
    report.verdict += leaderboard.describe_class_mean(
        [name for name in evidence.sets[0].models[0].runs[0].told.get("classes", []) if name not in absent]
    )
    report.verdict += leaderboard.describe_test_sets(evidence.sets)
    busy = leaderboard.leaderboard_rows(evidence.sets[0])
    if max((row.other_load_pct or 0.0 for row in busy), default=0.0) >= leaderboard.BUSY_PCT:
        report.verdict.append(leaderboard.describe_load(busy).replace("Costs", "Mind: costs", 1))
    lead = html.render_paragraphs([known["question"]]) if known.get("question") else ""
    lead += html.render_paragraphs(report.verdict, "verdict") + provenance.describe_data(evidence, known)
    report.html = html.render_page(evidence.experiment, subtitle, sections, lead)
    return report


def _images(evidence: ExperimentResults) -> str:
    num = len(evidence.sets[0].images)
    return f"{num} test image{'s' * (num != 1)}" + (f" and {len(evidence.sets) - 1} other sets" if len(evidence.sets) > 1 else "")


def _apart(evidence: ExperimentResults) -> list[str]:
    out = [
        "The runs were tested on different images. Scores are paired within one set only; across sets no difference is computed or tested. "
        "The newest set of whole data comes first: the verdict and `best` are about it. Sets under --limit come last."
    ]
    for here in evidence.sets:
        num, when = sum(len(model.runs) for model in here.models), time.strftime("%Y-%m-%d %H:%M", time.localtime(here.last_s))
        out.append(f"{here.data}; data {here.digest}, last run {when}: {num} run{'s' * (num != 1)}, best {here.best.name}.")
    return out


def _about_set(here: TestSet, trackers: Sequence[Tracker], report: Report, prefix: str) -> list[tuple[str, str]]:
    table = leaderboard.leaderboard_rows(here)
    lines = leaderboard.plot_rows(here)
    differences = leaderboard.differences_to_best(here)

    def draw(name: str, figure: Figure, caption: str = "") -> str:
        report.pictures[prefix + name] = data = style.to_png(figure)
        return html.render_picture(data, name, caption)

    cells = [leaderboard.format_row(row) for row in table]
    report.tables[f"{prefix}leaderboard"] = (leaderboard.HEADINGS, cells)
    # Cost has a table of its own: these columns fit a page.
    shown = len(leaderboard.HEADINGS) - 3
    board = html.render_table(leaderboard.HEADINGS[:shown], [line[:shown] for line in cells[: html.MOST_LINES]]) + html.rows_not_shown(
        len(cells)
    )
    if lines:
        board += draw("leaderboard", comparison_plots.plot_leaderboard(lines))
        if len(lines[0].measures) > 1:
            board += draw("measures", comparison_plots.plot_metrics(lines))
    board += draw("images", comparison_plots.plot_distributions([m.name for m in here.models], [m.scores().per_image for m in here.models]))
    board += _heat(here, draw)
    if became := leaderboard.outcome_rows(here):
        report.tables[f"{prefix}cells"] = (leaderboard.OUTCOME_HEADINGS, became)
        board += "<h3>Single cells of all test images</h3>"
        board += html.render_table(leaderboard.OUTCOME_HEADINGS, became[: html.MOST_LINES]) + html.rows_not_shown(len(became))
    return [
        ("Leaderboard", board),
        ("Are the differences real?", _statistics(here, differences, report, prefix, draw)),
        ("How few labels are enough?", _labels(here, report, prefix, draw)),
        ("Cost", _cost(table, lines, report, prefix, draw)),
        ("The best model, image by image", _best(here, trackers)),
    ]


def _heat(here: TestSet, draw: Draw) -> str:
    plain = [model for model in here.models if model.plain and not model.baseline]
    rows, columns = (list(dict.fromkeys(getattr(model, name) for model in plain)) for name in ("backbone", "head"))
    if len(rows) < 2 or len(columns) < 2 or all(math.isnan(model.scores().mean) for model in plain):
        return ""
    rows = rows[: comparison_plots.MOST]
    values = np.full((len(rows), len(columns)), np.nan)
    for model in plain:
        if model.backbone in rows:
            values[rows.index(model.backbone), columns.index(model.head)] = model.scores().mean
    return draw("heatmap", comparison_plots.plot_heatmap(rows, columns, values))


def _labels(here: TestSet, report: Report, prefix: str, draw: Draw) -> str:
    found = learning_curves.learning_curves(here)
    if not found:
        return ""
    counted = all(point.num_train for curve in found for point in curve.points)
    label = "training images learned from" if counted else "share of the training images"
    points = [[(point.num_train if counted else point.fraction, point.dice) for point in curve.points] for curve in found]
    cells = learning_curves.table_rows(found)
    report.tables[f"{prefix}labels"] = (learning_curves.HEADINGS, cells)
    return (
        html.render_paragraphs(learning_curves.describe_curves(found))
        + draw("labels", comparison_plots.plot_learning_curves([curve.model for curve in found], points, label))
        + html.render_table(learning_curves.HEADINGS, cells[: html.MOST_LINES])
        + html.rows_not_shown(len(cells))
    )


# --- statistics -------------------------------------------------------------------------------------------------------------------------

DIFFERENCE_HEADINGS = ("model", "minus", "difference", "95 %", "p (adjusted)", "effect", "better on", "equal on", "verdict")


def _difference(d: Difference, folded: bool) -> list[str]:
    """A comparison as text, under the headings above; with folds the p of the folds' own test stands last."""
    return [
        d.a,
        d.b,
        f"{d.interval.mean:+.4f}",
        leaderboard.format_interval(d.interval.low, d.interval.high, d.interval.rough, "+.4f") or "none",
        format_p(d.p_adjusted).removeprefix("p = ").removeprefix("p "),
        f"{d.effect:+.2f}",
        f"{d.wins} of {d.num_images}",
        str(d.ties),
        "cannot tell" if d.better is None else "better" if d.better == d.a else "worse",
        *([f"{d.p_folds:.3f}" if d.p_folds is not None else ""] if folded else []),
    ]


def _statistics(here: TestSet, differences: list[Difference], report: Report, prefix: str, draw: Draw) -> str:
    if not differences:
        return ""
    best, folded = differences[0].b, here.num_folds > 1
    headings = (*DIFFERENCE_HEADINGS, *(("p over folds",) if folded else ()))
    lines = [_difference(d, folded) for d in sorted(differences, key=lambda d: -d.interval.mean)]
    every = leaderboard.pairwise_differences(here)
    report.tables[f"{prefix}differences"] = (headings, lines)
    report.tables[f"{prefix}pairs"] = (headings, [_difference(d, folded) for d in every])
    out = draw("differences", significance_plots.plot_differences(differences, best))
    out += html.render_table(headings, lines[: html.MOST_LINES]) + html.rows_not_shown(len(lines))
    if len(here.models) > 2 and len(every) > len(differences):
        out += "<h3>Every pair</h3>" + draw("pairs", significance_plots.plot_pairs([model.name for model in here.models], every))
    ranked = here.models[:MOST_RANKED]
    if len(ranked) > 2 and here.decidable:
        only = f" of the {MOST_RANKED} best models" if len(here.models) > MOST_RANKED else ""
        out += _ranked(f"Mean ranks{only}", [model.scores() for model in ranked], "ranks", here.num_pairs, draw)
    plain = [model for model in here.models if model.plain and not model.baseline]
    scores = [model.scores() for model in plain]
    for one, other in (("backbone", "head"), ("head", "backbone")):
        own = [getattr(model, one) for model in plain]
        if 1 < len(set(own)) <= MOST_RANKED and len(plain) > 2:
            averaged = marginal_scores(scores, own, over=[getattr(model, other) for model in plain])
            if len(averaged) > 1:
                out += _ranked(f"{one.capitalize()}s, {'; '.join(averaged[0].notes)}", averaged, f"ranks-{one}s", here.num_pairs, draw)
    return out


def _ranked(title: str, models: list[ModelScores], name: str, num_pairs: int, draw: Draw) -> str:
    """``num_pairs``: how many pairs the page compares, so that a diagram separates nothing where the page says that nothing can be decided."""
    ranking = critical_difference(models, num_tests=num_pairs)
    picture = draw(name, significance_plots.plot_critical_difference(ranking)) if ranking.critical_difference is not None else ""
    notes = [f"{note[:1].upper()}{note[1:]}." for note in ranking.notes if note not in models[0].notes]
    test = f"{ranking.test}'s test: {format_p(ranking.p)}." if ranking.p is not None else ""
    means = ", ".join(f"{m.model} {m.mean:.4f}" for m in sorted(models, key=lambda m: -m.mean)) if not picture else ""
    return (
        f"<h3>{html.escape(title)}</h3>"
        + html.render_paragraphs([means + "."] if means else [])
        + picture
        + html.render_paragraphs([" ".join([test, *notes])])
    )


# --- cost -------------------------------------------------------------------------------------------------------------------------------

COST_HEADINGS = (
    "model", "backbone", "trained", "training s", "processor s", "images/s", "processor s an image", "load by others", "peak MiB",
    "features kept MiB", "Dice/image",
)  # fmt: skip


def _cost(table: list[LeaderboardRow], lines: list[PlotRow], report: Report, prefix: str, draw: Draw) -> str:
    cells = [
        [
            row.model, format_count(row.backbone_params), format_count(row.head_params), f"{row.train_s:.1f}", leaderboard.format_number(row.train_cpu_s, 1),
            f"{row.images_per_s:.2f}", leaderboard.format_number(row.image_cpu_s, 3), "" if row.other_load_pct is None else f"{row.other_load_pct:.0f} %",
            f"{row.peak_mib:.0f}", f"{row.features_mib:.0f}", leaderboard.format_number(row.image_dice, 4),
        ]
        for row in table
    ]  # fmt: skip
    report.tables[f"{prefix}cost"] = (COST_HEADINGS, cells)
    drawn = {line.model for line in lines}
    costs = {
        "training, s (trunk and head)": [row.train_s for row in table if row.model in drawn],
        "prediction, s an image": [1 / row.images_per_s if row.images_per_s else 0.0 for row in table if row.model in drawn],
    }
    load = leaderboard.describe_load(table)
    notes = [
        load,
        "Backbone and trained: parameters. Processor seconds are what the threads of a run used of the processor; on a GPU, what handing the work "
        "over took. The load by others is the largest share of the processor that other processes used while a run was trained or tested.",
        "Training seconds are computing time, summed over the lanes that work side by side, and hold the backbone's pass, which runs of one "
        "cohort share: each is charged all of it, and of the features kept too. Peak memory is the whole process's up to that run, so later "
        "runs never show less.",
    ]
    return (
        (draw("cost", comparison_plots.plot_pareto(lines, costs), load) if lines else "")
        + html.render_table(COST_HEADINGS, cells[: html.MOST_LINES])
        + html.rows_not_shown(len(cells))
        + html.render_paragraphs(notes)
    )


def _best(here: TestSet, trackers: Sequence[Tracker]) -> str:
    """Pictures that the best model's first run left, and its worst images by name; where it learned nothing, the best that did as well."""
    model = here.best
    out = _pictures(model, trackers)
    scores = model.scores()
    per_image = scores.per_image
    order = np.argsort(per_image, kind="stable")[:10]
    names = [name for name in ("dice", *MEASURES) if model.has(name)]
    names = list(dict.fromkeys(names))
    means = {name: model.scores(name).per_image for name in names}
    rivals = np.array([one.scores().per_image for one in here.models])
    headings = ("worst images", *(MEASURES[name] for name in names), "mean of all models")
    number = leaderboard.format_number
    lines = [[here.images[k], *(number(means[name][k], 4) for name in names), number(nan_mean(rivals[:, k]), 4)] for k in order.tolist()]
    out += html.render_table(headings, lines)
    trained = next((one for one in here.models if "best/val_dice" in one.runs[0].stored.metrics), None)
    return out if trained in (None, model) else out + _pictures(trained, trackers)


def _pictures(model: ModelGroup, trackers: Sequence[Tracker]) -> str:
    run = model.runs[0]
    fold = f", fold {run.fold}" if run.fold is not None else ""
    out = f"<h3>{html.escape(f'{model.name}, seed {run.seed}{fold}')}</h3>"
    for name, photo in (("scores", False), ("curves", False), ("worst", True), ("median", True), ("best", True)):
        data = next((found for tracker in trackers if (found := tracker.artifact(run.stored, f"figures/{name}.png"))), None)
        if data is not None:
            out += html.render_picture(data, name, photo=photo)
    return out
