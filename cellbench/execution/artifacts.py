"""What a finished run leaves: its metrics by the contract's names, and the files beside them."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.torch import save_file

from cellbench import system_load
from cellbench.config.experiment import Experiment
from cellbench.config.run import RunSpec
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.sampling import num_used_images
from cellbench.escaping import escape_markdown
from cellbench.metrics import catalog
from cellbench.metrics.boundary import TOLERANCE_PX
from cellbench.metrics.instance import COUNTS, SCORES, describe_outcomes
from cellbench.metrics.instances import MIN_AREA_NUMBERED_PX, MIN_AREA_PX
from cellbench.metrics.pixel import count_empty_images, named_scores, nan_mean, per_image_scores, pixel_scores
from cellbench.statistics.bootstrap import ROUGH_BELOW, mean_interval, unit_labels
from cellbench.tracking import ui_view
from cellbench.tracking.schema import NOTE, SEEN, TABLES
from cellbench.training.evaluator import RunEvaluation
from cellbench.training.trainer import HeadTrainer


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """A run's test."""

    exam: RunEvaluation
    cost: dict[str, float]
    learner: HeadTrainer | None = None
    preparation: Preparation | None = None
    """What was done to every image; None for a method that sees images as they are."""


def import_plotting() -> None:
    """Imports what draws the pictures: a second that a grid with nothing new need not spend."""
    importlib.import_module("cellbench.reporting.plots.run")


def final_metrics(dataset: Dataset, result: TestResult) -> dict[str, float]:
    """Everything that is logged at the end of a run: pooled scores, means over images with their interval, cells, cost, the best epoch.

    Means go over the images that have a score; ``…_empty1`` are the same with 1 for what has none, as older publications have them. Names
    without a value (a class in neither truth nor prediction) are left out.
    """
    counts, each, outcomes = result.exam.counts, result.exam.per_image(), result.exam.outcomes()
    out = named_scores("test", counts, dataset.classes) | result.cost
    out |= {f"test_image/{name}": nan_mean(values) for name, values in each.items()}
    known, own = np.flatnonzero(~np.isnan(each["dice"])), resampling_units(dataset)
    if known.size:
        interval = mean_interval(each["dice"][known], groups=None if own is None else [own[k] for k in known])
        if interval.low is not None and interval.high is not None:
            out |= {"test_image/dice_low": interval.low, "test_image/dice_high": interval.high, "test_image/dice_units": interval.num}
    out |= {f"test_image/{name}_empty1": float(values.mean()) for name, values in _empty1(counts, each, dataset.unused).items()}
    out["test/num_empty"], out["test/num_empty_found"] = count_empty_images(counts)
    out |= {f"test/{name}": int(values.sum()) for name, values in outcomes.items()}
    errors = outcomes["num_predicted"] - outcomes["num_true"]
    # The mean of signed errors is a bias, in which too many and too few cancel out; the other is how far a count is off.
    out |= {"test_image/count_error": float(errors.mean()), "test_image/count_error_abs": float(np.abs(errors).mean())}
    cut = result.exam.separation
    # What cutting is worth: the same answers, their cells taken as connected regions.
    joined = [one["num_predicted"] - one["num_true"] for one in result.exam.connected]
    out |= {"test_image/ap50_connected": nan_mean(np.array([one["ap50"] for one in result.exam.connected]))}
    out |= {"test_image/count_error_abs_connected": float(np.abs(joined).mean()), "separation/saddle_ratio": cut.saddle_ratio}
    if cut.val_ap50:
        out["separation/val_ap50"] = cut.val_ap50[f"{cut.saddle_ratio:g}"]
    if (calibration := result.exam.calibration()) is not None:
        from cellbench.metrics.calibration import expected_calibration_error

        out["test/calibration_error"] = expected_calibration_error(calibration)
    if result.learner is not None:
        best = result.learner.history[result.learner.best_epoch]
        out |= {"best/epoch": result.learner.best_epoch, "best/val_loss": best["val/loss"], "best/val_dice": best.get("val/dice", math.nan)}
    return {key: round_metric(key, value) for key, value in out.items() if not math.isnan(value)}


def _empty1(counts: np.ndarray, each: Mapping[str, np.ndarray], unused: Collection[int]) -> dict[str, np.ndarray]:
    """Per-image scores (N,) by the older rule: a class in neither truth nor prediction scores 1, and so do the cells of an image without any."""
    old = per_image_scores(counts, absent=1.0)
    num = counts.shape[-1] - 1
    scored = [k for k in range(1, num + 1) if k not in unused]
    present = ((counts.sum(1) + counts.sum(2)) > 0)[:, scored].sum(1)
    outlines = {name: (np.nan_to_num(each[name]) * present + num - present) / num for name in ("nsd", "boundary_dice")}
    cells = {name: np.nan_to_num(each[name], nan=1.0) for name in SCORES if name not in outlines}
    return {"dice": old["dice"], "iou": old["iou"], **outlines, **cells}


def resampling_units(dataset: Dataset) -> tuple[Hashable, ...] | None:
    """What an interval over the test images resamples: their groups, as the report does; None for the images themselves."""
    return unit_labels([sample.name for sample in dataset.test], [sample.group for sample in dataset.test])


def interval_words(values: Mapping[str, float]) -> str:
    """The interval of the mean Dice among a run's metrics, in words; empty where there is none."""
    if "test_image/dice_low" not in values:
        return ""
    rough = "roughly " if values.get("test_image/dice_units", ROUGH_BELOW) < ROUGH_BELOW else ""
    return f" (95 % {rough}{values['test_image/dice_low']:.4f} to {values['test_image/dice_high']:.4f})"


def round_metric(name: str, value: float) -> float:
    """Six decimals of a score and four figures of a cost: what the numbers are worth, and what a column of the UI can show."""
    return float(f"{value:.4g}") if name.startswith("cost/") and not name.endswith("_params") else round(float(value), 6)


def write_artifacts(
    folder: Path,
    name: str,
    run: RunSpec,
    experiment: Experiment,
    datasets: Sequence[Dataset],
    pixels: ImageCache,
    result: TestResult,
    seen: dict[str, Any] | None = None,
) -> None:
    """Writes the files that a tested run leaves into a folder.

    They are ``config.toml``, ``per_image.json``, ``images.json``, ``preparation.json``, ``separation.json``, ``head.safetensors`` and
    ``figures/*.png``.

    ``datasets``: one, or one a fold. ``seen``: what the run keeps of the images that it learned from, as ``seen_images.json``.
    """
    from cellbench.reporting.plots import run as run_plots
    from cellbench.reporting.plots import style

    if seen is not None:
        (folder / SEEN).write_text(json.dumps(seen), encoding="utf-8")
    dataset = datasets[run.fold]
    told = per_image_record(dataset, result)
    if result.learner is not None:
        told["num_train"] = num_used_images(len(dataset.train), run.fraction)
    if experiment.data.folds:
        told |= {"fold": run.fold, "num_folds": experiment.data.folds, "pool": pool_folds(datasets)}
    (folder / "config.toml").write_text(tomli_w.dumps(single_run_experiment(run, experiment)), encoding="utf-8")
    (folder / "per_image.json").write_text(json.dumps(told, allow_nan=False), encoding="utf-8")
    (folder / SEPARATION).write_text(json.dumps(asdict(result.exam.separation)), encoding="utf-8")
    (folder / TABLE).write_text(json.dumps(per_image_table(told), allow_nan=False), encoding="utf-8")
    if result.preparation is not None:
        (folder / "preparation.json").write_text(json.dumps(result.preparation.to_dict()), encoding="utf-8")
    (folder / "figures").mkdir()
    if result.learner is not None:
        save_file({key: x.contiguous() for key, x in result.learner.best_weights.items()}, folder / "head.safetensors")
        style.save_figure(run_plots.plot_curves(result.learner.history, result.learner.best_epoch), folder / "figures" / "curves.png")
    exam = result.exam
    pooled = pixel_scores(exam.counts.sum(0))
    by_class = {label: pooled.of(index) for index, label in enumerate(dataset.classes)}
    style.save_figure(
        run_plots.plot_scores(
            name,
            exam.per_image(),
            by_class,
            exam.calibration(),
            resampling_units(dataset),
            [one for one in exam.own_metrics if not one.unit],
        ),
        folder / "figures" / "scores.png",
    )
    for which, case in exam.examples.cases.items():
        picture, truth = pixels[case.image]
        cells = describe_outcomes(asdict(exam.agreements[case.image]))
        title = f"{which} of {len(pixels)} test images: {pixels.samples[case.image].name}, {case.score}\n{cells}"
        style.save_figure(run_plots.plot_example(picture, truth, case.classes, case.cell, title), folder / "figures" / f"{which}.png")


def pool_folds(datasets: Sequence[Dataset]) -> str:
    """What stands for the data of all folds together: files, classes, and how they were cut. Of one dataset, its own digest."""
    if len(datasets) == 1:
        return datasets[0].digest
    return hashlib.sha256(json.dumps([dataset.digest for dataset in datasets]).encode()).hexdigest()[:16]


TABLE = "images.json"
"""The artifact that MLflow's UI opens as a table, one line an image."""


SEPARATION = "separation.json"
"""The artifact with a run's :class:`~cellbench.metrics.separation.SeparationParams`, field by field."""


def per_image_record(dataset: Dataset, result: TestResult) -> dict[str, object]:
    """The scores of each test image and the counts they come from; any other overlap can be had from those."""
    exam = result.exam
    return {
        "classes": list(dataset.classes),
        "unused": [dataset.classes[k] for k in dataset.unused],
        "images": [sample.name for sample in dataset.test],
        "dataset": dataset.digest,
        "num_images": {split: len(dataset.samples(split)) for split in SPLITS},
        "groups": [sample.group for sample in dataset.test],
        "tolerance_px": TOLERANCE_PX,
        "min_area_px": [dataset.min_cell_px or (MIN_AREA_NUMBERED_PX if one.numbered else MIN_AREA_PX) for one in exam.agreements],
        "separation_saddle_ratio": exam.separation.saddle_ratio,
        "cells_numbered": [one.numbered for one in exam.agreements],
        "confusion": exam.counts.tolist(),
        **{name: _rounded(values) for name, values in exam.per_image().items()},
        **{name: values.tolist() for name, values in exam.outcomes().items()},
        "own_metrics": catalog.to_record(exam.own_metrics),
        "calibration": exam.calibration(),
    }


def _rounded(values: np.ndarray) -> list[float | None]:
    """Six decimals; None, JSON's null, for an image without a score."""
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]


def per_image_table(told: dict[str, Any]) -> dict[str, object]:
    """``per_image`` as the UI's table: worst image first, since that is the one to look at; those without a score last."""
    order = np.argsort(np.array(told["dice"], np.float64), kind="stable").tolist()
    columns = [
        metric.key for metric in catalog.per_image(catalog.from_record(told["own_metrics"])) if metric.key != "accuracy"
    ]  # next to 1
    columns += COUNTS
    return {"columns": ["image", *columns], "data": [[told["images"][k], *(told[name][k] for name in columns)] for k in order]}


def single_run_experiment(run: RunSpec, experiment: Experiment) -> dict[str, object]:
    """An experiment file that asks for this run only: ``grid config.toml`` repeats it."""
    plain = run.model_dump(exclude={"backbone", "head", "baseline", "options", "seed"})
    data = {key: value for key, value in experiment.data.model_dump().items() if value not in (None, {})}
    tree: dict[str, object] = {"experiment": experiment.experiment, "dataset": experiment.dataset}
    if run.baseline:
        part = {"baselines": [run.baseline], "run": {**plain, "seed": run.seed}, "baseline": {run.baseline: run.options}}
    else:
        part = {
            "grid": {"backbone": [run.backbone], "head": [run.head], "seed": [run.seed]},
            "run": plain,
            "head": {run.head or "": run.options},
        }
    return {**tree, **part, "data": data}


def run_tags(name: str, metrics: dict[str, float], machine: str, worst: str) -> dict[str, str]:
    """Tags of a tested run: the machine, notes, and the table of its images.

    ``TABLE`` is named as MLflow's own log_table would name it, which takes 100 ms more. ``worst``: the address of the worst image's picture.
    """
    named = json.dumps([{"path": TABLE, "type": "table"}])
    return {"cellbench.machine": machine, TABLES: named, NOTE: run_note(name, metrics, worst=worst)}


def format_score(values: Mapping[str, float], name: str) -> str:
    """A score as text, where the run has it."""
    return f"{values[name]:.4f}" if name in values else "none (no cell)"


def run_note(name: str, values: dict[str, float], worst: str = "") -> str:
    """A run's notes in MLflow, in Markdown. ``worst``: the address of the worst case's picture."""
    interval = interval_words(values)
    lines = [
        ["test Dice, all pixels pooled", format_score(values, "test/dice")],
        ["test Dice, mean over images", f"{format_score(values, 'test_image/dice')}{interval}"],
        [f"outlines within {TOLERANCE_PX:g} px (NSD)", format_score(values, "test_image/nsd")],
        [
            "AP50",
            f"{format_score(values, 'test_image/ap50')} ({format_score(values, 'test_image/ap50_connected')} where touching cells are not parted)",
        ],
        ["cells of all test images", describe_outcomes({name.removeprefix("test/"): value for name, value in values.items()})],
        ["cells counted, predicted minus true", f"{values['test_image/count_error']:+.1f} an image"],
    ]
    if values["test/num_empty"]:
        empty, found = values["test/num_empty"], values["test/num_empty_found"]
        lines.append(["test images without a cell", f"{empty:g}; something was found in {found:g} of them; means leave out the others"])
    if loads := [values[name] for name in ("cost/train_other_load_pct", "cost/test_other_load_pct") if name in values]:
        lines.append(["costs were measured", system_load.describe_load(max(loads))])
    parts = [
        # The UI shows five lines of a note before it asks for more: the answer comes first.
        f"**{escape_markdown(name)}**: test Dice **{format_score(values, 'test/dice')}** over all pixels, "
        f"{format_score(values, 'test_image/dice')}{interval} as the mean over images.",
        ui_view.padded_table(("what", "score"), lines),
        f"*Artifacts*: `{TABLE}` (each image, worst first), `figures/`, weights, and `config.toml`, which repeats this run.",
    ]
    return "\n\n".join(parts + ([f"The worst test image:\n\n![the worst test image]({worst})"] if worst else []))
