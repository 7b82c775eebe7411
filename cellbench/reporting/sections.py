"""Analyses the collected runs: from results to the report's records. A new figure is one line here and its function in ``plots/``."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from cellbench.errors import quantity
from cellbench.metrics import catalog
from cellbench.metrics.counting import counts_by_label
from cellbench.metrics.instance import COUNTS, describe_outcomes
from cellbench.metrics.pixel import nan_mean
from cellbench.reporting import provenance
from cellbench.reporting.cells import class_rows, describe_errors, models_with_classes
from cellbench.reporting.collect import EXAMPLE_FIGURES, ExperimentResults
from cellbench.reporting.counts import MEANING, evaluation_rows, model_counts, model_rows
from cellbench.reporting.decisions import describe_doubling, images_needed, is_equivalent
from cellbench.reporting.difference_sentences import describe_outcome
from cellbench.reporting.leaderboard import (
    LeaderboardRow,
    format_interval,
    format_metric,
    format_number,
    format_p,
    format_p_cell,
    format_row,
    leaderboard_rows,
    outcome_rows,
)
from cellbench.reporting.learning_curves import LearningCurve, learning_curves
from cellbench.reporting.model_groups import FinishedRun, ModelGroup, TestSet
from cellbench.reporting.plot_rows import plot_rows
from cellbench.reporting.render import PLACE
from cellbench.reporting.report_data import Block, Figure, Heading, ReportData, Section, StoredImage, Table, Text
from cellbench.reporting.shift import shift_of
from cellbench.reporting.shift_section import shift_blocks, shift_rows
from cellbench.reporting.verdict import (
    conclude,
    describe_costs_load,
    describe_learning_curves,
    list_test_sets,
)
from cellbench.statistics.bootstrap import FEWEST
from cellbench.statistics.power import MOST_IMAGES
from cellbench.statistics.ranking import critical_difference, marginal_scores
from cellbench.statistics.scores import Difference, ModelScores

LEADING_COLUMNS = ("model", "Dice/image", "95 %", "Dice", "NSD", "AP50", "train s")
"""Columns of the leaderboard that the page shows unfolded."""
MAX_OPEN_ROWS = 12
MAX_RANKED = 20
"""Models in a critical-difference diagram; more are not readable."""
MAX_HEATED = 30
"""Backbones in the figure of backbones by heads."""
NUM_WORST_IMAGES = 10
COSTS = ("backbone_params", "head_params", "train_s", "train_cpu_s", "images_per_s", "image_cpu_s", "peak_mib", "features_mib")
"""Columns of the table of costs."""


def build_report(results: ExperimentResults) -> ReportData:
    """The records of a report."""
    first, *others = results.sets
    leading, *more = [_TestSetReport(here, results, f"set{k + 1}-" if k else "") for k, here in enumerate(results.sets)]
    rows = leading.rows
    sections = leading.sections()
    if others:
        sections.append(("Different test images", [Text(list_test_sets(results.sets))]))
    for one in more:
        label = f"{one.here.description}; {one.here.digest[:8]}"
        sections += [(f"{title} ({label})", blocks) for title, blocks in [("Leaderboard", one.lead()), *one.sections()]]
    sections += [
        ("Counts on images without masks", _count_evaluations(results)),
        ("The data", [provenance.data_facts(results)]),
        ("Runs without a result", provenance.missing_runs(results)),
        ("What the metrics mean", provenance.glossary(results)),
        ("How it was made", provenance.environment(results)),
    ]
    verdict = conclude(results, rows, leading.shift)
    num_models = sum(len(here.models) for here in results.sets)
    size = f"{quantity(num_models, 'model')}, {results.num_runs} runs"
    return ReportData(
        title=results.experiment,
        subtitle=f"{first.description} · {size} · {time.strftime('%Y-%m-%d %H:%M')}",
        question=results.request.question,
        verdict=verdict.lines,
        notes=verdict.more,
        lead=leading.lead(),
        sections=[Section(title, blocks, folded=True) for title, blocks in sections],
        leaderboard=rows,
        files_only=[table for one in (leading, *more) for table in one.files_only()],
    )


def _count_evaluations(results: ExperimentResults) -> list[Block]:
    rows = evaluation_rows(results.counted)
    headings = list(rows[0]) if rows else []
    return [Text([MEANING]), Table(headings=headings, rows=[list(row.values()) for row in rows])] if rows else []


class _TestSetReport:
    """The blocks about one test set. ``prefix``: of the names of its files."""

    def __init__(self, here: TestSet, results: ExperimentResults, prefix: str) -> None:
        self.here, self.results, self.prefix, self.shift = here, results, prefix, shift_of(here)
        self.rows = leaderboard_rows(here, self.shift)
        self.plotted = plot_rows(here)
        self.cells = [format_row(row, here.own_metrics) for row in self.rows]

    def lead(self) -> list[Block]:
        """What the page shows unfolded: one figure, the leaderboard, the worst image of the best model."""
        worse = {d.a for d in self.here.differences_to_best() if d.better == d.b}
        elsewhere = [*(f"{other.dataset}: Dice/image" for other in (self.shift.sets if self.shift else ())), "lowest Dice"]
        return [
            *([self.figure("leaderboard", "comparison:plot_leaderboard", self.plotted, worse)] if self.plotted else []),
            self.page_table([name for name in (*LEADING_COLUMNS, *elsewhere) if name in self.cells[0]], open_rows=MAX_OPEN_ROWS),
            *self.pictures(self.here.best, ("worst",)),
            *([Text(errors)] if (errors := describe_errors(self.here.best)) else []),
        ]

    def sections(self) -> list[tuple[str, list[Block]]]:
        return [
            ("Are the differences significant?", self.differences()),
            ("How far does each model fall?", shift_blocks(self.shift, self.prefix) if self.shift is not None else []),
            ("Other scores", self.leaderboard()),
            ("Classes of cells", self.cell_classes()),
            ("Counts", self.counts()),
            ("Image by image", self.images()),
            ("How few training images are enough?", self.learning_curves()),
            ("Cost", self.cost()),
            ("Pictures and curves of the best model", self.examples()),
        ]

    def figure(self, name: str, plot: str, *arguments: object, note: str = "") -> Figure:
        """A figure by the function ``plot``, ``module:name``. ``note``: follows its caption."""
        return Figure(name=self.prefix + name, plot=plot, arguments=arguments, note=note)

    def table(self, name: str, rows: Sequence[Mapping[str, str]]) -> Table:
        """A table that is a file too; ``rows``: cells by heading."""
        headings = list(rows[0]) if rows else []
        return Table(name=self.prefix + name, headings=headings, rows=[list(row.values()) for row in rows])

    def page_table(self, columns: Sequence[str], open_rows: int | None = None) -> Table:
        """Some columns of the leaderboard, with the place of each model. The whole leaderboard is a file."""
        rows = [[str(place), *(cells[name] for name in columns)] for place, cells in enumerate(self.cells, 1)]
        return Table(headings=[PLACE, *columns], rows=rows, open_rows=open_rows)

    def leaderboard(self) -> list[Block]:
        here = self.here
        costs = {metric.label for metric in catalog.leaderboard() if not metric.per_image}  # they are in a table of their own
        rest = [name for name in self.cells[0] if name not in costs and name not in LEADING_COLUMNS[1:]]
        blocks: list[Block] = [self.page_table(rest)]
        if self.plotted and len(self.plotted[0].metrics) > 1:
            blocks.append(self.figure("measures", "comparison:plot_metrics", self.plotted))
        if (grid := _backbones_by_heads(here)) is not None:
            blocks.append(self.figure("heatmap", "comparison:plot_heatmap", *grid))
        if outcomes := outcome_rows(here):
            blocks += [Heading("Single cells of all test images"), self.table("cells", outcomes)]
        return blocks

    def cell_classes(self) -> list[Block]:
        """Counts and AP50 of each class of cells, and what the best model took each cell for."""
        if not (models := models_with_classes(self.here, MAX_OPEN_ROWS)):
            return []
        best = models[0]
        note = f"{best.name}, all test images{', mean of its seeds' if len(best.by_seed) > 1 else ''}."
        confusion = np.mean(best.cell_confusions, axis=0)
        return [
            self.table("classes", class_rows(models)),
            self.figure("confusion", "cells:plot_cell_confusion", best.classes, confusion, note=note),
        ]

    def counts(self) -> list[Block]:
        """How well the number of cells in each image agrees."""
        counts = model_counts(self.here.models)
        if not counts:
            return []
        shown = counts_by_label([row for rows in list(counts.values())[:3] for row in rows])
        return [Text([MEANING]), self.figure("counts", "counts:plot_agreement", shown), self.table("counts", model_rows(counts))]

    def images(self) -> list[Block]:
        """The scores of each image, and the images on which the best model is worst."""
        here, best = self.here, self.here.best
        names, per_image = [model.name for model in here.models], [model.scores().per_image for model in here.models]
        metrics = [metric for metric in catalog.compared(here.own_metrics) if best.has(metric.key)]
        scores = {metric.label: best.scores(metric.key).per_image for metric in metrics}
        all_models = np.array(per_image)
        rows = [
            [here.images[k], *(format_number(one[k], 3) for one in scores.values()), format_number(nan_mean(all_models[:, k]), 3)]
            for k in np.argsort(best.scores().per_image, kind="stable")[:NUM_WORST_IMAGES].tolist()
        ]
        worst = Table(headings=("image", *scores, "Dice, mean of all models"), rows=rows)
        return [
            self.figure("images", "comparison:plot_distributions", names, per_image),
            Heading(f"The images on which {best.name} is worst"),
            worst,
        ]

    def differences(self) -> list[Block]:
        here, differences, pairs = self.here, self.here.differences_to_best(), self.here.differences()
        if not differences:
            return []
        rows = self.difference_rows
        names = [name for name in rows[0] if name != "minus"]  # the figure's caption says it
        blocks: list[Block] = [
            self.figure("differences", "significance:plot_differences", differences, differences[0].b),
            Table(headings=names, rows=[[row[name] for name in names] for row in rows]),
        ]
        if len(pairs) > len(differences):
            names = [model.name for model in here.models]
            blocks += [Heading("Every pair"), self.figure("pairs", "significance:plot_pairs", names, pairs)]
        ranked = here.models[:MAX_RANKED]
        if len(ranked) > 2 and here.decidable:
            only = f" of the {MAX_RANKED} best models" if len(here.models) > MAX_RANKED else ""
            blocks += self.ranking(f"Mean ranks{only}", [model.scores() for model in ranked], "ranks")
        plain = [model for model in here.models if model.plain and not model.baseline]
        for one, other in (("backbone", "head"), ("head", "backbone")):
            labels = [getattr(model, one) for model in plain]
            if 1 < len(set(labels)) <= MAX_RANKED and len(plain) > 2:
                averaged = marginal_scores([model.scores() for model in plain], labels, over=[getattr(model, other) for model in plain])
                if len(averaged) > 1:
                    blocks += self.ranking(f"{one.capitalize()}s, {'; '.join(averaged[0].notes)}", averaged, f"ranks-{one}s")
        return blocks

    @functools.cached_property
    def difference_rows(self) -> list[dict[str, str]]:
        """Each model minus the best."""
        differences = sorted(self.here.differences_to_best(), key=lambda d: -d.interval.mean)
        return [_difference_row(d, self.here.num_folds > 1) | self.decision_cells(d) for d in differences]

    def decision_cells(self, d: Difference) -> dict[str, str]:
        """Whether two models are equal for practical purposes, and how many images would decide where neither is better."""
        needed = ""
        if d.better is None and d.ties < d.num_images and self.here.num_units >= FEWEST:
            num = images_needed(self.here, d)
            needed = f"> {MOST_IMAGES}" if num is None else str(num)
        return {
            f"equal within {self.here.margin:g}": "yes" if is_equivalent(self.here, d) else "no",
            f"{self.here.unit}s to decide": needed,
        }

    def ranking(self, title: str, models: Sequence[ModelScores], name: str) -> list[Block]:
        # Counts all pairs of the page: a diagram must not separate models if the page says that no difference can be significant.
        ranking = critical_difference(models, num_tests=self.here.num_pairs)
        blocks: list[Block] = [Heading(title)]
        if ranking.critical_difference is not None:
            blocks.append(self.figure(name, "significance:plot_critical_difference", ranking))
        else:
            blocks.append(Text([", ".join(f"{m.model} {m.mean:.4f}" for m in sorted(models, key=lambda m: -m.mean)) + "."]))
        test = [f"{ranking.test}'s test: {format_p(ranking.p)}."] if ranking.p is not None else []
        notes = [f"{note[:1].upper()}{note[1:]}." for note in ranking.notes if note not in models[0].notes]
        return [*blocks, Text([" ".join([*test, *notes])])]

    def learning_curves(self) -> list[Block]:
        curves = learning_curves(self.here)
        if not curves:
            return []
        by_number = all(point.num_train for curve in curves for point in curve.points)
        label = "training images" if by_number else "share of the training images"
        points = [[(point.num_train if by_number else point.fraction, point.dice) for point in curve.points] for curve in curves]
        return [
            Text([*describe_learning_curves(curves), *describe_doubling(curves)]),
            self.figure("labels", "comparison:plot_learning_curves", [curve.model for curve in curves], points, label),
            self.table("labels", _curve_rows(curves)),
        ]

    def cost(self) -> list[Block]:
        load = describe_costs_load(self.rows)
        known = {row.model: row.costs for row in self.rows if row.kind != "external"}  # nothing is known of what another tool costs
        plotted = [line for line in self.plotted if line.model in known]
        costs = [known[line.model] for line in plotted]
        axes = {
            "training, s (backbone and head)": [cost["train_s"] or 0.0 for cost in costs],
            "prediction, s an image": [1 / speed if (speed := cost["images_per_s"]) else 0.0 for cost in costs],
        }
        blocks: list[Block] = [self.figure("cost", "comparison:plot_pareto", plotted, axes, note=load)] if plotted else []
        notes = [
            *([] if plotted else [load]),  # else it is below the figure
            "Backbone and head: parameters, of the head those that were trained. CPU seconds are the processor time of a run's threads; on a "
            "GPU, of handing the work over. Other load is the largest share of the processor that other processes used while a run was trained "
            "or tested.",
            "Training seconds are computing time, summed over threads that work side by side. They hold the backbone's pass, which the runs of a "
            "cohort share: each run is charged all of it, and all of the kept features. Peak memory is the whole process's up to that run, so "
            "later runs never show less.",
        ]
        return [*blocks, self.table("cost", [_cost_row(row) for row in self.rows if row.model in known]), Text(notes)]

    def examples(self) -> list[Block]:
        """More figures of the best model's run; all of the best trained model if that is another one."""
        best, *others = self.here.example_models
        more = self.pictures(best, [name for name in EXAMPLE_FIGURES if name != "worst"])
        return [*more, *(block for model in others for block in (Heading(model.name), *self.pictures(model, EXAMPLE_FIGURES)))]

    def pictures(self, model: ModelGroup, names: Sequence[str]) -> list[Block]:
        """Stored figures of a model's run."""
        run = model.example_run
        images = self.results.examples.get(run.record.run_id, {})
        seed = f", seed {run.seed}" if len(model.by_seed) > 1 else ""
        fold = f", fold {run.fold}" if run.fold is not None else ""
        of = f"of {model.name}{seed}{fold}"
        num = len(run.per_image["images"])
        sizes = {"worst": len(self.here.images)}  # of all folds
        captions = {"scores": f"Scores {of}.", "curves": f"Training {of}."}
        return [
            StoredImage(
                name=name,
                png=images[name],
                photo=name not in captions,
                caption=captions.get(name)
                or f"The {name} of {quantity(sizes.get(name, num), 'test image')} {of}{_example_facts(run, name)}.",
            )
            for name in names
            if name in images
        ]

    def files_only(self) -> list[Table]:
        tables = {
            "leaderboard": self.cells,
            "differences": self.difference_rows,
            "pairs": [_difference_row(d, self.here.num_folds > 1) for d in self.here.differences()],
        }
        if self.shift is not None:
            tables["shift"] = shift_rows(self.shift)
        return [self.table(name, rows) for name, rows in tables.items() if rows]


def _example_facts(run: FinishedRun, which: str) -> str:
    """Name and score of the worst or best image of a run, and its cells: in letters that a phone shows, unlike those in the picture."""
    dice = np.array(run.per_image["dice"], np.float64)
    if which not in ("worst", "best") or np.isnan(dice).all():
        return ""
    k = int(np.nanargmin(dice) if which == "worst" else np.nanargmax(dice))
    counts = {name: run.per_image[name][k] for name in COUNTS if name in run.per_image}
    cells = f"; {describe_outcomes(counts)}" if len(counts) == len(COUNTS) else ""
    return f": {run.per_image['images'][k]}, Dice {dice[k]:.3f}{cells}"


def _backbones_by_heads(here: TestSet) -> tuple[list[str], list[str], np.ndarray] | None:
    """Backbones, heads, and mean Dice of each pair, NaN where it was not run; None for a single backbone or head."""
    plain = [model for model in here.models if model.plain and not model.baseline]
    backbones, heads = list(dict.fromkeys(model.backbone for model in plain)), list(dict.fromkeys(model.head for model in plain))
    if len(backbones) < 2 or len(heads) < 2 or all(math.isnan(model.scores().mean) for model in plain):
        return None
    backbones = backbones[:MAX_HEATED]
    values = np.full((len(backbones), len(heads)), np.nan)
    for model in plain:
        if model.backbone in backbones:
            values[backbones.index(model.backbone), heads.index(model.head)] = model.scores().mean
    return backbones, heads, values


def _difference_row(d: Difference, folds: bool) -> dict[str, str]:
    row = {
        "model": d.a,
        "minus": d.b,
        "difference": f"{d.interval.mean:+.4f}",
        "95 %": format_interval(d.interval.low, d.interval.high, d.interval.rough, "+.4f") or "none",
        "p (adjusted)": format_p_cell(d.p_adjusted),
        "effect": f"{d.effect:+.2f}",
        "better on": f"{d.wins} of {d.num_images}",
        "equal on": str(d.ties),
        "verdict": describe_outcome(d),
    }
    return row | ({"p over folds": format_number(d.p_folds, 3)} if folds else {})


def _curve_rows(curves: Sequence[LearningCurve]) -> list[dict[str, str]]:
    return [
        {
            "model": curve.model,
            "share": f"{point.fraction:.0%}" if point.fraction >= 0.01 else f"{point.fraction:.2%}",
            "training images": str(point.num_train or ""),
            "Dice/image": format_number(point.dice.mean, 4),
            "95 %": format_interval(point.dice.low, point.dice.high, point.dice.rough),
            "minus the largest share": f"{d.interval.mean:+.4f}" if d else "",
            "p (adjusted)": format_p_cell(d.p_adjusted) if d else "",
            "verdict": describe_outcome(d) if d else "",
        }
        for curve in curves
        for point in curve.points
        for d in [point.to_largest]
    ]


def _cost_row(row: LeaderboardRow) -> dict[str, str]:
    costs = {metric.label: format_metric(metric, row.costs[key]) for key in COSTS for metric in [catalog.metric(key)]}
    load = "" if row.other_load_pct is None else f"{row.other_load_pct:.0f} %"
    return {"model": row.model, **costs, "other load": load, "Dice/image": format_number(row.image_dice, 4)}
