"""A feature pyramid over several depths of the backbone: fine maps from shallow levels, coarse ones from deep levels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, conv_bn_relu, resize


class FPN(Head):
    """A lateral 1x1 at each level, a top-down sum, a 3x3 at each scale, and a sum at the finest scale that is scored and resized.

    The maps of a plain ViT have one stride, so shallow ones are enlarged (x4, x2), as in ViTDet's simple pyramid and the semantic branch of
    Panoptic FPN. smp's ``FPNDecoder`` doubles by fixed factors and fails on odd token grids (36 against 37 places at 518 px); every resize
    here is to a given size.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, width: int) -> None:
        super().__init__(levels, num_classes)
        self.laterals = nn.ModuleList(nn.Conv2d(level.dim, width, 1, bias=False) for level in levels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in levels)
        self.smooth = nn.ModuleList(conv_bn_relu(width, width) for _ in levels)
        self.score = nn.Conv2d(width, num_classes, 1)
        self.enlarge = _enlargements(levels)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        places = [(m.shape[-2] * k, m.shape[-1] * k) for m, k in zip(maps, self.enlarge, strict=True)]
        top, merged = None, None
        for i in reversed(range(len(maps))):
            x = resize(self.norms[i](self.laterals[i](maps[i])), places[i])
            top = x if top is None else x + F.interpolate(top, size=places[i], mode="nearest")
            smooth = self.smooth[i](top)
            merged = smooth if merged is None else smooth + resize(merged, places[i])
        return resize(self.score(merged), pixels_BCHW.shape[-2:])


def _enlargements(levels: tuple[Level, ...]) -> list[int]:
    """Factor of each map: the shallowest to a stride of about 4 px, the next to about 8; between 1 and 4."""
    return [max(1, min(4, round(level.stride_px / (4 * 2**i)))) for i, level in enumerate(levels)]
