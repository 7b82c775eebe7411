"""Resolves an experiment into runs, once: cards, weights, name, fingerprint, and the reason if a run cannot start."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellbench.config.cards import BackboneCard, BaselineCard, HeadCard
from cellbench.config.experiment import Experiment, named_runs
from cellbench.config.registry import Registry
from cellbench.config.run import ADAPTATIONS, EDGE_CELLS, TTA, RunSpec, fingerprint
from cellbench.data.dataset import Dataset
from cellbench.data.transforms.framing import Framing
from cellbench.errors import CellbenchError, WeightsUnavailable, one_line
from cellbench.execution.resources import Resources
from cellbench.models.backbones.build import weights_digest
from cellbench.models.baselines.build import baseline_weights_digest, model_digest


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """One run with everything that its settings refer to. Its execution needs neither the registry nor the weights index."""

    run: RunSpec
    name: str
    fingerprint: str
    precision: str
    """``fp32`` or ``bf16``: precision of the backbone and the head."""
    framing: Framing
    card: HeadCard | BaselineCard
    """Of the head, or of the baseline."""
    backbone: BackboneCard | None = None
    """None for a baseline."""
    weights_digest: str = ""
    """Digest of the backbone's weights; empty if there is no backbone or its weights are unavailable."""
    backbone_identity: str = ""
    """Weights digest and backbone card digest: part of the fingerprint and of the feature cache's key."""
    unavailable: str = ""
    """Why it must be skipped; empty if it can run."""
    same_training: tuple[tuple[RunSpec, str], ...] = ()
    """Single runs that train the head of this one, or those of an ensemble, each with its fingerprint; without the run itself."""

    @property
    def trained(self) -> bool:
        """Whether it has trainable parameters; False for a baseline such as Otsu's threshold."""
        return isinstance(self.card, HeadCard) or self.card.trained


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
    """Resolves the runs of an experiment. Raises CellbenchError for an unknown name or setting.

    ``datasets``: one, or one per fold. ``precision``: ``fp32`` or ``bf16``, as on the machine that will run them. Missing weights are downloaded,
    or reported as unavailable with ``download=False``.
    """
    trained = {name: registry.baseline(name).trained for name in experiment.baselines}
    named = named_runs(experiment, where, trained)
    parts = [registry.resolve(spec) for _, spec in named]
    framings = [_framing(one.run, one.backbone.patch_px if one.backbone else 1) for one in parts]
    backbones = {one.backbone.id: one.backbone for one in parts if one.backbone}
    weights_of = {name: _Weights.of(card, weights, download) for name, card in backbones.items()}
    ready_made = {name: _Weights.of_baseline(registry.baseline(name), registry, weights, download) for name in experiment.baselines}
    out = []
    for (name, _), one, framing in zip(named, parts, framings, strict=True):
        run, found = one.run, weights_of[one.backbone.id] if one.backbone else ready_made[one.run.baseline or ""]
        if found.digest and isinstance(one.card, BaselineCard) and one.card.package and (model := model_digest(run.options)):
            found = replace(found, digest=f"{found.digest} {model}")
        has_weights = one.backbone is not None or bool(found.digest or found.unavailable)
        identity = f"{found.digest}:{one.backbone_digest}" if found.digest else "unavailable"
        learns = trained.get(run.baseline or "", True)  # a baseline without training has no precision
        card_digest, *own_digests = one.digests
        identities = json.dumps([identity if has_weights else None, card_digest, precision if learns else "", *own_digests])
        digest = datasets[run.fold].digest
        out.append(
            ResolvedRun(
                run=run,
                name=name,
                fingerprint=fingerprint(run, digest, identities),
                precision=precision,
                framing=framing,
                card=one.card,
                backbone=one.backbone,
                weights_digest=found.digest,
                backbone_identity=identity if one.backbone and found.digest else "",
                unavailable=found.unavailable,
                same_training=tuple((other, fingerprint(other, digest, identities)) for other in _same_training(run)) if learns else (),
            )
        )
    return out


def resolve_tree(
    tree: Mapping[str, Any], resources: Resources, datasets: Sequence[Dataset], where: str
) -> tuple[Experiment, list[ResolvedRun]]:
    """Validates an experiment and resolves its runs, as :func:`resolve_runs`."""
    experiment, precision = Experiment.of(tree, where), resources.machine.precision_name
    return experiment, resolve_runs(experiment, resources.registry, datasets, resources.weights, where, precision=precision)


def _same_training(run: RunSpec) -> list[RunSpec]:
    """The single runs that differ from this one, or from a member of this ensemble, only in what is done after training."""
    variants = [
        member.training.model_copy(update={"tta": tta, "adapt": adapt, "edge_cells": edge_cells})
        for member, tta, adapt, edge_cells in itertools.product(run.members, TTA, ADAPTATIONS, EDGE_CELLS)
    ]
    return [one for one in variants if one != run]


@dataclass(frozen=True, kw_only=True)
class _Weights:
    digest: str = ""
    unavailable: str = ""

    @classmethod
    def of_baseline(cls, card: BaselineCard, registry: Registry, folder: Path | None, download: bool) -> _Weights:
        try:
            return cls(digest=baseline_weights_digest(card, registry, folder, download))
        except WeightsUnavailable as error:
            return cls(unavailable=one_line(error))

    @classmethod
    def of(cls, card: BackboneCard, folder: Path | None, download: bool) -> _Weights:
        try:
            return cls(digest=weights_digest(card, folder, download))
        except WeightsUnavailable as error:
            return cls(unavailable=one_line(error))


def _framing(run: RunSpec, patch: int) -> Framing:
    """The framing of the run's images. Raises CellbenchError if the tile size is no multiple of the backbone's patch size."""
    framing = Framing.of(run)
    side = framing.side_px
    if side % patch and run.framing == "resize" and run.tile_scale != 1:
        raise CellbenchError(
            f"tile_px * tile_scale = {side}: {run.backbone} reads patches of {patch} px, and resize makes squares of that side. Use a multiple."
        )
    if side % patch:
        below = run.tile_px // patch * patch
        raise CellbenchError(
            f"tile_px = {run.tile_px}: {run.backbone} reads patches of {patch} px. Use a multiple, such as {below} or {below + patch}."
        )
    return framing
