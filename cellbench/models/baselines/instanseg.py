"""InstanSeg by its own package, with its own weights: nothing trained here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cellbench.models.baselines.package_weights import LOCK, opened

MODELS = ["brightfield_nuclei", "fluorescence_nuclei_and_cells", "single_channel_nuclei"]


def instanseg(image: np.ndarray, num_classes: int, *, model: str, target: str, um_per_px: float) -> np.ndarray:
    """Cell numbers (H, W) int32 of an RGB image (H, W, 3) uint8. ``model``: a name, or a TorchScript file.

    ``target``: ``nuclei`` or ``cells``, where the model tells them apart. ``um_per_px``: side of a pixel, to which the image is scaled; 0: unknown.
    """
    with LOCK:
        net = opened("instanseg", model, _load, MODELS)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
        found = net.eval_small_image(pixels, pixel_size=um_per_px or None, target=target, return_image_tensor=False)
    ids: np.ndarray = found[0, 0].cpu().numpy()
    return ids.astype(np.int32)


def _load(name: str) -> Any:
    from instanseg import InstanSeg

    return InstanSeg(name if name in MODELS else torch.jit.load(name, map_location="cpu"), verbosity=0)
