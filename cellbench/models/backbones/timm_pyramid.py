"""Hierarchical networks (ConvNeXt, EfficientNet and similar), built by timm from a card: each level has its own width and stride.

The map of a stage is its output. Such networks have no final norm that fits all stages (ConvNeXt's comes after pooling), so every map is
normalised to mean 0 and variance 1 over the channels of each place, without learned factors, to be comparable to a ViT's normed tokens.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cellbench.config.cards import BackboneCard
from cellbench.errors import CellbenchError, unknown_name
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

    def begin(self, x_BCHW: Tensor, indices: tuple[int, ...], num_blocks: int) -> tuple[list[Tensor], Tensor]:
        """See ``Backbone.begin``: its blocks are stages, its tokens the places of the last stage's map."""
        self._check_can_cut()
        *maps, last_BDhw = intermediates(self.net, x_BCHW, (*indices, num_blocks - 1), norm=False)
        return [norm_channels(map_BDhw) for map_BDhw in maps], last_BDhw.flatten(2).transpose(1, 2)

    def tail(self, num_blocks: int) -> TrainableStages:
        """See ``Backbone.tail``."""
        self._check_can_cut()
        self.check_first_stays_frozen(num_blocks, "stages")
        return TrainableStages(self.net, num_blocks)

    def _check_can_cut(self) -> None:
        # Of these a stage's map is all that the next stage reads. Swin passes it on in another layout, for one.
        if not isinstance(self.net, timm.models.EfficientNet | timm.models.ConvNeXt):
            raise CellbenchError(f"a {type(self.net).__name__} cannot be cut between two stages. Set unfreeze = 0 for this backbone.")


class TrainableStages(nn.Module):
    """A copy of a network's last stages, trained by one run. Its batch norms keep their statistics, so that a tile does not depend on its batch."""

    def __init__(self, net: Any, num_stages: int) -> None:
        super().__init__()
        self._first = len(net.feature_info) - num_stages
        before, *stages = list(net.feature_info)[self._first - 1 :]
        self._finer = stages[-1]["reduction"] // before["reduction"]
        # A stage of EfficientNet, as "blocks.4", also holds the blocks since the stage before, "blocks.2".
        container, ends = before["module"].split(".")[0], [int(stage["module"].split(".")[1]) for stage in (before, *stages)]
        parts = getattr(net, container)
        self.blocks = nn.ModuleList(copy.deepcopy(parts[a + 1 : b + 1]) for a, b in itertools.pairwise(ends)).requires_grad_(True)
        self.norm = nn.Identity()  # what the optimiser's groups expect: a pyramid has no final norm

    def train(self, mode: bool = True) -> TrainableStages:
        """See ``nn.Module.train``; batch norms stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x_BND: Tensor, indices: tuple[int, ...], places: tuple[int, int]) -> list[Tensor]:
        """The maps (B, D, h', w') at these levels, from the places (B, N, D) of the last frozen map; ``places`` is (h, w) of the last level."""
        x_BDhw = x_BND.transpose(1, 2).unflatten(2, (places[0] * self._finer, places[1] * self._finer))
        found = {}
        for index, stage in enumerate(self.blocks, self._first):
            x_BDhw = stage(x_BDhw)
            if index in indices:
                found[index] = norm_channels(x_BDhw)
        return [found[index] for index in indices]


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
