"""The contracts that every head must keep. Each one takes a card and tries its head on several kinds of backbone and tile.

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

from cellbench.config.cards import HeadCard
from cellbench.config.registry import load
from cellbench.diagnostics.backbone_checks import all_close, failure_reason
from cellbench.models.backbones.base import Backbone, Level
from cellbench.training.randomness import ModelRandomness

# (width, stride in px) of a backbone's levels, and (height, width) in px of the tiles tried with them.
_SETTINGS = (
    ([(384, 14)] * 12, ((56, 56), (42, 98))),
    ([(192, 16)] * 12, ((48, 80),)),
    ([(90, 4)], ((36, 52),)),
    ([(96, 4), (192, 8), (384, 16), (768, 32)], ((128, 192),)),
)


class HeadTestCase(NamedTuple):
    """The input of a head: its levels, their maps (2, D, h, w) and the pixels (2, 3, H, W) of two tiles."""

    levels: tuple[Level, ...]
    maps: list[Tensor]
    pixels: Tensor


def _test_cases(num_levels: int) -> Iterator[HeadTestCase]:
    source = torch.Generator().manual_seed(2)
    for facts, tiles in _SETTINGS:
        backbone = Backbone((0.5,) * 3, (0.5,) * 3)
        backbone.levels = tuple(Level(index=i, dim=dim, stride_px=stride) for i, (dim, stride) in enumerate(facts))
        levels = backbone.pick(num_levels)
        for height, width in tiles:
            maps = [torch.randn(2, each.dim, height // each.stride_px, width // each.stride_px, generator=source) for each in levels]
            yield HeadTestCase(levels, maps, torch.rand(2, 3, height, width, generator=source))


def for_all_cases(contract: Callable[[HeadCard, HeadTestCase], str]) -> Callable[[HeadCard], str]:
    """Runs the contract on every kind of backbone and tile; the reason names the one that breaks it."""

    @functools.wraps(contract)
    def on_card(card: HeadCard) -> str:
        for case in _test_cases(card.levels):
            if broken := failure_reason(contract, card, case):
                strides = ", ".join(str(stride) for stride in sorted({level.stride_px for level in case.levels}))
                height, width = case.pixels.shape[2:]
                return f"{broken} (maps of stride {strides} px, tile of {height} x {width} px)"
        return ""

    return on_card


def _make(card: HeadCard, levels: tuple[Level, ...], num_classes: int = 2, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load(card)(levels, num_classes, **card.options)


def options_on_card(card: HeadCard) -> str:
    """The card's options are exactly the arguments that the class takes after ``(levels, num_classes)``."""
    taken = list(inspect.signature(load(card)).parameters.values())[2:]
    if any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in taken):
        return "it takes **kwargs or *args, which would hide a misspelt option; name each one"
    names = {each.name for each in taken}
    if missing := sorted(names - set(card.options)):
        return f"[options] on the card lacks {', '.join(missing)}; give each its default there"
    if unknown := sorted(set(card.options) - names):
        return f"[options] on the card has {', '.join(unknown)}, which {card.builder.rpartition(':')[2]} does not take"
    return ""


@for_all_cases
def scores(card: HeadCard, case: HeadTestCase) -> str:
    """Scores (B, K, H, W), float32, finite: for several strides, tile sizes and numbers of classes, training or not."""
    for num_classes in (1, 3):
        for training in (True, False):
            found = _make(card, case.levels, num_classes).train(training)(case.maps, case.pixels)
            expected = (2, num_classes, *case.pixels.shape[2:])
            if found.shape != expected or found.dtype != torch.float32:
                return f"its scores are {tuple(found.shape)} {found.dtype}, not {expected} float32"
            if not found.isfinite().all():
                return "its scores are not finite"
    return ""


@for_all_cases
def half_precision(card: HeadCard, case: HeadTestCase) -> str:
    """Finite scores under autocast, with maps in bfloat16 and pixels in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _make(card, case.levels)([m.bfloat16() for m in case.maps], case.pixels)
    return "" if found.isfinite().all() else "its scores are not finite in bfloat16"


@for_all_cases
def gradient(card: HeadCard, case: HeadTestCase) -> str:
    """A gradient reaches every parameter and every level that the card lists."""
    noise = torch.Generator().manual_seed(3)
    head = _make(card, case.levels).train()
    with torch.no_grad():  # a last layer that starts at zero would stop every gradient
        for parameter in head.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    maps = [m.requires_grad_() for m in case.maps]
    found = head(maps, case.pixels)
    (found * torch.randn(found.shape, generator=noise)).sum().backward()
    if unreached := [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]:
        return f"no gradient reaches {', '.join(unreached[:4])}"
    if unread := [str(i) for i, m in enumerate(maps) if m.grad is None or not m.grad.any()]:
        return f"levels {', '.join(unread)} of {len(maps)} are not read; lower 'levels' on the card"
    return ""


@for_all_cases
def head_grid_order(card: HeadCard, case: HeadTestCase) -> str:
    """A change in one corner of the maps changes the scores of that corner most."""
    head = _make(card, case.levels).eval()
    for down, right in ((False, True), (True, False)):
        lit = [m.clone() for m in case.maps]
        for m in lit:
            h, w = m.shape[2] // 3, m.shape[3] // 3
            m[:, :, -h if down else 0 :, -w if right else 0 :][:, :, :h, :w] += 3.0
        with torch.no_grad():
            change = (head(lit, case.pixels) - head(case.maps, case.pixels)).abs().sum((0, 1))
        means = [[part.mean().item() for part in half.chunk(2, 1)] for half in change.chunk(2, 0)]
        if means[down][right] < max(map(max, means)):
            return f"maps changed at the {'bottom left' if down else 'top right'} change the scores of another corner most"
    return ""


@for_all_cases
def pixels_as_on_card(card: HeadCard, case: HeadTestCase) -> str:
    """The scores depend on the tile's pixels if and only if the card says ``pixels = true``."""
    head = _make(card, case.levels).eval()
    with torch.no_grad():
        reads = not torch.equal(head(case.maps, case.pixels), head(case.maps, 1 - case.pixels))
    return "" if reads == card.pixels else f"pixels = {str(card.pixels).lower()} on the card, but it {'reads' if reads else 'ignores'} them"


@for_all_cases
def head_batch_independence(card: HeadCard, case: HeadTestCase) -> str:
    """In eval mode a tile gives the same scores alone and in a batch."""
    head = _make(card, case.levels)
    head.train()(case.maps, case.pixels)
    head.eval()
    with torch.no_grad():
        many, one = head(case.maps, case.pixels)[1:], head([m[1:] for m in case.maps], case.pixels[1:])
    return "" if all_close(many, one) else f"a tile's scores differ by up to {(many - one).abs().max():.2g} with the others of its batch"


@for_all_cases
def seeded(card: HeadCard, case: HeadTestCase) -> str:
    """The same seed of torch gives the same head."""
    first, second = (_make(card, case.levels).state_dict() for _ in range(2))
    other = [name for name, value in first.items() if not torch.equal(value, second[name])]
    return f"{', '.join(other[:4])}: not the same for the same seed; draw with torch's own generator" if other else ""


@for_all_cases
def repeatable(card: HeadCard, case: HeadTestCase) -> str:
    """Training for three steps, and again with a resume after the first, gives the same weights and the same scores in eval mode."""
    start = {name: value.clone() for name, value in _make(card, case.levels).state_dict().items()}
    (weights, scores), (again, others) = (_trained(card, case, start, resumed_after) for resumed_after in (0, 1))
    if other := [name for name, value in weights.items() if not torch.equal(value, again[name])]:
        return f"{', '.join(other[:4])}: not the same when trained again; draw with torch's functions, and keep no state outside of state_dict()"
    return "" if torch.equal(scores, others) else "its scores in eval mode are not the same the second time; draw while training only"


def _trained(card: HeadCard, case: HeadTestCase, weights: dict[str, Tensor], resumed_after: int) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and scores after three steps of gradient descent, seeded as training seeds them; a new head takes over at ``resumed_after``."""
    for step in range(3):
        if step in (0, resumed_after):
            head = _make(card, case.levels, seed=step).train()
            head.load_state_dict(weights)
            weights = head.state_dict()  # shares memory with the head: follows the steps
        with ModelRandomness(head).seeded(0, 0, step):
            head(case.maps, case.pixels).square().mean().backward()
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
    head.eval()
    with torch.no_grad(), ModelRandomness(head).fixed():
        return head.state_dict(), head(case.maps, case.pixels)


HEAD = MappingProxyType({
    "options on its card": options_on_card,
    "shape": scores,
    "half precision": half_precision,
    "gradient": gradient,
    "grid order": head_grid_order,
    "pixels as on its card": pixels_as_on_card,
    "batch independence": head_batch_independence,
    "seed": seeded,
    "repeatable": repeatable,
})  # fmt: skip
