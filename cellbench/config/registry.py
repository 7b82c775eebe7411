"""The registry: cards (TOML files of facts) by kind and name, and the code that a card names.

Listing reads cards only; a card's code is imported when it is built. A card in the user's folder takes precedence over a shipped one of the same name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellbench.config import source_code
from cellbench.config.base import Scalar
from cellbench.config.cards import (
    KINDS,
    AugmentationCard,
    BackboneCard,
    BaselineCard,
    C,
    Card,
    DatasetCard,
    HeadCard,
    LossCard,
    MetricCard,
    read_card,
)
from cellbench.config.run import RUN_KEYS, RunSpec, weighted_terms
from cellbench.errors import CellbenchError, keeping_on, unknown_name
from cellbench.files import facts_digest, text_digest, to_nfc
from cellbench.startup import without_compiler


def shipped(folder: str) -> Path:
    """``registry`` or ``experiments``: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_shipped" / folder
    return inside if inside.is_dir() else package.parent / folder


BUILDERS = {
    "timm-vit": "cellbench.models.backbones.timm_vit:timm_vit",
    "timm-pyramid": "cellbench.models.backbones.timm_pyramid:timm_pyramid",
    "cbc-unet": "cellbench.models.backbones.cbc_unet:cbc_unet",
    "filter-bank": "cellbench.models.backbones.filter_bank:filter_bank",
    "bilinear": "cellbench.models.heads.bilinear:Bilinear",
    "detail": "cellbench.models.heads.detail:Detail",
    "detail-deep": "cellbench.models.heads.detail_deep:DetailDeep",
    "fpn": "cellbench.models.heads.fpn:FPN",
    "linear-depths": "cellbench.models.heads.linear_depths:LinearDepths",
    "smp-decoder": "cellbench.models.heads.smp_decoder:SmpDecoder",
    "transposed-conv": "cellbench.models.heads.transposed_conv:TransposedConv",
    "unetr": "cellbench.models.heads.unetr:UNETR",
    "cbc": "cellbench.models.baselines.cbc:cbc",
    "cellpose": "cellbench.models.baselines.cellpose:cellpose",
    "instanseg": "cellbench.models.baselines.instanseg:instanseg",
    "otsu": "cellbench.models.baselines.otsu:otsu",
    "stardist": "cellbench.models.baselines.stardist:stardist",
    "unet": "cellbench.models.baselines.unet:UNet",
    "binary-cross-entropy": "cellbench.training.losses:binary_cross_entropy",
    "cross-entropy": "cellbench.training.losses:cross_entropy",
    "dice": "cellbench.training.losses:dice",
    "focal": "cellbench.training.losses:focal",
    "jaccard": "cellbench.training.losses:jaccard",
    "lovasz": "cellbench.training.losses:lovasz",
    "tversky": "cellbench.training.losses:tversky",
    "smears": "cellbench.data.synthetic.smears:draw_dataset",
}
"""The package's own builders. Cards use these names, so that fingerprints do not depend on the location of the code."""


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """A run with all options filled in, and the cards that it refers to."""

    registry: Registry
    run: RunSpec
    card: HeadCard | BaselineCard
    backbone: BackboneCard | None

    @property
    def digests(self) -> list[str]:
        """The cards of the head or baseline, then of the user's own losses, augmentations and metrics."""
        return [self.registry.digest(card) for card in (self.card, *self.registry.extensions(self.run))]

    @property
    def backbone_digest(self) -> str:
        return self.registry.digest(self.backbone) if self.backbone else ""


class Registry:
    """The cards of the shipped folder and of the user's folder. Each is read once, at its first use, so edits during a run have no effect."""

    def __init__(self, extra: Path | None = None) -> None:
        if extra is not None and not extra.is_dir():
            raise CellbenchError(f"--registry {extra}: there is no such folder. Expected one with {', '.join(k + '/' for k in KINDS)}.")
        if extra is not None and not any((extra / kind).is_dir() for kind in KINDS):
            raise CellbenchError(
                f"--registry {extra}: has none of {', '.join(k + '/' for k in KINDS)}. Put cards into folders of these names."
            )
        self.extra = extra
        """The user's folder."""
        self._folders = [folder for folder in (extra, shipped("registry")) if folder is not None]
        self._cards: dict[tuple[str, str], Card] = {}
        self._digests: dict[str, str] = {}

    def names(self, kind: str) -> list[str]:
        """The ids of all cards of a kind, sorted."""
        return sorted({path.stem for folder in self._folders for path in (folder / kind).glob("*.toml")})

    def backbone(self, name: str) -> BackboneCard:
        return self._card(BackboneCard, name)

    def head(self, name: str) -> HeadCard:
        return self._card(HeadCard, name)

    def baseline(self, name: str) -> BaselineCard:
        return self._card(BaselineCard, name)

    def dataset(self, name: str) -> DatasetCard:
        return self._card(DatasetCard, name)

    def loss(self, name: str) -> LossCard:
        return self._card(LossCard, name)

    def augmentation(self, name: str) -> AugmentationCard:
        return self._card(AugmentationCard, name)

    def metric(self, name: str) -> MetricCard:
        return self._card(MetricCard, name)

    def card(self, kind: str, name: str) -> Card:
        if kind not in KINDS:
            raise unknown_name("kind of card", kind, KINDS)
        return self._card(KINDS[kind], name)

    def _card(self, record: type[C], name: str) -> C:
        card = self._cards.get((record.KIND, name))
        if card is None:
            card = self._cards[record.KIND, name] = self._read(record, name)
        assert isinstance(card, record)
        return card

    def _read(self, record: type[C], name: str) -> C:
        for folder in self._folders if _is_file_name(name) else ():
            path = folder / record.KIND / f"{name}.toml"
            if not name.isascii() and not path.is_file():
                path = next((one for one in path.parent.glob("*.toml") if to_nfc(one.stem) == to_nfc(name)), path)
            if path.is_file():
                return read_card(path, record)
        singular = "loss" if record is LossCard else record.KIND.removesuffix("s")
        raise unknown_name(singular, name, self.names(record.KIND), all_with=f"cellbench list {record.KIND}")

    def part(self, run: RunSpec) -> HeadCard | BaselineCard:
        """The card of the run's head or baseline."""
        return self.baseline(run.baseline) if run.baseline else self.head(run.head or "")

    def complete(self, run: RunSpec) -> RunSpec:
        """The run with every option of its head or baseline filled in from the card. Raises CellbenchError, as :meth:`resolve`."""
        return self.resolve(run).run

    def resolve(self, run: RunSpec) -> RunParts:
        """The run and its cards. Raises CellbenchError for an option that the card lacks, and for an unknown backbone, loss or augmentation."""
        card = self.part(run)
        options = with_defaults(card.options, run.options, f"{'baseline' if run.baseline else 'head'}.{card.id}", RUN_KEYS)
        backbone = self.backbone(run.backbone) if run.backbone else None
        self.terms(run)
        return RunParts(registry=self, run=run.model_copy(update={"options": options}), card=card, backbone=backbone)

    def terms(self, run: RunSpec) -> list[Card]:
        """The cards of the losses and own augmentations that a run names. Raises CellbenchError for an unknown name."""
        return [self.loss(name) for name in weighted_terms(run.loss)] + [self.augmentation(name) for name in run.own_augmentations]

    def digest(self, card: Card) -> str:
        """:func:`digest_of`, computed once for each card."""
        if card.path not in self._digests:
            self._digests[card.path] = digest_of(card)
        return self._digests[card.path]

    def extensions(self, run: RunSpec) -> list[Card]:
        """The user's own losses, augmentations and metrics that can change what a run logs."""
        cards = [*self.terms(run), *(self.metric(name) for name in self.names("metrics"))]
        return [card for card in cards if Path(card.path).parents[1] != shipped("registry")]


def _is_file_name(name: str) -> bool:
    return not {"/", "\0"} & set(name) and len(name.encode("utf-8", "surrogateescape")) < 200


def with_defaults(defaults: dict[str, Scalar], given: dict[str, Scalar], where: str, beside: Sequence[str] = ()) -> dict[str, Scalar]:
    """``defaults`` updated by ``given``. Raises CellbenchError for a name without a default or a value of another type.

    ``beside``: other names that the table ``where`` may have, for the message.
    """
    for key, value in given.items():
        if key not in defaults:
            raise unknown_name("setting", key, (*defaults, *beside), where=f"[{where}]")
        default = defaults[key]
        fits = isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
        if not fits or isinstance(value, bool) != isinstance(default, bool):
            raise CellbenchError(f"[{where}] {key} = {value!r}: a {_kind(default)} is expected, like the default {default!r}.")
    return {key: type(default)(given.get(key, default)) for key, default in defaults.items()}


def _kind(value: Scalar) -> str:
    return {bool: "true or false", int: "whole number", float: "number", str: "string"}[type(value)]


def load(card: Card) -> Any:
    """The object that a card's ``builder`` names, imported now."""
    if ":" not in card.builder and card.builder not in BUILDERS:
        known = f"Expected 'module:object', 'file.py:object' or one of {', '.join(BUILDERS)}."
        raise CellbenchError(f"{card.path}: builder = {card.builder!r}. {known}")
    module_name, _, attribute = builder_path(card).partition(":")
    try:
        with without_compiler(), keeping_on():
            module = (
                _from_file(Path(card.path).parent / module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
            )
        return getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise CellbenchError(f"{card.path}: builder = {card.builder!r} cannot be imported: {error}.") from error


def builder_path(card: Card) -> str:
    """``module:object`` of a card's builder."""
    return BUILDERS.get(card.builder, card.builder)


def code_digest(card: Card) -> str:
    """The part of a fingerprint that represents the code behind a card.

    The hash of a user's source files (``cellbench.config.source_code``); empty for the package's own code, for which
    :data:`cellbench.config.run.NUMERICS_VERSION` stands.
    """
    return source_code.digest(builder_path(card), Path(card.path).parent) if card.builder else ""


def digest_of(card: Card) -> str:
    """Sixteen hex digits over what can change numbers of a card: its facts, apart from descriptions, and the code behind it."""
    facts = card.model_dump(mode="json", exclude=set(card.DESCRIPTIVE))
    return facts_digest([facts, code_digest(card)])


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # By its full path: two folders may each have a my_head.py.
    name = f"cellbench_user_{path.stem}_{text_digest(str(path.resolve()), 8)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look up the module there
    spec.loader.exec_module(module)
    return module
