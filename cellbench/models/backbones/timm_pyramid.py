"""Hierarchical networks (ConvNeXt, EfficientNet and similar), built by timm from a card: each level has its own width and stride.

The map of a stage is its output. Such networks have no final norm that fits all stages (ConvNeXt's comes after pooling), so every map is
normalised to mean 0 and variance 1 over the channels of each place, without learned factors, to be comparable to a ViT's normed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cellbench.config.cards import BackboneCard
from cellbench.errors import unknown_name
from cellbench.models.backbones.base import Backbone, Level, norm_channels
from cellbench.models.backbones.state_dict import load_strictly, to_timm_names
from cellbench.models.backbones.timm_vit import build, check_card, intermediates, model_name


class TimmPyramid(Backbone):
    """A timm network in stages. ``tile_multiple_px`` is the stride of the last one."""

    net: Any

    def __init__(self, net: Any, card: BackboneCard) -> None:
        super().__init__(card.mean, card.std)
        self.net = net
        stages = enumerate(net.feature_info)
        self.levels = tuple(Level(index=i, dim=stage["num_chs"], stride_px=stage["reduction"]) for i, stage in stages)
        self.tile_multiple_px = self.levels[-1].stride_px

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """See ``Backbone.maps``. Skips stages after the deepest requested level."""
        return [norm_channels(map_BDhw) for map_BDhw in intermediates(self.net, x_BCHW, indices, norm=False)]


def timm_pyramid(card: BackboneCard, state: dict[str, Tensor] | None) -> Backbone:
    """The card's network, not yet frozen, with the weights of ``state``, or with random ones from ``[arch] seed`` for None.

    The card's ``dim`` and ``patch_px`` are those of the last stage, ``depth`` the number of stages. Raises CellbenchError.
    """
    for key in card.arch:
        if key not in ("name", "seed"):
            raise unknown_name("setting", key, ("name", "seed"), where=f"{card.path}: [arch]")
    name = model_name(card)
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(card.arch.get("seed", 0)))
            net = _network(name, None)
    else:
        net = _network(name, "meta")
        load_strictly(net, to_timm_names(state, card.id), card.id)
    last = net.feature_info[-1]
    check_card(card, {"dim": last["num_chs"], "patch_px": last["reduction"], "depth": len(net.feature_info), "prefix_tokens": 0})
    return TimmPyramid(net, card)


def _network(name: str, device: str | None) -> Any:
    net = build(name, device, num_classes=0)
    if hasattr(net, "head"):
        net.head = nn.Identity()  # it has a norm for pooled features that the maps do not use
    return net
