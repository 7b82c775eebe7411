"""A run: one point of a grid, with every setting that can change its numbers. No torch and no I/O here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from cellbench.config.base import Scalar, StrictModel
from cellbench.files import facts_digest

# Increased whenever a code change alters the numbers of an unchanged spec; finished runs of older versions are then executed again.
NUMERICS_VERSION = 6

TestTimeAugmentation = Literal["none", "flips", "d4", "shifts"]
TTA: tuple[TestTimeAugmentation, ...] = get_args(TestTimeAugmentation)
Adaptation = Literal["none", "batchnorm"]
ADAPTATIONS: tuple[Adaptation, ...] = get_args(Adaptation)
EdgeCells = Literal["all", "tuned"]
EDGE_CELLS: tuple[EdgeCells, ...] = get_args(EdgeCells)

_COHORT = "cohort"
"""Marks the fields of a run that determine which tiles pass which backbone, in which colours."""


class RunSpec(StrictModel):
    """Everything about one run that can change its numbers, apart from the data and the weights themselves."""

    backbone: Annotated[str | None, _COHORT] = None
    head: str | None = None
    baseline: str | None = None
    options: dict[str, Scalar] = Field(default_factory=dict)
    """The options of the head or baseline, by the names on its card."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the head's initial weights only; ``data_seed`` determines the tiles and their order."""

    framing: Annotated[Literal["tile", "pad", "resize"], _COHORT] = "tile"
    """``tile``: cut into squares. ``pad``: whole, padded to multiples of ``tile_px``. ``resize``: whole, resized to one square."""
    tile_px: Annotated[int, _COHORT] = Field(default=224, ge=16, le=4096)
    """Side of the square tiles that the backbone sees."""
    tile_scale: Annotated[float, _COHORT] = Field(default=1.0, ge=0.25, le=4)
    """Scale of the image before tiling: at 2 a tile shows a quarter of the area, each cell twice as wide. ``resize``: scale of the square."""
    overlap: Annotated[float, _COHORT] = Field(default=0.5, ge=0, le=0.9)
    """Share of a tile that its neighbour also covers, in test and prediction."""
    val_overlap: Annotated[float, _COHORT] = Field(default=0.0, ge=0, le=0.9)
    """The same in validation."""
    sampling: Annotated[Literal["crops", "tiles"], _COHORT] = "crops"
    """``crops``: random places, new ones each epoch. ``tiles``: every tile of every image once an epoch."""
    crops_per_image: Annotated[int, _COHORT] = Field(default=1, ge=1, le=10_000)
    """Number of random crops that an epoch takes from each training image; without effect on ``tiles``."""
    repeat_views_every: Annotated[int, _COHORT] = Field(default=0, ge=0, le=1000)
    """Number of epochs after which training views repeat; 0: never. With it, features of augmented tiles can be cached."""
    flips: Annotated[bool, _COHORT] = True
    """Whether training tiles are mirrored at random."""
    zoom: Annotated[float, _COHORT] = Field(default=0.0, ge=0, le=1)
    """Crops are magnified at random by a factor from 1 / (1 + ``zoom``) to 1 + ``zoom``, evenly on a logarithmic scale; 0: none."""
    rotations: Annotated[bool, _COHORT] = True
    """By right angles only, which needs no interpolation."""
    brightness: Annotated[float, _COHORT] = Field(default=0.2, ge=0, lt=1)
    """Largest random change of brightness of a training tile, as a share; 0: none."""
    contrast: Annotated[float, _COHORT] = Field(default=0.2, ge=0, lt=1)
    """The same for contrast."""
    saturation: Annotated[float, _COHORT] = Field(default=0.1, ge=0, lt=1)
    """The same for saturation."""
    hue: Annotated[float, _COHORT] = Field(default=0.05, ge=0, le=0.5)
    """Largest random shift of the hue, as a share of the colour circle."""
    hed: Annotated[float, _COHORT] = Field(default=0.0, ge=0, le=1)
    """Stain augmentation: haematoxylin, eosin and DAB are each multiplied by 1 - ``hed`` to 1 + ``hed``, and shifted. 0.05 is light, 0.2 strong."""
    reference_stains: Annotated[float, _COHORT] = Field(default=0.0, ge=0, le=1)
    """Random reference stains of training tiles: each channel's optical density times exp(-2 to 2 times this), half of it common to all channels."""
    augmentations: Annotated[str, _COHORT] = "none"
    """The user's own augmentations, each with its strength: ``0.3 blur + 0.1 noise``. They are applied after the shipped ones, in this order."""
    normalise: Annotated[Literal["none", "reinhard", "macenko", "background"], _COHORT] = "none"
    """Stain normalisation: to the run's training images, or by each image's own ``background``. Untrained baselines see images as they are."""
    data_seed: Annotated[int, _COHORT] = Field(default=2026, ge=0, lt=2**31)
    """Seed of the training tiles, their augmentation and their order; equal for all runs that are compared."""
    fraction: Annotated[float, _COHORT] = Field(default=1.0, gt=0, le=1)
    """Share of the training images that is used; smaller shares are subsets of larger ones. The length of an epoch stays the same."""

    fold: Annotated[int, _COHORT] = Field(default=0, ge=0)
    """Index of the fold of ``[data] folds`` that is the test set, from 0."""

    epochs: int = Field(default=20, ge=1, le=10_000)
    """Maximum number of epochs; ``patience`` may end a run earlier."""
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Number of tiles per training step of a head."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate (AdamW)."""
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    """Weight decay (AdamW)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """``cosine``: the learning rate falls to 0 over ``epochs``."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """The learning rate rises linearly over this number of epochs, which may be a fraction."""
    patience: int = Field(default=10, ge=0)
    """Epochs without a better ``select`` before the run stops; 0: never."""
    loss: str = "0.5 ce + 0.5 dice"
    """A loss, or a weighted sum of losses. ``cellbench list losses`` names them."""
    targets: Literal["cell", "cell+distance", "cell+border+distance", "flows", "stars", "hv"] = "cell"
    """What is learned beside the classes to find single cells: distances and borders, Cellpose's flows, StarDist's rays, HoVer-Net's maps."""
    unfreeze: Annotated[int, _COHORT] = Field(default=0, ge=0, le=100)
    """Number of the backbone's last blocks, or stages of a pyramid, that are also trained, as a copy for each run; earlier ones stay frozen, shared."""
    tail_lr_scale: float = Field(default=0.01, gt=0, le=1)
    """The learning rate of the last block of an unfrozen tail, as a share of ``lr``."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """The learning rate of each block before it, as a share of that of the next block."""
    lora_rank: int = Field(default=0, ge=0, le=1024)
    """Above 0: of the blocks of ``unfreeze`` only an update of this rank beside each linear layer is trained (LoRA), at ``lr`` itself."""
    pixel_adapter: int = Field(default=0, ge=0, le=1024)
    """Above 0: before the blocks of ``unfreeze`` a CNN on the tile's pixels, of this width, is added to the tokens (after ViT-Adapter)."""
    select: Literal["val/dice", "val/loss"] = "val/dice"
    """The score by which the best epoch is chosen."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation: the mean prediction over a tile's mirrors and half turn, over all eight orientations, or over shifts by half a patch.

    Not used in epochs.
    """
    adapt: Adaptation = "none"
    """``batchnorm``: the head's batch norms use a share of each tile's own statistics at test time, as tuned on validation; not used in epochs."""
    edge_cells: EdgeCells = "all"
    """``tuned``: small regions that the image's frame cuts are dropped from masks, as the annotators did; the share of a cell below which is tuned
    on validation. Not used in epochs."""
    ensemble: str = "none"
    """Seeds of several heads, such as ``0, 1, 2``, whose mean prediction is used. ``ensemble_seeds`` of an experiment makes such runs."""

    @field_validator("ensemble")
    @classmethod
    def _ensemble_can_be_read(cls, value: str) -> str:
        if value != "none":
            seeds = member_seeds(value)
            if len(seeds) < 2 or len(set(seeds)) < len(seeds):
                raise ValueError(f"two or more different seeds like '0, 1, 2' are expected, not {value!r}")
        return value

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
        if self.zoom and (self.framing != "tile" or self.sampling != "crops"):
            raise ValueError('zoom magnifies random crops: it needs framing = "tile" and sampling = "crops"')
        if self.zoom and self.targets == "stars":
            raise ValueError('zoom changes the lengths of rays: it is not for targets = "stars"')
        for name in ("lora_rank", "pixel_adapter"):
            if (value := getattr(self, name)) and not self.unfreeze:
                raise ValueError(f"{name} = {value} is for the last blocks of the backbone: set unfreeze to their number")
        return self

    @property
    def members(self) -> list[RunSpec]:
        """The single runs whose heads are used: one for each seed of an ensemble, else the run itself."""
        if self.ensemble == "none":
            return [self]
        return [self.model_copy(update={"ensemble": "none", "seed": seed}) for seed in member_seeds(self.ensemble)]

    @property
    def model(self) -> str:
        """Name of the model, shared by runs that differ only in seed: ``dinobloom-s · fpn`` or ``otsu``."""
        return self.baseline or f"{self.backbone} · {self.head}"

    @property
    def own_augmentations(self) -> dict[str, float]:
        """The strength of each of the user's augmentations."""
        return {} if self.augmentations == "none" else weighted_terms(self.augmentations)

    @property
    def training(self) -> RunSpec:
        """The same run without what is done after training: single runs with equal ones have the same trained weights."""
        return self.model_copy(update={name: RunSpec.model_fields[name].default for name in AFTER_TRAINING})

    @property
    def stream(self) -> tuple[Any, ...]:
        """The fields that determine the stream of tiles and features."""
        return tuple(getattr(self, name) for name in SAMPLING_FIELDS)

    @property
    def cohort_key(self) -> tuple[Any, ...]:
        """Equal for runs of one cohort: the same stream, and the same baseline or none."""
        return self.stream, self.baseline


SAMPLING_FIELDS = tuple(name for name, field in RunSpec.model_fields.items() if _COHORT in field.metadata)

ADDED_LATER = {
    name: RunSpec.model_fields[name].default
    for name in ("zoom", "reference_stains", "augmentations", "tta", "adapt", "edge_cells", "ensemble", "lora_rank", "pixel_adapter")
}
"""Fields that older runs do not have, with the value that leaves a run's fingerprint as it was."""
AFTER_TRAINING = ("tta", "adapt", "edge_cells", "ensemble")
"""Fields that change the use of a trained model, not its training."""

# Keys that [run] may set for all runs, and [head.x] or [baseline.x] for the runs of that head or baseline only.
RUN_KEYS = tuple(name for name in RunSpec.model_fields if name not in ("backbone", "head", "baseline", "options"))


def fingerprint(run: RunSpec, dataset_digest: str, parts_digest: str) -> str:
    """Sixteen hex digits over everything that can change a run's numbers; independent of device, paths and workers.

    ``parts_digest``: of the weights, the cards and their code, and the precision.
    """
    unused = {name for name, value in ADDED_LATER.items() if getattr(run, name) == value}
    facts = {"numerics": NUMERICS_VERSION, "run": run.model_dump(exclude=unused), "dataset": dataset_digest, "parts": parts_digest}
    return facts_digest(facts)


def member_seeds(text: str) -> list[int]:
    """The seeds of an ensemble.

    >>> member_seeds("0, 1, 2")
    [0, 1, 2]
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) < 2**31 for part in parts):
        raise ValueError(f"seeds like '0, 1, 2' are expected, not {text!r}")
    return [int(part) for part in parts]


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
            raise ValueError(f"{text!r} names '{name}' twice")
        weights[name] = weight
    if not any(weights.values()):
        raise ValueError(f"all weights of {text!r} are 0")
    return weights
