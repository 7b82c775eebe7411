"""A baseline without training as a function from image to class map; with weights where its card names some, or by another package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellbench.config.cards import BaselineCard
from cellbench.config.registry import Registry, load
from cellbench.errors import CellbenchError, WeightsUnavailable
from cellbench.files import compute_sha256, text_digest
from cellbench.models.backbones.build import weights_digest
from cellbench.models.backbones.weight_files import read_state
from cellbench.models.backbones.weights import locate


@dataclass(frozen=True, kw_only=True)
class FoundClasses:
    """What a baseline without training finds in an image (H, W)."""

    classes: np.ndarray
    """(H, W) uint8."""
    fields: np.ndarray | None = None
    """(3, H, W) uint8: the number of each pixel's cell, from its lowest byte up, for the separation ``numbers``; None where it tells no cells apart."""


def open_baseline(card: BaselineCard, registry: Registry, weights: Path | None, download: bool = True) -> Callable[..., FoundClasses]:
    """The function of an untrained baseline, called as ``(image, num_classes, **options)``. Raises WeightsUnavailable, also when it is called."""
    builder: Callable[..., Any] = load(card)
    find = builder
    if card.package:
        package_version(card)
    elif card.weights:
        find = builder([read_state(locate(registry.backbone(name), weights, download)) for name in card.weights])

    def found(image: np.ndarray, num_classes: int, **options: object) -> FoundClasses:
        if card.package and num_classes != 2:
            raise CellbenchError(
                f"the baseline {card.id} finds cells without their kinds; the data has {num_classes - 1} kinds. Leave it out."
            )
        out: np.ndarray = find(image, num_classes, **options)
        return of_numbers(out) if card.package else FoundClasses(classes=out)

    return found


def of_numbers(ids: np.ndarray) -> FoundClasses:
    """Cells by their numbers (H, W), whole and below 2**24."""
    numbers = ids.astype(np.uint32)
    return FoundClasses(classes=(ids > 0).astype(np.uint8), fields=np.stack([(numbers >> shift).astype(np.uint8) for shift in (0, 8, 16)]))


def package_version(card: BaselineCard) -> str:
    """The package that runs a baseline, and its version. Raises WeightsUnavailable."""
    try:
        return f"{card.package} {importlib.metadata.version(card.package)}"
    except importlib.metadata.PackageNotFoundError:
        raise WeightsUnavailable(
            f"the Python package {card.package}, which runs it, is not installed: pip install 'cellbench[{card.id}]'."
        ) from None


def model_digest(options: Mapping[str, object]) -> str:
    """Identifies the content of the file or folder that the option ``model`` of a package's baseline names; empty where it is a name."""
    place = Path(str(options.get("model") or ""))
    if not options.get("model") or not place.exists():
        return ""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return text_digest(" ".join(map(compute_sha256, files)))


def baseline_weights_digest(card: BaselineCard, registry: Registry, weights: Path | None, download: bool = True) -> str:
    """Identifies the weights that a baseline's card names, or the package that runs it; empty for neither. Raises WeightsUnavailable."""
    if card.package:
        return package_version(card)
    return " ".join(weights_digest(registry.backbone(name), weights, download) for name in card.weights)
