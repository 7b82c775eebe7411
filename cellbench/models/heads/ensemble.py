"""The mean of several heads that read the same maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cellbench.models.heads.base import Head


class Ensemble(Head):
    """Gives the scores whose probabilities are the mean of the members' probabilities.

    The softmax of its class scores is the mean of the members' softmaxes. Channels after those of the classes are the mean of the members'. For
    prediction: the members are trained alone.
    """

    def __init__(self, members: Sequence[Head], num_extra: int) -> None:
        """``num_extra``: channels after those of the classes."""
        super().__init__(members[0].levels, members[0].num_classes)
        self.members = nn.ModuleList(members)
        self._num = members[0].num_classes - num_extra

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        return self.mean(member(maps, pixels_BCHW) for member in self.members)

    def mean(self, scores: Iterable[Tensor]) -> Tensor:
        """The scores (B, K, H, W), of those of each member."""
        classes, extra = torch.empty(0), torch.empty(0)
        for k, one in enumerate(scores):
            own, more = one[:, : self._num].float().log_softmax(1), one[:, self._num :].float()
            classes, extra = (torch.logaddexp(classes, own), extra + more) if k else (own, more)
        return torch.cat([classes - math.log(len(self.members)), extra / len(self.members)], 1)
