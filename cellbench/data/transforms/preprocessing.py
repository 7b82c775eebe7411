"""Preparation of images: intensity scaling, stain normalisation and framing. One record for training, validation, test and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.stain import KINDS, Normaliser


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Converts images to framed images. Equal records give equal results, so they serve as cache keys."""

    framing: Framing
    normaliser: Normaliser | None = None
    """Fitted to the training images."""
    reading: IntensityScaling = field(default_factory=IntensityScaling)
    """Intensity scaling of image files: that of the training data. Decoded images are expected to be scaled already."""
    um_per_px: float | None = None
    """Side of a pixel in the training images, in micrometres; None if unknown or not unique. Images are not resampled by it."""

    @property
    def is_identity(self) -> bool:
        """Whether it returns images unchanged."""
        return self.framing.exact and self.normaliser is None

    def image(self, image: np.ndarray) -> np.ndarray:
        """The framed image (H', W', 3) uint8 of an image (H, W, 3) uint8 RGB."""
        return self.framing.image(image if self.normaliser is None else self.normaliser.image(image))

    def __call__(self, pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """An image and its class map (H, W) uint8, both framed."""
        return self.image(pair[0]), self.framing.mask(pair[1])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; :meth:`of` reads it back."""
        kind = next((name for name, made in KINDS.items() if isinstance(self.normaliser, made)), None)
        return {"framing": asdict(self.framing), "normalise": kind, "normaliser": asdict(self.normaliser) if self.normaliser else None,
                "reading": self.reading.to_dict(), "um_per_px": self.um_per_px}  # fmt: skip

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Preparation:
        """The inverse of :meth:`to_dict`, also after a round trip through JSON."""
        kind, facts = record["normalise"], record["normaliser"]
        return cls(framing=Framing(**record["framing"]), normaliser=KINDS[kind](**_tuples(facts)) if kind else None,
                   reading=IntensityScaling.of(record.get("reading")), um_per_px=record.get("um_per_px"))  # fmt: skip


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(one) for name, one in value.items()}
    return tuple(_tuples(one) for one in value) if isinstance(value, list | tuple) else value
