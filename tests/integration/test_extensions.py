"""A metric, a loss and an augmentation of a user's own: the examples of docs/extending.md, through a grid, its workers, a report and a search."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_data import ROOT, enter, write_pair, write_set

from cellbench.data import layouts
from cellbench.reporting import sections
from cellbench.reporting.plots import comparison
from cellbench.run import main

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = re.findall(r"^`(parts/[^`]+)`\n\n```\w+\n(.*?)```", PAGE, flags=re.M | re.S)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)

GRID = """# Own parts
experiment = "small"
dataset    = "folder"
baselines  = ["otsu"]
[grid]
backbone = ["filter-bank"]
head     = ["bilinear"]
loss     = ["ce", "0.5 margin + 0.5 dice"]
augmentations = ["none", "0.8 blur"]
[run]
tile_px = 64
epochs  = 2
crops_per_image = 2
"""
SEARCH = """# For the own metric
experiment = "sought"
dataset    = "folder"
[search]
trials      = 2
batch       = 2
objective   = "val/area-error"
repeat_best = 1
[space]
backbone = ["filter-bank"]
head     = ["bilinear"]
lr       = [1e-3, 1e-2]
[run]
tile_px = 64
epochs  = 1
crops_per_image = 2
"""
CALL = ["grid", "small.toml", "--data", "smears", "--device", "cpu", "--registry", "parts"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_set(folder, ["a0.png", "a1.png", "a2.png", "a3.png"], ["t0.png", "t1.png"])
    for name, text in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "small.toml").write_text(GRID)
    (folder / "sought.toml").write_text(SEARCH)
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        assert main(CALL) == 0
        yield folder


def runs(experiment: str = "small") -> dict[str, mlflow.entities.Run]:
    found = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    tests = [run for run in found if run.data.tags.get("cellbench.status") == "finished" and "mlflow.parentRunId" in run.data.tags]
    return {run.info.run_name: run for run in tests}


def fresh(project: Path, folder: Path) -> Path:
    """The same files in a folder without runs."""
    for name in ("parts", "smears"):
        shutil.copytree(project / name, folder / name)
    shutil.copy(project / "small.toml", folder)
    return folder


@pytest.fixture
def here(project, monkeypatch):
    enter(project, monkeypatch)
    return project


def test_every_run_logs_the_own_metric_of_each_image_and_its_mean(here):
    done = runs()
    assert len(done) == 5  # two losses with and without blur, and a threshold
    for run in done.values():
        record = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/per_image.json")
        errors = np.array(record["area-error"], float)
        counts = np.array(record["confusion"], float)
        by_hand = np.abs(counts[:, :, 1].sum(1) - counts[:, 1].sum(1)) / counts[:, 1].sum(1)
        np.testing.assert_allclose(errors, by_hand, atol=1e-6)
        assert run.data.metrics["test_image/area-error"] == pytest.approx(errors.mean(), abs=1e-6)
        assert record["own_metrics"][0]["direction"] == "minimize"


def test_own_loss_and_augmentation_change_what_is_learned(here):
    losses = {tuple(run.data.params[key] for key in ("loss", "augmentations")): run.data.metrics.get("val/loss") for run in runs().values()}
    trained = [value for value in losses.values() if value is not None]
    assert len(trained) == len(set(trained)) == 4


def test_leaderboard_and_report_have_the_own_metric_without_its_code(here, capsys):
    capsys.readouterr()
    (here / "parts").rename(here / "away")
    try:
        assert main(["report", "small", "--out", "page"]) == 0
    finally:
        (here / "away").rename(here / "parts")
    page = (here / "page" / "report.html").read_text()
    assert page.count("area error") >= 2  # leaderboard and glossary
    assert "Relative error of the total area of cells" in page
    board = (here / "page" / "leaderboard.csv").read_text().splitlines()
    assert "area error" in board[0]
    assert len(board) == 6


def test_a_worker_loads_own_parts_and_gives_the_same_numbers(here, tmp_path, monkeypatch, undrawn_processes):
    before = {name: {k: v for k, v in run.data.metrics.items() if not k.startswith(("cost/", "system/"))} for name, run in runs().items()}
    enter(fresh(here, tmp_path), monkeypatch)
    assert main([*CALL, "--workers", "1"]) == 0  # in another process
    after = {name: {k: v for k, v in run.data.metrics.items() if not k.startswith(("cost/", "system/"))} for name, run in runs().items()}
    assert after == before


def test_changed_code_is_run_again_and_nothing_else(here):
    def finished() -> dict[str, str]:
        found = mlflow.search_runs(experiment_names=["small"], output_format="list")
        return {
            run.info.run_id: run.data.params["loss"]
            for run in found
            if run.data.tags["cellbench.status"] == "finished" and "loss" in run.data.params
        }

    before = finished()
    assert main(CALL) == 0
    assert finished() == before
    loss = here / "parts" / "losses" / "margin.py"
    text = loss.read_text()
    loss.write_text(text + "\n# changed\n")
    try:
        assert main(CALL) == 0
    finally:
        loss.write_text(text)
    new = {run_id: loss for run_id, loss in finished().items() if run_id not in before}
    assert sorted(new.values()) == ["0.5 margin + 0.5 dice"] * 2


def test_a_search_optimises_the_own_metric(here):
    assert main(["search", "sought.toml", "--data", "smears", "--device", "cpu", "--registry", "parts"]) == 0
    trials = [
        run for run in mlflow.search_runs(experiment_names=["sought"], output_format="list") if "best/val_area-error" in run.data.metrics
    ]
    assert len(trials) == 2
    assert all(math.isfinite(run.data.metrics["best/val_area-error"]) for run in trials)


def test_the_contracts_hold_for_the_examples_and_a_broken_part_is_named(here, capsys):
    assert main(["doctor", "--contracts", "--registry", "parts"]) == 0
    assert "5 cards" in capsys.readouterr().out
    code = here / "parts" / "metrics" / "area_error.py"
    text = code.read_text()
    code.write_text("def area_error(image):\n    return float((image.truth == image.prediction).mean())\n")
    try:
        assert main(["doctor", "--contracts", "--registry", "parts"]) == 1
    finally:
        code.write_text(text)
    assert "FAIL  metrics/area-error  truth is better" in capsys.readouterr().out


def test_a_metric_that_fails_names_itself(here, monkeypatch, tmp_path, capsys):
    enter(fresh(here, tmp_path), monkeypatch)
    (tmp_path / "parts" / "metrics" / "area_error.py").write_text("def area_error(image):\n    return 1 / 0\n")
    assert main([*CALL, "--set", "grid.loss=['ce']", "--set", "grid.augmentations=['none']"]) == 1
    assert "metric 'area-error': ZeroDivisionError" in "".join(capsys.readouterr())


def test_the_layout_of_the_page_is_read(here, monkeypatch, tmp_path, capsys):
    (layout,) = [block for block in BLOCKS if block.startswith("LAYOUTS")]
    scope: dict[str, object] = dict(vars(layouts))
    exec(layout, scope)
    monkeypatch.setattr(layouts, "LAYOUTS", scope["LAYOUTS"])
    for split in ("train", "test"):
        for seed in range(3):
            write_pair(tmp_path / "scans" / split, f"{split}{seed}.png", seed + 10 * (split == "test"), image="tif", mask="annotation")
    assert main(["check", str(tmp_path / "scans")]) == 0
    assert "train|test/tif/ with train|test/annotation/" in capsys.readouterr().out


def test_the_figure_of_the_page_is_drawn_and_in_the_report(here, monkeypatch, pictures):
    (code,) = [block for block in BLOCKS if "def plot_seeds" in block]
    (line,) = [block for block in BLOCKS if block.startswith("blocks.append")]
    scope: dict[str, object] = {}
    exec(code, scope)
    assert isinstance(scope["plot_seeds"](["a", "b"], [[0.5, 0.6], [0.7]]), Figure)
    monkeypatch.setattr(comparison, "plot_seeds", scope["plot_seeds"], raising=False)
    leaderboard = sections._TestSetReport.leaderboard

    def more(self):
        blocks, here = leaderboard(self), self.here
        exec(line, {**vars(sections)}, {"self": self, "blocks": blocks, "here": here, "names": [model.name for model in here.models]})
        return blocks

    monkeypatch.setattr(sections._TestSetReport, "leaderboard", more)
    assert main(["report", "small", "--out", "figured"]) == 0
    assert (here / "figured" / "figures" / "seeds.png").stat().st_size > 1000
