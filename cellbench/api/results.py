"""The results of an experiment as tables (pandas), comparisons and a report."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cellbench.errors import CellbenchError, unknown_name
from cellbench.metrics import catalog
from cellbench.metrics.catalog import Metric
from cellbench.reporting.collect import ExperimentResults, collect_report, collect_runs
from cellbench.reporting.difference_sentences import describe_difference
from cellbench.reporting.grouping import name_words
from cellbench.reporting.leaderboard import format_row, leaderboard_rows, terminal_table
from cellbench.reporting.model_groups import FinishedRun, ModelGroup, TestSet
from cellbench.reporting.shift import Shift, further_sets, shift_of
from cellbench.reporting.verdict import conclude
from cellbench.statistics.comparison import compare_all
from cellbench.statistics.scores import Difference, swap_sides
from cellbench.tracking.tracker import Tracker

if TYPE_CHECKING:
    from cellbench.inference.segmenter import Segmenter


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """Model ``a`` compared with model ``b``, paired by test image. ``str()`` is a sentence.

    Images of one patient, slide or smear count as one unit, where the data says which belong together.
    """

    a: str
    b: str
    metric: str
    """Key of the metric, like ``dice``."""
    mean_a: float
    mean_b: float
    """Mean over the test images, in the metric's unit (a share from 0 to 1 for most)."""
    difference: float
    """Mean of a - b."""
    low: float | None
    high: float | None
    """95 % interval of ``difference``, by the bootstrap over images, of this pair alone. None with fewer than four images."""
    p: float
    """Wilcoxon signed-rank test, two-sided, of this pair alone."""
    p_adjusted: float
    """Adjusted for all ``num_pairs`` pairs of models (Holm), as in the report."""
    num_pairs: int
    effect: float
    """Matched-pairs rank-biserial correlation, -1 to 1; positive where ``a`` is higher."""
    wins: int
    """Images on which ``a`` is better."""
    ties: int
    losses: int
    significant: bool
    """``p_adjusted`` is below 0.05, the interval excludes 0, and mean and ranks agree."""
    better: str | None
    """The significantly better model, or None."""
    notes: tuple[str, ...]
    """What limits the comparison."""
    sentence: str

    def __str__(self) -> str:
        return self.sentence

    __repr__ = __str__

    @classmethod
    def of(cls, d: Difference, metric: Metric) -> Comparison:
        """The comparison as it is public."""
        return cls(
            a=d.a,
            b=d.b,
            metric=metric.key,
            mean_a=d.mean_a,
            mean_b=d.mean_b,
            difference=d.interval.mean,
            low=d.interval.low,
            high=d.interval.high,
            p=d.p,
            p_adjusted=d.p_adjusted,
            num_pairs=d.num_tests,
            effect=d.effect,
            wins=d.wins,
            ties=d.ties,
            losses=d.losses,
            significant=d.significant,
            better=d.better,
            notes=tuple(note for note in dict.fromkeys((d.interval.note, *d.notes)) if note),
            sentence=f"{describe_difference(d, metric.label)}.",
        )


class Results:
    """The finished runs of an experiment. Made by :func:`cellbench.grid` and :func:`cellbench.results`.

    A model is all runs that differ in seed and fold only. Everything here is about one set of test images, the newest whole one; results on
    other test images, which are never paired with these, are in :attr:`others`.
    """

    def __init__(self, found: ExperimentResults, trackers: Sequence[Tracker], only: Collection[str] | None = None) -> None:
        self._found, self._trackers, self._only = found, tuple(trackers), only
        self._here: TestSet = found.sets[0]

    @functools.cached_property
    def _shift(self) -> Shift | None:
        return shift_of(self._here)

    @classmethod
    def collect(
        cls,
        trackers: Sequence[Tracker],
        only: Collection[str] | None = None,
        *,
        skipped: Mapping[str, str] | None = None,
        failed: Mapping[str, str] | None = None,
    ) -> Results:
        """Reads the runs of these experiments; ``only``: those with these ids. Raises CellbenchError if none has scores."""
        found = collect_runs(trackers, only)
        if only is not None:
            found = replace(found, skipped=dict(skipped or {}), failed=dict(failed or {}))
        return cls(found, trackers, only)

    @property
    def experiment(self) -> str:
        """Name of the experiment in MLflow."""
        return self._found.experiment

    @property
    def data(self) -> str:
        """The data and the numbers of images, in words."""
        return self._here.description

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the best first, by the mean over images of Dice."""
        return tuple(model.name for model in self._here.models)

    @property
    def best(self) -> str:
        """Name of the best model."""
        return self._here.best.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of the metrics that :meth:`compare` takes: the per-image scores that every model has."""
        return tuple(metric.key for metric in self._here.compared_metrics())

    @property
    def skipped(self) -> Mapping[str, str]:
        """Runs that could not start, such as for missing weights, by name, with the reason."""
        return self._found.skipped

    @property
    def failed(self) -> Mapping[str, str]:
        """Runs that failed, by name, with the reason."""
        return self._found.failed

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about runs that are not in the tables, and why."""
        return self._found.left_out

    @property
    def others(self) -> tuple[Results, ...]:
        """The results on other test images of the same experiment, the newest first."""
        return tuple(Results(replace(self._found, sets=(one,)), self._trackers, _ids(one)) for one in self._found.sets[1:])

    @property
    def further(self) -> dict[str, Results]:
        """The results of the same models on each further test set of ``[data] tests``, by its name."""
        sets = {one.dataset: one for one in further_sets(self._here)}
        return {name: Results(replace(self._found, sets=(one,)), self._trackers, _ids(one)) for name, one in sets.items()}

    def shift(self) -> pd.DataFrame:
        """One row a model and condition: perturbed images, appearances and further test sets. Empty where there are none.

        Columns: ``model``, ``condition`` (``blur-2``, …), ``kind``, ``num_images``, ``dice`` (mean over images) and ``fall`` (from the unperturbed
        images; missing for other images).
        """
        found = self._shift
        rows = [
            {
                "model": model,
                "condition": one.name,
                "kind": one.kind,
                "num_images": len(one.dice[model]),
                "dice": one.mean(model),
                "fall": one.fall(model),
            }
            for model in (found.models if found else ())
            for one in (found.conditions if found else ())
        ]
        return _with_numbers(pd.DataFrame(rows, columns=["model", "condition", "kind", "num_images", "dice", "fall"]))

    def leaderboard(self) -> pd.DataFrame:
        """One row a model, the best first.

        Columns: ``model``, ``backbone`` and ``head`` (missing for a baseline), ``baseline`` (bool), ``num_seeds``, ``dice_per_image`` (mean over
        test images, by which rows are sorted) with its 95 % interval ``low`` to ``high``, ``p_to_best`` (of the difference to the best model,
        adjusted for all pairs; NaN for the best), the scores of the leaderboard by key (overlap scores like ``dice`` over all pixels of all
        test images, others as mean over images, mostly shares from 0 to 1), the costs by key (``train_s`` seconds, ``peak_mib`` MiB, …),
        and ``run_ids``. NaN: undefined, or not recorded.
        """
        rows = [
            {
                "model": row.model,
                "backbone": None if row.backbone == "none" else row.backbone,
                "head": None if row.head == "none" else row.head,
                "baseline": row.baseline,
                "num_seeds": row.num_seeds,
                "dice_per_image": row.image_dice,
                "low": row.low,
                "high": row.high,
                "p_to_best": row.p_to_best,
                **row.scores,
                **row.costs,
                "run_ids": list(row.run_ids),
            }
            for row in leaderboard_rows(self._here)
        ]
        return _with_numbers(pd.DataFrame(rows))

    def per_image(self) -> pd.DataFrame:
        """One row an image and run, models in the order of the leaderboard.

        Columns: ``image`` (file name), ``group`` (patient, slide or smear; missing where unknown), ``model``, ``backbone`` and ``head`` (missing
        for a baseline), ``seed``, ``fold`` (missing without folds), ``run_id``, each score of one image by key (``dice``, ``iou``, ``nsd``,
        ``ap50``, …, those of your own metrics too) and the numbers of cells (``num_true``, ``num_found``, ``num_missed``, …). NaN: the image
        has nothing to score, because it has no cell and none was predicted.
        """
        frames = [
            pd.DataFrame(
                {
                    "image": run.per_image["images"],
                    "group": [group or None for group in run.per_image.get("groups") or [None] * len(run.per_image["images"])],
                    "model": model.name,
                    "backbone": None if model.backbone == "none" else model.backbone,
                    "head": None if model.head == "none" else model.head,
                    "seed": run.seed,
                    "fold": pd.array([run.fold] * len(run.per_image["images"]), dtype="Int64"),
                    "run_id": run.record.run_id,
                    **{
                        metric.key: pd.array(run.per_image[metric.key], dtype="float64")
                        for metric in (*catalog.per_image(model.own_metrics), *catalog.counts())
                        if metric.key in run.per_image
                    },
                }
            )
            for model, run in self._runs()
        ]
        return pd.concat(frames, ignore_index=True)

    def runs(self) -> pd.DataFrame:
        """One row a finished run, models in the order of the leaderboard.

        Columns: ``run_id``, ``name``, ``model``, ``started`` (UTC), then the settings (text, as MLflow stores them: ``lr``, ``epochs``, …)
        and the metrics by their names in MLflow (``test/dice``, ``best/val_dice``, ``cost/train_s``, …).
        """
        rows = [
            {
                "run_id": run.record.run_id,
                "name": run.record.name,
                "model": model.name,
                "started": pd.Timestamp(run.record.start_s, unit="s", tz="UTC"),
                **run.record.params,
                **run.record.metrics,
            }
            for model, run in self._runs()
        ]
        return pd.DataFrame(rows)

    def compare(self, a: str, b: str | None = None, *, metric: str = "dice") -> Comparison:
        """Compares two models, paired by test image.

        Args:
            a: name of a model as in :attr:`models`; any separator will do: ``vit-tiny-in1k detail`` for ``vit-tiny-in1k · detail``.
            b: name of the other; by default the best of all but ``a``.
            metric: key of a per-image score, one of :attr:`metrics`.

        p is adjusted for every pair of models of the experiment, as in the report: whoever looks at all of them may compare any two.
        Raises CellbenchError for an unknown name.

        >>> print(results.compare("vit-tiny-in1k · detail", "otsu"))  # doctest: +SKIP
        vit-tiny-in1k · detail is better than otsu by 0.112 Dice (95 % 0.093 to 0.134, p < 0.001, better on 12 of 12 images).

        """
        found, first = self._metric(metric), self._model(a)
        if b is None:
            if len(self._here.models) < 2:
                raise CellbenchError(f"'{first.name}' is the only model: there is nothing to compare it with.")
            second = min((model for model in self._here.models if model is not first), key=lambda model: model.sort_key(metric))
        else:
            second = self._model(b)
        if first is second:
            raise CellbenchError(f"'{a}' and '{b}' are the same model, {first.name}. Name two of: {', '.join(self.models)}.")
        wanted = {first.name, second.name}
        pair = next((d for d in self._here.differences(metric) if {d.a, d.b} == wanted), None)
        if pair is None:  # of so many models only the differences to the best are known; adjusted for all pairs nevertheless
            (alone,) = compare_all([first.scores(metric), second.scores(metric)])
            num = self._here.num_pairs
            pair = replace(alone, p_adjusted=min(1.0, alone.p * num), num_tests=num)
        return Comparison.of(pair if pair.a == first.name else swap_sides(pair), found)

    def comparisons(self, metric: str = "dice") -> pd.DataFrame:
        """Every pair of models, one row a pair, with the fields of :class:`Comparison`; of more than 40 models, each with the best."""
        found = self._metric(metric)
        return pd.DataFrame([vars(Comparison.of(d, found)) for d in self._here.differences(metric)])

    def verdict(self) -> str:
        """Which model is best, whether the differences are significant, and what limits this: at most five lines."""
        return "\n".join(conclude(self._found, leaderboard_rows(self._here), self._shift).lines)

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Writes the report into a folder: ``report.html``, and tables (CSV, Markdown, LaTeX) and figures beside it.

        Args:
            out: the folder, made if need be; by default ``reports/EXPERIMENT``.

        Returns the path of ``report.html``. Raises CellbenchError if the folder cannot be written.

        """
        from cellbench.reporting.render import write_report_files
        from cellbench.reporting.report import report_dir
        from cellbench.reporting.sections import build_report

        made = build_report(collect_report(self._trackers, only=self._only))
        return write_report_files(made, Path(out) if out is not None else report_dir(self.experiment))

    def segmenter(self, model: str | None = None, **where: Any) -> Segmenter:
        """The trained model, ready to segment images; of its seeds and folds the one with the best validation Dice.

        Args:
            model: name of a model, by default the best.
            **where: ``weights``, ``registry``, ``device`` and ``precision``, as for :meth:`cellbench.Segmenter.load`.

        """
        from cellbench.inference.segmenter import Segmenter

        chosen = self._here.best if model is None else self._model(model)
        return Segmenter.load(chosen.chosen.record.run_id, **where)

    def __repr__(self) -> str:
        return f"<Results '{self.experiment}' on {self.data}: {len(self.models)} models, best {self.best}>"

    def __str__(self) -> str:
        table = terminal_table(leaderboard_rows(self._here, self._shift), self._here.own_metrics)
        return f"{self.experiment}, on {self.data}\n\n{table}\n\n{self.verdict()}"

    def _repr_html_(self) -> str:
        rows = [format_row(row, self._here.own_metrics) for row in leaderboard_rows(self._here)]
        title = f"<p><b>{html.escape(self.experiment)}</b>, on {html.escape(self.data)}</p>"
        sentences = "".join(f"<p>{html.escape(line)}</p>" for line in self.verdict().splitlines())
        table: str = pd.DataFrame(rows).to_html(index=False, border=0)
        return title + table + sentences

    def _runs(self) -> list[tuple[ModelGroup, FinishedRun]]:
        return [(model, run) for model in self._here.models for run in model.runs]

    def _model(self, name: str) -> ModelGroup:
        for model in self._here.models:
            if name_words(model.name) == name_words(name):
                return model
        raise unknown_name("model", name, list(self.models))

    def _metric(self, key: str) -> Metric:
        found = {metric.key: metric for metric in self._here.compared_metrics()}
        if key not in found:
            raise unknown_name("per-image metric", key, list(found))
        return found[key]


def _ids(here: TestSet) -> set[str]:
    return {run.record.run_id for model in here.models for run in model.runs}


def _with_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of numbers and None as float64 with NaN."""
    for column in table:
        if table[column].dtype == object and all(one is None or isinstance(one, float | int) for one in table[column]):
            table[column] = table[column].astype("float64")
    return table
