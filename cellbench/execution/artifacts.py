"""The final metrics of a run and the artifacts that it logs to MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w
from safetensors.numpy import save as save_arrays

from cellbench import system_load
from cellbench.config.experiment import Experiment
from cellbench.config.run import RunSpec
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.io.images import thumbnail
from cellbench.data.loading import pool_folds
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.escaping import escape_markdown
from cellbench.metrics import catalog
from cellbench.metrics.boundary import TOLERANCE_PX
from cellbench.metrics.calibration import expected_calibration_error
from cellbench.metrics.cell_classes import cells_of_classes
from cellbench.metrics.counting import CountRow, counts_by_label, counts_csv
from cellbench.metrics.instance import COUNTS, SCORES, describe_outcomes
from cellbench.metrics.instances import MIN_AREA_NUMBERED_PX, MIN_AREA_PX
from cellbench.metrics.pixel import count_empty_images, named_scores, nan_mean, per_image_scores, pixel_scores
from cellbench.metrics.training_features import TrainingFeatures
from cellbench.reporting.plots.by_name import draw_plot
from cellbench.reporting.plots.example import draw_example
from cellbench.statistics.bootstrap import ROUGH_BELOW, mean_interval, unit_labels
from cellbench.tracking import ui_view
from cellbench.tracking.schema import CALIBRATION, NOTE, SEEN, TABLES, TRAINING_FEATURES
from cellbench.training.evaluator import RunEvaluation

if TYPE_CHECKING:
    from cellbench.training.trainer import HeadTrainer


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The evaluation of one run on the test set."""

    evaluation: RunEvaluation
    cost: dict[str, float]
    trainer: HeadTrainer | None = None
    preparation: Preparation | None = None
    """The preprocessing of every image; None for a baseline that reads the raw image."""
    training_features: TrainingFeatures | None = None
    """How the training images look to the backbone; None without one."""


def final_metrics(dataset: Dataset, result: EvaluationResult) -> dict[str, float]:
    """All metrics that are logged at the end of a run.

    They are the pooled scores, the means over images with their interval, the cell counts, the cost and the best epoch. A mean covers the
    images that have a score. In the ``…_empty1`` variants an undefined score counts as 1, as in older publications. A metric without a value
    (a class in neither the reference nor the prediction) is omitted.
    """
    counts, each, outcomes = result.evaluation.counts, result.evaluation.per_image(), result.evaluation.outcomes()
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
    if result.evaluation.cell_matrices:
        for one in cells_of_classes(np.sum(result.evaluation.cell_matrices, axis=0)):
            prefix = f"test_{dataset.classes[one.index]}"
            out |= {f"{prefix}/ap50": one.ap50, f"{prefix}/num_true": one.num_true, f"{prefix}/num_predicted": one.num_predicted}
    errors = outcomes["num_predicted"] - outcomes["num_true"]
    # The mean of signed errors is a bias: overcounts and undercounts cancel out. The mean absolute error is the typical error of a count.
    out |= {"test_image/count_error": float(errors.mean()), "test_image/count_error_abs": float(np.abs(errors).mean())}
    cut = result.evaluation.separation
    # The same predictions with connected regions as cells: shows the effect of the separation.
    joined = [one["num_predicted"] - one["num_true"] for one in result.evaluation.connected]
    out |= {"test_image/ap50_connected": nan_mean(np.array([one["ap50"] for one in result.evaluation.connected]))}
    out |= {"test_image/count_error_abs_connected": float(np.abs(joined).mean())} | {
        f"separation/{name}": value for name, value in cut.setting.items()
    }
    if (val_ap50 := cut.val_ap50_of_setting) is not None:
        out["separation/val_ap50"] = val_ap50
    if (calibration := result.evaluation.calibration()) is not None:
        out["test/calibration_error"] = expected_calibration_error(calibration)
        calibrated, corrected = result.evaluation.calibrated, result.evaluation.calibration(corrected=True)
        if calibrated.is_fitted and corrected is not None:
            out |= {"calibration/temperature": calibrated.temperature, "calibration/test_error": expected_calibration_error(corrected)}
        if estimates := result.evaluation.dice_estimates():
            out["calibration/dice_error"] = float(np.mean([abs(estimated - true) for estimated, true in estimates]))
    if result.trainer is not None:
        if result.trainer.model.adapts:
            out["adapt/own_share"] = result.trainer.model.own_share
        if result.trainer.model.tunes_edges:
            out["adapt/edge_share"] = result.trainer.model.edge_share
        best = result.trainer.history[result.trainer.best_epoch]
        out |= {"best/epoch": result.trainer.best_epoch, "best/val_loss": best["val/loss"], "best/val_dice": best.get("val/dice", math.nan)}
    return {key: round_metric(key, value) for key, value in out.items() if not math.isnan(value)}


def _empty1(counts: np.ndarray, each: Mapping[str, np.ndarray], unused: Collection[int]) -> dict[str, np.ndarray]:
    """Per-image scores (N,) where undefined scores are 1: a class in neither reference nor prediction, or an image without cells."""
    old = per_image_scores(counts, absent=1.0)
    num = counts.shape[-1] - 1
    scored = [k for k in range(1, num + 1) if k not in unused]
    present = ((counts.sum(1) + counts.sum(2)) > 0)[:, scored].sum(1)
    outlines = {name: (np.nan_to_num(each[name]) * present + num - present) / num for name in ("nsd", "boundary_dice")}
    cells = {name: np.nan_to_num(each[name], nan=1.0) for name in SCORES if name not in outlines}
    return {"dice": old["dice"], "iou": old["iou"], **outlines, **cells}


def resampling_units(dataset: Dataset) -> tuple[Hashable, ...] | None:
    """The resampling units of an interval over the test images: their groups, as in the report. None: the images themselves."""
    return unit_labels([sample.name for sample in dataset.test], [sample.group for sample in dataset.test])


def describe_interval(values: Mapping[str, float]) -> str:
    """The interval of the mean Dice as text; empty if the metrics contain none."""
    if "test_image/dice_low" not in values:
        return ""
    rough = "roughly " if values.get("test_image/dice_units", ROUGH_BELOW) < ROUGH_BELOW else ""
    return f" (95 % {rough}{values['test_image/dice_low']:.4f} to {values['test_image/dice_high']:.4f})"


def round_metric(name: str, value: float) -> float:
    """Rounds a score to six decimals and a cost to four significant digits, so that it fits a column of the UI."""
    return float(f"{value:.4g}") if name.startswith("cost/") and not name.endswith("_params") else round(float(value), 6)


def write_artifacts(
    folder: Path,
    run: RunSpec,
    experiment: Experiment,
    datasets: Sequence[Dataset],
    result: EvaluationResult,
    seen: dict[str, Any] | None = None,
) -> None:
    """Writes the artifacts of an evaluated run to a folder, apart from its :func:`pictures`.

    They are ``config.toml``, ``per_image.json``, ``images.json``, ``preparation.json``, ``separation.json``, ``calibration.json``, ``head.safetensors`` and
    ``training_features.safetensors``.

    ``datasets``: one, or one per fold. ``seen``: content of ``seen_images.json``, which describes the training images.
    """
    if seen is not None:
        (folder / SEEN).write_text(json.dumps(seen), encoding="utf-8")
    num_train = None
    if result.trainer is not None:
        from cellbench.data.transforms.sampling import num_used_images  # imports torch, which masks of another tool do without

        num_train = num_used_images(len(datasets[run.fold].train), run.fraction)
    write_scores(folder, run.fold, experiment.data.folds, datasets, result, num_train)
    (folder / "config.toml").write_text(tomli_w.dumps(single_run_experiment(run, experiment)), encoding="utf-8")
    write_separation(folder, result)
    if result.training_features is not None:
        (folder / TRAINING_FEATURES).write_bytes(save_arrays(result.training_features.to_arrays()))
    if result.preparation is not None:
        (folder / "preparation.json").write_text(json.dumps(result.preparation.to_dict()), encoding="utf-8")
    if result.trainer is not None:
        from safetensors.torch import save

        # safetensors' own function writes files that only their owner may read.
        (folder / "head.safetensors").write_bytes(save({key: x.contiguous() for key, x in result.trainer.best_weights.items()}))


def write_separation(folder: Path, result: EvaluationResult) -> None:
    (folder / SEPARATION).write_text(json.dumps(asdict(result.evaluation.separation)), encoding="utf-8")


def write_scores(
    folder: Path, fold: int, num_folds: int, datasets: Sequence[Dataset], result: EvaluationResult, num_train: int | None = None
) -> None:
    """Writes ``per_image.json`` and ``images.json``: the scores of each test image of a fold. ``num_train``: of training images, where there are any."""
    record = per_image_record(datasets[fold], result)
    if num_train is not None:
        record["num_train"] = num_train
    if num_folds:
        record |= {"fold": fold, "num_folds": num_folds, "pool": pool_folds(datasets)}
    (folder / "per_image.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
    (folder / CALIBRATION).write_text(json.dumps(asdict(result.evaluation.calibrated)), encoding="utf-8")
    (folder / TABLE).write_text(json.dumps(per_image_table(record), allow_nan=False), encoding="utf-8")


def write_counts(folder: Path, rows: Sequence[CountRow]) -> None:
    """Writes ``counts.csv``, and the figure of how well the counts agree."""
    if rows:
        (folder / COUNTS_TABLE).write_text(counts_csv(rows), encoding="utf-8")
        unit = "region" if any(row.region for row in rows) else "image"
        write_pictures(folder, {"figures/counts.png": draw_plot("counts:plot_agreement", counts_by_label(rows), unit)})


def pictures(name: str, dataset: Dataset, pixels: ImageCache, result: EvaluationResult) -> dict[str, partial[bytes]]:
    """The pictures of an evaluated run by file name: calls that draw a PNG, also in another process."""
    drawings: dict[str, partial[bytes]] = {}
    if result.trainer is not None:
        drawings["figures/curves.png"] = partial(draw_plot, "run:plot_curves", result.trainer.history, result.trainer.best_epoch)
    evaluation = result.evaluation
    pooled = pixel_scores(evaluation.counts.sum(0))
    by_class = {label: pooled.of(index) for index, label in enumerate(dataset.classes)}
    own = [one for one in evaluation.own_metrics if not one.unit]
    drawings["figures/scores.png"] = partial(
        draw_plot,
        "run:plot_scores",
        name,
        evaluation.per_image(),
        by_class,
        evaluation.calibration(),
        resampling_units(dataset),
        catalog.from_record(catalog.to_record(own)),  # another process has no code of the user's
        evaluation.calibration(corrected=True) if evaluation.calibrated.is_fitted else None,
    )
    for which, case in evaluation.examples.cases.items():
        picture, truth = pixels[case.image]
        cells = describe_outcomes(asdict(evaluation.agreements[case.image]))
        what = f"{which} of {len(pixels)} test images" if len(pixels) > 1 else "the only test image"
        title = f"{what}: {pixels.samples[case.image].name}, {case.score}\n{cells}"
        drawings[f"figures/{which}.png"] = partial(
            draw_example, thumbnail(picture), thumbnail(truth), case.classes, case.cell, title, case.cells
        )
    return drawings


def draw_pictures(folder: Path, name: str, dataset: Dataset, pixels: ImageCache, result: EvaluationResult) -> None:
    """Draws and writes the pictures of an evaluated run, in this process."""
    write_pictures(folder, {file: draw() for file, draw in pictures(name, dataset, pixels, result).items()})


def write_pictures(folder: Path, drawn: Mapping[str, bytes]) -> None:
    """Writes PNGs by file name."""
    for name, png in drawn.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png)


COUNTS_TABLE = "counts.csv"
"""The artifact of an evaluation with the cells of each image, or region, by class, predicted beside true ones."""
TABLE = "images.json"
"""The artifact that MLflow's UI shows as a table, one row per image."""


SEPARATION = "separation.json"
"""The artifact with the fields of a run's :class:`~cellbench.metrics.separation.SeparationParams`."""


def per_image_record(dataset: Dataset, result: EvaluationResult) -> dict[str, object]:
    """The scores of each test image and their pixel counts, from which any other overlap score can be computed."""
    evaluation = result.evaluation
    return {
        "classes": list(dataset.classes),
        "unused": [dataset.classes[k] for k in dataset.unused],
        "images": [sample.name for sample in dataset.test],
        "dataset": dataset.digest,
        "num_images": {split: len(dataset.samples(split)) for split in SPLITS},
        "groups": [sample.group for sample in dataset.test],
        **({"appearance": [sample.appearance for sample in dataset.test]} if any(sample.appearance for sample in dataset.test) else {}),
        "tolerance_px": TOLERANCE_PX,
        "min_area_px": [dataset.min_cell_px or (MIN_AREA_NUMBERED_PX if one.numbered else MIN_AREA_PX) for one in evaluation.agreements],
        "separation": evaluation.separation.description,
        "cut_px": dataset.cut_px,
        "cells_numbered": [one.numbered for one in evaluation.agreements],
        "confusion": evaluation.counts.tolist(),
        **({"cell_confusion": [one.tolist() for one in evaluation.cell_matrices]} if evaluation.cell_matrices else {}),
        **{name: rounded(values) for name, values in evaluation.per_image().items()},
        **{name: values.tolist() for name, values in evaluation.outcomes().items()},
        "own_metrics": catalog.to_record(evaluation.own_metrics),
        "calibration": evaluation.calibration(),
        "calibration_corrected": evaluation.calibration(corrected=True),
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """Rounds to six decimals. None (JSON's null) for an image without a score."""
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]


def per_image_table(record: dict[str, Any]) -> dict[str, object]:
    """``per_image`` as a table for the UI: sorted from the worst image to the best, images without a score last."""
    order = np.argsort(np.array(record["dice"], np.float64), kind="stable").tolist()
    columns = [
        metric.key for metric in catalog.per_image(catalog.from_record(record["own_metrics"])) if metric.key != "accuracy"
    ]  # accuracy is close to 1 everywhere
    columns += COUNTS
    return {"columns": ["image", *columns], "data": [[record["images"][k], *(record[name][k] for name in columns)] for k in order]}


def single_run_experiment(run: RunSpec, experiment: Experiment) -> dict[str, object]:
    """An experiment with this run only: ``grid config.toml`` repeats it."""
    plain = run.model_dump(exclude={"backbone", "head", "baseline", "options", "seed"})
    data = experiment.data.given
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
    """Tags of an evaluated run: the machine, the note, and the table of its images.

    The tag for ``TABLE`` is the one that MLflow's ``log_table`` would write, which takes 100 ms more. ``worst``: URL of the figure of the worst image.
    """
    named = json.dumps([{"path": TABLE, "type": "table"}])
    return {"cellbench.machine": machine, TABLES: named, NOTE: run_note(name, metrics, worst=worst)}


def format_score(values: Mapping[str, float], name: str) -> str:
    """A score as text, if the run has it."""
    return f"{values[name]:.4f}" if name in values else "none (no cell)"


def run_note(name: str, values: dict[str, float], worst: str = "") -> str:
    """The Markdown note of a run in MLflow. ``worst``: URL of the figure of the worst image."""
    interval = describe_interval(values)
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
        # The UI shows only the first five lines of a note, so the result comes first.
        f"**{escape_markdown(name)}**: test Dice **{format_score(values, 'test/dice')}** over all pixels, "
        f"{format_score(values, 'test_image/dice')}{interval} as the mean over images.",
        ui_view.padded_table(("what", "score"), lines),
        f"*Artifacts*: `{TABLE}` (each image, worst first), `figures/`, weights, and `config.toml`, which repeats this run.",
    ]
    return "\n\n".join(parts + ([f"The worst test image:\n\n![the worst test image]({worst})"] if worst else []))
