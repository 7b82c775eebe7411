"""Backbone cards with changes, and the networks that are built from them."""

from __future__ import annotations

from torch import Tensor

from cellbench.config.cards import BackboneCard
from cellbench.config.registry import Registry, load
from cellbench.models.backbones.base import Backbone


def card(name: str, **changes: object) -> BackboneCard:
    return Registry().backbone(name).model_copy(update=changes)


def built(it: BackboneCard, state: dict[str, Tensor] | None = None) -> Backbone:
    return load(it)(it, state).freeze()
