"""StarDist by its own package (with TensorFlow), with its own weights: nothing trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cellbench.models.baselines.package_weights import LOCK, opened

MODELS = ["2D_versatile_he", "2D_versatile_fluo", "2D_paper_dsb2018", "2D_demo"]


def stardist(image: np.ndarray, num_classes: int, *, model: str) -> np.ndarray:
    """Cell numbers (H, W) int32 of an RGB image (H, W, 3) uint8. ``model``: a name, or the folder of a model.

    Intensities are scaled by their percentiles 1 and 99.8, as StarDist's examples do; models of one channel read the mean of the three.
    """
    with LOCK:
        from csbdeep.utils import normalize

        net = opened("stardist", model, _load, MODELS)
        pixels = image if net.config.n_channel_in == 3 else image.mean(-1)
        ids: np.ndarray = net.predict_instances(normalize(pixels.astype(np.float32), 1, 99.8))[0]
    return ids.astype(np.int32)


def _load(name: str) -> Any:
    from stardist.models import StarDist2D

    if name not in MODELS:
        return StarDist2D(None, name=Path(name).name, basedir=str(Path(name).absolute().parent))
    if (net := StarDist2D.from_pretrained(name)) is None:
        raise FileNotFoundError(name)
    return net
