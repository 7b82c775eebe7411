"""The interface of a cell target: its channels, their truth, their loss, and how they turn with a tile.

Truth and prediction are numbers from 0 to 1, stored as 0..255. A component of a vector from -1 to 1 is stored as (component + 1) / 2, so that its
negation is 1 minus the number.

Letters: B tiles, H x W pixels, A channels of a target, F of the fields that it predicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellbench.metrics.instances import Instances
from cellbench.metrics.star_polygons import ray_directions

FULL = 255


@dataclass(frozen=True, eq=False)
class ChannelTurns:
    """How channels change if a tile is turned, for each code of ``augmentation.rotate_flip``: where each comes from, and whether it is negated."""

    source: np.ndarray
    """(8, A) int64."""
    negated: np.ndarray
    """(8, A) bool."""

    @classmethod
    def none(cls, num: int) -> ChannelTurns:
        """Of channels without a direction."""
        return cls(np.tile(np.arange(num), (8, 1)), np.zeros((8, num), bool))

    @classmethod
    def of_vector(cls) -> ChannelTurns:
        """Of a vector with the components down and right."""
        turns = np.stack([_turn(code) for code in range(8)])
        return cls(np.abs(turns).argmax(2), turns.sum(2) < 0)

    @classmethod
    def of_rays(cls, num: int, num_other: int = 0) -> ChannelTurns:
        """Of ``num`` rays, after ``num_other`` channels without a direction; ray k points at k / num of a circle, from right to down."""
        rays = ray_directions(num)
        # The ray that becomes this one is the one most parallel to this one turned back.
        source = np.stack([((rays @ _turn(code)) @ rays.T).argmax(1) for code in range(8)])
        other = np.tile(np.arange(num_other), (8, 1))
        return cls(np.concatenate([other, source + num_other], axis=1), np.zeros((8, num + num_other), bool))

    def turn_truth(self, truth_HWA: np.ndarray, code: int) -> np.ndarray:
        """The channels of one tile, uint8, whose pixels were turned by ``code``."""
        if not code or self.is_plain:
            return truth_HWA
        turned = truth_HWA[..., self.source[code]]
        return np.where(self.negated[code], FULL - turned, turned)

    def turn_tiles(self, truth_BHWA: Tensor, codes_B: Tensor) -> Tensor:
        """The same of tiles on a device, each with its code."""
        if self.is_plain:
            return truth_BHWA
        source, negated = (torch.from_numpy(table).to(truth_BHWA.device)[codes_B][:, None, None] for table in (self.source, self.negated))
        turned = truth_BHWA.gather(-1, source.expand_as(truth_BHWA))
        return torch.where(negated, FULL - turned, turned)

    def turn_fields(self, fields_BFHW: Tensor, code: int) -> Tensor:
        """The channels of predicted fields, 0..1, whose pixels were turned by ``code``."""
        if not code or self.is_plain:
            return fields_BFHW
        turned = fields_BFHW[:, torch.from_numpy(self.source[code]).to(fields_BFHW.device)]
        negated = torch.from_numpy(self.negated[code]).to(fields_BFHW.device)[:, None, None]
        return torch.where(negated, 1 - turned, turned)

    @property
    def is_plain(self) -> bool:
        """Whether turning changes no channel."""
        return not self.negated.any() and bool((self.source == self.source[0]).all())


def _turn(code: int) -> np.ndarray:
    """What ``augmentation.rotate_flip`` does to a vector (down, right), as a matrix."""
    quarter, mirror = np.array([[0, -1], [1, 0]]), np.array([[1, 0], [0, -1]])
    turn: np.ndarray = np.linalg.matrix_power(quarter, code % 4) @ (mirror if code >= 4 else np.eye(2, dtype=int))
    return turn


class CellTarget(ABC):
    """Something that a head learns beside the classes. Its output channels follow those of the classes."""

    channels: tuple[str, ...]
    """Names of the A channels of the truth and of the head's output."""
    turns: ChannelTurns
    """Of the truth's channels."""
    num_fields: int
    """F, the number of channels that are blended over tiles and given to the method that finds cells."""
    field_turns: ChannelTurns
    """Of these."""
    fields_meaning: str
    """What they are, for those who use an exported network."""
    method: str
    """How cells are found in the fields: a key of ``cellbench.metrics.separation.METHODS``."""

    @abstractmethod
    def encode(self, cells: Instances, scale: tuple[float, float]) -> np.ndarray:
        """The truth (H, W, A) uint8 of a framed image's cells. ``scale``: framed pixels per image pixel, downwards and to the right."""

    @abstractmethod
    def loss(self, logits_BAHW: Tensor, truth_BHWA: Tensor, kept_BHW: Tensor | None) -> Tensor:
        """A scalar float32. ``kept_BHW`` bool: the pixels that count; None: all. The loss is 0 if none counts."""

    def fields(self, logits_BAHW: Tensor) -> Tensor:
        """The fields (B, F, H, W), float32, 0..1. By default the channels themselves."""
        return logits_BAHW.float().sigmoid()


def weighted_cross_entropy(logits_BAHW: Tensor, wanted_BAHW: Tensor, weight_B1HW: Tensor, kept_BHW: Tensor | None) -> Tensor:
    """The mean binary cross-entropy over pixels with a weight, summed over channels; 0 if no pixel has one.

    Pixels are weighted, not selected, so that the step of a GPU can be captured.
    """
    if kept_BHW is not None:
        weight_B1HW = weight_B1HW * kept_BHW[:, None]
    each = F.binary_cross_entropy_with_logits(logits_BAHW.float(), wanted_BAHW, reduction="none")
    return (each * weight_B1HW).sum() / weight_B1HW.sum().clamp_min(1)


def as_share(truth_BHWA: Tensor) -> Tensor:
    """Stored truth as (B, A, H, W) float32, 0..1."""
    return truth_BHWA.movedim(-1, 1).float() / FULL


def stored(share: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as uint8, 0..255."""
    out: np.ndarray = np.rint(FULL * share).astype(np.uint8)
    return out
