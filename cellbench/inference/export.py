"""Exports a run as a folder that works on other machines, without MLflow and without the registry it was trained with.

``run.json`` holds the settings, ``head.safetensors`` the trained weights, ``training_features.safetensors`` how the training images look,
``registry/`` the cards of its parts and a user's own code, and
``<backbone>.safetensors`` (or the published suffix) the backbone's weights, where their licence allows copies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save

from cellbench.config.base import read_json
from cellbench.config.cards import BackboneCard, Card
from cellbench.config.registry import Registry
from cellbench.config.trust import code_file, remember_code
from cellbench.data.audit.seen_images import without_paths
from cellbench.errors import CellbenchError, one_line
from cellbench.files import make_folder, os_errors_as, write_atomic
from cellbench.inference.records import ExportRecord, FormatRecord, training_features_of_arrays
from cellbench.inference.trained_run import TrainedRun
from cellbench.models.backbones.weights import locate, package_name
from cellbench.tracking.schema import TRAINING_FEATURES

FORMAT = 1
RUN, HEAD, CARDS = "run.json", "head.safetensors", "registry"
FREE = ("Apache-2.0", "MIT", "BSD-3-Clause")
"""Licences that allow copies without further conditions."""


def may_embed_weights(card: BackboneCard) -> bool:
    """Whether the weights may be copied into an exported folder. Gated weights never are."""
    return card.license in FREE and not card.gated


def write_export(folder: Path, trained: TrainedRun, registry: Registry, weights: Path | None, backbone: str) -> str:
    """Writes the folder; returns a sentence about the backbone. ``backbone``: ``auto``, ``embed`` or ``reference``.

    Raises CellbenchError for ``embed`` where the licence forbids it.
    """
    run = trained.run
    card = registry.backbone(run.backbone) if run.backbone else None
    note = "It needs no backbone."
    copied: Path | None = None
    if card is not None and card.weights == "none":
        note = f"{card.id} needs no weights."
    elif card is not None:
        if backbone == "embed" and not may_embed_weights(card):
            raise CellbenchError(
                f"--backbone embed: the licence of {card.id} ({card.license}{', gated' if card.gated else ''}) does not allow to share its "
                "weights. Export by reference; users of the folder get them from the publisher."
            )
        if backbone == "reference" or not may_embed_weights(card):
            why = (
                "" if may_embed_weights(card) else f", since its licence ({card.license}{', gated' if card.gated else ''}) allows no copies"
            )
            package = package_name(card)
            source = f"install the Python package {package}" if package else f"let it be downloaded from {card.weights}"
            note = f"{card.id} is named, not copied{why}: give --weights DIR there, or {source}."
        else:
            copied = locate(card, weights)
            note = f"{card.id}'s weights are in it ({card.license})."
    part = registry.part(run)
    for one in filter(None, (part, card)):
        code_file(one)  # raises before anything is written
    make_folder(folder)
    with os_errors_as(f"writing {folder}"):
        _copy_card(folder, part)
        if card is not None:
            _copy_card(folder, card)
        if copied is not None and card is not None:
            shutil.copyfile(copied, folder / f"{card.id}{copied.suffix}")
        if trained.training_features is not None:
            write_atomic(folder / TRAINING_FEATURES, save_arrays(trained.training_features.to_arrays()))
        if trained.weights:
            write_atomic(folder / HEAD, save({name: x.contiguous() for name, x in trained.weights.items()}))
    facts = {
        "format": FORMAT,
        "name": trained.name,
        "run": run.model_dump(),
        "classes": list(trained.classes),
        "preparation": trained.preparation.to_dict(),
        "separation": asdict(trained.separation),
        "calibration": asdict(trained.calibration),
        "fingerprint": trained.fingerprint,
        "dataset_digest": trained.dataset_digest,
        "backbone_digest": trained.backbone_digest,
        "run_id": trained.run_id,
        "experiment": trained.experiment,
        "config": trained.config,
        "data": trained.data,
        "chosen": trained.chosen,
        "seen": without_paths(trained.seen) if trained.seen is not None else None,
        "backbone": note,
    }
    remember_code(Registry(folder / CARDS), folder / CARDS)
    write_atomic(folder / RUN, json.dumps(facts, indent=1))  # last: it marks a complete folder
    return note


def read_export(folder: Path) -> TrainedRun:
    """The run of an exported folder. Raises CellbenchError for any other folder, a damaged one, one of a newer version, or one with links."""
    for path in (folder / RUN, folder / HEAD, folder / TRAINING_FEATURES, folder / CARDS, *(folder / CARDS).rglob("*")):
        if path.is_symlink():
            raise CellbenchError(f"{path}: is a link. An exported folder holds its files itself. Export it again.")
        if path.exists() and not path.is_file() and not path.is_dir():  # a named pipe would be waited for, for ever
            raise CellbenchError(f"{path}: is neither a file nor a folder. Export it again.")
    try:
        data = (folder / RUN).read_bytes()
    except FileNotFoundError:
        raise CellbenchError(f"{folder}: has no {RUN}, so it is no complete folder of `cellbench export`.") from None
    except OSError as error:
        raise CellbenchError(f"{folder / RUN}: cannot be read ({error.strerror}).") from None
    if (found := read_json(FormatRecord, data, str(folder / RUN)).format) != FORMAT:
        raise CellbenchError(f"{folder / RUN}: has format {found}, this version reads {FORMAT}. Update cellbench, or export it again.")
    record = read_json(ExportRecord, data, str(folder / RUN))
    weights = _arrays(folder / HEAD, load_file)
    arrays = _arrays(folder / TRAINING_FEATURES, load_arrays)
    return TrainedRun(
        name=record.name,
        run=record.run,
        classes=record.classes,
        preparation=record.preparation.preparation(),
        weights=weights,
        separation=record.separation.separation(),
        calibration=record.calibration.calibration(),
        training_features=training_features_of_arrays(arrays, str(folder / TRAINING_FEATURES)) if arrays else None,
        seen=record.seen.model_dump() if record.seen is not None else None,
        **record.model_dump(
            include={"fingerprint", "dataset_digest", "run_id", "experiment", "config", "backbone_digest", "data", "chosen"}
        ),
    )


def _arrays(path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The arrays of a safetensors file; none without the file."""
    try:
        return read(path) if path.exists() else {}
    except Exception as error:  # a damaged file, whatever safetensors calls it
        raise CellbenchError(f"{path}: is damaged ({one_line(error)[:80]}). Export it again.") from None


def _copy_card(folder: Path, card: Card) -> None:
    """Copies a card and the code beside it that it names."""
    place = make_folder(folder / CARDS / card.KIND)
    shutil.copyfile(card.path, place / Path(card.path).name)
    if (code := code_file(card)) is not None:
        target = place / code.relative_to(Path(card.path).parent)
        make_folder(target.parent)
        shutil.copyfile(code, target)
