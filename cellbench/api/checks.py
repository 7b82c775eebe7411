"""``cellbench.check``: whether images and masks are fit to train on, from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cellbench import console, startup
from cellbench.api.experiments import Place, as_changes, as_path
from cellbench.config.loading import data_spec
from cellbench.config.registry import Registry
from cellbench.data.audit.checks import Severity
from cellbench.data.audit.dataset_audit import audit


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DataCheck:
    """What :func:`cellbench.check` found in a dataset. Prints as its verdict."""

    verdict: str
    fit: bool
    """Whether nothing was found that would falsify a comparison of models."""
    findings: pd.DataFrame
    """Columns ``kind``, ``severity`` (``severe``, ``look`` or ``note``), ``message`` and ``images`` (a tuple of names), the most severe first."""
    statistics: Mapping[str, str]
    notes: tuple[str, ...]
    """How the folder was read."""

    def __repr__(self) -> str:
        return self.verdict


def check(
    data: Place, *, dataset: str = "folder", set: Mapping[str, Any] | None = None, registry: Place | None = None, progress: bool = True
) -> DataCheck:
    """Audits a dataset as the command ``cellbench check`` does: layout, masks, duplicates, splits. Writes nothing.

    Args:
        data: the folder of images and masks, or a manifest or COCO file.
        dataset: the card that says what the masks mean, like ``bccd``.
        set: settings of the data for this call, by key: ``{"data.folds": 5}``.
        registry: a folder of your own cards.
        progress: whether to show a progress bar.

    Raises CellbenchError if no image with a mask can be read there.

    >>> cellbench.check("BCCD").fit  # doctest: +SKIP
    True

    """
    startup.set_environment()
    cards = Registry(as_path(registry))
    with console.silent(not progress):
        found = audit(cards.dataset(dataset), as_path(data), data_spec(as_changes(set or {})))
    rows = [(one.kind, one.severity.name.lower(), one.message, tuple(one.images)) for one in found.findings]
    return DataCheck(
        verdict=found.verdict,
        fit=not any(one.severity is Severity.SEVERE for one in found.findings),
        findings=pd.DataFrame(rows, columns=["kind", "severity", "message", "images"]),
        statistics=dict(found.numbers),
        notes=tuple(found.notes),
    )
