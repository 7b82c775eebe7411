"""Hierarchical networks (ConvNeXt and similar), built by timm from a card: each level has its own width and stride.

The map of a stage is its output. Such networks have no final norm that fits all stages (ConvNeXt's comes after pooling), so every map is
normalised to mean 0 and variance 1 over the channels of each place, without learned factors, to be comparable to a ViT's normed tokens.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from cellbench.config.cards import BackboneCard
from cellbench.errors import CellbenchError, unknown_name
from cellbench.models.backbones.base import Backbone, Level
from cellbench.models.backbones.state_dict import load_strictly, to_timm_names


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
        """See ``Backbone.maps``. Skips stages behind the deepest level asked for. Raises ValueError for an unknown level or a wrong size."""
        height, width = x_BCHW.shape[-2:]
        if height % self.tile_multiple_px or width % self.tile_multiple_px:
            raise ValueError(f"a tile of {height} x {width} px: sides must be multiples of {self.tile_multiple_px} px")
        if not all(0 <= index < len(self.levels) for index in indices):
            raise ValueError(f"levels {indices}: there are 0 to {len(self.levels) - 1}")
        wanted = sorted(set(indices))
        maps = self.net.forward_intermediates(x_BCHW, indices=wanted, stop_early=True, intermediates_only=True)
        found = {index: _normed(map_BDhw) for index, map_BDhw in zip(wanted, maps, strict=True)}
        return [found[index] for index in indices]


def _normed(map_BDhw: Tensor) -> Tensor:
    map_BhwD = map_BDhw.permute(0, 2, 3, 1)
    return functional.layer_norm(map_BhwD, map_BhwD.shape[-1:], eps=1e-6).permute(0, 3, 1, 2).contiguous()


def timm_pyramid(card: BackboneCard, state: dict[str, Tensor] | None) -> Backbone:
    """The card's network, not yet frozen, with the weights of ``state``, or with random ones from ``[arch] seed`` for None.

    The card's ``dim`` and ``patch_px`` are those of the last stage, ``depth`` the number of stages. Raises CellbenchError.
    """
    for key in card.arch:
        if key not in ("name", "seed"):
            raise unknown_name("setting", key, ("name", "seed"), where=f"{card.path}: [arch]")
    name = card.arch.get("name")
    if not isinstance(name, str) or not timm.is_model(name):
        raise CellbenchError(f"{card.path}: [arch] name = {name!r}: timm {timm.__version__} has no such model; timm.list_models() has.")
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(card.arch.get("seed", 0)))
            net = _network(name, None)
    else:
        net = _network(name, "meta")
        load_strictly(net, to_timm_names(state, card.id), card.id)
    last = net.feature_info[-1]
    built = {"dim": last["num_chs"], "patch_px": last["reduction"], "depth": len(net.feature_info), "prefix_tokens": 0}
    wrong = [f"{key} = {getattr(card, key)}, the network has {value}" for key, value in built.items() if getattr(card, key) != value]
    if wrong:
        raise CellbenchError(f"{card.id} ({card.path}): {'; '.join(wrong)}. Correct the card, or its [arch].")
    return TimmPyramid(net, card)


def _network(name: str, device: str | None) -> Any:
    net: Any = timm.create_model(name, pretrained=False, num_classes=0, device=None if device is None else torch.device(device))
    net.head = nn.Identity()  # has a norm for pooled features that no map passes through
    return net
