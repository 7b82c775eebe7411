"""Claims about the settings of a process: imports are not searched for garbage, a caller's own garbage is still found, and importing sets nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from cellbench import startup
from cellbench.errors import CellbenchError
from cellbench.hardware import detect_hardware

UNTOUCHED = """
import gc, os, signal
before = (dict(os.environ), gc.get_threshold(), gc.get_freeze_count(), signal.getsignal(signal.SIGTERM))
import cellbench, cellbench.run, cellbench.cli.grid, cellbench.hardware, cellbench.inference.segmenter
import torch
threads = torch.get_num_threads()
cellbench.hardware.detect_hardware("cpu")
print(before[1:] == (gc.get_threshold(), gc.get_freeze_count(), signal.getsignal(signal.SIGTERM)), torch.get_num_threads() == threads)
print(*sorted(name for name in os.environ if name.startswith(("MLFLOW", "CELLBENCH", "RAY", "HF_"))))
"""


class Knot:
    """Garbage that only a search finds: it holds itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.mark.slow
def test_importing_changes_no_setting_of_the_process():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "CELLBENCH", "RAY", "HF_"))}
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=True, env=environment, timeout=120)
    assert done.stdout.split() == ["True", "True"]


def test_imported_modules_are_searched_once_and_a_callers_garbage_is_found():
    startup.freeze_imports()
    before = gc.get_freeze_count()
    assert before > 0
    knot = Knot()
    found = weakref.ref(knot)
    startup.freeze_imports()  # nothing was imported since
    del knot
    gc.collect()
    assert found() is None
    assert gc.get_freeze_count() <= before  # not frozen again; frozen objects may be freed


@pytest.mark.parametrize(("device", "cores", "threads", "lanes"), [("cpu", 2, 1, 2), ("cpu", 16, 4, 4), ("cuda", 16, 16, 1)])
def test_a_cpu_gets_four_threads_and_a_gpu_one(monkeypatch, device, cores, threads, lanes):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr("cellbench.hardware.num_cores", lambda: cores)
    startup.configure_threads(device)
    machine = detect_hardware(device, "fp32", elsewhere=True)
    assert (set_to, machine.threads, machine.lanes) == ([threads], threads, lanes)


def test_the_cache_is_set_for_this_process_and_a_url_must_be_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLBENCH_CACHE", "before")
    monkeypatch.setenv("CELLBENCH_CACHE_URL", "")
    startup.set_cache(None)
    assert os.environ["CELLBENCH_CACHE"] == "before"
    startup.set_cache("here", "s3://bucket/folder")
    assert (os.environ["CELLBENCH_CACHE"], os.environ["CELLBENCH_CACHE_URL"]) == (str(tmp_path / "here"), "s3://bucket/folder")
    assert Path("here").is_dir()
    with pytest.raises(CellbenchError, match="expected a URL"):
        startup.set_cache(None, "/shared/cache")


@pytest.mark.slow
def test_timm_is_imported_and_an_optimiser_takes_steps_without_torchs_compiler_which_can_be_imported_afterwards():
    code = """
import sys, torch
from cellbench import startup
weight = torch.nn.Parameter(torch.ones(3))
with startup.without_compiler():
    import timm
    optimiser = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    weight.sum().backward()
    optimiser.step()
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
assert torch.allclose(weight.detach(), torch.full((3,), 0.9))
import torchvision
boxes = torch.tensor([[0, 0.0, 0.0, 3.0, 3.0]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), boxes, 2).shape == (1, 1, 2, 2)
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(1)) == 2
assert torch._dynamo.utils.__file__
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_code_that_compiles_when_it_is_imported_gets_the_compiler():
    code = """
import torch
from cellbench import startup
with startup.without_compiler():
    import torch._dynamo.eval_frame
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert compiled(torch.ones(1)) == 2
    assert torch._dynamo.eval_frame.innermost_fn
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
