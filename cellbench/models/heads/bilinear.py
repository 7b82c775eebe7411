"""One linear map from a token to class scores, then a bilinear resize: what the features alone can do."""

from __future__ import annotations

from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, resize


class Bilinear(Head):
    """Batch norm and a 1x1 convolution at token resolution, resized to the tile: DINOv2's linear segmentation head."""

    def __init__(self, levels: tuple[Level, ...], num_classes: int) -> None:
        super().__init__(levels, num_classes)
        self.norm = nn.BatchNorm2d(levels[-1].dim)
        self.score = nn.Conv2d(levels[-1].dim, num_classes, 1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        return resize(self.score(self.norm(maps[-1])), pixels_BCHW.shape[-2:])
