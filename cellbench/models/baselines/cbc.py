"""The blood-smear U-Nets of the Python package cbc 1.1.0 as they are: trained on smears of another laboratory, nothing trained here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from cellbench.errors import CellbenchError
from cellbench.models.backbones.cbc_unet import BORDER_PX, CbcUNet, load_unet

TILE_PX = 420
"""Side of the square that one pass segments: 508 px with its border, which the valid convolutions need."""


def cbc(states: Sequence[Mapping[str, Tensor]]) -> Callable[..., np.ndarray]:
    """A function from image to class map, by the networks of these weights: a cell is where any of them finds one, holes filled."""
    nets = [load_unet(state, "cbc") for state in states]

    def segment(image: np.ndarray, num_classes: int, *, threshold: float) -> np.ndarray:
        if num_classes != 2:
            raise CellbenchError(f"the baseline cbc finds cells without their kinds; the data has {num_classes - 1} kinds. Leave it out.")
        pixels = _equalised(image)
        found = np.max([_probability(net, pixels) for net in nets], axis=0) > threshold
        return binary_fill_holes(found).astype(np.uint8)

    return segment


def _equalised(image: np.ndarray) -> np.ndarray:
    """What the networks were trained on: BGR (H, W, 3) float32, -1 to 1, with CLAHE of the lightness, of an image (H, W, 3) uint8 RGB."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(lab[..., 0])
    bgr: np.ndarray = cv2.cvtColor(lab, cv2.COLOR_LAB2BGR).astype(np.float32) / 127.5 - 1
    return bgr


def _probability(net: CbcUNet, bgr: np.ndarray) -> np.ndarray:
    """The probability (H, W) float32 of a cell, of pixels as :func:`_equalised` gives them."""
    height, width = bgr.shape[:2]
    below, right = -height % TILE_PX, -width % TILE_PX
    padded = cv2.copyMakeBorder(bgr, BORDER_PX, BORDER_PX + below, BORDER_PX, BORDER_PX + right, cv2.BORDER_REFLECT)
    out = np.empty((height + below, width + right), np.float32)
    side = TILE_PX + 2 * BORDER_PX
    with torch.inference_mode():
        for y in range(0, height, TILE_PX):
            for x in range(0, width, TILE_PX):
                tile = torch.from_numpy(padded[y : y + side, x : x + side].transpose(2, 0, 1).copy())[None]
                out[y : y + TILE_PX, x : x + TILE_PX] = torch.sigmoid(net(tile))[0, 0].numpy()
    return out[:height, :width]
