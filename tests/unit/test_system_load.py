"""Claims about costs: processor seconds beside wall seconds, what is short is repeated, and the load by others is measured and said."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
from finished_runs import finished_run, per_image_scores

from cellbench import system_load
from cellbench.reporting.grouping import group_models
from cellbench.reporting.leaderboard import leaderboard_rows
from cellbench.reporting.verdict import describe_costs_load
from cellbench.system_load import SystemLoad
from cellbench.training import measured_cost

Times = namedtuple("Times", "user nice system idle iowait steal guest")


def test_the_load_by_others_is_what_this_process_did_not_use_of_the_busy_time(monkeypatch):
    """Of 2 cores for 5 s: 6 s busy, 1 s of them stolen by the host and 1 s for a guest, which the user's seconds hold too; 2 s are our own."""
    readings = iter([([Times(0, 0, 0, 0, 0, 0, 0)] * 2, 10.0), ([Times(3, 0, 1, 1, 0, 0, 0), Times(1, 0, 0, 2, 1, 1, 1)], 12.0)])

    def counters(percpu):
        times, own_s = next(readings)
        monkeypatch.setattr(system_load.time, "process_time", lambda: own_s)
        return times

    monkeypatch.setattr(system_load.psutil, "cpu_times", counters)
    monkeypatch.setattr(system_load, "_children_s", lambda: 0.0)
    monkeypatch.setattr(system_load.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    # Core 0: 5 s, 4 busy. Core 1: 6 s with the guest's counted once more by psutil, so 5 s, of which 3 idle.
    assert SystemLoad().others_pct() == pytest.approx(100 * (4 + 2 - 2) / 10)


def test_a_process_that_this_one_started_is_its_own_while_it_runs_and_after():
    before_s = system_load._counters()[2]
    code = "import time, sys\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert system_load._counters()[2] - before_s > 0.35
        child.stdin.close()
        child.wait()
    assert system_load._counters()[2] - before_s > 0.35


def test_too_short_a_time_has_no_load(monkeypatch):
    monkeypatch.setattr(system_load.psutil, "cpu_times", lambda percpu: [Times(1, 0, 0, 1, 0, 0, 0)])
    assert SystemLoad().others_pct() is None


def test_waiting_costs_wall_seconds_and_no_processor_seconds():
    machine = SimpleNamespace(wait=lambda: None)
    wall_s, cpu_s = measured_cost.spent(lambda: time.sleep(0.02), machine)
    assert wall_s >= 0.02
    assert cpu_s < 0.01


def world(place: str, pass_s: list[float], backbone_s: float):
    """A model and features whose passes over four test images take the model these seconds, one after the other, and the backbone ``backbone_s``."""
    frozen = SimpleNamespace(seconds=0.0, cpu_seconds=0.0, module=object(), chunk=2, maps=lambda tile: time.sleep(0.01))
    frozen.machine = SimpleNamespace(device="cpu", wait=lambda: None)
    made = SimpleNamespace(seconds=0.0, cpu_seconds=0.0)
    features = SimpleNamespace(
        backbone=frozen, pixels={"test": range(4)}, place={"test": place}, tile_px={"test": (8, 8)}, grid=lambda *_: range(3)
    )
    passes = iter(pass_s)

    def segment(models, *_):
        made.seconds += (spent := next(passes))
        made.cpu_seconds += spent / 2
        frozen.seconds += backbone_s
        frozen.cpu_seconds += backbone_s / 2
        yield 0, []

    return made, features, segment


def test_what_is_timed_in_less_than_a_second_is_timed_again_without_the_cold_first_pass(monkeypatch):
    made, features, segment = world("streamed", [0.8, 0.3, 0.3, 0.3, 0.3], 0.1)
    monkeypatch.setattr(measured_cost, "segment_images", segment)
    monkeypatch.setattr(measured_cost, "MEASURED_S", 1.0)
    list(segment([made]))  # the test itself: 0.9 s
    (speed,) = measured_cost.inference_speeds([made], features)
    assert (speed.wall_s, speed.cpu_s) == pytest.approx((0.4 / 4, 0.2 / 4))


def test_what_takes_a_second_is_timed_once(monkeypatch):
    made, features, segment = world("streamed", [0.9], 0.1)
    monkeypatch.setattr(measured_cost, "segment_images", segment)
    monkeypatch.setattr(measured_cost, "MEASURED_S", 1.0)
    list(segment([made]))
    (speed,) = measured_cost.inference_speeds([made], features)
    assert speed.wall_s == pytest.approx(1 / 4)


def test_cached_features_do_not_hide_the_time_of_the_backbone(monkeypatch):
    made, features, segment = world("on disk", [2.0], 0.0)
    monkeypatch.setattr(measured_cost, "segment_images", segment)
    list(segment([made]))
    (speed,) = measured_cost.inference_speeds([made], features)
    assert speed.wall_s >= 2.0 / 4 + 3 * 0.01 / 2  # three tiles an image, of chunks of two


def test_the_load_is_reported_with_the_costs():
    (here,), _ = group_models([finished_run(head, per_image_scores(mean, 0)) for head, mean in (("fpn", 0.9), ("bilinear", 0.8))])
    first, second = leaderboard_rows(here)
    assert describe_costs_load([first, second]) == "The load by other processes is not recorded."
    idle = [replace(row, other_load_pct=3.0) for row in (first, second)]
    assert describe_costs_load(idle) == "Costs were measured while other processes used 3 % of the processor at most."
    busy = describe_costs_load([replace(first, other_load_pct=45.0), second])
    assert busy.startswith("Costs were measured while other processes used 45 % of the processor (not recorded for 1 of 2 models)")
    assert "Processor seconds" in busy
