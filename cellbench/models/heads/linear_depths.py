"""One linear map from the tokens of several depths to class scores, then a bilinear resize: what all depths together can do."""

from __future__ import annotations

from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, resize


class LinearDepths(Head):
    """Batch norm and a 1x1 convolution of each level, summed: the same as one linear layer on the concatenated tokens."""

    def __init__(self, levels: tuple[Level, ...], num_classes: int) -> None:
        super().__init__(levels, num_classes)
        self.scores = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(level.dim), nn.Conv2d(level.dim, num_classes, 1)) for level in levels)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        scores = [layer(m) for m, layer in zip(maps, self.scores, strict=True)]
        finest = max((tuple(m.shape[-2:]) for m in maps), key=lambda size: size[0])
        return resize(sum((resize(score, finest) for score in scores[1:]), start=resize(scores[0], finest)), pixels_BCHW.shape[-2:])
