"""Hierarchical networks (ConvNeXt and its kin), built by timm from a card: each level has its own width and stride.

``forward(pixels, indices)`` gives the output of each stage asked for as a map (B, D, h, w), float32, coarser from stage to stage. Such
networks have no final norm that fits all stages (ConvNeXt's own stands behind the pooling), so every map is brought to mean 0 and
variance 1 over the channels of each place, without learned factors: the same footing as a transformer's normed tokens.
"""

from __future__ import annotations

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

    def __init__(self, net: nn.Module, card: BackboneCard) -> None:
        super().__init__(card.mean, card.std)
        self.net = net
        stages = enumerate(net.feature_info)
        self.levels = tuple(Level(index=i, dim=stage["num_chs"], stride_px=stage["reduction"]) for i, stage in stages)
        self.tile_multiple_px = self.levels[-1].stride_px

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """See ``Backbone.maps``; stages deeper than asked for are not run. Raises ValueError for a level or a size that it has not."""
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
    """The card's network with the weights of ``state``, or, for None, with random ones from ``[arch] seed``; not yet frozen.

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


def _network(name: str, device: str | None) -> nn.Module:
    net = timm.create_model(name, pretrained=False, num_classes=0, device=None if device is None else torch.device(device))
    net.head = nn.Identity()  # holds a norm of its own, for pooled features, that no map passes through
    return net
