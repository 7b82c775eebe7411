"""What a run logs to MLflow, and when: epochs wait for the next call, and none is lost however the run ends."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest

from cellbench.execution.claims import ActiveRun, Outcome, RunClaims
from cellbench.tracking import open_run
from cellbench.tracking import tracker as tracker_module
from cellbench.tracking.offline_queue import TakenOverError
from cellbench.tracking.tracker import Tracker

EXPERIMENT = "runs"


def curve(tracker: Tracker, run_id: str) -> list[tuple[int, float]]:
    """A run's validation Dice by step, as MLflow has it."""
    return sorted((one.step, one.value) for one in tracker.client.get_metric_history(run_id, "val/dice"))


def test_epochs_go_to_mlflow_with_what_is_logged_next_each_at_its_step(tracker):
    with tracker.run("kept", "kept") as run:
        for epoch in range(3):
            run.buffer(epoch, {"val/dice": epoch / 10})
        assert curve(tracker, run.run_id) == []
        run.log({"test/dice": 0.9})
        assert curve(tracker, run.run_id) == [(0, 0.0), (1, 0.1), (2, 0.2)]


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_ends_a_run_loses_none_of_its_epochs(tracker, how):
    runs = []

    def ends() -> None:
        with tracker.run("ended", how.__name__) as run:
            runs.append(run.run_id)
            run.buffer(4, {"val/dice": 0.5})
            raise how

    with pytest.raises(how):
        ends()
    assert curve(tracker, runs[0]) == [(4, 0.5)]


def test_more_numbers_than_mlflow_takes_at_once_all_arrive(tracker):
    with tracker.run("many", "many") as run:
        for epoch in range(2001):
            run.buffer(epoch, {"val/dice": 0.5})
        run.end("finished", metrics={"test/dice": 0.7}, tags={"model": "x"})
    assert [step for step, _ in curve(tracker, run.run_id)] == list(range(2001))
    data = tracker.client.get_run(run.run_id).data
    assert (data.metrics["test/dice"], data.tags["model"], data.tags["cellbench.status"]) == (0.7, "x", "finished")


def test_a_run_whose_scores_mlflow_refuses_has_failed(tracker):
    with pytest.raises(Exception, match="name"), tracker.run("refused", "refused") as run:
        run.end("finished", metrics={"not a name of a metric ?": 0.5})
    assert tracker.client.get_run(run.run_id).data.tags["cellbench.status"] == "failed"


def test_a_run_logs_the_load_of_its_machine_by_mlflows_own_monitor(tracker, monkeypatch):
    monkeypatch.setattr(open_run, "SAMPLE_S", 0.02)
    monkeypatch.setattr(open_run, "SAMPLES_PER_VALUE", 2)
    with tracker.run("one", "one") as run:
        for _ in range(2):  # the second time as if the run was resumed
            with run.system_metrics():
                time.sleep(0.3)
    history = tracker.client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    assert len(history) >= 4
    assert len({one.step for one in history}) == len(history)


def test_a_run_of_a_second_has_its_load_too(tracker):
    with tracker.run("short", "short") as run, run.system_metrics():
        time.sleep(0.05)
    metrics = tracker.client.get_run(run.run_id).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 10


def test_an_open_run_has_a_heartbeat_though_nothing_is_logged_and_a_closed_one_has_none(tracker, monkeypatch):
    monkeypatch.setattr(tracker_module, "HEARTBEAT_S", 0.05)
    with tracker.run("one", "one") as run:
        first = float(tracker.client.get_run(run.run_id).data.tags["cellbench.heartbeat"])
        time.sleep(0.5)
        assert float(tracker.client.get_run(run.run_id).data.tags["cellbench.heartbeat"]) > first
    time.sleep(0.2)
    last = tracker.client.get_run(run.run_id).data.tags["cellbench.heartbeat"]
    time.sleep(0.2)
    assert tracker.client.get_run(run.run_id).data.tags["cellbench.heartbeat"] == last


def test_runs_are_found_by_their_fingerprints_as_in_a_search_of_all(tracker):
    for number in range(5):
        with tracker.run(f"run {number}", f"f{number}"):
            pass
    with contextlib.suppress(KeyboardInterrupt), tracker.run("again", "f3"):
        raise KeyboardInterrupt
    with tracker.run("gone", "f9") as gone:
        pass
    tracker.client.delete_run(gone.run_id)
    every = tracker.known()
    assert tracker.known("f1", "f3", "f9", "absent") == {name: every[name] for name in ("f1", "f3")}
    assert every["f3"].name == "run 3"  # the finished one
    assert Tracker("other").known("f1") == {}


def test_a_process_that_slept_leaves_a_run_that_another_took_over(tracker):
    """After an hour without a sign of life another machine executes the run: the sleeper logs nothing more, and does not end it."""
    with tracker.run("slept", "slept") as run:
        run.log({"val/dice": 0.1})
        tracker.client.set_tag(run.run_id, "cellbench.owner", "lab-2:71:8123.5f0c.40265")
        run.log({"val/dice": 0.2}, step=1)  # awake: nobody takes over, so nobody is asked
        run.alive_s -= 3600
        for ask in (lambda: run.log({"val/dice": 0.3}, step=2), lambda: run.end("finished")):
            with pytest.raises(TakenOverError, match="taken over by process 71 on lab-2"):
                ask()
        claims = RunClaims(tracker=tracker, parent_id="", datasets=[], limit=None, say=lambda _: None)
        out = Outcome()
        claims.fail(ActiveRun(resolved=SimpleNamespace(name="slept", fingerprint="f"), run=run), "taken over", out, "a traceback")
    assert (out.busy, out.failed) == (["slept"], {})
    assert curve(tracker, run.run_id) == [(0, 0.1), (1, 0.2)]
    (stored,) = [one for one in tracker.stored() if one.run_id == run.run_id]
    assert (stored.status, stored.owner) == ("running", "lab-2:71:8123.5f0c.40265")


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_a_clock_that_jumps_takes_no_run_away(tracker, jump_s):
    with tracker.run("jumps", f"jumps {jump_s}") as run:
        run.alive_s += jump_s
        run.log({"val/dice": 0.1})
        assert abs(run.alive_s - time.time()) < 60
    assert curve(tracker, run.run_id) == [(0, 0.1)]


@pytest.mark.parametrize(("text", "seconds"), [("1795727674.5", 1795727674.5), ("nan", 0.0), ("x", 0.0), ("", 0.0)])
def test_a_heartbeat_that_somebody_edited_is_none(tracker, text, seconds):
    with tracker.run("edited", f"edited {text}") as run:
        tracker.client.set_tag(run.run_id, "cellbench.heartbeat", text)
        (stored,) = [one for one in tracker.stored() if one.run_id == run.run_id]
    assert stored.heartbeat_s == seconds
