"""A small search from the command line: trials in MLflow and in the study, the test set untouched, the best tested once, bad input reported."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import mlflow
import optuna
import pytest
from small_data import ROOT, enter, write_pair

from cellbench.cli.search import stop_at_interrupt
from cellbench.config import loading
from cellbench.config.registry import Registry
from cellbench.data.image_cache import ImageCache
from cellbench.metrics.catalog import objectives
from cellbench.run import main
from cellbench.search import best_setting, driver

SEARCH = """# A small search
experiment = "small"
dataset    = "folder"
[search]
trials      = 6
batch       = 3
startup     = 3
seed        = 3
pruner      = "halving"
repeat_best = 2
[search.max]
"cost/head_params" = 1e9
[space]
backbone = ["vit-tiny-random"]
head     = ["bilinear", "detail"]
lr       = {low = 1e-4, high = 1e-1, log = true}
[head.detail]
width       = [8, 16]
pixel_width = 8
[run]
tile_px = 64
epochs  = 3
repeat_views_every = 1
crops_per_image = 3
"""
CALL = ["search", "small.toml", "--data", "smears", "--device", "cpu"]


def small(folder: Path) -> None:
    for part, first, num in (("train", 0, 3), ("test", 100, 1)):
        for seed in range(first, first + num):
            write_pair(folder / "smears" / part, f"{seed}.png", seed, height_px=80, width_px=96)
    (folder / "small.toml").write_text(SEARCH)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which the search was made; which splits were read before the best was known is kept there."""
    folder = tmp_path_factory.mktemp("done")
    small(folder)
    read = []
    whole, really = ImageCache.prepared, best_setting.test_best

    def prepared(self, index, preparation):
        read.append(self.samples[0].mask.parents[1].name)
        return whole(self, index, preparation)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        enter(folder, patch)
        patch.setattr(ImageCache, "prepared", prepared)
        patch.setattr(best_setting, "test_best", lambda *given: (read.append("END"), really(*given))[1])
        code = main(CALL)
    (folder / "printed.txt").write_text(printed.getvalue())
    (folder / "read.txt").write_text(" ".join(read))
    assert code == 0, printed.getvalue()
    return folder


@pytest.fixture
def inside(done, monkeypatch):
    enter(done, monkeypatch)
    return done


def study() -> optuna.Study:
    return optuna.load_study(study_name="small", storage="sqlite:///mlruns/optuna.db")


def runs() -> dict[str, mlflow.entities.Run]:
    return {run.info.run_id: run for run in mlflow.search_runs(experiment_names=["small"], output_format="list")}


def parent() -> mlflow.entities.Run:
    (found,) = (run for run in runs().values() if run.data.tags.get("cellbench.kind") == "search")
    return found


def artifacts(run: mlflow.entities.Run) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://"))


def test_trials_read_no_test_image_and_the_best_is_tested_at_the_end(inside):
    before, after = (inside / "read.txt").read_text().split("END")
    assert "train" in before
    assert "test" not in before
    assert "test" in after


def test_each_trial_has_its_run_and_each_run_its_trial(inside):
    known = runs()
    trials = study().trials
    assert [t.state.name for t in trials].count("COMPLETE") >= 2
    assert len(trials) == 6
    for t in trials:
        run = known[t.user_attrs["mlflow_run_id"]]
        assert run.data.tags["optuna.trial"] == str(t.number)
        assert run.data.tags["mlflow.parentRunId"] == parent().info.run_id
        assert run.data.tags["cellbench.status"] == ("pruned" if t.state.name == "PRUNED" else "validated")
        assert not any(name.startswith("test") for name in run.data.metrics)
        assert run.data.params["lr"] == str(t.params["lr"])
        if t.state.name == "COMPLETE":
            assert t.value == pytest.approx(run.data.metrics["best/val_dice"])
            assert run.data.metrics["cost/latency_ms"] > 0


def test_only_the_best_setting_is_tested_with_its_seeds(inside):
    tested = [run for run in runs().values() if "test/dice" in run.data.metrics]
    best = study().best_trial
    assert [run.data.params["lr"] for run in tested] == [str(best.params["lr"])] * 2
    assert {run.data.params["seed"] for run in tested} == {"0", "1"}
    assert 0 < parent().data.metrics["search/test_dice"] <= 1


def test_the_parent_holds_pictures_a_table_and_a_file_that_grid_runs(inside, capsys):
    folder = artifacts(parent())
    assert {"history.png", "slice.png", "parallel.png", "curves.png"} <= {path.name for path in (folder / "figures").iterdir()}
    assert len((folder / "trials.csv").read_text().splitlines()) == 7
    assert tomllib.loads((folder / "best.toml").read_text())["grid"]["seed"] == [0, 1]
    assert main(["grid", str(folder / "best.toml"), *CALL[2:]]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out


def test_the_same_command_again_trains_nothing_and_a_changed_space_is_refused(inside, capsys):
    before = set(runs())
    assert main(CALL) == 0
    assert set(runs()) == before
    assert main([*CALL, "--set", 'space.head=["bilinear"]']) == 2
    assert "space.head was bilinear, detail and is bilinear" in capsys.readouterr().err


def test_trials_without_run_and_runs_without_trial_are_marked_and_kept(done, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(done, tmp_path / "copy")
    enter(tmp_path / "copy", monkeypatch)
    victim = study().trials[0]
    mlflow.delete_run(victim.user_attrs["mlflow_run_id"])
    orphan = next(iter(runs().values()))
    mlflow.tracking.MlflowClient().create_run(orphan.info.experiment_id, tags={"optuna.study": "small", "optuna.trial": "99"})
    assert main(CALL) == 0
    output = capsys.readouterr().out
    assert "MLflow has lost the runs of 1 trials (0)" in output
    assert study().user_attrs["lost_runs"] == [0]
    assert len(study().trials) == 6
    assert [run.data.tags.get("optuna.state") for run in runs().values() if run.data.tags.get("optuna.trial") == "99"] == ["lost"]


BAD = {
    "an empty space": (["--set", "space.head=[]"], "empty list"),
    "nothing open": (["--set", "space.lr=[1e-3]", "--set", 'space.head=["bilinear"]'], "leaves nothing open"),
    "an unknown parameter": (["--set", "space.lrr=[1e-3]"], "Did you mean 'lr'?"),
    "a seed that varies": (["--set", "space.seed=[1, 2]"], "repeat_best"),
    "low above high": (["--set", "space.lr={low = 1e-2, high = 1e-3}"], "not below high"),
    "a log range from 0": (["--set", "space.lr={low = 0, high = 1e-3, log = true}"], "above 0"),
    "out of a setting's own range": (["--set", "space.lr={low = 1e-3, high = 7}"], "lr = 7"),
    "a range of words": (["--set", "space.loss={low = 1, high = 2}"], "list of choices"),
    "a head's unknown setting": (["--set", "head.detail.widht=[1, 2]"], "Did you mean 'width'?"),
    "a misspelt head": (["--set", 'space.head=["bilinear", "detial"]'], "Did you mean 'detail'?"),
    "fixed and varied": (["--set", "run.lr=1e-3"], "in [space] and in [run]"),
    "no such metric": (["--set", 'search.objective="val/dise"'], "Did you mean 'val/dice'?"),
    "a metric of the test": (["--set", 'search.objective="test/dice"'], "only used for the best trial"),
    "pruning of two objectives": (["--set", 'search.objective=["val/dice", "cost/train_s"]'], "pruner"),
    "a storage that is no URL": (["--storage", "optuna"], "expected a URL"),
    "a storage that is not there": (["--storage", "sqlite:///small.toml"], "storage"),
    "a grid's file": (["quickstart"], "has no [space]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(inside, tmp_path, monkeypatch, capsys, name):
    arguments, message = BAD[name]
    call = ["search", *arguments] if arguments == ["quickstart"] else [*CALL, *arguments]
    assert main(call) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_trials_that_all_fail_stop_the_search_with_the_first_error(tmp_path, monkeypatch, capsys):
    small(tmp_path)
    enter(tmp_path, monkeypatch)
    wide = SEARCH.replace("tile_px = 64\n", "").replace("[head.detail]", "tile_px = {low = 64, high = 79}\n[head.detail]")
    (tmp_path / "small.toml").write_text(wide)  # one of 16 widths fits the patches: that the others do not is for the trials to find out
    assert main([*CALL, "--set", "search.max_failed=2"]) == 2
    output = capsys.readouterr().err
    assert "trials have all failed" in output
    assert "patches of 16 px" in output


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "cellbench.run", *CALL, *more]
    return subprocess.Popen(call, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def num_asked() -> int:
    """Read without Optuna, which would make tables while the search does."""
    with contextlib.closing(sqlite3.connect("file:mlruns/optuna.db?mode=ro", uri=True)) as store:
        return store.execute("SELECT count(*) FROM trials").fetchone()[0]


def test_a_search_killed_in_training_resumes_the_same_trials(inside, tmp_path, monkeypatch):
    whole = [(t.number, t.params, t.state.name, t.value) for t in study().trials]
    small(tmp_path)
    enter(tmp_path, monkeypatch)
    process = start(tmp_path)
    end = time.monotonic() + 200
    try:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(sqlite3.OperationalError):  # not there yet
                if num_asked() >= 4:
                    break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    states = [t.state.name for t in study().trials]
    assert states[:3].count("RUNNING") == 0
    assert "RUNNING" in states
    assert main(CALL) == 0
    assert [(t.number, t.params, t.state.name, t.value) for t in study().trials] == whole


def test_a_second_worker_takes_trials_on_its_share_of_the_cores(done, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(done, tmp_path / "copy")
    enter(tmp_path / "copy", monkeypatch)
    monkeypatch.setattr("cellbench.hardware.num_cores", lambda: 2)
    given = loading.read_space(CALL[1], ["search.trials=8"], None, None, Registry(), objectives())[1]
    held = Path(CALL[1]).rename("held.toml")  # a worker is handed what the first one read
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert main([*CALL, "--trials", "8", "--workers", "2", "--helper", "1"]) == 0
    held.rename(CALL[1])
    trials = study().trials
    assert {t.state.name for t in trials[6:]} <= {"COMPLETE", "PRUNED"}
    machines = [run.data.tags["cellbench.machine"] for run in runs().values() if run.data.tags.get("optuna.trial") in ("6", "7")]
    assert len(trials) == 8
    assert [name.partition(", ")[2].startswith("1 core,") for name in machines] == [True, True]
    assert main([*CALL, "--workers", "3"]) == 2


def test_the_first_ctrl_c_ends_after_the_batch_and_the_second_at_once(capsys):
    stop = driver.StopRequest()
    with stop_at_interrupt(stop):
        helper = subprocess.Popen(["sleep", "60"], start_new_session=True)
        stop.helpers.append(helper)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.over()
        assert "stopping after this batch" in capsys.readouterr().out
        assert helper.wait(20) == -signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
