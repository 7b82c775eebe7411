"""The contracts that every backbone must keep. Each one takes a card and its ``small_backbone``.

Letters: B tiles, D features, h x w places of a map, H x W pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import ParamSpec

import torch
from torch import Tensor

from cellbench.config.cards import BackboneCard
from cellbench.config.registry import load
from cellbench.errors import one_line
from cellbench.models.backbones.base import Backbone
from cellbench.models.backbones.build import truncate_card

P = ParamSpec("P")


def failure_reason(contract: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> str:
    """The reason that a contract returns, or the exception that the checked code raises."""
    try:
        return contract(*args, **kwargs)
    except Exception as error:  # third-party code may raise anything, and any exception breaks the contract
        return f"{type(error).__name__}: {one_line(error)[:200]}"


def all_close(a: Tensor, b: Tensor) -> bool:
    """Equal to 1e-4. Batches of different sizes sum in a different order, which costs about 1e-6 in float32."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def small_backbone(card: BackboneCard) -> Backbone:
    """The card's backbone with random weights and at most two blocks (one where they are wide), frozen."""
    return load(card)(truncate_card(card, 2 if card.dim < 768 else 1), None).freeze()


def _pixels(backbone: Backbone, rows: int, columns: int, batch: int = 1, unit_px: int = 8) -> Tensor:
    """Grey tiles with a little noise, ``rows`` x ``columns`` units; a unit is at least ``unit_px`` and a multiple of ``tile_multiple_px``."""
    unit = -(-unit_px // backbone.tile_multiple_px) * backbone.tile_multiple_px
    noise = torch.rand(batch, 3, rows * unit, columns * unit, generator=torch.Generator().manual_seed(1))
    return (0.4 + 0.2 * noise).to(backbone.mean.device)


def _indices(backbone: Backbone) -> tuple[int, ...]:
    return tuple(level.index for level in backbone.levels)


def agrees_with_card(card: BackboneCard, backbone: Backbone) -> str:
    """Parameters, depth, width and stride match the card; levels are numbered from 0, shallow to deep."""
    if truncate_card(card) is not card:  # at full depth, on a device that holds no values
        with torch.device("meta"):
            backbone = load(card)(card, None)
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    last = backbone.levels[-1]
    if abs(card.params_m - millions) > max(0.01 * millions, 0.001):
        return f"params_m = {card.params_m:g} on the card, the network has {millions:.4g}"
    if _indices(backbone) != tuple(range(card.depth)):
        return f"depth = {card.depth} on the card, the levels are numbered {list(_indices(backbone))}"
    if (last.dim, last.stride_px) != (card.dim, card.patch_px):
        return f"dim = {card.dim} and patch_px = {card.patch_px} on the card, the last level has {last.dim} and {last.stride_px}"
    return ""


def shape(card: BackboneCard, backbone: Backbone) -> str:
    """Maps are (B, D, h, w) float32, finite and in the requested order, for tiles of any multiple of ``tile_multiple_px``, square or not."""
    for rows, columns in ((1, 1), (3, 5), (7, 2)):
        x = _pixels(backbone, rows, columns, batch=2, unit_px=1)
        levels = backbone.levels[::-1]
        maps = backbone(x, tuple(level.index for level in levels))
        if len(maps) != len(levels):
            return f"{len(levels)} levels were requested, {len(maps)} maps returned"
        for level, found in zip(levels, maps, strict=True):
            expected = (2, level.dim, x.shape[2] // level.stride_px, x.shape[3] // level.stride_px)
            if found.shape != expected or found.dtype != torch.float32:
                return f"tiles {tuple(x.shape)} give at level {level.index} {tuple(found.shape)} {found.dtype}, not {expected} float32"
            if not found.isfinite().all():
                return f"level {level.index} holds values that are not finite"
            if rows > 1 and not found.std() > 0:
                return f"level {level.index} holds one value only"
    if not all_close(maps[-1], backbone(x, (levels[-1].index,))[0]):
        return f"level {levels[-1].index} differs when it is requested alone"
    return ""


CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}
"""Whether a corner is at the first or the last row and column."""


def grid_order(card: BackboneCard, backbone: Backbone) -> str:
    """Of a bright square in each corner, the one in its own corner changes a corner of the map most: rows go down, columns to the right.

    Corners are compared between squares and not with the rest of the map, where a convolution that crosses the square's edge may change more.
    """
    x = _pixels(backbone, 4, 6, unit_px=2 * backbone.tile_multiple_px)  # a random EfficientNet sees four places far at its last level
    side, dark = x.shape[2] // 4, backbone(x, _indices(backbone))
    changes: dict[str, list[dict[str, float]]] = {}
    for lit, (row, column) in CORNERS.items():
        square = x.clone()
        square[:, :, -side if row else 0 :, -side if column else 0 :][:, :, :side, :side] = 1.0
        bright = backbone(square, _indices(backbone))
        moved = [(b - d).square().sum(1)[0] for b, d in zip(bright, dark, strict=True)]
        changes[lit] = [{seen: float(change[at]) for seen, at in CORNERS.items()} for change in moved]
    for level, _ in enumerate(zip(backbone.levels, dark, strict=True)):
        for seen in CORNERS:
            most = max(CORNERS, key=lambda lit: changes[lit][level][seen])
            if most != seen:
                return f"the {seen} corner of level {level} changes most where a square is lit at the {most} of the tile"
    return ""


def batch_independence(card: BackboneCard, backbone: Backbone) -> str:
    """A tile gives the same maps alone and in a batch."""
    x = _pixels(backbone, 4, 6, batch=3)
    for level, many, one in zip(backbone.levels, backbone(x, _indices(backbone)), backbone(x[1:2], _indices(backbone)), strict=True):
        if not all_close(many[1:2], one):
            return f"level {level.index} of a tile differs by up to {(many[1:2] - one).abs().max():.2g} with the others of its batch"
    return ""


def frozen(card: BackboneCard, backbone: Backbone) -> str:
    """No parameter requires a gradient, no map carries one, and ``train()`` leaves every module in eval mode."""
    backbone.train()
    if training := [name or "the backbone" for name, module in backbone.named_modules() if module.training]:
        return f"train() puts {len(training)} modules into training mode, first {training[0]}"
    if learning := [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]:
        return f"{len(learning)} parameters require a gradient after freeze(), first {learning[0]}"
    if backbone(_pixels(backbone, 4, 6).requires_grad_(), (0,))[0].requires_grad:
        return "its maps carry a gradient"
    return ""


def repeatable(card: BackboneCard, backbone: Backbone) -> str:
    """A backbone without a weights file is the same at each build: only its card enters the fingerprints of runs."""
    if card.weights != "none":
        return ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        again = small_backbone(card).state_dict()
    other = [name for name, value in backbone.state_dict().items() if not torch.equal(value, again[name])]
    return f"{', '.join(other[:4])}: different at each build; draw within torch.random.fork_rng from a fixed seed" if other else ""


BACKBONE = MappingProxyType({
    "agrees with its card": agrees_with_card,
    "shape": shape,
    "grid order": grid_order,
    "batch independence": batch_independence,
    "frozen": frozen,
    "repeatable": repeatable,
})  # fmt: skip
