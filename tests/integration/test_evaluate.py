"""``evaluate``: equal scores on the run's own test images, logged as a child run, and reports do not change."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from small_data import MODEL, write_pair

from cellbench.reporting.collect import collect_runs
from cellbench.run import main
from cellbench.tracking import ui_view
from cellbench.tracking.tracker import Tracker


def runs() -> list[mlflow.entities.Run]:
    return mlflow.search_runs(experiment_names=["small"], output_format="list")


def test_on_its_own_data_a_run_scores_what_its_test_scored(there: Path) -> None:
    (tested,) = [run for run in runs() if run.info.run_name == MODEL]
    before = len(collect_runs([Tracker("small")]).parents)
    for data in (["--data", "smears"], []):  # its own data is the default
        assert main(["evaluate", MODEL, *data, "--device", "cpu"]) == 0
    (again,) = [run for run in runs() if run.data.tags.get("cellbench.kind") == "evaluation"]
    assert again.data.tags["mlflow.parentRunId"] == tested.info.run_id
    scores = {name: value for name, value in tested.data.metrics.items() if name.startswith("test")}
    assert {name: again.data.metrics[name] for name in scores} == scores
    evidence = collect_runs([Tracker("small")])
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


def test_images_that_the_run_has_seen_are_known_however_they_are_packed(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two training images one is renamed and one turned and saved as JPEG; the validation image is brightened; one image is new."""
    from cellbench.config.experiment import DataSpec
    from cellbench.config.registry import Registry
    from cellbench.data.loading import open_dataset

    known = open_dataset(Registry().dataset("folder"), there / "smears", DataSpec())
    packed = [
        (known.train[0], "x0.bmp", lambda pixels: pixels),
        (known.train[1], "x1.jpg", lambda pixels: np.rot90(pixels)),
        (known.val[0], "x2.png", lambda pixels: (pixels * 0.9 + 5).astype(np.uint8)),
    ]
    for sample, name, how in packed:
        write_pair(tmp_path / "again", name, 0)
        pixels, mask = known.read(sample)
        Image.fromarray(how(pixels)).save(tmp_path / "again" / "original" / name)
        mask = np.rot90(mask) if name == "x1.jpg" else mask
        Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / "again" / "mask" / f"{Path(name).stem}.png")
    write_pair(tmp_path / "again", "x3.png", 77)
    assert main(["evaluate", MODEL, "--data", str(tmp_path / "again"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "Warning: 2 of 4 images were trained on, 1 validated on" in said
    assert "in the mean of the 1 images that the run was not trained or validated on" in said
    (run,) = [run for run in runs() if run.info.run_name.endswith("on again")]
    assert run.data.tags["cellbench.independent"] == "no"
    assert (run.data.params["images_trained_on"], run.data.params["images_validated_on"]) == ("2", "1")


def test_evaluations_leave_the_leaderboard_and_the_choice_of_the_best(there: Path) -> None:
    assert main(["evaluate", MODEL, "--data", "smears", "--device", "cpu"]) == 0
    shown = mlflow.search_runs(experiment_names=["small"], filter_string=ui_view.FILTER, output_format="list")
    assert {run.data.tags.get("cellbench.kind") for run in shown} == {None, "grid"}
    assert MODEL in {run.info.run_name for run in shown}
