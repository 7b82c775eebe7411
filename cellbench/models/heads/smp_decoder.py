"""The decoders of segmentation-models-pytorch on a backbone's maps: one adapter, a card for each decoder.

They expect the pyramid of a convolutional encoder, each map twice as fine as the next. The maps of a plain ViT have one stride, so each is
projected and resized to one scale of such a pyramid, the shallowest to the finest, as BEiT and ViTDet do. Sizes are counted from the coarsest
scale, so that the decoders' fixed doublings are exact for every tile; the last resize brings the scores to the tile.
"""

from __future__ import annotations

from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP, DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from segmentation_models_pytorch.decoders.manet.decoder import MAnetDecoder
from segmentation_models_pytorch.decoders.pan.decoder import ConvBnRelu, PANDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from cellbench.errors import unknown_name
from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, resize

STRIDES_PX = {"deeplabv3plus": (4, 16), "pan": (4, 8, 16, 16)}
"""Strides of a decoder's pyramid other than ``USUAL_STRIDES_PX``."""
USUAL_STRIDES_PX = (4, 8, 16, 32)
MIN_PLACES = {"pan": 8}
"""Fewest places of the coarsest map on a side: PAN halves it three times."""


class SmpDecoder(Head):
    """Each level to ``width`` channels (1x1 and batch norm, at its own resolution) and to its scale, the decoder, and a 1x1 to classes.

    Where the backbone has fewer levels than the pyramid has scales, neighbouring scales share a level.
    """

    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, decoder: str, width: int) -> None:
        super().__init__(levels, num_classes)
        self._strides = STRIDES_PX.get(decoder, USUAL_STRIDES_PX)
        self._min_places = MIN_PLACES.get(decoder, 1)
        num = len(self._strides)
        self._level_of_scale = [scale * len(levels) // num for scale in range(num)]
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(levels[k].dim, width, 1, bias=False), nn.BatchNorm2d(width)) for k in self._level_of_scale
        )
        self.decoder, dim = _decoder(decoder, num, width)
        for module in self.decoder.modules():
            if isinstance(module, ConvBnRelu):  # PAN's: batch norm removes the bias, which never learns
                module.conv.register_parameter("bias", None)
            elif isinstance(module, ASPP):  # steps with dropout cannot be captured on a GPU
                module.project[-1] = nn.Identity()
        self._wants_finer = decoder in ("unet", "unetplusplus", "manet")
        self._wants_prefix = decoder == "dpt"
        self.score = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        height, width = pixels_BCHW.shape[-2:]
        coarsest = self._strides[-1]
        rows, columns = (max(-(-side // coarsest), self._min_places) for side in (height, width))
        pyramid = [
            resize(lateral(maps[k]), (rows * coarsest // stride, columns * coarsest // stride))
            for lateral, k, stride in zip(self.laterals, self._level_of_scale, self._strides, strict=True)
        ]
        if self._wants_prefix:
            y = self.decoder(pyramid, [None] * len(pyramid))
        else:
            # Of the finer maps of an encoder the decoders read the size alone.
            finer = [2] if self._wants_finer else [4, 2]
            finest = pyramid[0]
            empty = [finest.new_empty(1, 0, k * finest.shape[-2], k * finest.shape[-1]) for k in finer]
            y = self.decoder([*empty, *pyramid])
        return resize(self.score(y), (height, width))


def _decoder(name: str, num: int, width: int) -> tuple[nn.Module, int]:
    """A decoder of ``num`` maps of ``width`` channels, and the channels of its output."""
    dims, halving = [width] * num, [2 * width, width, width, width // 2]
    builders = {
        "unet": lambda: UnetDecoder([0, *dims], halving, n_blocks=num),
        "unetplusplus": lambda: UnetPlusPlusDecoder([0, *dims], halving, n_blocks=num),
        # A reduction of 16, as published for 512 channels, would leave four.
        "manet": lambda: MAnetDecoder([0, *dims], halving, n_blocks=num, reduction=4),
        "pan": lambda: PANDecoder([0, 0, *dims], encoder_depth=5, decoder_channels=width),
        "upernet": lambda: UPerNetDecoder([0, 0, *dims], decoder_channels=width),
        "segformer": lambda: SegformerDecoder([0, 0, *dims], segmentation_channels=width),
        # The rates are those published for a stride of 16 px.
        "deeplabv3plus": lambda: DeepLabV3PlusDecoder(
            [0, 0, *dims], 4, width, atrous_rates=(6, 12, 18), output_stride=16, aspp_separable=True, aspp_dropout=0.0
        ),
        "dpt": lambda: DPTDecoder(
            dims, USUAL_STRIDES_PX, encoder_has_prefix_tokens=False, readout="ignore", intermediate_channels=dims, fusion_channels=width
        ),
    }
    if name not in builders:
        raise unknown_name("decoder", name, builders)
    return builders[name](), halving[-1] if name in ("unet", "unetplusplus", "manet") else width
