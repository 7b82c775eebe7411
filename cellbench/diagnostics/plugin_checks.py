"""What every backbone and every head must keep. Our tests put the shipped cards through it, ``doctor --contracts`` anybody's own.

A contract is a function that gives the empty string where it is kept, else the reason why not. Backbones are built with random weights and
few blocks, heads with the seed 0, all on the CPU in float32: nothing is downloaded, and a card takes a second or two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cellbench.config.cards import BackboneCard, HeadCard
from cellbench.diagnostics.backbone_checks import BACKBONE, small_backbone
from cellbench.diagnostics.common import failure_reason
from cellbench.diagnostics.head_checks import HEAD
from cellbench.models.backbones.base import Backbone

__all__ = ["BACKBONE", "HEAD", "Verdict", "small_backbone", "verdicts"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One contract of one card (``heads/fpn``); ``reason`` is empty where it is kept."""

    card: str
    contract: str
    reason: str


def verdicts(card: BackboneCard | HeadCard) -> Iterator[Verdict]:
    """The verdict on every contract of a card's kind; for a backbone that cannot be built, that one alone."""
    if isinstance(card, HeadCard):
        for name, contract in HEAD.items():
            yield Verdict(card=f"heads/{card.id}", contract=name, reason=failure_reason(lambda contract=contract: contract(card)))
        return
    made: list[Backbone] = []
    yield Verdict(
        card=f"backbones/{card.id}", contract="can be built", reason=failure_reason(lambda: made.append(small_backbone(card)) or "")
    )
    for name, contract in BACKBONE.items() if made else ():
        yield Verdict(card=f"backbones/{card.id}", contract=name, reason=failure_reason(lambda contract=contract: contract(card, made[0])))
