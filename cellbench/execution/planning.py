"""From an experiment to its runs, resolved once: cards, weights, name, fingerprint, and why a run cannot start, where it cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellbench.config.cards import BackboneCard, BaselineCard, HeadCard
from cellbench.config.experiment import Experiment, named_runs
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec, fingerprint
from cellbench.data.dataset import Dataset
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
    framing: Framing
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
    trained = {name: registry.baseline(name).trained for name in experiment.baselines}
    named = named_runs(experiment, where, trained)
    parts = [registry.resolve(spec) for _, spec in named]
    framings = [_framing(one.run, one.backbone.patch_px if one.backbone else 1) for one in parts]
    backbones = {one.backbone.id: one.backbone for one in parts if one.backbone}
    weights_of = {name: _Weights.of(card, weights, download) for name, card in backbones.items()}
    out = []
    for (name, _), one, framing in zip(named, parts, framings, strict=True):
        run, found = one.run, weights_of[one.backbone.id] if one.backbone else _Weights()
        identity = f"{found.digest}:{one.backbone_digest}" if found.digest else "unavailable"
        learns = trained.get(run.baseline or "", True)  # else it is a function, in whatever precision of its own
        card_digest, *own_digests = one.digests
        identities = json.dumps([identity if one.backbone else None, card_digest, precision if learns else "", *own_digests])
        out.append(
            ResolvedRun(
                run=run,
                name=name,
                fingerprint=fingerprint(run, datasets[run.fold].digest, identities),
                precision=precision,
                framing=framing,
                card=one.card,
                backbone=one.backbone,
                weights_digest=found.digest,
                backbone_identity=identity if found.digest else "",
                unavailable=found.unavailable,
            )
        )
    return out


def resolve_tree(
    tree: Mapping[str, Any], registry: Registry, datasets: Sequence[Dataset], weights: Path | None, where: str, *, precision: str
) -> tuple[Experiment, list[ResolvedRun]]:
    """As :func:`resolve_runs`, of an experiment that is not checked yet; and that experiment."""
    experiment = Experiment.of(tree, where)
    return experiment, resolve_runs(experiment, registry, datasets, weights, where, precision=precision)


@dataclass(frozen=True, kw_only=True)
class _Weights:
    digest: str = ""
    unavailable: str = ""

    @classmethod
    def of(cls, card: BackboneCard, folder: Path | None, download: bool) -> _Weights:
        try:
            return cls(digest=weights_digest(card, folder, download))
        except WeightsUnavailable as error:
            return cls(unavailable=one_line(error))


def _framing(run: RunSpec, patch: int) -> Framing:
    """How the run sees images. Raises CellbenchError where its tiles are no multiple of the backbone's patch."""
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
