"""One's own few images, without naming an experiment: all are tested, and what was chosen is recorded with the runs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import mlflow
import pytest
from labelled_folders import pairs

from cellbench.reporting.collect import collect_runs
from cellbench.run import main
from cellbench.tracking.tracker import Tracker


def test_the_default_tests_every_image_and_a_run_s_own_config_asks_for_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    pairs(tmp_path / "slides", 8)
    few = ["grid.backbone=['filter-bank']", "grid.head=['bilinear']", "baselines=['otsu']", "run.tile_px=32", "run.epochs=1"]
    call = ["grid", "--data", "slides", "--device", "cpu", *(word for change in few for word in ("--set", change))]
    assert main([*call, "--set", "tiles_per_epoch=6"]) == 0
    assert "all 8 are tested instead, each once, in 5 folds" in capsys.readouterr().out
    (here,) = collect_runs([Tracker("own on slides")]).sets
    assert (here.num_folds, sorted(here.images)) == (5, [f"i{k}.png" for k in range(8)])
    runs = mlflow.search_runs(experiment_names=["own on slides"], output_format="list")
    run = next(run for run in runs if run.data.params.get("fold") == "3" and run.data.params.get("backbone") == "filter-bank")
    config = Path(run.info.artifact_uri.removeprefix("file://")) / "config.toml"
    assert tomllib.loads(config.read_text())["data"]["folds"] == 5
    main(["grid", str(config), "--data", "slides", "--device", "cpu"])
    assert "1 of 1 runs are finished already" in capsys.readouterr().out
