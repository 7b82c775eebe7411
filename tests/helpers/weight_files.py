"""What the tests of weights share: two files of the same tensors, a card for them, and a machine with nothing on it yet."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_hub import StandIn, standin
from safetensors.torch import save as safetensors_bytes

from cellbench.config.cards import BackboneCard
from cellbench.errors import WeightsUnavailable
from cellbench.models.backbones.weights import locate

HALF = (0.5, 0.5, 0.5)
STATE = {"patch_embed.proj.weight": torch.arange(30_000.0), "norm.bias": torch.ones(7)}
REPO = "lab/net"


def card(weights: str, **facts: object) -> BackboneCard:
    defaults = {
        "id": "net",
        "title": "",
        "path": "net.toml",
        "builder": "x:y",
        "patch_px": 16,
        "dim": 8,
        "depth": 2,
        "mean": HALF,
        "std": HALF,
    }
    return BackboneCard(**{**defaults, "weights": weights, **facts})


def torch_bytes(tree: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


PTH = torch_bytes({"teacher": {f"backbone.{key}": value for key, value in STATE.items()}, "epoch": 3})
SAFE = safetensors_bytes(STATE)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def empty_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Own caches, nobody logged in, the hub and Zenodo played by the stand-in."""
    import huggingface_hub.constants as hub

    for name in ("CELLBENCH_WEIGHTS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CELLBENCH_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(hub, "HF_TOKEN_PATH", str(folder / "no-token"))
    with standin() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        yield state


def refusal(it: BackboneCard, folder: Path | None = None, download: bool = True) -> str:
    """The one line with which these weights are refused."""
    with pytest.raises(WeightsUnavailable) as caught:
        locate(it, folder, download)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(it.id)
    return line
