"""Further test sets and perturbed images: added to finished runs from their stored heads, with the scores of a test of the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_data import enter, finish_grid, write_pair, write_set

import cellbench
from cellbench.run import main
from cellbench.tracking.schema import SHIFT_TESTS
from cellbench.tracking.tracker import Tracker

EXPERIMENT = """# Which model is the safest?
experiment = "shifted"
dataset    = "folder"
baselines  = ["otsu"]
[grid]
backbone = ["filter-bank"]
head     = ["detail"]
[run]
tile_px = 64
epochs  = 1
crops_per_image = 4
normalise = "reinhard"
val_overlap = 0.5
"""


def scores(name: str) -> dict[str, dict]:
    tracker = Tracker("shifted")
    runs = [run for run in tracker.stored() if not run.is_parent]
    return {run.params["baseline"]: json.loads(tracker.artifact(run, name) or b"{}") for run in runs}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shift")
    write_set(folder, [f"a{k}.png" for k in range(6)], [f"t{k}.png" for k in range(3)])
    return finish_grid(folder, "q.toml", EXPERIMENT)


@pytest.fixture
def here(project: Path, monkeypatch) -> Path:
    enter(project, monkeypatch)
    return project


def test_finished_runs_are_tested_further_in_a_worker_process_and_only_once(here: Path, capsys, undrawn_processes: None) -> None:
    before = scores("per_image.json")
    trained = next(run for run in Tracker("shifted").stored() if run.params.get("baseline") == "none")
    fitted = Path(trained.artifact_uri.removeprefix("file://")) / "calibration.json"
    fitted.write_text(json.dumps(json.loads(fitted.read_text()) | {"temperature": 3.0}))
    asked = ["grid", "q.toml", "--data", "smears", "--tests", "smears", "--set", 'data.perturb=["blur"]']
    assert main([*asked, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 runs are finished already" in printed
    assert "Each finished run is also tested on smears (3 images) and images perturbed by blur." in printed
    assert printed.count("1 run tested on 5 more sets of images.") == 2
    assert "3 of 3 images of smears are images of smears too" in printed
    found = scores(SHIFT_TESTS)
    for model, main_test in before.items():
        for key in ("images", "dice", "nsd", "confusion"):
            assert found[model]["sets"]["smears"][key] == main_test[key], (model, key)
        assert found[model]["perturbed"]["none"] == main_test["dice"]  # with val_overlap = overlap
        assert found[model]["perturbed"]["blur-3"] != main_test["dice"]
    calibrated = found["none"]["sets"]["smears"]
    assert calibrated["calibration"] == before["none"]["calibration"]
    spread = [max(abs(p - 0.5) for p in calibrated[key]["probability"] if p) for key in ("calibration_corrected", "calibration")]
    assert spread[0] < spread[1] - 0.05  # a temperature of 3 makes it less sure
    metrics = next(run.metrics for run in Tracker("shifted").stored() if run.params.get("baseline") == "none")
    assert metrics["shift.smears/dice"] == metrics["test_image/dice"]
    assert metrics["shift.smears/dice_pooled"] == metrics["test/dice"]
    assert metrics["shift.smears/calibration_error_raw"] == metrics["test/calibration_error"] != metrics["shift.smears/calibration_error"]
    results = cellbench.results("shifted")
    assert results.further["smears"].leaderboard()["dice_per_image"].tolist() == results.leaderboard()["dice_per_image"].tolist()
    assert set(results.shift()["condition"]) == {"own", "smears", "blur-1", "blur-2", "blur-3"}
    assert main(asked) == 0
    assert "1 run tested on" not in capsys.readouterr().out
    assert main([*asked[:-1], 'data.perturb=["blur", "jpeg"]']) == 0  # adds to what is there
    assert sorted(scores(SHIFT_TESTS)["otsu"]["perturbed"]) == ["blur-1", "blur-2", "blur-3", "jpeg-1", "jpeg-2", "jpeg-3", "none"]


def test_a_baseline_with_weights_is_tested_further(here: Path, tmp_path: Path) -> None:
    registry, weights = tmp_path / "registry", tmp_path / "weights"
    for folder in (registry / "baselines", registry / "backbones", weights):
        folder.mkdir(parents=True)
    safetensors.torch.save_file({"darkest": torch.tensor(200.0)}, weights / "level.safetensors")
    (registry / "backbones" / "level.toml").write_text(
        '# Not a network\nbuilder = "timm_vit"\nweights = "local"\npatch_px = 8\ndim = 1\ndepth = 1\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n'
    )
    (registry / "baselines" / "dark.py").write_text(
        "def dark(states):\n    return lambda image, num_classes: (image[..., 0] < states[0]['darkest'].item()).astype('uint8')\n"
    )
    (registry / "baselines" / "dark.toml").write_text('# Dark pixels\nbuilder = "dark.py:dark"\ntrained = false\nweights = ["level"]\n')
    asked = ["grid", "q.toml", "--data", "smears", "--registry", str(registry), "--weights", str(weights), "--tests", "smears"]
    assert main([*asked, "--set", 'baselines=["dark"]']) == 0
    assert scores(SHIFT_TESTS)["dark"]["sets"]["smears"]["dice"] == scores("per_image.json")["dark"]["dice"]


def test_a_folder_with_other_classes_is_refused_before_training(here: Path, capsys) -> None:
    for seed in range(2):
        write_pair(here / "three", f"x{seed}.png", seed)
    (here / "three" / "dataset.toml").write_text('classes = ["background", "red", "white"]\nvalues = [0, 128, 255]\n')
    assert main(["grid", "q.toml", "--data", "smears", "--tests", "three"]) == 2
    assert "[data] tests: three has the classes background, red, white; those of smears are background, cell." in capsys.readouterr().err
    assert main(["grid", "q.toml", "--data", "smears", "--tests", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
