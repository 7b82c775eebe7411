"""A run tested again: the same numbers on its own test images, a run of its own below it, and reports as they were."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import MODEL, write_pair
from PIL import Image

from cellbench.evidence import collect
from cellbench.run import main
from cellbench.track import Tracker


def runs() -> list[mlflow.entities.Run]:
    return mlflow.search_runs(experiment_names=["small"], output_format="list")


def test_on_its_own_data_a_run_scores_what_its_test_scored(there: Path) -> None:
    (tested,) = [run for run in runs() if run.info.run_name == MODEL]
    before = len(collect([Tracker("small")]).parents)
    for _ in range(2):
        assert main(["evaluate", MODEL, "--data", "smears", "--device", "cpu"]) == 0
    (again,) = [run for run in runs() if run.data.tags.get("cellbench.kind") == "evaluation"]
    assert again.data.tags["mlflow.parentRunId"] == tested.info.run_id
    scores = {name: value for name, value in tested.data.metrics.items() if name.startswith("test")}
    assert {name: again.data.metrics[name] for name in scores} == scores
    evidence = collect([Tracker("small")])
    assert (evidence.num_runs, len(evidence.parents)) == (2, before)


def test_another_folder_is_tested_whole_with_its_worst_images(there: Path, tmp_path: Path) -> None:
    for seed in range(3):
        write_pair(tmp_path / "more", f"m{seed}.png", 50 + seed)
    assert main(["evaluate", MODEL, "--data", str(tmp_path / "more"), "--visualize", "2", "--device", "cpu"]) == 0
    (run,) = [run for run in runs() if run.info.run_name.endswith("on more")]
    assert run.data.params["images"] == "3"
    files = {path.name for path in (Path(run.info.artifact_uri.removeprefix("file://")) / "figures").iterdir()}
    assert sum(name.startswith("worst-00") for name in files) == 2
    assert not (tmp_path / "more" / "splits.json").exists()


def test_other_classes_are_refused(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path / "three", "a.png", 1)
    Image.fromarray(np.zeros((120, 160), np.uint8)).save(tmp_path / "three" / "mask" / "a.png")
    (tmp_path / "three" / "dataset.toml").write_text('classes = ["background", "nucleus", "cytoplasm"]\nvalues = [0, 128, 255]\n')
    assert main(["evaluate", MODEL, "--data", str(tmp_path / "three"), "--device", "cpu"]) == 2
    assert "its classes are background, nucleus, cytoplasm" in capsys.readouterr().err
