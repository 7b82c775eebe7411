"""Cards: the facts about a backbone, a head, a baseline or a dataset, one TOML file each."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from cellbench.config.base import Scalar, StrictModel, checked
from cellbench.errors import CellbenchError
from cellbench.files import parse_toml, read_text


class Card(StrictModel):
    """What all cards share. ``id`` is the file's name, ``title`` its first comment line."""

    KIND: ClassVar[str]
    """The folder of such cards."""
    DESCRIPTIVE: ClassVar[frozenset[str]] = frozenset({"id", "title", "path", "license", "source", "notes"})
    """Keys that do not change the numbers of a run. All others enter its fingerprint."""

    id: str
    title: str
    path: str
    builder: str
    """A name in ``cellbench.config.registry.BUILDERS``, ``module:object``, or ``file.py:object`` for a file beside the card; imported when built."""
    license: str = ""
    """Licence of the weights or images."""
    source: str = ""
    """Where the facts come from: a paper, a DOI, a page."""
    notes: str = ""
    """Anything else worth knowing."""


class BackboneCard(Card):
    """A frozen feature extractor. Maps have ``dim`` channels, one vector for each ``patch_px`` x ``patch_px`` pixels."""

    KIND = "backbones"
    # Where the weights come from is descriptive too: the fingerprint holds the hash of the file.
    DESCRIPTIVE: ClassVar[frozenset[str]] = Card.DESCRIPTIVE | {
        "weights", "file", "revision", "sha256", "file_mib", "params_m", "domain", "gated", "page", "probe", "alternatives",
    }  # fmt: skip

    weights: str
    """``hf-hub:OWNER/NAME``, ``https://…``, ``package:NAME`` for a file in a Python package (``NAME`` is what ``pip install`` takes), ``local`` for
    one that only the ``--weights`` folder can hold, or ``none`` for a backbone that needs no weights."""
    file: str = ""
    """The file within a hub repository, or ``MODULE/PATH`` within a Python package."""
    revision: str = ""
    """The hub commit that these facts were read from; empty: not known."""
    sha256: str = ""
    """Of the weights file; empty: not known, recorded at first use."""
    file_mib: float = Field(default=0, ge=0)
    """Size of the published file, if it holds more than the network's parameters in float32 (training heads, a teacher); 0: that of the parameters."""
    patch_px: int = Field(ge=1, le=64)
    """Side of the square of pixels that one feature vector stands for."""
    dim: int = Field(ge=1)
    """Number of channels of the feature maps."""
    depth: int = Field(ge=1)
    """Number of blocks, that is, of maps that heads can choose from."""
    prefix_tokens: int = Field(default=0, ge=0)
    """Class and register tokens that stand before the patch tokens."""
    params_m: float = Field(default=0, ge=0)
    """Millions of parameters."""
    mean: tuple[float, float, float]
    """Mean of each colour channel that is subtracted from pixels in 0..1."""
    std: tuple[float, float, float]
    """Standard deviation by which they are then divided."""
    domain: Literal["", "blood", "pathology", "natural-image"] = ""
    """The images that it was trained on; empty: none, or not known."""
    gated: bool = False
    """Whether the download needs an account that has accepted the licence."""
    page: str = ""
    """Where to accept the licence, or to read about the weights; empty: the hub repository's page."""
    probe: tuple[float, ...] = ()
    """Eight means of the last map of a synthetic tile, with which `doctor NAME` checks the output; empty: not known, and measured there."""
    alternatives: tuple[str, ...] = ()
    """The same weights published elsewhere, ``hf-hub:OWNER/NAME/FILE``: used if already in the hub's cache, never downloaded."""
    arch: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the builder."""


class HeadCard(Card):
    """A decoder from a backbone's maps to class scores at every pixel."""

    KIND = "heads"
    DESCRIPTIVE: ClassVar[frozenset[str]] = Card.DESCRIPTIVE | {"options"}  # they are part of the run

    levels: int = Field(default=1, ge=1, le=8)
    """Number of backbone levels that it reads, evenly spaced, including the last one."""
    pixels: bool = False
    """Whether it also reads the pixels of the tile."""
    options: dict[str, Scalar] = Field(default_factory=dict)
    """Arguments of the builder, with their defaults."""


class BaselineCard(Card):
    """A segmenter without a backbone, for comparison."""

    KIND = "baselines"
    # The version of the package is part of a run's fingerprint, and so are its options.
    DESCRIPTIVE: ClassVar[frozenset[str]] = Card.DESCRIPTIVE | {"options", "package"}

    trained: bool
    """Whether it is trained. If not, its builder is a function from image to mask."""
    package: str = ""
    """Of one that another Python package runs, with weights of its own: its name. The builder's function returns cell numbers (H, W)."""
    weights: tuple[str, ...] = ()
    """Of one that was trained elsewhere: backbones whose weights it reads. Its builder takes them and returns that function."""
    options: dict[str, Scalar] = Field(default_factory=dict)
    """Arguments of the builder, with their defaults."""


class LossCard(Card):
    """A term of a run's loss: a function (logits (B, K, H, W) float32, target (B, H, W) int64) -> scalar."""

    KIND = "losses"


class AugmentationCard(Card):
    """A change of colours of training tiles; its builder is a class as ``cellbench.data.transforms.augmentation.Augmentation`` says."""

    KIND = "augmentations"


class MetricCard(Card):
    """A score of one test image: a function from :class:`cellbench.metrics.catalog.ScoredImage` to a number, NaN where there is nothing to score."""

    KIND = "metrics"
    label: str = ""
    """In headings and figures; empty: the card's name."""
    unit: str = ""
    """Unit; empty for a share or a number without one."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """The better direction."""
    in_leaderboard: bool = True
    """Whether the leaderboard has a column of it."""
    searchable: bool = False
    """Whether a search may optimise it, as ``val/NAME``. Costs one pass over the validation images for each run of a search."""


class DatasetCard(Card):
    """Images with masks. ``classes`` are in the order of the class numbers, the background first."""

    KIND = "datasets"
    builder: str = ""
    """Empty: the folder is read in one of the known layouts. Else ``builder(folder, card)`` returns its ``cellbench.data.scan.Listing``, or with
    ``draw`` ``builder(folder, settings, progress)`` draws the images into the folder."""
    classes: tuple[str, ...] = Field(default=("background", "cell"), min_length=2)
    """Names of the classes, the background first."""
    values: tuple[int, ...] = ()
    """The mask value of each class; a pixel belongs to the nearest. Empty: 0 is background, anything else a cell."""
    tolerance: int = Field(default=20, ge=0, lt=32768)
    """Maximum distance of a mask's value from that of its class before `check` warns. Either way, the nearest class is taken."""
    thresholds: tuple[int, ...] = ()
    """In place of ``values``: class k begins at the k-th of these mask values, class 0 below the first."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """In place of ``values``: the mask's colour of each class, red, green and blue from 0 to 255."""
    objects: tuple[str, ...] = ()
    """The classes that are objects, counted one by one; all others are parts of them. If neither this nor ``parts`` is given, the masks decide."""
    parts: tuple[str, ...] | dict[str, str] = ()
    """The classes that are parts of objects, as a nucleus is of a cell: ``["nucleus"]``, or ``{ nucleus = "cytoplasm" }`` with several classes of
    objects. In a list, a part belongs to the class of objects that it touches most."""
    range: tuple[float, float] | None = None
    """Black and white level of images of more than 8 bits. None: as the files state, else by the largest number in all of them."""
    channels: tuple[Annotated[int, Field(ge=0, lt=64)], ...] = ()
    """Which channels of each image file are read, counted from 0: one or three. Empty: files must be grey or RGB, with or without alpha."""
    images: str = ""
    """The folder of images below the dataset's; ``{split}`` stands for ``train`` and ``test``. Empty: the usual layouts are tried."""
    masks: str = ""
    """The folder of masks, beside ``images``. If ``images`` is empty: ``mask_kind``."""
    mask_kind: Literal["", "cells", "classes", "binary"] = ""
    """What the numbers in mask files are: of ``cells``, values of ``classes``, or ``binary``, anything but 0 being a cell. Empty: inferred from
    the values, or else from all masks together. ``masks = "cells"`` says the same where ``masks`` names no folder."""
    ignore: int | tuple[int, int, int] | None = None
    """The value, or where ``colors`` are given the colour, of mask pixels that are ignored in training and scores."""
    min_cell_px: int | None = Field(default=None, ge=1)
    """Minimum area of a cell: smaller regions are not counted. Empty: estimated from the cells of the masks."""
    cut_px: int = Field(default=0, ge=0, le=15)
    """Width of the lines that part touching cells in masks without cell numbers: cells on both sides of a line this wide, or of a joint this narrow,
    are different ones, and the line belongs to them. Pixel scores count it as the mask does. 0: cells are connected regions."""
    categories: dict[str, str] = Field(default_factory=dict)
    """Of a COCO file: the class of each category. ``""`` excludes a category, ``"ignore"`` excludes its pixels from training and scores."""
    expected: dict[str, int] = Field(default_factory=dict)
    """How many images the published set holds, by split."""
    how_to_get: str = ""
    """Where to get the images, for the message when they are missing."""
    draw: dict[str, Scalar] = Field(default_factory=dict)
    """The drawing's settings and their defaults; empty for data that is read from a folder."""

    @model_validator(mode="after")
    def _drawn_data_has_a_builder(self) -> DatasetCard:
        if self.draw and not self.builder:
            raise ValueError("[draw] is for synthetic data: builder must name the function that draws it")
        return self

    @model_validator(mode="after")
    def _masks_are_one_thing(self) -> DatasetCard:
        valued, kind = bool(self.values or self.thresholds or self.colors), self.kind_of_masks
        if (kind == "cells" and valued) or (kind in ("cells", "binary") and len(self.classes) > 2):
            raise ValueError(
                f"masks = '{kind}' is incompatible with {'values of classes' if valued else 'more than two classes'}; keep one"
            )
        if len(self.classes) > 255:
            raise ValueError(f"{len(self.classes)} classes; at most 255 are possible")
        if self.cut_px and kind == "cells":
            raise ValueError("cut_px is for masks without cell numbers, and masks = 'cells' says that they have them; keep one")
        if self.ignore is not None and isinstance(self.ignore, tuple) != bool(self.colors):
            raise ValueError(f"ignore must be {'a colour, as colors are' if self.colors else 'a value'}")
        if (isinstance(self.ignore, int) and self.ignore < (0 if valued else 1)) or self.ignore in (*self.values, *self.colors):
            raise ValueError(f"ignore = {self.ignore} is also a class or the background")
        return self

    @model_validator(mode="after")
    def _classes_have_one_meaning(self) -> DatasetCard:
        given = [name for name in ("values", "thresholds", "colors") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one")
        wanted = len(self.classes) - (given == ["thresholds"])
        if given and (len(getattr(self, given[0])) != wanted or len(set(getattr(self, given[0]))) != wanted):
            raise ValueError(f"{given[0]} must name {wanted} different ones, for {len(self.classes)} classes")
        if list(self.thresholds) != sorted(self.thresholds) or any(not 0 <= part < 256 for color in self.colors for part in color):
            raise ValueError("thresholds rise, and colours lie in 0..255")
        if len(self.channels) not in (0, 1, 3):
            raise ValueError("channels names one channel, read as grey, or three, read as red, green and blue")
        if self.range is not None and not (self.range[0] < self.range[1] and all(map(math.isfinite, self.range))):
            raise ValueError("range is [BLACK, WHITE], and white is above black")
        return self

    @property
    def kind_of_masks(self) -> str:
        """``mask_kind``, or ``masks`` where that names a kind; empty: all masks together decide."""
        return self.masks if not self.images and self.masks in ("cells", "classes", "binary") else self.mask_kind

    @model_validator(mode="after")
    def _parts_belong_to_objects(self) -> DatasetCard:
        for key in ("objects", "parts"):
            for name in getattr(self, key):
                if name not in self.classes[1:]:
                    raise ValueError(f"{key} names '{name}'; the classes of cells are {', '.join(self.classes[1:])}")
        given = self.part_of() or {}
        if both := set(given) & set(self.objects):
            raise ValueError(f"'{min(both)}' is listed in objects and in parts; keep one")
        if self.objects and (lost := set(self.classes[1:]) - set(self.objects) - set(given)):
            raise ValueError(f"'{min(lost)}' is neither in objects nor in parts")
        if given and not set(self.classes[1:]) - set(given):
            raise ValueError("all classes are parts, and none is an object")
        if wrong := [owner for owner in given.values() if owner is not None and (owner in given or owner not in self.classes[1:])]:
            raise ValueError(f"a part belongs to a class of objects, which '{wrong[0]}' is not")
        return self

    def part_of(self) -> dict[str, str | None] | None:
        """Each part's class of objects, None where the masks decide; None where the card names neither objects nor parts."""
        if not self.objects and not self.parts:
            return None
        if isinstance(self.parts, dict):
            return dict(self.parts)
        parts = self.parts or tuple(name for name in self.classes[1:] if name not in self.objects)
        objects = [name for name in self.classes[1:] if name not in parts]
        return {part: objects[0] if len(objects) == 1 else None for part in parts}


KINDS: Mapping[str, type[Card]] = MappingProxyType(
    {record.KIND: record for record in (BackboneCard, HeadCard, BaselineCard, DatasetCard, LossCard, AugmentationCard, MetricCard)}
)
"""The record of each kind of card, by the name of its folder."""

C = TypeVar("C", bound=Card)


def read_card(path: Path, record: type[C]) -> C:
    """One card. Raises CellbenchError that names the file for bad TOML, an unknown key or a value out of range."""
    try:
        text = read_text(path)
        tree = parse_toml(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CellbenchError(f"{path}: cannot be read as a card: {error}.") from None
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    title = first.lstrip("# ").strip() if first.startswith("#") else ""
    for reserved in ("id", "title", "path"):
        if reserved in tree:
            raise CellbenchError(f"{path}: '{reserved}' is not a key of a card: the file's name is the id and its first comment the title.")
    return checked(record, {**tree, "id": path.stem, "title": title, "path": str(path)}, str(path))
