"""Claims about ``import cellbench``: it loads no library, changes no setting of the process, and offers what ``__all__`` names."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cellbench
from cellbench import startup

UNTOUCHED = """
import gc, os, signal, sys
import torch
torch.set_num_threads(2)
def settings():
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}  # OpenCV sets it
    collector, handler = (gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()), signal.getsignal(signal.SIGTERM)
    return environment, collector, handler, torch.get_num_threads()
before, loaded = settings(), set(sys.modules)
import cellbench
print(sorted({name.partition(".")[0] for name in set(sys.modules) - loaded} - set(sys.stdlib_module_names)), settings() == before)
from cellbench import *
print(settings() == before, {"mlflow", "timm"} & set(sys.modules))
"""
ALONE = "import sys; before = set(sys.modules); import cellbench; print(*{name.split('.')[0] for name in set(sys.modules) - before})"


def test_importing_it_loads_nothing():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"cellbench"}


@pytest.mark.slow
def test_neither_it_nor_any_of_its_names_changes_the_process():
    known = {name: value for name, value in os.environ.items() if name not in startup.ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=True, env=known, timeout=120)
    first, second = done.stdout.splitlines()
    assert first == "['cellbench'] True"
    assert second == "True set()"  # neither MLflow nor timm, which read the environment when they are imported


def test_every_public_name_is_found_where_its_module_defines_it():
    for name, place in cellbench._PLACE.items():
        value = getattr(cellbench, name)
        assert value is getattr(importlib.import_module(f"cellbench.{place}"), name)
        assert value.__doc__, name
    assert sorted(cellbench.__all__) == sorted([*cellbench._PLACE, *cellbench._PACKAGES])
    assert len(set(cellbench.__all__)) == len(cellbench.__all__)
    assert not hasattr(cellbench, "griddle")


def test_no_public_name_is_hidden_by_a_package_of_the_same_name():
    folder = Path(cellbench.__file__).parent
    assert {path.stem for path in folder.iterdir()} & {*cellbench.__all__} == set(cellbench._PACKAGES)


def test_a_package_with_a_public_name_is_called_as_the_function(monkeypatch):
    package = importlib.import_module("cellbench.search")
    assert cellbench.search is package
    monkeypatch.setattr("cellbench.api.searches.search", lambda *arguments, **named: (arguments, named))
    assert cellbench.search("file", trials=3) == (("file",), {"trials": 3})
