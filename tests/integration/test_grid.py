"""``grid`` on a small synthetic folder: runs are trained, tested and logged, and none is run twice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiment_files
import mlflow
import pytest
from safetensors.torch import load_file
from small_data import enter, write_set

from cellbench.run import main

EXPERIMENT = """# A small question
experiment = "small"
dataset    = "folder"
baselines  = ["otsu"]
[grid]
backbone = ["vit-tiny-random"]
head     = ["bilinear", "detail"]
seed     = [0, 1]
[run]
tile_px = 64
epochs  = 2
crops_per_image = 4
lr = 5e-3
"""


def _question(folder: Path) -> list[str]:
    write_set(folder, ["a0.png", "a1.jpg", "b 2.png", "b3.jpeg", "zelle-ä.png", "c5.JPG"], ["t0.png", "t1.jpg"])
    (folder / "small.toml").write_text(EXPERIMENT)
    return ["grid", "small.toml", "--data", "smears", "--device", "cpu"]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A folder in which the small question was asked once: exit code and what was printed are kept there."""
    folder = tmp_path_factory.mktemp("answered")
    question = _question(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        enter(folder, patch)
        code = main(question)
    (folder / "printed.txt").write_text(f"{code}\n{printed.getvalue()}")
    return folder


@pytest.fixture
def inside(answered, monkeypatch):
    """The answered folder as the current one, for tests that look or ask again."""
    enter(answered, monkeypatch)
    return answered


QUESTION = ["grid", "small.toml", "--data", "smears", "--device", "cpu"]


@pytest.fixture
def question(tmp_path, monkeypatch):
    """The same question, not asked yet, in the test's own folder."""
    arguments = _question(tmp_path)
    enter(tmp_path, monkeypatch)
    return arguments


def runs_of(experiment: str = "small", kind: str = "run") -> dict[str, mlflow.entities.Run]:
    """Runs by name: the children, or the parent."""
    found = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    return {r.info.run_name: r for r in found if ("mlflow.parentRunId" in r.data.tags) == (kind == "run")}


def artifacts(run: mlflow.entities.Run) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://"))


def test_every_run_is_logged_by_the_contract(inside):
    code, printed = (inside / "printed.txt").read_text().split("\n", 1)
    assert code == "0"
    runs = runs_of()
    models = ["vit-tiny-random · bilinear", "vit-tiny-random · detail"]
    assert set(runs) == {f"{m} · seed {s}" for m in models for s in (0, 1)} | {"otsu · seed 0"}
    run = runs["vit-tiny-random · detail · seed 1"]
    assert run.info.status == "FINISHED"
    assert {k: run.data.params[k] for k in ("backbone", "head", "seed", "framing", "epochs", "tile_px", "dataset", "head.width")} == {
        "backbone": "vit-tiny-random", "head": "detail", "seed": "1", "framing": "tile", "epochs": "2", "tile_px": "64",
        "dataset": "smears", "head.width": "64",
    }  # fmt: skip
    assert {"backbone", "head", "seed", "dataset", "cellbench.experiment", "cellbench.fingerprint", "cellbench.weights"} <= set(
        run.data.tags
    )
    assert run.data.tags["cellbench.status"] == "finished"
    for name in ("train/loss", "val/loss", "val/dice", "val/iou", "lr", "test/dice", "test/iou", "test/precision", "test/recall", "test/accuracy",
                 "test_background/dice", "test_mean/dice", "test_image/dice", "cost/train_s", "cost/train_cpu_s",
                 "cost/image_cpu_s", "cost/head_params", "cost/backbone_params",
                 "cost/images_per_s", "cost/peak_mib", "cost/features_mib"):  # fmt: skip
        assert name in run.data.metrics, name
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val/dice")
    assert [m.step for m in history] == [0, 1]
    parent = runs_of(kind="parent")["grid: small"]
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "system/cpu_utilization_percentage" in parent.data.metrics
    for name in ("config.toml", "per_image.json", "head.safetensors"):
        assert (artifacts(run) / name).stat().st_size > 0, name
    assert (artifacts(parent) / "leaderboard.json").is_file()
    for model in [*models, "otsu"]:
        assert model in printed


def test_the_winner_is_a_model_in_mlflow_with_its_best_epochs_score(inside):
    best = json.loads((artifacts(runs_of(kind="parent")["grid: small"]) / "leaderboard.json").read_text())["leaderboard"][0]
    experiment = mlflow.get_experiment_by_name("small").experiment_id
    entries = {one.source_run_id: one for one in mlflow.search_logged_models([experiment], output_format="list")}
    (winner,) = (entries[run] for run in best["run_ids"] if run in entries)
    assert winner.tags["cellbench.verdict"] == "the best"
    metrics = {one.key: one.value for one in winner.metrics}
    if not best["baseline"]:
        assert metrics["val/dice"] == pytest.approx(metrics["best/val_dice"], abs=1e-6)
    assert metrics["test/dice"] in [pytest.approx(dice, abs=1e-6) for dice in best["pooled_by_seed"]]


def test_per_image_scores_and_pooled_scores_come_from_the_same_counts(inside):
    run = runs_of()["vit-tiny-random · bilinear · seed 0"]
    record = json.loads((artifacts(run) / "per_image.json").read_text())
    (_, fp), (fn, tp) = (
        (sum(column) for column in zip(*[m[0] for m in record["confusion"]], strict=True)),
        (sum(column) for column in zip(*[m[1] for m in record["confusion"]], strict=True)),
    )
    assert run.data.metrics["test/dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert run.data.metrics["test_image/dice"] == pytest.approx(sum(record["dice"]) / len(record["dice"]), abs=1e-6)
    assert len(record["images"]) == len(record["dice"]) == 2


def test_a_second_call_runs_nothing_again_and_draws_no_report_again(inside, capsys, monkeypatch):
    before = {name: run.info.run_id for name, run in runs_of().items()}
    monkeypatch.setattr("cellbench.reporting.render.write_report_files", lambda *_: pytest.fail("a report that is there was drawn again"))
    assert main(QUESTION) == 0
    assert {name: run.info.run_id for name, run in runs_of().items()} == before
    assert "5 of 5 runs are finished already" in capsys.readouterr().out
    assert len(runs_of(kind="parent")) == 1


def test_a_larger_grid_runs_only_what_is_new(inside, capsys):
    before = {run.info.run_id for run in runs_of().values()}
    main([*QUESTION, "--set", 'grid.head=["bilinear"]', "--set", "grid.seed=[0,1,2]"])
    assert "3 of 4 runs are finished already" in capsys.readouterr().out
    runs = runs_of()
    assert len(runs) == 6
    assert before < {run.info.run_id for run in runs.values()}


def test_a_run_repeated_from_its_own_config_is_known_again(inside, capsys):
    run = runs_of()["vit-tiny-random · detail · seed 1"]
    assert main(["grid", str(artifacts(run) / "config.toml"), *QUESTION[2:]]) == 0
    assert "1 of 1 runs are finished already" in capsys.readouterr().out


def test_runs_of_different_precision_are_distinguished(question, capsys):
    changes = ["grid.backbone=['filter-bank']", "grid.head=['bilinear']", "grid.seed=[0]", "run.epochs=1"]
    for precision in ("fp32", "bf16", "fp32"):
        assert main([*question, *(x for change in changes for x in ("--set", change)), "--precision", precision]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out  # fp32 again
    found = mlflow.search_runs(experiment_names=["small"], output_format="list")
    runs = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    assert sorted((run.data.params["baseline"], run.data.params["precision"]) for run in runs) == [
        ("none", "bf16"),
        ("none", "fp32"),
        ("otsu", "fp32"),
    ]
    assert len({run.data.metrics["val/loss"] for run in runs if run.data.params["head"] != "none"}) == 2
    assert main(["report", "small"]) == 0
    printed = capsys.readouterr().out
    assert all(f"filter-bank · bilinear · precision {precision}" in printed for precision in ("fp32", "bf16"))


def test_runs_with_unavailable_weights_are_skipped_with_a_reason(question, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    narrow = ["--set", 'grid.head=["bilinear"]', "--set", "grid.seed=[0]"]
    code = main([*question, "--weights", str(tmp_path / "empty"), "--set", 'grid.backbone=["vit-tiny-random","vit-tiny-in1k"]', *narrow])
    assert code == 0
    runs = runs_of()
    skipped = runs["vit-tiny-in1k · bilinear · seed 0"]
    assert skipped.data.tags["cellbench.status"] == "skipped"
    assert "vit-tiny-in1k" in skipped.data.tags["cellbench.reason"]
    assert "test/dice" not in skipped.data.metrics
    assert runs["vit-tiny-random · bilinear · seed 0"].data.tags["cellbench.status"] == "finished"


def test_the_kept_head_is_the_best_epochs(inside):
    run = runs_of()["vit-tiny-random · bilinear · seed 0"]
    state = load_file(artifacts(run) / "head.safetensors")
    assert state["head.score.weight"].shape == (2, 192, 1, 1)


def test_a_dry_run_prints_and_leaves_nothing(question, tmp_path, capsys):
    assert main([*question, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\nvit-tiny-random +4 ", printed)
    assert "in all about" in printed
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


def test_another_dataset_is_another_experiment_when_the_experiment_draws_its_own(question):
    changes = ["grid.backbone=['vit-tiny-random']", "grid.head=['bilinear']", "run.epochs=1", "run.tile_px=64", "baselines=[]"]
    assert main(["grid", "quickstart", "--data", "smears", *(x for change in changes for x in ("--set", change))]) == 0
    assert mlflow.get_experiment_by_name("quickstart on smears") is not None


BAD = {
    "a missing folder": (["--data", "nowhere"], "nowhere"),
    "a misspelt head": (["--set", 'grid.head=["bilinaer"]'], "Did you mean 'bilinear'?"),
    "a misspelt backbone": (["--set", 'grid.backbone=["vit-tiny-randon"]'], "Did you mean 'vit-tiny-random'?"),
    "a misspelt setting": (["--set", "run.epoch=3"], "Did you mean run.epochs?"),
    "a value out of range": (["--set", "run.lr=-1"], "lr = -1"),
    "a value that is no number": (["--set", "run.lr=nan"], "lr = "),
    "a wrong type": (["--set", 'run.epochs="many"'], "epochs"),
    "an unknown loss": (["--set", 'run.loss="0.5 ce + 0.5 dise"'], "Did you mean 'dice'?"),
    "a head's unknown option": (["--set", "head.bilinear.widht=3"], "widht"),
    "a tile that the patch does not divide": (["--set", "run.tile_px=100"], "such as 96 or 112"),
    "no such device": (["--device", "cuda:99"], "cuda:99"),
    "no such kind of device": (["--device", "gpu"], "gpu"),
    "a size that is none": (["--memory", "much"], "much"),
    "a registry that is none": (["--registry", "nowhere"], "nowhere"),
    "weights that are nowhere": (["--weights", "nowhere"], "nowhere"),
    "an empty grid list": (["--set", "grid.seed=[]"], "seed is an empty list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(question, tmp_path, capsys, name):
    arguments, message = BAD[name]
    assert main([*question, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_truncated_image_stops_before_anything_is_trained(question, tmp_path, capsys):
    victim = sorted((tmp_path / "smears" / "test" / "original").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:200])
    assert main(question) == 2
    assert victim.name in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


@pytest.fixture
def start(undrawn_processes):
    """Starts a grid as a process of its own in the current folder; none outlives its test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        call = [sys.executable, "-m", "cellbench.run", *arguments]
        with Path("stderr.txt").open("w") as errors:
            started.append(subprocess.Popen(call, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=errors))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


LONG = [*QUESTION, *(part for change in (
    "grid.backbone=['filter-bank']", "grid.head=['bilinear']", "grid.seed=[0]", "baselines=[]", "run.epochs=40", "run.patience=0",
) for part in ("--set", change))]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The answers to the long question of a grid that nobody ended."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        experiment_files.place(folder, patch)
        assert main(LONG) == 0
        return experiment_files.finished_results()


@pytest.mark.parametrize(("how", "status"), [(signal.SIGKILL, "running"), (signal.SIGTERM, "interrupted")])
def test_a_grid_killed_after_a_checkpoint_resumes_from_it_and_ends_with_the_numbers_of_an_uninterrupted_one(
    uninterrupted, tmp_path, monkeypatch, start, capsys, how, status
):
    experiment_files.place(tmp_path, monkeypatch)
    process = start(*LONG)
    for _ in range(3000):
        if process.poll() is not None or list(Path("cache", "checkpoints").glob("*.pt")):
            break
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(60) == (-how if how == signal.SIGKILL else 128 + how), Path("stderr.txt").read_text()[-2000:]
    before = runs_of()
    assert [run.data.tags["cellbench.status"] for run in before.values()] == [status]
    assert main(LONG) == 0
    assert re.search(r"bilinear · seed 0 resumes after epoch \d+\.", capsys.readouterr().out)
    assert {name: run.info.run_id for name, run in runs_of().items()} == {name: run.info.run_id for name, run in before.items()}
    assert experiment_files.finished_results() == uninterrupted


def test_two_grids_at_once_share_the_work_and_nothing_is_run_twice(question, start):
    narrow = ["--set", 'grid.head=["bilinear"]']
    first, second = start(*question, *narrow), start(*question, *narrow)
    assert first.wait(200) == 0
    assert second.wait(200) == 0
    runs = mlflow.search_runs(experiment_names=["small"], output_format="list")
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(children) == 3
    assert all(run.data.tags["cellbench.status"] == "finished" for run in children)


def test_a_bare_call_uses_mlflows_own_default_store(question, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert (
        main([*question, "--set", "grid.head=['bilinear']", "--set", "grid.seed=[0]", "--set", "baselines=[]", "--set", "run.epochs=1"])
        == 0
    )
    assert (tmp_path / "mlflow.db").is_file()
    assert list((tmp_path / "mlruns" / "small").glob("*/artifacts/head.safetensors"))
