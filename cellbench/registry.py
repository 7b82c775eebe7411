"""What exists: cards (TOML files of facts) for backbones, heads, baselines and datasets, and the code that a card names.

Listing reads cards only; the code behind a card is imported when it is built. ``Registry(extra)`` lays a user's folder over the
shipped one: a card of the same name there wins.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, model_validator

from cellbench import imports
from cellbench.errors import CellbenchError, unknown
from cellbench.files import nfc
from cellbench.spec import Record, RunSpec, Scalar, checked


class Card(Record):
    """What all cards share. ``id`` is the file's name, ``title`` its first comment line."""

    id: str
    title: str
    path: str
    builder: str
    """``module:object``, or ``file.py:object`` for a file beside the card; imported when built, not when listed."""
    license: str = ""
    source: str = ""
    """Where the facts come from: a paper, a DOI, a page."""
    notes: str = ""


class BackboneCard(Card):
    """A frozen feature extractor. Maps have ``dim`` channels, one vector for each ``patch_px`` x ``patch_px`` pixels."""

    weights: str
    """``hf-hub:OWNER/NAME``, ``https://…``, or ``none`` for a floor that needs no weights."""
    file: str = ""
    """The file within a hub repository."""
    revision: str = ""
    """The hub commit that the facts here were read from; empty: not known."""
    sha256: str = ""
    """Of the weights file; empty: not known, recorded at first use."""
    file_mib: float = Field(0, ge=0)
    """Size of the published file, where it holds more than the network's parameters in float32 (training heads, a teacher); 0: it does not."""
    patch_px: int = Field(ge=1, le=64)
    dim: int = Field(ge=1)
    depth: int = Field(ge=1)
    """Blocks, that is, the number of maps that heads can choose from."""
    prefix_tokens: int = Field(0, ge=0)
    """Class and register tokens that stand before the patch tokens."""
    params_m: float = Field(0, ge=0)
    """Millions of parameters."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    gated: bool = False
    page: str = ""
    """Where a person logs in and accepts the licence, or reads what the publisher says; empty: the hub repository's own page."""
    probe: tuple[float, ...] = ()
    """Eight means of the last map of a drawn tile, by which `doctor NAME` knows the right output; empty: not known, and measured there."""
    alternatives: tuple[str, ...] = ()
    """The same weights published elsewhere, ``hf-hub:OWNER/NAME/FILE``: used where already in the hub's cache, never downloaded unasked."""
    arch: dict[str, Any] = Field(default_factory=dict)
    """What the builder needs to make the network, in its own words."""


class HeadCard(Card):
    """A decoder from a backbone's maps to class scores at every pixel."""

    levels: int = Field(1, ge=1, le=8)
    """How many depths of the backbone it reads, evenly spaced, the last one included."""
    pixels: bool = False
    """Whether it also sees the tile itself."""
    options: dict[str, Scalar] = Field(default_factory=dict)


class BaselineCard(Card):
    """A whole segmenter, with no backbone of ours in it: what a foundation model must beat."""

    trained: bool
    """Whether it learns from the training images; if not, it is one function from image to mask."""
    options: dict[str, Scalar] = Field(default_factory=dict)


class DatasetCard(Card):
    """Images with masks. ``classes`` are in the order of the class numbers, the background first."""

    classes: tuple[str, ...] = Field(("background", "cell"), min_length=2)
    values: tuple[int, ...] = ()
    """The mask value of each class; a pixel belongs to the nearest. Empty: 0 is background, anything else a cell."""
    tolerance: int = Field(20, ge=0, lt=32768)
    """How far from its class's value a mask's value may lie before `check` doubts it: noisy masks are taken to the nearest all the same."""
    thresholds: tuple[int, ...] = ()
    """In place of ``values``: class k begins at the k-th of these mask values, class 0 below the first."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """In place of ``values``: the mask's colour of each class, red, green and blue from 0 to 255."""
    images: str = ""
    """The folder of images below the dataset's; ``{split}`` stands for ``train`` and ``test``. Empty: the usual layouts are tried."""
    masks: str = ""
    expected: dict[str, int] = Field(default_factory=dict)
    """How many images the published set holds, by split."""
    how_to_get: str = ""
    draw: dict[str, Scalar] = Field(default_factory=dict)
    """The drawing's settings and their defaults; empty for data that is read from a folder."""

    @model_validator(mode="after")
    def _classes_have_one_meaning(self) -> DatasetCard:
        given = [name for name in ("values", "thresholds", "colors") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say the same in two ways; keep one")
        wanted = len(self.classes) - (given == ["thresholds"])
        if given and (len(getattr(self, given[0])) != wanted or len(set(getattr(self, given[0]))) != wanted):
            raise ValueError(f"{given[0]} must name {wanted} different ones, for {len(self.classes)} classes")
        if list(self.thresholds) != sorted(self.thresholds) or any(not 0 <= part < 256 for color in self.colors for part in color):
            raise ValueError("thresholds rise, and colours lie in 0..255")
        return self


KINDS = MappingProxyType({"backbones": BackboneCard, "heads": HeadCard, "baselines": BaselineCard, "datasets": DatasetCard})


def shipped(folder: str) -> Path:
    """``registry`` or ``experiments``: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "_shipped" / folder
    return inside if inside.is_dir() else package.parent / folder


class Registry:
    """The cards of the shipped folder and of the user's own folder, read when asked for."""

    def __init__(self, extra: Path | None = None) -> None:
        if extra is not None and not extra.is_dir():
            raise CellbenchError(f"--registry {extra}: there is no such folder. Expected one with backbones/, heads/, baselines/ or datasets/.")
        if extra is not None and not any((extra / kind).is_dir() for kind in KINDS):
            raise CellbenchError(f"--registry {extra}: holds none of {', '.join(k + '/' for k in KINDS)}. Put cards into folders of these names.")
        self._folders = [folder for folder in (extra, shipped("registry")) if folder is not None]

    def names(self, kind: str) -> list[str]:
        """The ids of all cards of a kind, sorted."""
        return sorted({path.stem for folder in self._folders for path in (folder / kind).glob("*.toml")})

    def backbone(self, name: str) -> BackboneCard:
        return self._card("backbones", name)

    def head(self, name: str) -> HeadCard:
        return self._card("heads", name)

    def baseline(self, name: str) -> BaselineCard:
        return self._card("baselines", name)

    def dataset(self, name: str) -> DatasetCard:
        return self._card("datasets", name)

    def card(self, kind: str, name: str) -> Card:
        if kind not in KINDS:
            raise unknown("kind of card", kind, KINDS)
        return self._card(kind, name)

    def _card(self, kind: str, name: str) -> Any:
        for folder in self._folders:
            path = folder / kind / f"{name}.toml"
            if not name.isascii() and not path.is_file():
                path = next((one for one in (folder / kind).glob("*.toml") if nfc(one.stem) == nfc(name)), path)
            if "/" not in name and path.is_file():
                return read_card(path, KINDS[kind])
        raise unknown(kind.removesuffix("s"), name, self.names(kind))

    def complete(self, run: RunSpec) -> RunSpec:
        """The run with every option of its head or baseline filled in from the card. Raises CellbenchError for an option that the card lacks."""
        card = self.baseline(run.baseline) if run.baseline else self.head(run.head or "")
        if run.backbone:
            self.backbone(run.backbone)
        options = with_defaults(card.options, run.options, f"{'baseline' if run.baseline else 'head'}.{card.id}")
        return run.model_copy(update={"options": options})


def with_defaults(defaults: dict[str, Scalar], given: dict[str, Scalar], where: str) -> dict[str, Scalar]:
    """``given`` over ``defaults``; a name that has no default, or a value of another type, is a CellbenchError."""
    for key, value in given.items():
        if key not in defaults:
            raise unknown("setting", key, defaults, where=f"[{where}]")
        default = defaults[key]
        fits = isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
        if not fits or isinstance(value, bool) != isinstance(default, bool):
            raise CellbenchError(f"[{where}] {key} = {value!r}: a {_kind(default)} is expected, like the default {default!r}.")
    return {key: type(default)(given.get(key, default)) for key, default in defaults.items()}


def _kind(value: Scalar) -> str:
    return {bool: "true or false", int: "whole number", float: "number", str: "string"}[type(value)]


def read_card(path: Path, record: type[Card]) -> Card:
    """One card. Raises CellbenchError that names the file for bad TOML, an unknown key or a value out of range."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CellbenchError(f"{path}: cannot be read as a card: {error}.") from None
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    title = first.lstrip("# ").strip() if first.startswith("#") else ""
    for reserved in ("id", "title", "path"):
        if reserved in tree:
            raise CellbenchError(f"{path}: '{reserved}' is not a key of a card: the file's name is the id and its first comment the title.")
    return checked(record, {**tree, "id": path.stem, "title": title, "path": str(path)}, str(path))


def load(card: Card) -> Any:
    """The object that a card's ``builder`` names, imported now."""
    module_name, _, attribute = card.builder.partition(":")
    if not attribute:
        raise CellbenchError(f"{card.path}: builder = {card.builder!r}. Expected 'module:object' or 'file.py:object'.")
    try:
        with imports.kept():
            module = _from_file(Path(card.path).parent / module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        return getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise CellbenchError(f"{card.path}: builder = {card.builder!r} cannot be imported: {error}.") from error


def code_of(card: Card) -> str:
    """What stands for the code behind a card in fingerprints: the hash of a user's file; empty for the package's own, which ``NUMERICS``
    speaks for."""
    module = card.builder.partition(":")[0]
    file = Path(card.path).parent / module
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if module.endswith(".py") and file.is_file() else ""


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # By its whole path: two people's folders may each have a my_head.py.
    name = f"cellbench_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their own module up there
    spec.loader.exec_module(module)
    return module
