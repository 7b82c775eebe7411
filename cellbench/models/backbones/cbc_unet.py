"""The U-Nets of the Python package cbc 1.1.0: trained on blood smears, one each for red cells, white cells and platelets.

All convolutions are valid: n pixels give n - 88. Each is followed by batch norm (epsilon 1e-3) and ReLU. They read BGR in -1..1, after CLAHE on the
lightness of the whole image. The encoder is also a frozen backbone, of strides 1, 2, 4 and 8: there convolutions repeat the edge of the tile, so that a
map covers it, and there is no CLAHE, which would depend on the tile.

Letters: B tiles, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellbench.config.cards import BackboneCard
from cellbench.errors import CellbenchError
from cellbench.models.backbones.base import Backbone, Level, norm_channels

WIDTHS = (32, 64, 128, 256)
BORDER_PX = 44
"""What valid convolutions take from each side."""
ENCODER = ((3, 96, 3), (96, 32, 1), (32, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), (128, 256, 3), (256, 256, 3))
"""Inputs, outputs and side of each convolution; stages end after the third, fifth, seventh and ninth."""
STAGE_ENDS = (3, 5, 7, 9)
CROPS = (4, 16, 40)
"""Pixels cut from each side of a skip, deepest first."""


class ConvNormRelu(nn.Module):
    """A valid or transposed convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int, transposed: bool = False) -> None:
        super().__init__()
        self.conv: nn.Module = nn.ConvTranspose2d(inputs, outputs, side, side) if transposed else nn.Conv2d(inputs, outputs, side)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.margin = 0 if transposed else side // 2

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        if padded and self.margin:
            x = F.pad(x, (self.margin,) * 4, mode="replicate")
        return F.relu(self.norm(self.conv(x)))


class CbcUNet(nn.Module):
    """Scores (B, 1, H - 88, W - 88) of the cell, before the sigmoid, of BGR tiles (B, 3, H, W) in -1..1; H and W are 188 + 8 k."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(ConvNormRelu(*shape) for shape in ENCODER)
        decoder: list[nn.Module] = []
        for width in reversed(WIDTHS[:-1]):
            decoder += [ConvNormRelu(2 * width, width, 2, True), ConvNormRelu(2 * width, width, 3), ConvNormRelu(width, width, 3)]
        self.decoder = nn.ModuleList(decoder)
        self.mask = nn.Conv2d(WIDTHS[0], 1, 1)

    def stages(self, x: Tensor, padded: bool = False) -> list[Tensor]:
        """The output of each stage of the encoder. ``padded``: edges are repeated, so that a map of stride s is H // s x W // s."""
        out = []
        for k, layer in enumerate(self.encoder, 1):
            x = layer(x, padded)
            if k in STAGE_ENDS:
                out.append(x)
                x = F.max_pool2d(x, 2) if k < STAGE_ENDS[-1] else x
        return out

    def forward(self, x_B3HW: Tensor) -> Tensor:
        *skips, x = self.stages(x_B3HW)
        for step, (skip, crop) in enumerate(zip(reversed(skips), CROPS, strict=True)):
            up, first, second = self.decoder[3 * step : 3 * step + 3]
            x = second(first(torch.cat([skip[..., crop:-crop, crop:-crop], up(x)], 1)))
        scores: Tensor = self.mask(x)
        return scores


def load_unet(state: Mapping[str, Tensor], name: str) -> CbcUNet:
    """The network with weights under their Keras names and layouts: ``conv2d_3.kernel`` (height, width, in, out). Raises CellbenchError."""
    net, taken = CbcUNet(), dict[str, Tensor]()
    layers = [(f"encoder.{k}", one) for k, one in enumerate(net.encoder)] + [(f"decoder.{k}", one) for k, one in enumerate(net.decoder)]
    counts = {"conv2d": 0, "conv2d_transpose": 0, "batch_normalization": 0}

    def keras(kind: str) -> str:
        number, counts[kind] = counts[kind], counts[kind] + 1
        return f"{kind}_{number}" if number else kind

    try:
        for place, layer in layers:
            kind = "conv2d_transpose" if isinstance(layer.conv, nn.ConvTranspose2d) else "conv2d"
            conv, norm = keras(kind), keras("batch_normalization")
            taken[f"{place}.conv.weight"], taken[f"{place}.conv.bias"] = state[f"{conv}.kernel"].permute(3, 2, 0, 1), state[f"{conv}.bias"]
            for own, theirs in (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance")):
                taken[f"{place}.norm.{own}"] = state[f"{norm}.{theirs}"]
        taken["mask.weight"], taken["mask.bias"] = state["mask.kernel"].permute(3, 2, 0, 1), state["mask.bias"]
        own_counts = {key: x for key, x in net.state_dict().items() if key.endswith("num_batches_tracked")}
        net.load_state_dict({**taken, **own_counts})
    except (KeyError, RuntimeError) as error:
        raise CellbenchError(f"{name}: its weights are not those of a U-Net of cbc 1.1.0 ({str(error)[:160]}).") from None
    return net.eval()


class CbcEncoder(Backbone):
    """The four stages of the encoder, each map normed over its channels as those of other pyramids are."""

    def __init__(self, net: CbcUNet, card: BackboneCard) -> None:
        super().__init__(card.mean, card.std)
        self.net = nn.ModuleList(net.encoder)
        self._stages = net.stages
        self.levels = tuple(Level(index=k, dim=width, stride_px=2**k) for k, width in enumerate(WIDTHS))
        self.tile_multiple_px = 2 ** (len(WIDTHS) - 1)

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """See ``Backbone.maps``."""
        maps = self._stages(x_BCHW.flip(1), padded=True)  # it was trained on BGR
        return [norm_channels(maps[index]) for index in indices]


def cbc_unet(card: BackboneCard, state: dict[str, Tensor] | None) -> CbcEncoder:
    """The encoder of a card's U-Net, not yet frozen; random weights for None."""
    return CbcEncoder(CbcUNet().eval() if state is None else load_unet(state, card.id), card)
