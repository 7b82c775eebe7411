"""Ensembles and test-time augmentation of finished runs need no training, and predict as they were tested."""

from __future__ import annotations

import json

import mlflow
import numpy as np
import pytest
from cohorts import dataset_of
from small_data import write_pair

from cellbench.cli.main import main
from cellbench.inference.segmenter import Segmenter
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


def test_ensembles_and_tta_of_finished_runs_need_no_training_and_predict_as_they_were_tested(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for seed in range(7):
        write_pair(tmp_path / "smears" / ("test" if seed > 4 else "train"), f"{seed}.png", seed)
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    grid = ["grid", "small.toml", "--data", "smears", "--device", "cpu"]
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
