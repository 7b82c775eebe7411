"""``list`` and ``show``: what exists, in words, from the cards alone. No torch."""

from __future__ import annotations

import tomllib
from pathlib import Path

from cellbench.config.cards import KINDS, BackboneCard, Card, DatasetCard, HeadCard
from cellbench.config.registry import Registry, shipped
from cellbench.errors import CellbenchError, unknown_name

EXPERIMENTS = "experiments"


def list_components(kind: str | None, extra: Path | None) -> str:
    """The names of one kind, or of all, each with its card's first line."""
    registry = Registry(extra)
    kinds = [*KINDS, EXPERIMENTS]
    if kind is not None and kind not in kinds:
        raise unknown_name("kind", kind, kinds)
    blocks = []
    for one in kinds if kind is None else [kind]:
        lines = _experiments() if one == EXPERIMENTS else [(name, _brief(registry.card(one, name))) for name in registry.names(one)]
        width = max((len(name) for name, _ in lines), default=0)
        blocks.append("\n".join([f"{one}:", *(f"  {name.ljust(width)}  {brief}" for name, brief in lines)]))
    return "\n\n".join(blocks)


def _brief(card: Card) -> str:
    facts = []
    if isinstance(card, BackboneCard):
        facts = [f"{card.params_m:g} M parameters" if card.params_m else "", card.license, "gated" if card.gated else ""]
        facts = [fact for fact in facts if fact]
    return card.title + (f"  [{', '.join(facts)}]" if facts else "")


def _experiments() -> list[tuple[str, str]]:
    paths = sorted(shipped(EXPERIMENTS).glob("*.toml"))
    return [(path.stem, path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")) for path in paths]


def show_component(name: str, extra: Path | None) -> str:
    """A card or experiment file as it lies on disk, under its path, with what the code makes of it."""
    registry = Registry(extra)
    kind, _, rest = name.rpartition("/")
    if kind and kind not in (*KINDS, EXPERIMENTS):
        raise unknown_name("kind", kind, (*KINDS, EXPERIMENTS))
    holders = [k for k in KINDS if rest in registry.names(k) and kind in ("", k)]
    if kind in ("", EXPERIMENTS) and rest in dict(_experiments()):
        holders.append(EXPERIMENTS)
    if not holders:
        known = (
            [n for k in KINDS for n in registry.names(k)]
            if not kind
            else dict(_experiments())
            if kind == EXPERIMENTS
            else registry.names(kind)
        )
        raise unknown_name(kind.removesuffix("s") or "card", rest, known)
    if len(holders) > 1:
        raise CellbenchError(f"'{rest}' is the name of several: {', '.join(f'{k}/{rest}' for k in holders)}. Name one of them.")
    if holders[0] == EXPERIMENTS:
        path = shipped(EXPERIMENTS) / f"{rest}.toml"
        return f"{path}\n\n{path.read_text(encoding='utf-8').rstrip()}\n\n{_asks(path)}"
    card = registry.card(holders[0], rest)
    text = Path(card.path).read_text(encoding="utf-8").rstrip()
    return f"{card.path}\n\n{text}\n\n{_meaning(card)}".rstrip()


def _meaning(card: Card) -> str:
    if isinstance(card, BackboneCard):
        cost = (
            "needs no weights"
            if card.weights == "none"
            else f"weights: --weights DIR with {card.id}.safetensors, .pth or .bin, else {card.weights}"
        )
        return f"{cost}; a 224-px tile becomes {224 // card.patch_px} x {224 // card.patch_px} vectors of {card.dim}."
    if isinstance(card, HeadCard):
        return f"reads {card.levels} depth{'s' if card.levels > 1 else ''} of the backbone{' and the pixels' if card.pixels else ''}."
    if isinstance(card, DatasetCard) and card.draw:
        return "drawn when first used, needs no folder; settings go into [data.draw]."
    return ""


def _asks(path: Path) -> str:
    from cellbench.config.experiment import Experiment, cohorts, expand
    from cellbench.config.search_space import Space

    tree = tomllib.loads(path.read_text(encoding="utf-8"))
    if "space" in tree:
        space = Space.of(tree, str(path), Registry())
        return f"{space.settings.trials} trials in {len(space.dimensions)} dimensions: {', '.join(one.name for one in space.dimensions)}."
    runs = expand(Experiment.of(tree, str(path)))
    return f"{len(runs)} runs in {len(cohorts(runs))} cohorts."


def list_cache(folder: str | None, remove: bool, older_than_days: float) -> str:
    """The features kept on disk, the longest unused first; or, with ``remove``, what was removed of them."""
    import os
    import time

    from cellbench.features.cache_admin import cache_entries, features_dir, remove_entries

    if folder is not None:
        if not Path(folder).is_dir():
            raise CellbenchError(f"--cache {folder}: there is no such folder.")
        os.environ["CELLBENCH_CACHE"] = str(Path(folder).absolute())
    found = cache_entries()
    if remove:
        chosen = [entry for entry in found if time.time() - entry.used >= older_than_days * 86400]
        freed = remove_entries(chosen)
        return f"removed {len(chosen)} of {len(found)} kept passes from {features_dir()}: {freed / 2**20:,.0f} MiB free again."
    if not found:
        return f"no features are kept in {features_dir()}. `grid --cache SIZE` keeps them for later calls."
    lines = [("backbone", "dataset", "split", "tiles", "MiB", "last used")]
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        lines.append((entry.backbone, entry.dataset, entry.what, str(entry.num_tiles), f"{entry.size_bytes / 2**20:,.0f}", used))
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    total = sum(entry.size_bytes for entry in found) / 2**20
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, f"{total:,.0f} MiB in {features_dir()}"])
