"""From an experiment to its runs: each with a name, the fingerprint by which it is known again, and why it cannot run, where it cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellbench.config.cards import BackboneCard
from cellbench.config.experiment import Experiment, expand, labels
from cellbench.config.registry import Registry, digest_of
from cellbench.config.run import RunSpec, fingerprint
from cellbench.data.dataset import Dataset
from cellbench.data.loading import open_dataset
from cellbench.data.transforms.framing import Framing
from cellbench.errors import CellbenchError, WeightsUnavailable, one_line
from cellbench.models.backbones.build import weights_digest


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run to be: what it is, what it is called, and by what it is known again."""

    run: RunSpec
    name: str
    fingerprint: str
    precision: str
    """``fp32`` or ``bf16``, in which its backbone and head compute."""
    unavailable: str = ""
    """Why it must be skipped; empty where it can run."""


def open_folds(experiment: Experiment, registry: Registry, data: Path | None) -> list[Dataset]:
    """The experiment's dataset, or one for each of its folds, in their order. Raises CellbenchError."""
    card, spec = registry.dataset(experiment.dataset), experiment.data
    return [open_dataset(card, data, spec.model_copy(update={"fold": fold})) for fold in range(max(spec.folds, 1))]


def planned_runs(
    experiment: Experiment,
    registry: Registry,
    datasets: Sequence[Dataset],
    weights: Path | None,
    where: str,
    *,
    precision: str,
    download: bool = True,
) -> list[PlannedRun]:
    """The runs of an experiment with their fingerprints. Raises CellbenchError for a name or setting that no card knows.

    ``datasets``: one, or one a fold. ``precision``: that of the machine which will run them, ``fp32`` or ``bf16``. Weights that are not here are
    downloaded now, or with ``download=False`` reported as missing.
    """
    trained = {name: registry.baseline(name).trained for name in experiment.baselines}
    runs = [registry.complete(run) for run in expand(experiment, where, trained)]
    for run in runs:
        _check_tile(run, registry)
    reasons: dict[str, str] = {}
    digests: dict[str, str] = {}
    for name in {run.backbone for run in runs if run.backbone}:
        try:
            digests[name] = backbone_identity(registry.backbone(name), weights, download)
        except WeightsUnavailable as error:
            reasons[name], digests[name] = one_line(error), "unavailable"
    cards = {(run.head, run.baseline): registry.baseline(run.baseline) if run.baseline else registry.head(run.head or "") for run in runs}
    heads = {part: digest_of(card) for part, card in cards.items()}

    def parts(run: RunSpec) -> str:
        learns = trained.get(run.baseline or "", True)  # else it is a function, in whatever precision of its own
        return json.dumps([digests.get(run.backbone or ""), heads[run.head, run.baseline], precision if learns else ""])

    return [
        PlannedRun(
            run=run,
            name=name,
            fingerprint=fingerprint(run, datasets[run.fold].digest, parts(run)),
            precision=precision,
            unavailable=reasons.get(run.backbone or "", ""),
        )
        for run, name in zip(runs, labels(runs), strict=True)
    ]


def backbone_identity(card: BackboneCard, weights: Path | None, download: bool = True) -> str:
    """What stands for a backbone in fingerprints and for the features that are kept of it: its weights, and what the card makes of them."""
    return f"{weights_digest(card, weights, download)}:{digest_of(card)}"


def _check_tile(run: RunSpec, registry: Registry) -> None:
    patch = registry.backbone(run.backbone).patch_px if run.backbone else 1
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
