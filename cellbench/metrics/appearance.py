"""How far an image looks from a run's training images: the distance to the nearest of them, in the features of the frozen backbone.

Features are scaled by their deviation between training images. The unit of the distance is that of an image of the training set: 1 is the distance
that 95 of 100 images of the same set do not exceed, as measured on each training image against the others, and on the validation images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

USUAL = 0.95
"""Share of held-out images of the training set within the distance 1."""
FAR = 2.0
"""From this distance on, an image is called unlike the training images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingAppearance:
    """The descriptors of a run's training images, and how far images of their set lie from each other."""

    rows: np.ndarray
    """(N, D) float32: scaled descriptors."""
    centre: np.ndarray
    """(D,) float32: their mean before scaling."""
    scale: np.ndarray
    """(D,) float32."""
    unit: float
    """The distance that is called 1."""
    num_held_out: int
    """Number of images from which it was measured."""

    @classmethod
    def of(cls, train_ND: np.ndarray, other_MD: np.ndarray) -> TrainingAppearance | None:
        """From descriptors of training images and of other images of the same set; None with fewer than three training images."""
        if len(train_ND) < 3:
            return None
        centre, deviation = train_ND.mean(0), train_ND.std(0)
        # A feature that hardly varies between a few images would count most: each gets the median deviation in addition.
        scale = np.sqrt(deviation**2 + np.median(deviation) ** 2) + 1e-6
        rows = ((train_ND - centre) / scale).astype(np.float32)
        between = _distances(rows, rows)
        np.fill_diagonal(between, np.inf)
        others = _distances((other_MD - centre) / scale, rows) if len(other_MD) else np.zeros((0, len(rows)))
        held_out = np.concatenate([between.min(1), others.min(1)])
        unit = float(np.quantile(held_out, USUAL, method="higher"))
        return cls(rows=rows, centre=centre, scale=scale, unit=max(unit, 1e-6), num_held_out=len(held_out))

    def distance(self, descriptor_D: np.ndarray) -> float:
        """The distance of an image by its descriptor, in units of the training set."""
        return float(_distances(((descriptor_D - self.centre) / self.scale)[None], self.rows).min()) / self.unit

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a file; :meth:`from_arrays` reads them back. Descriptors have half precision there."""
        facts = np.array([self.unit, self.num_held_out], np.float64)
        return {"rows": self.rows.astype(np.float16), "centre": self.centre, "scale": self.scale, "facts": facts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TrainingAppearance:
        unit, num = arrays["facts"]
        rows = arrays["rows"].astype(np.float32)
        return cls(rows=rows, centre=arrays["centre"], scale=arrays["scale"], unit=float(unit), num_held_out=int(num))


def _distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Root mean squared difference of the features of each pair (N, M)."""
    return cdist(a_ND.astype(np.float64), b_MD.astype(np.float64)) / math.sqrt(a_ND.shape[1])


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What is known of an image's prediction without its truth."""

    distance: float | None = None
    """From the training images; None for a run without a backbone, and for runs of older versions."""

    @property
    def facts(self) -> dict[str, float]:
        """The known values, by the names that they have in tables."""
        return {} if self.distance is None else {"distance": round(self.distance, 3)}

    @property
    def word(self) -> str:
        """How the image looks, in words; empty where nothing is known."""
        if self.distance is None:
            return ""
        return "like the training images" if self.distance <= 1 else "unusual" if self.distance <= FAR else "unlike the training images"


NOTHING_KNOWN = Trust()
