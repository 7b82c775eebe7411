"""``bench`` measures what it says, and ``cache`` shows and removes what is kept."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from cohorts import REGISTRY, dataset_of, fitted, run_of
from small_data import write_set

from cellbench.diagnostics import gpu_speed, scaling, speed
from cellbench.diagnostics.benchmark_setup import BenchmarkSetup
from cellbench.features.cache_admin import cache_entries
from cellbench.hardware import detect_hardware
from cellbench.run import main


def setup_of(folder, machine, **more):
    facts = {"registry": REGISTRY, "dataset": dataset_of(folder), "machine": machine, "backbone": "vit-tiny-random", "weights": None}
    return BenchmarkSetup(**facts, epochs=1, crops=2, say=lambda _: None, **more)


def test_bench_checks_equalities_and_names_the_naive_protocol(small_folder, monkeypatch):
    monkeypatch.setattr(speed, "CHUNKS", 1)
    machine = detect_hardware("cpu", "fp32").smaller(3)
    setup, said = setup_of(small_folder, machine, quick=True, heads=("bilinear", "fpn"), rates=(1e-3, 2e-3)), []
    setup.say = said.append
    result = speed.measure(setup)
    assert all(result.checks.values()), result.checks
    assert any("alone and in a cohort" in name for name in result.checks)
    printed = "\n".join(said)
    assert "naive: the cohort is" in printed
    assert "of the bare forward" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert result.facts["alone_s"] > 0
    assert result.facts["pass_over_bare"] > 0  # on a busy machine it may be any number
    assert result.facts["naive_dice_gap"] < 1e-3  # the same views, weights and precision: only the order of sums differs


def test_cache_shows_what_is_kept_and_prunes_it(small_folder, capsys):
    assert main(["cache"]) == 0
    assert "no features are cached" in capsys.readouterr().out
    disk = {"memory_bytes": 0, "disk_bytes": 2**30, "key": "test", "backbone": "vit-tiny-random"}
    fitted(dataset_of(small_folder), [run_of(repeat_views_every=1)], **disk)
    assert main(["cache"]) == 0
    printed = capsys.readouterr().out
    assert "vit-tiny-random" in printed
    assert "train" in printed
    assert main(["cache", "--prune", "--older-than", "1"]) == 0
    assert "removed 0 of" in capsys.readouterr().out
    assert main(["cache", "--prune"]) == 0
    assert cache_entries() == []


def test_scaling_counts_images_and_runs_and_watches_memory(tmp_path, monkeypatch):
    write_set(tmp_path, ["a0.png", "a1.png"], ["t0.png"])
    monkeypatch.setattr(scaling, "NUM_RUNS", (1, 3))
    monkeypatch.setattr(scaling, "REPEATS", (1, 2))
    monkeypatch.setattr(scaling, "NUM_COMPARED", (4, 9))
    found = scaling.measure(setup_of(tmp_path / "smears", detect_hardware("cpu", "fp32")))
    assert [point.num_runs for point in found.runs] == [1, 3]
    assert [point.num_images for point in found.images] == [3, 6]  # all images of the folder, once and twice
    assert all(point.trunk_s > 0 and point.head_s > 0 and point.peak_mib > 100 for point in found.runs + found.images)
    assert "ms an image" in scaling.table(found)


def test_the_gpu_bench_measures_heads_pass_and_larger_backbones_on_a_processor_too(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "CHUNKS", 1)
    write_set(tmp_path, ["a0.png", "a1.png"], ["t0.png"])  # one image to train on: a pass of few tiles
    said = []
    setup = setup_of(tmp_path / "smears", detect_hardware("cpu", "fp32").smaller(3), quick=True, heads=("bilinear",))
    setup.say = said.append
    facts = gpu_speed.measure(setup).facts
    assert facts["head_bilinear_tiles_per_s"] > 0
    assert facts["pass_tiles_per_s_ViT-S/16"] < facts["pass_tiles_per_s"]  # seven times the work
    assert any("ViT-S/16: feature pass" in line for line in said)


def test_a_sampled_command_says_what_its_main_thread_did(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cellbench.diagnostics.stack_samples", "samples.json", "list", "heads"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0
    seconds = json.loads((tmp_path / "samples.json").read_text())
    assert seconds["import pydantic"] > 0


def test_a_peer_that_is_not_installed_is_named_with_how_to_install_it(capsys):
    if importlib.util.find_spec("eva"):
        pytest.skip("kaiko-eva is installed")
    assert main(["bench", "--peer", "eva"]) == 2
    assert "pip install 'kaiko-eva[vision]'" in capsys.readouterr().err
