"""``list``, ``show`` and ``cache``: cards, experiments and cached features. Does not import torch."""

from __future__ import annotations

import time
from pathlib import Path

from cellbench import startup
from cellbench.config.cards import KINDS, BackboneCard, Card, DatasetCard, HeadCard
from cellbench.config.experiment import Experiment, cohorts, expand
from cellbench.config.options import CacheOptions, ListOptions, ShowOptions
from cellbench.config.registry import Registry, shipped
from cellbench.config.search_space import Space
from cellbench.console import Column, format_table, number_columns, say
from cellbench.errors import CellbenchError, quantity, unknown_name
from cellbench.files import parse_toml, read_text
from cellbench.metrics.catalog import search_objectives
from cellbench.models.backbones.weights import package_name

EXPERIMENTS = "experiments"


def list_components(options: ListOptions) -> int:
    """Prints the names of one kind or of all kinds, each with the title of its card."""
    registry = Registry(options.registry)
    kinds = [*KINDS, EXPERIMENTS]
    if options.kind is not None and options.kind not in kinds:
        raise unknown_name("kind", options.kind, kinds)
    blocks, columns = [], [Column("name"), Column("what it is", folded=True)]
    for kind in kinds if options.kind is None else [options.kind]:
        lines = _experiments() if kind == EXPERIMENTS else {name: _brief(registry.card(kind, name)) for name in registry.names(kind)}
        heading = f"{kind}:" if lines else f"{kind}: none; --registry DIR adds your own"
        rows = [(f"  {name}", brief) for name, brief in lines.items()]
        blocks.append("\n".join([heading, *format_table(columns, rows, headings=False)]))
    say("\n\n".join(blocks))
    return 0


def _brief(card: Card) -> str:
    if not isinstance(card, BackboneCard):
        return card.title
    facts = [f"{card.params_m:g} M parameters" if card.params_m else "", card.license, "gated" if card.gated else ""]
    return card.title + (f"  [{', '.join(filter(None, facts))}]" if any(facts) else "")


def _experiments() -> dict[str, str]:
    """The first lines of the shipped experiment files, by name."""
    paths = sorted(shipped(EXPERIMENTS).glob("*.toml"))
    return {path.stem: read_text(path).split("\n", 1)[0].lstrip("# ") for path in paths}


def show_component(options: ShowOptions) -> int:
    """Prints the path and content of a card or experiment file, and a short explanation."""
    registry = Registry(options.registry)
    kind, _, name = options.name.rpartition("/")
    names = {**{one: registry.names(one) for one in KINDS}, EXPERIMENTS: list(_experiments())}
    if kind and kind not in names:
        raise unknown_name("kind", kind, names)
    holders = [one for one, known in names.items() if name in known and kind in ("", one)]
    if not holders:
        known = names[kind] if kind else [one for kind in KINDS for one in names[kind]]
        raise unknown_name(kind.removesuffix("s") or "card", name, known, all_with=f"cellbench list {kind}".rstrip())
    if len(holders) > 1:
        raise CellbenchError(f"'{name}' is the name of several: {', '.join(f'{one}/{name}' for one in holders)}. Name one of them.")
    if holders[0] == EXPERIMENTS:
        path = shipped(EXPERIMENTS) / f"{name}.toml"
        meaning = _size(path)
    else:
        card = registry.card(holders[0], name)
        path, meaning = Path(card.path), _meaning(card)
    say(f"{path}\n\n{read_text(path).rstrip()}\n\n{meaning}".rstrip())
    return 0


def _meaning(card: Card) -> str:
    if isinstance(card, BackboneCard):
        source = f"the Python package {name}" if (name := package_name(card)) else card.weights
        weights = f"weights: --weights DIR with {card.id}.safetensors, .pth or .bin, else {source}"
        side = 224 // card.patch_px
        return f"{'needs no weights' if card.weights == 'none' else weights}; a 224-px tile becomes {side} x {side} vectors of {card.dim}."
    if isinstance(card, HeadCard):
        return f"reads {quantity(card.levels, 'depth')} of the backbone{' and the pixels' if card.pixels else ''}."
    if isinstance(card, DatasetCard) and card.draw:
        return "drawn when first used, needs no folder; settings go into [data.draw]."
    return ""


def _size(path: Path) -> str:
    """The number of runs or trials in an experiment file."""
    tree = parse_toml(read_text(path))
    if "space" in tree:
        space = Space.of(tree, str(path), Registry(), search_objectives(Registry()))
        return f"{space.settings.trials} trials in {len(space.dimensions)} dimensions: {', '.join(one.name for one in space.dimensions)}."
    runs = expand(Experiment.of(tree, str(path)))
    return f"{len(runs)} runs in {len(cohorts(runs))} cohorts."


def cache(options: CacheOptions) -> int:
    """Lists the cached features, least recently used first; with ``--prune`` removes them."""
    from cellbench.features.cache_admin import cache_entries, features_dir, remove_entries  # imports torch

    if options.cache is not None and not options.cache.is_dir():
        raise CellbenchError(f"--cache {options.cache}: there is no such folder.")
    startup.set_cache(options.cache)
    found = cache_entries()
    if options.prune:
        chosen = [entry for entry in found if time.time() - entry.used >= options.older_than * 86400]
        freed = remove_entries(chosen)
        say(f"removed {len(chosen)} of {len(found)} cached passes from {features_dir()}: {freed / 2**20:,.0f} MiB freed.")
        return 0
    if not found:
        say(f"no features are cached in {features_dir()}. `grid --cache SIZE` keeps them for later calls.")
        return 0
    columns = [Column("backbone"), Column("dataset", cut=True), Column("split"), *number_columns("tiles", "MiB"), Column("last used")]
    rows = []
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        rows.append((entry.backbone, entry.dataset, entry.what, f"{entry.num_tiles:,}", f"{entry.size_bytes / 2**20:,.0f}", used))
    say("\n".join(format_table(columns, rows)))
    say(f"{sum(entry.size_bytes for entry in found) / 2**20:,.0f} MiB in {features_dir()}")
    return 0
