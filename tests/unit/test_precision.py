"""Claims about the choice between float32 and bf16 on a processor: by measurement, remembered, and never where bf16 is emulated."""

from __future__ import annotations

import json

import pytest
import torch

from cellbench import precision
from cellbench.files import cache_dir
from cellbench.hardware import detect_hardware


@pytest.fixture
def supported(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.mark.parametrize(("speed", "name"), [(0.6, "fp32"), (1.05, "fp32"), (1.9, "bf16")])
def test_the_faster_precision_is_taken(supported, monkeypatch, speed, name):
    monkeypatch.setattr(precision, "_measured", lambda num_threads: speed)
    assert detect_hardware("cpu").precision_name == name


def test_a_machine_is_measured_once(supported, monkeypatch):
    monkeypatch.setattr(precision, "_measured", lambda num_threads: 1.9)
    first = precision.bf16_is_faster(1)
    monkeypatch.setattr(precision, "_measured", lambda num_threads: 0.6)
    assert first is True
    assert precision.bf16_is_faster(1) is True


@pytest.mark.parametrize("text", ["", "[1]", '{"x": null}'])
def test_a_damaged_file_is_measured_again(supported, monkeypatch, text):
    monkeypatch.setattr(precision, "_measured", lambda num_threads: 0.6)
    (cache_dir()).mkdir()
    (cache_dir() / "precision.json").write_text(text)
    assert precision.bf16_is_faster(1) is False
    assert list(json.loads((cache_dir() / "precision.json").read_text()).values()) == [0.6]


def test_without_the_instructions_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision, "_measured", lambda num_threads: pytest.fail("measured"))
    assert detect_hardware("cpu").precision_name == "fp32"


def test_a_named_precision_is_not_measured(supported, monkeypatch):
    monkeypatch.setattr(precision, "_measured", lambda num_threads: pytest.fail("measured"))
    assert detect_hardware("cpu", "bf16").precision_name == "bf16"


def test_both_precisions_are_timed_on_the_same_work():
    assert 0.05 < precision.speed_of_bf16() < 20
