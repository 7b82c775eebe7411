"""A baseline without training as a function from image to class map; with weights where its card names some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cellbench.config.cards import BaselineCard
from cellbench.config.registry import Registry, load
from cellbench.models.backbones.build import weights_digest
from cellbench.models.backbones.weight_files import read_state
from cellbench.models.backbones.weights import locate


def open_baseline(card: BaselineCard, registry: Registry, weights: Path | None, download: bool = True) -> Callable[..., np.ndarray]:
    """The function of an untrained baseline, called as ``(image, num_classes, **options)``. Raises WeightsUnavailable."""
    builder: Callable[..., Callable[..., np.ndarray]] = load(card)
    if not card.weights:
        return builder  # type: ignore[return-value]
    return builder([read_state(locate(registry.backbone(name), weights, download)) for name in card.weights])


def baseline_weights_digest(card: BaselineCard, registry: Registry, weights: Path | None, download: bool = True) -> str:
    """Identifies the weights that a baseline's card names; empty where it names none. Raises WeightsUnavailable."""
    return " ".join(weights_digest(registry.backbone(name), weights, download) for name in card.weights)
