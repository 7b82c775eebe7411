"""A finished run as something to use: what it is, what it learned, and how images are prepared for it. Where it came from does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cellbench.config.run import RunSpec
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.metrics.separation import CONNECTED, SeparationParams


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One run, as MLflow or an exported folder remembers it."""

    name: str
    run: RunSpec
    classes: tuple[str, ...]
    """In the order of the class numbers, the background first."""
    preparation: Preparation
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Of head and tail, by name; empty for a method that learns nothing."""
    separation: SeparationParams = CONNECTED
    """How its cells are told apart."""
    fingerprint: str = ""
    dataset_digest: str = ""
    """Of the data that it learned from."""
    backbone_digest: str = ""
    """Of the backbone's weights that it learned on; empty where nobody wrote it down."""
    run_id: str = ""
    """In MLflow."""
    experiment: str = ""
    seen: Mapping[str, Any] | None = None
    """What ``data.seen_images`` recorded of its training and validation images; None for a run of an older version."""
    config: str = ""
    """An experiment file that repeats the run."""
    data: str = ""
    """What it was trained, validated and tested on, in words."""
    chosen: str = ""
    """How it was chosen, where several runs could be meant, in words."""

    @property
    def origin(self) -> list[str]:
        """Which run this is, what it learned from and how it was chosen, in sentences for people."""
        if not self.run_id:
            return []
        data = f": {self.data}" if self.data else ""
        return [f"{self.name} is run {self.run_id} of '{self.experiment}'{data}.", *([self.chosen] if self.chosen else [])]
