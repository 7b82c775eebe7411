"""smp's U-Net as a head that reads pixels only, trained on the same tiles as all other heads."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch.nn.functional as F
from torch import Tensor

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, scaled_pixels


class UNet(Head):
    """Trained end to end from random weights. Sides are padded with edge pixels to a multiple of 32 and cropped again."""

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, encoder: str, width: int) -> None:
        super().__init__(levels, num_classes)
        channels = tuple(width * 2**step for step in (4, 3, 2, 1, 0))
        self.net = smp.Unet(encoder, encoder_weights=None, decoder_channels=channels, classes=num_classes)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        height, width = pixels_BCHW.shape[-2:]
        below, right = -height % 32, -width % 32
        x = scaled_pixels(pixels_BCHW)
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        return self.net(x)[..., :height, :width]
