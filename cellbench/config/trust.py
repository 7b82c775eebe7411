"""Python code that comes with cards of a folder: what there is, and whether it may run.

A registry that a user names is the user's own, and its code is named before it runs. An exported folder may come from anybody: its code runs if this
user exported it and it has not changed since, else only with ``--trust``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from cellbench.config.cards import KINDS, Card
from cellbench.config.registry import BUILDERS, Registry, code_digest
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, write_atomic


def cards_with_code(registry: Registry, folder: Path) -> list[Card]:
    """The cards in a folder of ``registry`` whose builder is not one of the package's. Raises CellbenchError for a damaged card."""
    cards = [registry.card(kind, path.stem) for kind in KINDS for path in sorted((folder / kind).glob("*.toml"))]
    return [card for card in cards if card.builder and card.builder not in BUILDERS and card.builder not in BUILDERS.values()]


def describe_code(registry: Registry, folder: Path | None) -> list[str]:
    """One line about the code of a folder that runs; none where it has no code."""
    if folder is None or not folder.is_dir():
        return []
    names = [f"{card.KIND}/{card.builder.partition(':')[0]}" for card in cards_with_code(registry, folder)]
    return [f"Python code of {folder} runs: {', '.join(dict.fromkeys(names))}."] if names else []


def require_trust(registry: Registry, folder: Path, trusted: bool) -> None:
    """Raises CellbenchError for code in the cards of an exported folder that may not run."""
    for card in cards_with_code(registry, folder):
        code_file(card)
        if not trusted and not _known_at(code_digest(card)).is_file():
            raise CellbenchError(
                f"{card.path}: would run Python code ({card.builder}) that was not exported by this user, or has changed since. "
                "Read it, and if you trust it, add --trust (in Python trust=True)."
            )


def remember_code(registry: Registry, folder: Path) -> None:
    """Has the code of the cards in an exported folder run without being asked about again."""
    for card in cards_with_code(registry, folder):
        with contextlib.suppress(CellbenchError):  # a cache that may not be written: --trust is asked for
            write_atomic(_known_at(code_digest(card)), card.builder)


def code_file(card: Card) -> Path | None:
    """The file of code that a card names; None for a module. Raises CellbenchError where it is not a plain file beside the card or below it."""
    module = card.builder.partition(":")[0]
    if not module.endswith(".py"):
        return None
    folder, name = Path(card.path).parent, Path(module)
    inside = not name.is_absolute() and ".." not in name.parts and "\\" not in module and ":" not in module
    if not inside or any((folder / part).is_symlink() for part in (name, *name.parents)):
        raise CellbenchError(
            f"{card.path}: builder = {card.builder!r} names code outside of the card's folder, and an exported folder must hold its code. "
            "Put the file itself beside the card, and name it without a folder."
        )
    return folder / name


def _known_at(digest: str) -> Path:
    return cache_dir() / "trusted_code" / (digest or "none")
