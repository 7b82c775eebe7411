"""Finds or downloads the file of a backbone's weights, and checks it.

The order: the ``--weights`` folder (or ``CELLBENCH_WEIGHTS``), an installed Python package, earlier downloads, the Hugging Face cache, the
card's source. A file must be complete and have the hash on the card; without one there, the first hash is recorded and a different file is
refused later. Unavailable weights raise WeightsUnavailable with the remedy; random weights are never used instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cellbench.config.cards import BackboneCard
from cellbench.errors import CellbenchError, WeightsUnavailable
from cellbench.file_cache import sha256
from cellbench.files import cache_dir, make_folder, os_errors_as, text_digest, write_atomic
from cellbench.models.backbones.download import download_from_hub, download_https, find_cached, hold_lock, stated_sha256
from cellbench.models.backbones.weight_files import SUFFIXES, check_whole

LOCAL = "local"
"""Of a card whose weights nobody publishes in a readable form: they can only lie in the user's own folder."""
# Generic names: such a file belongs to a card only in a folder of the card's name.
COMMON_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth", "model.bin")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file in a hub repository: ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME/FILE``."""

    repo: str
    names: tuple[str, ...]
    """Its possible names; the first that exists is used."""

    @classmethod
    def of(cls, text: str, file: str = "") -> HubFile:
        parts = text.removeprefix("hf-hub:").split("/", 2)
        if len(parts) < 2:
            raise CellbenchError(f"weights = {text!r}: expected hf-hub:OWNER/NAME.")
        names = (parts[2],) if len(parts) == 3 else (file,) if file else ("model.safetensors", "pytorch_model.bin")
        return cls(repo="/".join(parts[:2]), names=names)


def locate(card: BackboneCard, folder: Path | None, download: bool = True) -> Path:
    """The checked weights file of a card; with ``download=False`` only what is on this machine now.

    Raises WeightsUnavailable with the reason and the remedy, CellbenchError for a card or folder that is wrong in itself.
    """
    if card.weights == "none":
        raise CellbenchError(f'{card.id}: has no weights file: its card says weights = "none".')
    if own := folder_file(card, folder):
        # The card's hash is that of the published file; a file of another format is held to the hash of its first use.
        same_format = own.suffix == Path(_published(card)).suffix
        return _checked(card, own, f"folder {own.name}", card.sha256 if same_format else "")
    if card.weights.startswith("package:"):
        packed = find_in_package(card)
        if packed is None:
            raise WeightsUnavailable(f"{card.id}: {_not_in_package(card)} {how_to_get(card, folder)}")
        return _checked(card, packed, card.weights, card.sha256)
    if card.weights == LOCAL:
        raise WeightsUnavailable(f"{card.id}: its weights are not on this machine. {how_to_get(card, folder)}")
    https = card.weights.startswith(("https://", "http://"))
    if not https and not card.weights.startswith("hf-hub:"):
        expected = "'hf-hub:OWNER/NAME', 'https://…', 'package:NAME', 'local' or 'none'"
        raise CellbenchError(f"{card.path}: weights = {card.weights!r}. Expected {expected}.")
    landed = download_path(card)
    if https and landed.is_file():
        return _checked(card, landed, card.weights, card.sha256)
    for path, source, published in find_in_hub_cache(card):
        return _checked(card, path, source, card.sha256 if published else "")
    if not download:
        raise WeightsUnavailable(f"{card.id}: its weights are not on this machine. {how_to_get(card, folder)}")
    try:
        if https:
            download_https(card.weights, landed, check_whole, card.sha256)
            path, source = landed, card.weights
        else:
            wanted = HubFile.of(card.weights, card.file)
            path, name = download_from_hub(wanted.repo, wanted.names, card.revision or None, check_whole)
            source = f"hf-hub:{wanted.repo}/{name}"
    except WeightsUnavailable as error:
        raise WeightsUnavailable(f"{card.id}: {error} {how_to_get(card, folder)}") from error
    return _checked(card, path, source, card.sha256)


def weights_folder(folder: Path | None) -> Path | None:
    """The folder of the user's own weight files: as given, or ``CELLBENCH_WEIGHTS``. Raises CellbenchError if it does not exist."""
    given = folder or (Path(os.environ["CELLBENCH_WEIGHTS"]).expanduser() if os.environ.get("CELLBENCH_WEIGHTS") else None)
    if given is not None and not given.is_dir():
        name = "--weights" if folder else "CELLBENCH_WEIGHTS ="
        raise CellbenchError(f"{name} {given}: there is no such folder. Name the one that holds <backbone>.safetensors, .pth or .bin.")
    return given


def folder_file(card: BackboneCard, folder: Path | None) -> Path | None:
    """The card's file in the user's own folder: ``<id>.safetensors|.pth|.pt|.bin``, the published name, or that name within ``<id>/``."""
    given = weights_folder(folder)
    if given is None:
        return None
    published = _published(card)
    names = [f"{card.id}{suffix}" for suffix in SUFFIXES]
    names += [published] if published and published not in COMMON_NAMES else []
    names += _extra_names(card)
    names += [f"{card.id}/{name}" for name in (published, *COMMON_NAMES) if name]
    return next((given / name for name in names if (given / name).is_file()), None)


def _published(card: BackboneCard) -> str:
    """The name under which the weights are published, or the empty string."""
    if card.file:
        return Path(card.file).name
    return Path(unquote(urlsplit(card.weights).path)).name if card.weights.startswith("http") else ""


def _suffix(card: BackboneCard) -> str:
    return Path(_published(card)).suffix or ".safetensors"


def _extra_names(card: BackboneCard) -> list[str]:
    """The weights of a timm tag are often shared as ``<model>.safetensors``: ``vit_tiny_patch16_224.safetensors``."""
    if not card.weights.startswith("hf-hub:timm/"):
        return []
    tag = card.weights.removeprefix("hf-hub:timm/")
    return [f"{stem}{suffix}" for stem in dict.fromkeys((tag, tag.split(".")[0])) for suffix in SUFFIXES]


def download_path(card: BackboneCard) -> Path:
    """Where a file published over https is stored. The name contains a hash of its address, so that a new address gets a new file."""
    address = text_digest(card.weights, 8)
    return cache_dir() / "weights" / f"{card.id}-{address}{_suffix(card)}"


def find_in_hub_cache(card: BackboneCard) -> Iterator[tuple[Path, str, bool]]:
    """Files in the hub's cache, with their sources: the published one (True), then the card's alternatives (False); no network."""
    sources = [(HubFile.of(card.weights, card.file), card.revision, True)] if card.weights.startswith("hf-hub:") else []
    sources += [(HubFile.of(text), "", False) for text in card.alternatives]
    for wanted, revision, published in sources:
        for name in wanted.names:
            if path := find_cached(wanted.repo, name, revision or None):
                yield path, f"hf-hub:{wanted.repo}/{name}", published


def package_name(card: BackboneCard) -> str:
    """The Python package that holds the card's weights, by the name that ``pip install`` takes; empty for other sources."""
    return card.weights.removeprefix("package:") if card.weights.startswith("package:") else ""


def find_in_package(card: BackboneCard) -> Path | None:
    """The card's file in its installed Python package, or None. The package is found, not imported: none of its code is run."""
    module, _, inner = card.file.partition("/")
    if not package_name(card):
        return None
    if not module.isidentifier() or not inner:
        raise CellbenchError(f"{card.path}: file = {card.file!r}. With weights = {card.weights!r}, expected 'MODULE/PATH' in that package.")
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () if (path := Path(folder) / inner).is_file()), None)


def _not_in_package(card: BackboneCard) -> str:
    module = card.file.partition("/")[0]
    if importlib.util.find_spec(module) is None:
        return f"its weights come in the Python package {package_name(card)}, which is not installed."
    return f"the installed Python package {package_name(card)} has no file {card.file}."


def _checked(card: BackboneCard, path: Path, source: str, expected: str) -> Path:
    """The resolved path of a complete file with the ``expected`` sha256; without one, ``source`` is the key of its first hash."""
    path = path.resolve()  # the hub's cache has links; the user must delete the file itself
    try:
        check_whole(path)
    except WeightsUnavailable as error:
        raise WeightsUnavailable(f"{card.id}: {error}") from error
    found = sha256(path)
    for wanted, who in ((expected, "the card"), (stated_sha256(path), "the hub")):
        if wanted and found != wanted:
            package = package_name(card)
            again = f"Run `pip install --force-reinstall {package}`" if package else "Delete it and download it again"
            raise WeightsUnavailable(
                f"{card.id}: {path} is not the published file: its sha256 is {found[:16]}…, {who} says {wanted[:16]}…. "
                f"{again}, or use it on purpose with a card of your own (--registry)."
            )
    if not expected:
        _trust_first(card, path, f"{card.id} {source}", found)
    return path


def _trust_first(card: BackboneCard, path: Path, key: str, found: str) -> None:
    """Records the hash of a file without a known one, and refuses a different file the next time."""
    known_at = cache_dir() / "weights" / "known_hashes.json"
    make_folder(known_at.parent)
    with os_errors_as(f"recording the hash of {path.name} in {known_at}"), hold_lock(known_at.with_suffix(".lock")):
        try:
            known = json.loads(known_at.read_text())
        except FileNotFoundError:
            known = {}
        except ValueError:
            raise CellbenchError(
                f"{known_at}: is damaged. It holds the hashes of first use; delete it to trust the present files."
            ) from None
        if key not in known:
            write_atomic(known_at, json.dumps({**known, key: found}, indent=1, sort_keys=True) + "\n")
        elif known[key] != found:
            raise WeightsUnavailable(
                f"{card.id}: {path} has changed since it was first used: its sha256 is {found[:16]}…, then it was {str(known[key])[:16]}…. "
                f"Put the first file back, or, if the new one is meant, delete the line '{key}' in {known_at}."
            )


def how_to_get(card: BackboneCard, folder: Path | None) -> str:
    """How a user can make these weights available, as a sentence."""
    if package := package_name(card):
        return f"Run `pip install {package}`."
    given = folder or os.environ.get("CELLBENCH_WEIGHTS") or "DIR"
    name = _published(card) or "the weights file"
    place = f"{Path(given) / (card.id + _suffix(card))}" + ("" if given != "DIR" else " and pass --weights DIR")
    hub_page = f"https://huggingface.co/{HubFile.of(card.weights).repo}" if card.weights.startswith("hf-hub:") else card.weights
    page = card.page or hub_page
    if card.weights == LOCAL:
        return f"Put {name} at {place}; how it is made from {page} stands in docs/backbones.md."
    if card.gated:
        return f"Accept the licence at {page} and log in (hf auth login), or put {name} at {place}."
    return f"With a network they are downloaded at first use; without one, put {name} (from {page}) at {place}."
