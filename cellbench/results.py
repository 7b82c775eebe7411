"""What a finished run leaves: its metrics by the contract's names, and the files beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tomli_w
from safetensors.torch import save_file

from cellbench import figures
from cellbench.data.dataset import Dataset
from cellbench.data.pixels import Pixels
from cellbench.metrics import image_scores, named
from cellbench.spec import Experiment, RunSpec
from cellbench.stats import mean_interval
from cellbench.train import Learner


@dataclass
class Keepsake:
    """The answers for the worst and the best image so far, so that no image needs to be segmented twice to be shown."""

    cases: dict[str, tuple[int, float, np.ndarray, np.ndarray | None]] = field(default_factory=dict)
    """``worst`` and ``best``: image number, Dice, class map (H, W), probability of a cell (H, W) uint8 or None."""

    def offer(self, image: int, dice: float, classes: np.ndarray, cell: np.ndarray | None) -> None:
        for which, better in (("worst", lambda new, old: new < old), ("best", lambda new, old: new > old)):
            if which not in self.cases or better(dice, self.cases[which][1]):
                self.cases[which] = (image, dice, classes, cell)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run's test."""

    counts: np.ndarray
    """Confusion matrices (N, K, K) of the test images, in their order."""
    cost: dict[str, float]
    keep: Keepsake
    learner: Learner | None = None


def metrics(dataset: Dataset, result: Result) -> dict[str, float]:
    """Everything that is logged at the end of a run: pooled scores, means over images with their interval, cost, the best epoch."""
    out = named("test", result.counts, dataset.classes) | result.cost
    each = image_scores(result.counts)
    out |= {f"test_image/{name}": float(values.mean()) for name, values in each.items()}
    interval = mean_interval(each["dice"])
    if interval.low is not None and interval.high is not None:
        out |= {"test_image/dice_low": interval.low, "test_image/dice_high": interval.high}
    if result.learner is not None:
        best = result.learner.history[result.learner.best_epoch]
        out |= {"best/epoch": result.learner.best_epoch, "best/val_dice": best["val/dice"], "best/val_loss": best["val/loss"]}
    return out


def write(folder: Path, run: RunSpec, experiment: Experiment, dataset: Dataset, pixels: Pixels, result: Result) -> None:
    """``config.toml``, ``per_image.json``, ``head.safetensors`` and ``figures/*.png`` into a folder."""
    (folder / "config.toml").write_text(tomli_w.dumps(alone(run, experiment)), encoding="utf-8")
    (folder / "per_image.json").write_text(json.dumps(per_image(dataset, result), indent=1), encoding="utf-8")
    (folder / "figures").mkdir()
    if result.learner is not None:
        save_file({name: x.contiguous() for name, x in result.learner.best_weights.items()}, folder / "head.safetensors")
        figures.save(figures.curves(result.learner.history, result.learner.best_epoch), folder / "figures" / "curves.png")
    for which, (image, dice, classes, cell) in result.keep.cases.items():
        picture, truth = pixels[image]
        title = f"{which} of {len(pixels)} test images: {pixels.samples[image].name}, Dice {dice:.4f}"
        figures.save(figures.case(picture, truth, classes, cell, title), folder / "figures" / f"{which}.png")


def per_image(dataset: Dataset, result: Result) -> dict[str, object]:
    """The scores of each test image and the counts they come from; any other score can be had from those."""
    return {
        "classes": list(dataset.classes),
        "images": [sample.name for sample in dataset.test],
        "dataset": dataset.digest,
        "confusion": result.counts.tolist(),
        **{name: [round(float(v), 6) for v in values] for name, values in image_scores(result.counts).items()},
    }


def alone(run: RunSpec, experiment: Experiment) -> dict[str, object]:
    """An experiment file that asks for this run only: ``grid config.toml`` repeats it."""
    plain = run.model_dump(exclude={"backbone", "head", "baseline", "options", "seed"})
    data = {key: value for key, value in experiment.data.model_dump().items() if value not in (None, {})}
    tree: dict[str, object] = {"experiment": experiment.experiment, "dataset": experiment.dataset}
    if run.baseline:
        part = {"baselines": [run.baseline], "run": {**plain, "seed": run.seed}, "baseline": {run.baseline: run.options}}
    else:
        part = {"grid": {"backbone": [run.backbone], "head": [run.head], "seed": [run.seed]}, "run": plain, "head": {run.head: run.options}}
    return {**tree, **part, "data": data}


def note(name: str, values: dict[str, float]) -> str:
    """A run's notes in MLflow, in Markdown."""
    interval = ""
    if "test_image/dice_low" in values:
        interval = f" (95 % {values['test_image/dice_low']:.4f} to {values['test_image/dice_high']:.4f})"
    return (
        f"**{name}**\n\nTest Dice pooled over all pixels **{values['test/dice']:.4f}**, "
        f"mean over images {values['test_image/dice']:.4f}{interval}. "
        "Figures, per-image scores, weights and the file that repeats this run are under *Artifacts*."
    )
