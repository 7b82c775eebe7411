"""From an experiment to its runs, resolved once: cards, weights, name, fingerprint, and why a run cannot start, where it cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellbench.config import experiment as experiments
from cellbench.config.cards import BackboneCard, BaselineCard, HeadCard
from cellbench.config.experiment import Experiment
from cellbench.config.registry import Registry, digest_of
from cellbench.config.run import RunSpec, fingerprint
from cellbench.data.dataset import Dataset
from cellbench.data.loading import open_dataset
from cellbench.data.transforms.framing import Framing
from cellbench.errors import CellbenchError, WeightsUnavailable, one_line
from cellbench.models.backbones.build import weights_digest


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """One run with everything that its settings refer to. Whoever executes it asks neither the registry nor the weights again."""

    run: RunSpec
    name: str
    fingerprint: str
    precision: str
    """``fp32`` or ``bf16``, in which its backbone and head compute."""
    card: HeadCard | BaselineCard
    """Of the head, or of the baseline."""
    backbone: BackboneCard | None = None
    """None for a baseline."""
    weights_digest: str = ""
    """Of the backbone's weights; empty where there is no backbone, or its weights are unavailable."""
    backbone_identity: str = ""
    """The weights and what the backbone's card makes of them: part of the fingerprint and of the feature cache's key."""
    unavailable: str = ""
    """Why it must be skipped; empty where it can run."""

    @property
    def trained(self) -> bool:
        """False for a baseline that is a plain function of the image."""
        return isinstance(self.card, HeadCard) or self.card.trained

    @property
    def num_levels(self) -> int:
        """How many depths of the backbone it reads; 0 for a baseline."""
        return self.card.levels if isinstance(self.card, HeadCard) else 0


def open_folds(experiment: Experiment, registry: Registry, data: Path | None) -> list[Dataset]:
    """The experiment's dataset, or one for each of its folds, in their order. Raises CellbenchError."""
    card, spec = registry.dataset(experiment.dataset), experiment.data
    return [open_dataset(card, data, spec.model_copy(update={"fold": fold})) for fold in range(max(spec.folds, 1))]


def resolve_runs(
    experiment: Experiment,
    registry: Registry,
    datasets: Sequence[Dataset],
    weights: Path | None,
    where: str,
    *,
    precision: str,
    download: bool = True,
) -> list[ResolvedRun]:
    """The runs of an experiment. Raises CellbenchError for an unknown name or setting.

    ``datasets``: one, or one a fold. ``precision``: that of the machine which will run them, ``fp32`` or ``bf16``. Missing weights are downloaded
    now, or with ``download=False`` reported as unavailable.
    """
    baselines = {name: registry.baseline(name) for name in experiment.baselines}
    expanded = experiments.expand(experiment, where, {name: card.trained for name, card in baselines.items()})
    specs = [registry.complete(run) for run in expanded]
    heads = {name: registry.head(name) for name in {spec.head for spec in specs if spec.head}}
    backbone_cards = {name: registry.backbone(name) for name in {spec.backbone for spec in specs if spec.backbone}}
    for spec in specs:
        _check_tile(spec, backbone_cards[spec.backbone].patch_px if spec.backbone else 1)
    backbones = {name: _Backbone.of(card, weights, download) for name, card in backbone_cards.items()}
    cards: list[HeadCard | BaselineCard] = [heads[spec.head] if spec.head else baselines[spec.baseline or ""] for spec in specs]
    digests = {card.path: digest_of(card) for card in cards}

    def resolved(spec: RunSpec, name: str, card: HeadCard | BaselineCard) -> ResolvedRun:
        backbone = backbones.get(spec.backbone or "")
        learns = isinstance(card, HeadCard) or card.trained  # else it is a function, in whatever precision of its own
        own = [digest_of(one) for one in registry.extensions(spec)]
        parts = json.dumps([backbone.identity if backbone else None, digests[card.path], precision if learns else "", *own])
        return ResolvedRun(
            run=spec,
            name=name,
            fingerprint=fingerprint(spec, datasets[spec.fold].digest, parts),
            precision=precision,
            card=card,
            backbone=backbone.card if backbone else None,
            weights_digest=backbone.digest if backbone else "",
            backbone_identity=backbone.identity if backbone else "",
            unavailable=backbone.unavailable if backbone else "",
        )

    return [resolved(*parts) for parts in zip(specs, experiments.labels(specs), cards, strict=True)]


def group_cohorts(runs: Sequence[ResolvedRun]) -> list[list[ResolvedRun]]:
    """The runs grouped by what they can share: one pass of one backbone over one stream of tiles."""
    by_spec = {id(one.run): one for one in runs}
    return [[by_spec[id(spec)] for spec in group] for group in experiments.cohorts(one.run for one in runs)]


@dataclass(frozen=True, kw_only=True)
class _Backbone:
    card: BackboneCard
    digest: str = ""
    identity: str = "unavailable"
    unavailable: str = ""

    @classmethod
    def of(cls, card: BackboneCard, weights: Path | None, download: bool) -> _Backbone:
        try:
            digest = weights_digest(card, weights, download)
        except WeightsUnavailable as error:
            return cls(card=card, unavailable=one_line(error))
        return cls(card=card, digest=digest, identity=f"{digest}:{digest_of(card)}")


def _check_tile(run: RunSpec, patch: int) -> None:
    side = Framing.of(run).side_px
    if side % patch and run.framing == "resize" and run.tile_scale != 1:
        raise CellbenchError(
            f"tile_px * tile_scale = {side}: {run.backbone} reads patches of {patch} px, and resize makes squares of that side. Use a multiple."
        )
    if side % patch:
        below = run.tile_px // patch * patch
        raise CellbenchError(
            f"tile_px = {run.tile_px}: {run.backbone} reads patches of {patch} px. Use a multiple, such as {below} or {below + patch}."
        )
