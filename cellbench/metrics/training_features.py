"""How far an image looks from a run's training images: the distance to the nearest of them, in the features of the frozen backbone.

Each depth of the backbone is compared alone, since colour shows at the first, blur and scale in the middle; the depth that differs most counts.
Features are scaled by their deviation between training images. The unit of the distance is that of an image of the training set: 1 is the distance
that 95 of 100 images of the same set do not exceed, as measured on each training image against the others, and on the validation images.

Measured with efficientnet-lite0 on three of 14 smears, each against the 13 others: 1.5 to 1.6 for images at 0.8 of their brightness, 3.1 to 3.4 at
0.6, 2.7 to 3.7 for a blur of 3 px, 2.1 to 3.2 for a yellow tint, 1.4 to 1.6 at half the magnification. The deepest features alone would be blind to light and
tint (0.6 to 1.0), and the deviation of features beside their mean adds nothing.

Letters: N training images, M held-out ones, L depths, D features of a depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

USUAL = 0.95
"""Share of held-out images of the training set within the distance 1."""
FAR = 2.0
"""From this distance on, an image is called unlike the training images."""

Descriptor = Mapping[int, np.ndarray]
"""The mean features (D,) of an image, by depth."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingFeatures:
    """The descriptors of a run's training images, and how far images of their set lie from each other."""

    rows: Mapping[int, np.ndarray]
    """(N, D) by depth: scaled descriptors."""
    centre: Mapping[int, np.ndarray]
    """(D,) by depth: their mean before scaling."""
    scale: Mapping[int, np.ndarray]
    """(D,) by depth."""
    held_out: Mapping[int, np.ndarray]
    """(M,) by depth: the distance of each held-out image to the nearest other training image."""

    @classmethod
    def of(cls, train: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> TrainingFeatures | None:
        """From descriptors (N, D) of training images and of other images of the same set, by depth; None with fewer than three training images."""
        rows, centres, scales, held_out = {}, {}, {}, {}
        for depth, train_ND in train.items():
            if len(train_ND) < 3:
                return None
            centre, deviation = train_ND.mean(0), train_ND.std(0)
            # A feature that hardly varies between a few images would count most: each gets the median deviation in addition.
            scale = np.sqrt(deviation**2 + np.median(deviation) ** 2) + 1e-6
            rows[depth], centres[depth], scales[depth] = (train_ND - centre) / scale, centre, scale
            between = _distances(rows[depth], rows[depth])
            np.fill_diagonal(between, np.inf)
            others = _distances((other[depth] - centre) / scale, rows[depth])
            held_out[depth] = np.concatenate([between.min(1), others.min(1)])
        return cls(rows=rows, centre=centres, scale=scales, held_out=held_out)

    def distance(self, descriptor: Descriptor) -> float | None:
        """The distance of an image by the depths that its descriptor has, in units of the training set; None if it has none of ours."""
        if not descriptor.keys() & self.rows.keys():
            return None
        return float(self.distances([descriptor])[0].max())

    def distances(self, descriptors: Sequence[Descriptor]) -> tuple[np.ndarray, np.ndarray]:
        """For N images of the same depths, some of ours, their distances to the nearest training image (L, N) and to each other (L, N, N), by depth.

        The unit is that of :meth:`distance`, which is the largest over depths.
        """
        depths = sorted(descriptors[0].keys() & self.rows.keys())
        held_out_LM = np.stack([self.held_out[depth] for depth in depths])
        unit_L = np.maximum(_usual(held_out_LM), 1e-6)
        unit_L = unit_L * max(_usual((held_out_LM / unit_L[:, None]).max(0)), 1e-6)
        to_train, between = [], []
        for depth, unit in zip(depths, unit_L, strict=True):
            rows_ND = (np.stack([one[depth] for one in descriptors]) - self.centre[depth]) / self.scale[depth]
            to_train.append(_distances(rows_ND, self.rows[depth]).min(1) / unit)
            between.append(_distances(rows_ND, rows_ND) / unit)
        return np.stack(to_train), np.stack(between)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a file; :meth:`from_arrays` reads them back. Descriptors have half precision there."""
        return {
            f"{name}.{depth}": array.astype(np.float16 if name == "rows" else np.float32)
            for name in ("rows", "centre", "scale", "held_out")
            for depth, array in getattr(self, name).items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TrainingFeatures:
        """Raises ValueError for arrays that do not belong together."""
        parts: dict[str, dict[int, np.ndarray]] = {name: {} for name in ("rows", "centre", "scale", "held_out")}
        for name, array in arrays.items():
            part, _, number = name.partition(".")
            parts[part][int(number)] = array.astype(np.float64)
        made = cls(**parts)
        for depth, rows_ND in made.rows.items():
            shapes = made.centre[depth].shape, made.scale[depth].shape
            if rows_ND.ndim != 2 or not len(rows_ND) or shapes != (rows_ND.shape[1:],) * 2 or made.held_out[depth].ndim != 1:
                raise ValueError(f"shapes at depth {depth}")
        return made


def _distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Root mean squared difference of the features of each pair (N, M)."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(a_ND.astype(np.float64), b_MD.astype(np.float64))) / math.sqrt(a_ND.shape[1])


def _usual(held_out: np.ndarray) -> np.ndarray:
    return np.asarray(np.quantile(held_out, USUAL, axis=-1, method="higher"))


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What is known of an image's prediction without its truth."""

    distance: float | None = None
    """From the training images; None for a run without a backbone, and for runs of older versions."""
    dice: float | None = None
    """The Dice to expect by the probabilities (``metrics.calibration``); None where no error can be stated: with few validation images, where
    nothing was found, and where the image is unlike the training images."""
    dice_error: float | None = None
    """Its root mean squared error on validation images."""
    descriptor: Descriptor | None = field(default=None, compare=False, repr=False)
    """The mean features of the image, by depth, where its distance is known."""

    @property
    def facts(self) -> dict[str, float]:
        """The known values, by the names that they have in tables."""
        known = {"distance": self.distance, "expected_dice": self.dice, "expected_dice_error": self.dice_error}
        return {name: round(value, 3) for name, value in known.items() if value is not None}

    @property
    def word(self) -> str:
        """How the image looks, in words; empty where nothing is known."""
        if self.distance is None:
            return ""
        return "like the training images" if self.distance <= 1 else "unusual" if self.distance <= FAR else "unlike the training images"


NOTHING_KNOWN = Trust()
