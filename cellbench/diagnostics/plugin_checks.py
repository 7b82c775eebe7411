"""The contracts that every backbone, head, loss, augmentation and metric must keep.

Tests run them on the shipped cards, ``doctor --contracts`` on a user's own.

A contract is a function that returns the empty string, or the reason why it is broken. Backbones are built with random weights and few
blocks, heads with seed 0, all on the CPU in float32: nothing is downloaded, and a card takes a second or two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cellbench.config.cards import BackboneCard, Card, HeadCard
from cellbench.diagnostics.backbone_checks import BACKBONE, failure_reason, small_backbone
from cellbench.diagnostics.extension_checks import EXTENSIONS
from cellbench.diagnostics.head_checks import HEAD
from cellbench.errors import one_line


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of one contract on one card (``heads/fpn``); ``reason`` is empty where it is kept."""

    card: str
    contract: str
    reason: str


def verdicts(card: Card) -> Iterator[Verdict]:
    """The result of every contract of a card's kind; for a backbone that cannot be built, that one alone."""
    for name, reason in _reasons(card):
        yield Verdict(card=f"{card.KIND}/{card.id}", contract=name, reason=reason)


def _reasons(card: Card) -> Iterator[tuple[str, str]]:
    """Each contract's name, and the reason why it is broken."""
    if isinstance(card, BackboneCard):
        try:
            backbone = small_backbone(card)
        except Exception as error:  # third-party code may raise anything
            yield "can be built", f"{type(error).__name__}: {one_line(error)[:200]}"
            return
        yield "can be built", ""
        yield from ((name, failure_reason(contract, card, backbone)) for name, contract in BACKBONE.items())
    elif isinstance(card, HeadCard):
        yield from ((name, failure_reason(contract, card)) for name, contract in HEAD.items())
    else:
        yield from ((name, failure_reason(contract, card)) for name, contract in EXTENSIONS.get(type(card), {}).items())
