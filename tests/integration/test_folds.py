"""A grid over folds: every image tested once by a run that never saw it, and the folds taken together as one test."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
from small_data import write_set

from cellbench.reporting.collect import collect_runs
from cellbench.run import main
from cellbench.tracking.tracker import Tracker

EXPERIMENT = """# A question over folds
experiment = "folded"
dataset    = "folder"
baselines  = ["otsu"]
[data]
folds = 3
[grid]
backbone = ["vit-tiny-random"]
head     = ["bilinear"]
[run]
tile_px = 64
epochs  = 1
crops_per_image = 2
"""


@pytest.fixture
def question(tmp_path, monkeypatch) -> list[str]:
    write_set(tmp_path, [f"a{k}.png" for k in range(5)], ["t0.png"])
    (tmp_path / "folded.toml").write_text(EXPERIMENT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return ["grid", "folded.toml", "--data", "smears", "--device", "cpu"]


def test_every_image_is_tested_once_and_the_folds_make_one_test(question, capsys) -> None:
    assert main(question) == 0
    printed = capsys.readouterr().out
    (here,) = collect_runs([Tracker("folded")]).sets
    assert here.num_folds == 3
    assert sorted(here.images) == [*(f"a{k}.png" for k in range(5)), "t0.png"]
    assert {model.name: len(model.runs) for model in here.models} == {"otsu": 3, "vit-tiny-random · bilinear": 3}
    assert "3 folds" in printed
    children = [
        run for run in mlflow.search_runs(experiment_names=["folded"], output_format="list") if "mlflow.parentRunId" in run.data.tags
    ]
    assert {(run.data.params["fold"], run.data.params["baseline"]) for run in children} == {
        (str(k), b) for k in range(3) for b in ("none", "otsu")
    }
    (top,) = [
        run for run in mlflow.search_runs(experiment_names=["folded"], output_format="list") if "mlflow.parentRunId" not in run.data.tags
    ]
    splits = json.loads((Path(top.info.artifact_uri.removeprefix("file://")) / "splits.json").read_text())
    for fold in range(3):
        parts = [splits[f"fold {fold}: {part}"] for part in ("train", "val", "test")]
        assert sorted(sum(parts, [])) == sorted(here.images)  # noqa: RUF017 - three short lists

    # Asked again, all is known; a run's own config asks for that run in its fold.
    assert main(question) == 0
    assert "6 of 6 runs are finished already" in capsys.readouterr().out
    trained = next(run for run in children if run.data.params["fold"] == "2" and run.data.params["baseline"] == "none")
    config = Path(trained.info.artifact_uri.removeprefix("file://")) / "config.toml"
    main(["grid", str(config), "--data", "smears", "--device", "cpu"])
    assert "1 of 1 runs are finished already" in capsys.readouterr().out


def test_a_dry_run_counts_the_runs_of_all_folds(question, capsys) -> None:
    assert main([*question, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "6 runs" in printed
    assert "fold 2" in printed
