"""The words of the project: what a run is, what an experiment asks, and which runs follow from it.

A run is one point of a grid; runs that see the same tiles through the same backbone are a cohort. Records are frozen and refuse
what they do not know. No torch and no I/O here.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cellbench.config.base import Scalar, StrictModel

# Raised whenever a change of code changes the numbers of an unchanged spec: finished runs of older numerics are then not taken for these.
NUMERICS_VERSION = 4

_COHORT = "cohort"
"""Marks the fields of a run that decide which tiles are seen, in which colours, through which backbone."""



class RunSpec(StrictModel):
    """Everything about one run that can change its numbers, apart from the data and the weights themselves."""

    backbone: Annotated[str | None, _COHORT] = None
    head: str | None = None
    baseline: str | None = None
    options: dict[str, Scalar] = Field(default_factory=dict)
    """The head's or baseline's own settings, by the names on its card."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Starts the head's weights, nothing else: which tiles are seen in which order is ``data_seed``'s."""

    framing: Annotated[Literal["tile", "pad", "resize"], _COHORT] = "tile"
    """``tile``: cut into squares. ``pad``: whole, padded to multiples of ``tile_px``. ``resize``: whole, squeezed into one square."""
    tile_px: Annotated[int, _COHORT] = Field(224, ge=16, le=4096)
    tile_scale: Annotated[float, _COHORT] = Field(1.0, ge=0.25, le=4)
    """The image is scaled by it first: at 2 a tile shows a quarter of the area, each cell twice as wide. ``resize``: the square is so much larger."""
    overlap: Annotated[float, _COHORT] = Field(0.5, ge=0, le=0.9)
    """Share of a tile that its neighbour also covers, in testing and prediction."""
    val_overlap: Annotated[float, _COHORT] = Field(0.0, ge=0, le=0.9)
    sampling: Annotated[Literal["crops", "tiles"], _COHORT] = "crops"
    """``crops``: random places, anew each epoch. ``tiles``: every tile of every image once an epoch."""
    crops_per_image: Annotated[int, _COHORT] = Field(1, ge=1, le=10_000)
    repeat_views_every: Annotated[int, _COHORT] = Field(0, ge=0, le=1000)
    """Training views repeat every so many epochs; 0: never. Lets augmentation and a feature cache live together."""
    flips: Annotated[bool, _COHORT] = True
    rotations: Annotated[bool, _COHORT] = True
    """Right angles only: they cost no interpolation."""
    brightness: Annotated[float, _COHORT] = Field(0.2, ge=0, lt=1)
    contrast: Annotated[float, _COHORT] = Field(0.2, ge=0, lt=1)
    saturation: Annotated[float, _COHORT] = Field(0.1, ge=0, lt=1)
    hue: Annotated[float, _COHORT] = Field(0.05, ge=0, le=0.5)
    hed: Annotated[float, _COHORT] = Field(0.0, ge=0, le=1)
    """How far training tiles vary in their stains: each of haematoxylin, eosin and DAB times 1 - ``hed`` to 1 + ``hed``, and shifted. 0.05 is
    light, 0.2 strong."""
    augmentations: Annotated[str, _COHORT] = "none"
    """The user's own augmentations, each with its strength: ``0.3 blur + 0.1 noise``. They follow the shipped ones, in this order."""
    normalise: Annotated[Literal["none", "reinhard", "macenko"], _COHORT] = "none"
    """All images are brought to the colours of the run's training images first. Baselines that learn nothing see images as they are."""
    data_seed: Annotated[int, _COHORT] = Field(2026, ge=0, lt=2**31)
    fraction: Annotated[float, _COHORT] = Field(1.0, gt=0, le=1)
    """Share of the training images that are learned from, smaller shares within larger ones. An epoch stays as long: those images come oftener."""

    fold: Annotated[int, _COHORT] = Field(0, ge=0)
    """Which of ``[data] folds`` is the test, from 0."""

    epochs: int = Field(20, ge=1, le=10_000)
    batch_size: int = Field(8, ge=1, le=4096)
    lr: float = Field(1e-3, gt=0, le=1)
    weight_decay: float = Field(1e-4, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = Field(1.0, ge=0)
    patience: int = Field(10, ge=0)
    """Epochs without a better ``select`` before the run stops; 0: never."""
    loss: str = "0.5 ce + 0.5 dice"
    targets: Literal["cell", "cell+distance", "cell+border+distance"] = "cell"
    """What the head learns beside the classes, so that touching cells part better: how deep in its cell a pixel lies, and where two meet."""
    unfreeze: Annotated[int, _COHORT] = Field(0, ge=0, le=100)
    """The backbone's last so many blocks are trained too, each run its own copy; what comes before stays frozen and shared."""
    tail_lr_scale: float = Field(0.01, gt=0, le=1)
    """The learning rate of the last block of an unfrozen tail, as a share of ``lr``."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """And of each block before it, as a share of the next."""
    select: Literal["val/dice", "val/loss"] = "val/dice"

    @field_validator("loss")
    @classmethod
    def _loss_can_be_read(cls, value: str) -> str:
        weighted_terms(value)
        return value

    @field_validator("augmentations")
    @classmethod
    def _augmentations_can_be_read(cls, value: str) -> str:
        if value != "none":
            weighted_terms(value)
        return value

    @model_validator(mode="after")
    def _one_model(self) -> RunSpec:
        if (self.baseline is None) == (self.backbone is None) or (self.backbone is None) != (self.head is None):
            raise ValueError("a run is either a backbone with a head, or a baseline")
        side = self.tile_px * self.tile_scale
        if self.framing == "resize" and side != round(side):
            raise ValueError(f"resize makes squares of tile_px * tile_scale = {side:g} px: a whole number is needed")
        return self

    @property
    def model(self) -> str:
        """What is compared, seeds aside: ``dinobloom-s · fpn`` or ``otsu``."""
        return self.baseline or f"{self.backbone} · {self.head}"

    @property
    def own_augmentations(self) -> dict[str, float]:
        """The strength of each of the user's augmentations."""
        return {} if self.augmentations == "none" else weighted_terms(self.augmentations)

    @property
    def stream(self) -> tuple[Any, ...]:
        """What decides which tiles are seen through which backbone: runs with equal streams are one cohort."""
        return tuple(getattr(self, name) for name in SAMPLING_FIELDS)


SAMPLING_FIELDS = tuple(name for name, field in RunSpec.model_fields.items() if _COHORT in field.metadata)

# What [run] may set for all runs, and [head.x] or [baseline.x] for the runs of that part alone.
RUN_KEYS = tuple(name for name in RunSpec.model_fields if name not in ("backbone", "head", "baseline", "options"))














def fingerprint(run: RunSpec, dataset_digest: str, parts_digest: str) -> str:
    """Sixteen hex digits over everything that can change a run's numbers; not device, paths or workers. ``parts_digest`` stands for the weights,
    the cards and their code, and the precision."""
    unused = {"augmentations"} if run.augmentations == "none" else None  # runs of before there were any keep their fingerprints
    facts = {"numerics": NUMERICS_VERSION, "run": run.model_dump(exclude=unused), "dataset": dataset_digest, "parts": parts_digest}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def weighted_terms(text: str) -> dict[str, float]:
    """The names in a sum, such as a run's loss, and their weights.

    >>> weighted_terms("0.5 ce + 0.5 dice")
    {'ce': 0.5, 'dice': 0.5}
    """
    weights: dict[str, float] = {}
    for term in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*?\s+)?([a-z][a-z0-9_-]*)\s*", term)
        if not match:
            raise ValueError(f"a sum like '0.5 ce + 0.5 dice' is expected, not {text!r}")
        weight, name = float(match[1] or 1), match[2]
        if name in weights:
            raise ValueError(f"'{name}' stands twice in {text!r}")
        weights[name] = weight
    if not any(weights.values()):
        raise ValueError(f"all weights of {text!r} are 0")
    return weights
