"""Plain vision transformers, built by timm from a card and filled from a state in any published layout.

The map of a block holds its patch tokens after the network's final norm, without class and register tokens. Position embeddings stay on
the grid that they were trained on and are resampled to the tile's grid once a pass (timm's antialiased bicubic); at the native tile size
they are used unchanged.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import LayerNorm, SwiGLUPacked
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cellbench.config.cards import BackboneCard
from cellbench.errors import CellbenchError, unknown_name
from cellbench.models.backbones.base import Backbone, Level
from cellbench.models.backbones.state_dict import load_strictly, pretrained_tile_px, to_timm_names

# The keys of [arch] other than the name of a timm model: numbers are passed on as timm's arguments of the same name.
NUMBERS = (
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values", "reg_tokens", "no_embed_class",
)  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {"mlp_layer": {"SwiGLUPacked": SwiGLUPacked}, "act_layer": {"SiLU": nn.SiLU, "GELU": nn.GELU}}
OWN = ("name", "seed", "norm_eps", "dynamic_img_size")


class TimmViT(Backbone):
    """A timm transformer with ``forward_intermediates``. Levels are its blocks, all of one width and one stride."""

    net: Any

    def __init__(self, net: nn.Module, card: BackboneCard) -> None:
        super().__init__(card.mean, card.std)
        self.net = net
        self.levels = tuple(Level(index=i, dim=card.dim, stride_px=card.patch_px) for i in range(card.depth))
        self.tile_multiple_px = card.patch_px

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        """See ``Backbone.maps``. Skips blocks after the deepest requested level."""
        return intermediates(self.net, x_BCHW, indices, norm=True)

    def begin(self, x_BCHW: Tensor, indices: tuple[int, ...], num_blocks: int) -> tuple[list[Tensor], Tensor]:
        """See ``Backbone.begin``. Runs the blocks as timm's forward does, so that the split changes no number."""
        self._check_can_cut()
        net, (height, width) = self.net, x_BCHW.shape[-2:]
        x_BND = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x_BCHW))))
        found = {}
        for index, block in enumerate(net.blocks[:num_blocks]):
            x_BND = block(x_BND)
            if index in indices:
                found[index] = tokens_to_map(
                    net.norm(x_BND), net.num_prefix_tokens, (height // self.levels[0].stride_px, width // self.levels[0].stride_px)
                )
        return [found[index] for index in indices], x_BND

    def tail(self, num_blocks: int) -> TrainableTail:
        """See ``Backbone.tail``."""
        self._check_can_cut()
        self.check_first_stays_frozen(num_blocks)
        return TrainableTail(self.net, num_blocks)

    def _check_can_cut(self) -> None:
        # Networks with rotary positions pass them to every block, so a tail would need them too.
        if not isinstance(self.net, timm.models.VisionTransformer):
            raise CellbenchError(f"a {type(self.net).__name__} cannot be cut between two blocks. Set unfreeze = 0 for this backbone.")


class TrainableTail(nn.Module):
    """A copy of a transformer's last blocks and final norm, trained by one run."""

    def __init__(self, net: Any, num_blocks: int) -> None:
        super().__init__()
        self._first, self._prefix = len(net.blocks) - num_blocks, net.num_prefix_tokens
        self.blocks = copy.deepcopy(net.blocks[self._first :]).requires_grad_(True)
        self.norm = copy.deepcopy(net.norm).requires_grad_(True)

    def forward(self, x_BND: Tensor, indices: tuple[int, ...], places: tuple[int, int]) -> list[Tensor]:
        """The maps (B, D, h, w) at these levels, counted from the backbone's first block; ``places`` is (h, w)."""
        found = {}
        for index, block in enumerate(self.blocks, self._first):
            x_BND = block(x_BND)
            if index in indices:
                found[index] = tokens_to_map(self.norm(x_BND), self._prefix, places)
        return [found[index] for index in indices]


def tokens_to_map(x_BND: Tensor, num_prefix: int, places: tuple[int, int]) -> Tensor:
    """Tokens (B, N, D) without their first ``num_prefix`` as a map (B, D, h, w), channels-last."""
    return x_BND[:, num_prefix:].unflatten(1, places).permute(0, 3, 1, 2)


def intermediates(net: Any, x_BCHW: Tensor, indices: tuple[int, ...], norm: bool) -> list[Tensor]:
    """The maps (B, D, h, w) of a timm network at ``indices``, in their order, without the layers after the deepest one."""
    wanted = sorted(set(indices))  # timm returns them shallow to deep
    maps = net.forward_intermediates(x_BCHW, indices=wanted, norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True)
    found = dict(zip(wanted, maps, strict=True))
    return [found[index] for index in indices]


def model_name(card: BackboneCard) -> str:
    """``[arch] name``. Raises CellbenchError where timm has no such model."""
    name = card.arch.get("name")
    if not isinstance(name, str) or not timm.is_model(name):
        raise CellbenchError(f"{card.path}: [arch] name = {name!r}: timm {timm.__version__} has no such model; timm.list_models() has.")
    return name


def timm_vit(card: BackboneCard, state: dict[str, Tensor] | None) -> Backbone:
    """The card's network, not yet frozen, with the weights of ``state``, or with random ones from ``[arch] seed`` for None.

    Random weights are drawn on torch's default device: within ``with torch.device("meta"):`` a large network costs nothing. Without
    ``img_size`` on the card, the position grid of the file decides. Raises CellbenchError where card, network and file disagree.
    """
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(card.arch.get("seed", 0)))
            net = _network(card, None)
    else:
        state = to_timm_names(state, card.id)
        grid_px = pretrained_tile_px(state, card.patch_px)
        net = _network(card, "meta", grid_px)
        kept = net.state_dict().keys()
        if any(name not in kept for name, _ in net.named_buffers()):
            # Rotary positions (DINOv3) are computed at construction and are in no file: on the meta device they would have no values.
            net = _network(card, "cpu", grid_px)
        load_strictly(net, state, card.id)
    if not hasattr(net, "forward_intermediates") or not hasattr(net, "blocks"):
        raise CellbenchError(
            f"{card.id} ({card.path}): {card.arch['name']} is not a plain transformer. For a ConvNet or Swin use timm_pyramid."
        )
    prefix_tokens, patch_px = net.num_prefix_tokens, net.patch_embed.patch_size[0]
    check_card(card, {"dim": net.embed_dim, "depth": len(net.blocks), "prefix_tokens": prefix_tokens, "patch_px": patch_px})
    return TimmViT(net, card)


def _network(card: BackboneCard, device: str | None, grid_px: int | None = None) -> Any:
    arguments: dict[str, Any] = {} if grid_px is None or "img_size" in card.arch else {"img_size": grid_px}
    for key, value in card.arch.items():
        if key in NUMBERS:
            arguments[key] = value
        elif key in CHOICES:
            if value not in CHOICES[key]:
                raise unknown_name(key, str(value), CHOICES[key], where=f"{card.path}: [arch]")
            arguments[key] = CHOICES[key][value]
        elif key not in OWN or (key == "dynamic_img_size" and value is not True):
            raise unknown_name("setting", key, (*NUMBERS, *CHOICES, *OWN), where=f"{card.path}: [arch]")
    if "norm_eps" in card.arch:
        arguments["norm_layer"] = functools.partial(LayerNorm, eps=card.arch["norm_eps"])
    # Without pooling, since timm would move the final norm after it.
    arguments |= {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
    return build(model_name(card), device, **arguments)


def build(name: str, device: str | None, **arguments: Any) -> Any:
    """A timm network without published weights; on the device ``"meta"`` it has no values at all."""
    if device is None:
        return timm.create_model(name, pretrained=False, **arguments)
    with _NothingToDraw() if device == "meta" else contextlib.nullcontext():
        return timm.create_model(name, pretrained=False, device=torch.device(device), **arguments)


class _NothingToDraw(TorchDispatchMode):
    """For the meta device. timm draws weights there too, to no effect, and some of these operations import sympy there: 480 modules."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        only_values = function._schema.name.endswith("_") and torch.Tag.inplace_view not in function.tags
        return arguments[0] if only_values and arguments[0].is_meta else function(*arguments, **(named or {}))


def check_card(card: BackboneCard, built: Mapping[str, int]) -> None:
    """Refuses a card that contradicts its network, of which ``built`` holds the same facts: all later sizes depend on the card."""
    wrong = [f"{key} = {getattr(card, key)}, the network has {value}" for key, value in built.items() if getattr(card, key) != value]
    if wrong:
        raise CellbenchError(f"{card.id} ({card.path}): {'; '.join(wrong)}. Correct the card, or its [arch].")
