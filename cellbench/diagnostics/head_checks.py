"""What every head must keep; each contract takes a card, and tries the head on several kinds of backbone and tile.

Letters: K classes, D features, h x w places of a map, H x W pixels of a tile.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cellbench.config.cards import HeadCard
from cellbench.config.registry import load
from cellbench.diagnostics.common import all_close, failure_reason
from cellbench.models.backbones.base import Backbone, Level
from cellbench.training.randomness import ModelRandomness
from cellbench.training.stacked_heads import has_layers_to_stack, stack

# (width, stride in px) of a backbone's levels, and the sides in px of the tiles that are tried with them.
_SETTINGS = (
    ([(384, 14)] * 12, ((56, 56), (42, 98))),
    ([(192, 16)] * 12, ((48, 80),)),
    ([(90, 4)], ((36, 52),)),
    ([(96, 4), (192, 8), (384, 16), (768, 32)], ((128, 192),)),
)


class HeadTestCase(NamedTuple):
    """What a head is made for and given: its levels, their maps (2, D, h, w) and the pixels (2, 3, H, W) of two tiles."""

    levels: tuple[Level, ...]
    maps: list[Tensor]
    pixels: Tensor


def _worlds(num_levels: int) -> Iterator[HeadTestCase]:
    source = torch.Generator().manual_seed(2)
    for facts, tiles in _SETTINGS:
        backbone = Backbone((0.5,) * 3, (0.5,) * 3)
        backbone.levels = tuple(Level(index=i, dim=dim, stride_px=stride) for i, (dim, stride) in enumerate(facts))
        levels = backbone.pick(num_levels)
        for height, width in tiles:
            maps = [torch.randn(2, each.dim, height // each.stride_px, width // each.stride_px, generator=source) for each in levels]
            yield HeadTestCase(levels, maps, torch.rand(2, 3, height, width, generator=source))


def for_all_cases(contract: Callable[[HeadCard, HeadTestCase], str]) -> Callable[[HeadCard], str]:
    """The contract for every kind of backbone and tile, the reason under the place where it was broken."""

    @functools.wraps(contract)
    def on_card(card: HeadCard) -> str:
        for world in _worlds(card.levels):
            if broken := failure_reason(lambda world=world: contract(card, world)):
                strides = ", ".join(str(stride) for stride in sorted({level.stride_px for level in world.levels}))
                height, width = world.pixels.shape[2:]
                return f"{broken} (maps of stride {strides} px, tile of {height} x {width} px)"
        return ""

    return on_card


def _make(card: HeadCard, levels: tuple[Level, ...], num_classes: int = 2, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load(card)(levels, num_classes, **card.options)


def options_on_card(card: HeadCard) -> str:
    """The card's options are exactly what the class takes after ``(levels, num_classes)``."""
    taken = list(inspect.signature(load(card)).parameters.values())[2:]
    if any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in taken):
        return "it takes **kwargs or *args, so that a misspelt option would pass unseen; name each one"
    names = {each.name for each in taken}
    if missing := sorted(names - set(card.options)):
        return f"[options] on the card lacks {', '.join(missing)}; give each its default there"
    if unknown := sorted(set(card.options) - names):
        return f"[options] on the card has {', '.join(unknown)}, which {card.builder.rpartition(':')[2]} does not take"
    return ""


@for_all_cases
def scores(card: HeadCard, world: HeadTestCase) -> str:
    """Scores (B, K, H, W), float32, finite: for several strides, tile sizes and numbers of classes, training or not."""
    for num_classes in (1, 3):
        for training in (True, False):
            found = _make(card, world.levels, num_classes).train(training)(world.maps, world.pixels)
            expected = (2, num_classes, *world.pixels.shape[2:])
            if found.shape != expected or found.dtype != torch.float32:
                return f"its scores are {tuple(found.shape)} {found.dtype}, not {expected} float32"
            if not found.isfinite().all():
                return "its scores are not finite"
    return ""


@for_all_cases
def half_precision(card: HeadCard, world: HeadTestCase) -> str:
    """Under autocast, with maps in bfloat16 and pixels in float32, as the harness calls it on machines that have it: finite scores."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _make(card, world.levels)([m.bfloat16() for m in world.maps], world.pixels)
    return "" if found.isfinite().all() else "its scores are not finite in bfloat16"


@for_all_cases
def gradient(card: HeadCard, world: HeadTestCase) -> str:
    """A gradient reaches every parameter, and every level that the card asks for."""
    noise = torch.Generator().manual_seed(3)
    head = _make(card, world.levels).train()
    with torch.no_grad():  # off their start: behind a last layer that starts at zero, no gradient would pass
        for parameter in head.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    maps = [m.requires_grad_() for m in world.maps]
    found = head(maps, world.pixels)
    (found * torch.randn(found.shape, generator=noise)).sum().backward()
    if unreached := [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]:
        return f"no gradient reaches {', '.join(unreached[:4])}"
    if unread := [str(i) for i, m in enumerate(maps) if m.grad is None or not m.grad.any()]:
        return f"levels {', '.join(unread)} of {len(maps)} are not read; lower 'levels' on the card"
    return ""


@for_all_cases
def head_grid_order(card: HeadCard, world: HeadTestCase) -> str:
    """Maps changed in a corner change the scores of that corner most."""
    head = _make(card, world.levels).eval()
    for down, right in ((False, True), (True, False)):
        lit = [m.clone() for m in world.maps]
        for m in lit:
            h, w = m.shape[2] // 3, m.shape[3] // 3
            m[:, :, -h if down else 0 :, -w if right else 0 :][:, :, :h, :w] += 3.0
        with torch.no_grad():
            change = (head(lit, world.pixels) - head(world.maps, world.pixels)).abs().sum((0, 1))
        means = [[part.mean().item() for part in half.chunk(2, 1)] for half in change.chunk(2, 0)]
        if means[down][right] < max(map(max, means)):
            return f"maps changed at the {'bottom left' if down else 'top right'} change the scores of another corner most"
    return ""


@for_all_cases
def pixels_as_on_card(card: HeadCard, world: HeadTestCase) -> str:
    """The scores hang on the tile's pixels if and only if the card says ``pixels = true``."""
    head = _make(card, world.levels).eval()
    with torch.no_grad():
        reads = not torch.equal(head(world.maps, world.pixels), head(world.maps, 1 - world.pixels))
    return "" if reads == card.pixels else f"pixels = {str(card.pixels).lower()} on the card, but it {'reads' if reads else 'ignores'} them"


@for_all_cases
def head_batch_independence(card: HeadCard, world: HeadTestCase) -> str:
    """In eval mode a tile gives the same scores alone and in a batch."""
    head = _make(card, world.levels)
    head.train()(world.maps, world.pixels)
    head.eval()
    with torch.no_grad():
        many, one = head(world.maps, world.pixels)[1:], head([m[1:] for m in world.maps], world.pixels[1:])
    return "" if all_close(many, one) else f"a tile's scores differ by up to {(many - one).abs().max():.2g} with the others of its batch"


@for_all_cases
def stacked(card: HeadCard, world: HeadTestCase) -> str:
    """A head that calls itself stackable gives, as one of two that learn as one, the scores and gradients that it gives alone."""
    heads = [_make(card, world.levels, seed=seed).train() for seed in (0, 1)]
    if not getattr(heads[0], "stackable", False) or not has_layers_to_stack(heads[0]):
        return ""
    together = stack(heads[0])
    own = {name: torch.stack([head.state_dict()[name] for head in heads]) for name in heads[0].state_dict()}
    weights = {name: own[name].requires_grad_() for name, _ in heads[0].named_parameters()}
    found = vmap(lambda one: functional_call(together, one, (world.maps, world.pixels)))(own)
    noise = torch.randn(found.shape[1:], generator=torch.Generator().manual_seed(3))
    gradients = dict(zip(weights, torch.autograd.grad((found * noise).sum(), list(weights.values())), strict=True))
    for k, head in enumerate(heads):
        alone = head(world.maps, world.pixels)
        if not all_close(found[k], alone):
            return f"stackable = True, but as one of two its scores differ by up to {(found[k] - alone).abs().max():.2g}"
        (alone * noise).sum().backward()
        for name, weight in head.named_parameters():
            if (gradients[name][k] - weight.grad).abs().max() > 1e-3 * weight.grad.abs().max():
                return f"stackable = True, but as one of two another gradient reaches {name}"
    return ""


@for_all_cases
def seeded(card: HeadCard, world: HeadTestCase) -> str:
    """The same seed of torch gives the same head."""
    first, second = (_make(card, world.levels).state_dict() for _ in range(2))
    other = [name for name, value in first.items() if not torch.equal(value, second[name])]
    return f"{', '.join(other[:4])}: not the same for the same seed; draw with torch's own generator" if other else ""


@for_all_cases
def repeatable(card: HeadCard, world: HeadTestCase) -> str:
    """Trained for three steps and trained again, resumed from its weights after the first: the same weights, and the same scores in eval mode."""
    start = {name: value.clone() for name, value in _make(card, world.levels).state_dict().items()}
    (weights, scores), (again, others) = (_trained(card, world, start, resumed_after) for resumed_after in (0, 1))
    if other := [name for name, value in weights.items() if not torch.equal(value, again[name])]:
        return f"{', '.join(other[:4])}: not the same when trained again; draw with torch's functions, and keep no state outside of state_dict()"
    return "" if torch.equal(scores, others) else "its scores in eval mode are not the same the second time; draw while training only"


def _trained(card: HeadCard, world: HeadTestCase, weights: dict[str, Tensor], resumed_after: int) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and scores after three steps of gradient descent, each seeded as the harness seeds it, in another head from this step on."""
    for step in range(3):
        if step in (0, resumed_after):
            head = _make(card, world.levels, seed=step).train()
            head.load_state_dict(weights)
            weights = head.state_dict()  # no copy: it follows the steps
        with ModelRandomness(head).seeded(0, 0, step):
            head(world.maps, world.pixels).square().mean().backward()
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
    head.eval()
    with torch.no_grad(), ModelRandomness(head).fixed():
        return head.state_dict(), head(world.maps, world.pixels)


HEAD = MappingProxyType({
    "options on its card": options_on_card,
    "shape": scores,
    "half precision": half_precision,
    "gradient": gradient,
    "grid order": head_grid_order,
    "pixels as on its card": pixels_as_on_card,
    "batch independence": head_batch_independence,
    "as one of several": stacked,
    "seed": seeded,
    "repeatable": repeatable,
})  # fmt: skip
