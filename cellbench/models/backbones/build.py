"""Builds a backbone from its card, and computes the digest of its weights for fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellbench.config.cards import BackboneCard
from cellbench.config.registry import builder_path, load
from cellbench.errors import CellbenchError
from cellbench.file_cache import sha256
from cellbench.files import facts_digest
from cellbench.models.backbones.weight_files import check_types, check_values, read_state
from cellbench.models.backbones.weights import locate
from cellbench.startup import without_compiler

if TYPE_CHECKING:
    from cellbench.models.backbones.base import Backbone


def open_backbone(card: BackboneCard, weights_folder: Path | None = None, download: bool = True) -> Backbone:
    """The frozen backbone of a card, in eval mode, on the CPU, float32.

    Its weights are found or downloaded, checked, and loaded strictly. Raises WeightsUnavailable if they are unavailable, CellbenchError
    if card and file disagree. A card with ``weights = "none"`` needs neither file nor network.
    """
    builder = load(card)  # loaded first: broken code should fail before a download of 4 GB
    path = None if card.weights == "none" else locate(card, weights_folder, download)
    state = None if path is None else read_state(path)
    with without_compiler():  # timm fills weights with operators that would import it
        backbone = builder(card, state).freeze()
    if state is not None:
        # Checks the built network, not the file: pretraining heads in the file do not matter, and a user's builder may have copied integers.
        own = backbone.state_dict()
        check_types({name: x for name, x in state.items() if name in own}, own, f"{card.id}: {path}")
        check_values(own, dict(backbone.named_parameters()).keys(), f"{card.id}: {path}", names=state.keys())
    if len(backbone.levels) != card.depth:
        given = len(backbone.levels)
        raise CellbenchError(f"{card.path}: depth = {card.depth}, but {card.builder} gives {given} levels. Correct the card.")
    return backbone


def truncate_card(card: BackboneCard, depth: int = 2) -> BackboneCard:
    """The same card with only ``depth`` blocks, for checks on random weights; unchanged if it is not a timm transformer."""
    if not builder_path(card).endswith(":timm_vit") or card.depth <= depth:
        return card
    return card.model_copy(update={"depth": depth, "arch": {**card.arch, "depth": depth}})


def weights_digest(card: BackboneCard, folder: Path | None = None, download: bool = True) -> str:
    """Identifies a backbone's weights: the file's sha256, or, without a file, a hash of what the card builds them from."""
    if card.weights == "none":
        facts = {"builder": card.builder, "arch": card.arch, "mean": card.mean, "std": card.std}
        return "none:" + facts_digest(facts, 64)
    return "sha256:" + sha256(locate(card, folder, download))
