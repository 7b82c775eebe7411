"""Cellpose by its own package, 3 (the networks of cyto3 and others) or 4 (Cellpose-SAM), with its own weights: nothing trained here."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import torch

from cellbench.models.baselines.package_weights import LOCK, opened


def cellpose(image: np.ndarray, num_classes: int, *, model: str, diameter: float) -> np.ndarray:
    """Cell numbers (H, W) int32 of an RGB image (H, W, 3) uint8. ``model``: a name or file; empty: the first of the version, cyto3 or cpsam_v2.

    ``diameter``: of cells in px; 0: that of the model.
    """
    version = 3 if importlib.metadata.version("cellpose").startswith("3.") else 4
    with LOCK:
        from cellpose import models

        known = [str(name) for name in models.MODEL_NAMES]
        net = opened("cellpose", model or known[0], lambda name: _load(models, name, version, known), known)
        grey: dict[str, Any] = {"channels": [0, 0]} if version == 3 else {}  # 4 reads three channels
        ids: np.ndarray = net.eval(image, diameter=diameter or None, **grey)[0]
    return ids.astype(np.int32)


def _load(models: Any, name: str, version: int, known: list[str]) -> Any:
    gpu = torch.cuda.is_available()
    if version == 3 and name in known:
        return models.CellposeModel(gpu=gpu, model_type=name)
    return models.CellposeModel(gpu=gpu, pretrained_model=name)
