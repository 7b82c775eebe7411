"""Ensembles and test-time augmentation of finished runs need no training, and predict as they were tested."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from cohorts import dataset_of
from small_data import enter, write_pair

import cellbench
from cellbench.cli.main import main
from cellbench.execution import best_ensembles
from cellbench.inference.segmenter import Segmenter
from cellbench.metrics.calibration import Calibration
from cellbench.metrics.pixel import confusion_matrix
from cellbench.training.trainer import HeadTrainer

EXPERIMENT = """
experiment = "small"
dataset = "folder"
[grid]
backbone = ["filter-bank"]
head = ["detail"]
seed = [0, 1]
[run]
epochs = 2
tile_px = 64
"""


def grid_command(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, *flags: str) -> list[str]:
    """The command of an experiment on five drawn images and two to test on, in a store of its own."""
    enter(folder, monkeypatch)
    for seed in range(7):
        write_pair(folder / "smears" / ("test" if seed > 4 else "train"), f"{seed}.png", seed)
    (folder / "asked.toml").write_text(text)
    return ["grid", "asked.toml", "--data", "smears", "--device", "cpu", *flags]


def test_ensembles_and_tta_of_finished_runs_need_no_training_and_predict_as_they_were_tested(tmp_path, monkeypatch) -> None:
    grid = grid_command(tmp_path, monkeypatch, EXPERIMENT)
    assert main(grid) == 0

    def refuse(*_: object) -> None:
        raise AssertionError("trains again")

    monkeypatch.setattr(HeadTrainer, "train_on", refuse)
    assert main([*grid, "--set", "ensemble_seeds=true", "--set", 'grid.tta=["none", "d4"]']) == 0
    runs = {one.info.run_name: one for one in mlflow.search_runs(experiment_names=["small"], output_format="list") if one.data.params}
    trained, turned = runs["filter-bank · detail · seed 1"], runs["filter-bank · detail · tta d4 · seed 1"]
    for name in ("best/epoch", "best/val_dice", "cost/head_s"):
        assert turned.data.metrics[name] == pytest.approx(trained.data.metrics[name], rel=1e-3)
    assert turned.data.metrics["test/dice"] != trained.data.metrics["test/dice"]

    name = "filter-bank · detail · tta d4 · ensemble of seeds 0, 1"
    assert main(["export", name, "--out", "model", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / runs[name].info.artifact_uri.removeprefix("file://") / "per_image.json").read_text())
    segmenter = Segmenter.load("model", device="cpu")

    for k, sample in enumerate(dataset_of(tmp_path / "smears").test):
        found = segmenter.predict(sample.image)
        truth = dataset_of(tmp_path / "smears").read_mask(sample)
        assert np.abs(confusion_matrix(truth, found.classes, 2) - np.array(record["confusion"][k])).max() <= 2


SEVERAL = """
experiment = "several"
dataset = "folder"
baselines = ["otsu"]
ensemble_best = 2
[grid]
backbone = ["filter-bank"]
head = ["detail", "bilinear", "fpn"]
seed = [0, 1]
[run]
epochs = 2
tile_px = 64
[head.fpn]
tile_scale = 0.5
targets = "cell+distance"
"""


def test_the_mean_of_the_models_that_are_best_on_validation_is_a_row_without_training(tmp_path, monkeypatch, capsys) -> None:
    grid = grid_command(tmp_path, monkeypatch, SEVERAL, "--tests", "smears")
    opened: list[str] = []
    load_model = best_ensembles.load_model

    def load_member(one, *more):
        opened.append(one.record.name)
        return load_model(one, *more)

    monkeypatch.setattr(best_ensembles, "load_model", load_member)
    assert main(grid) == 0
    runs = {one.info.run_name: one for one in mlflow.search_runs(experiment_names=["several"], output_format="list")}
    name = "ensemble of the best 2 models"
    own = {run: one for run, one in runs.items() if "best/val_dice" in one.data.metrics}
    by_head = {
        head: max((one.data.metrics["best/val_dice"], run) for run, one in own.items() if f" {head} " in run)
        for head in ("detail", "bilinear", "fpn")
    }
    members = [run for _, run in sorted(by_head.values(), reverse=True)[:2]]
    assert runs[name].data.tags["cellbench.members"] == ", ".join(members)
    assert opened == members  # once for all sets of images

    record = json.loads((tmp_path / runs[name].info.artifact_uri.removeprefix("file://") / "per_image.json").read_text())
    segmenters = [Segmenter.load(own[member].info.run_id, device="cpu") for member in members]
    for one in segmenters:  # probabilities before their correction
        one.trained = dataclasses.replace(one.trained, calibration=Calibration())
    data = dataset_of(tmp_path / "smears")
    for k, sample in enumerate(data.test):
        mean = np.mean([one.predict(sample.image).probability for one in segmenters], axis=0)
        found = confusion_matrix(data.read_mask(sample), (mean > 127.5).astype(np.uint8), 2)
        assert np.abs(found - np.array(record["confusion"][k])).max() <= 4
    further = json.loads((tmp_path / runs[name].info.artifact_uri.removeprefix("file://") / "tests.json").read_text())
    assert further["sets"]["smears"]["confusion"] == record["confusion"]

    results = cellbench.results("several")
    assert name in results.leaderboard()["model"].tolist()
    capsys.readouterr()
    assert main(["predict", name, "smears/test", "--out", "masks", "--device", "cpu"]) == 2
    refusal = capsys.readouterr().err
    assert "is the mean of several models" in refusal
    assert members[0] in refusal
    assert main(["export", "best:several", "--out", "model", "--device", "cpu"]) == 0  # of the models that can predict

    monkeypatch.setattr(best_ensembles, "segment_images", None)  # would raise if called
    assert main(grid) == 0  # the same members: nothing is tested again
    assert sum(one.info.run_name == name for one in mlflow.search_runs(experiment_names=["several"], output_format="list")) == 1
