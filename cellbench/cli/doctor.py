"""``doctor``: lists which backbones are available on this machine, tests whether a backbone matches its card, and times heads.

The table uses no network: it reads the weights folder, earlier downloads and the hub's cache. The self-test loads and runs a backbone. Neither
downloads anything. Only the self-test, the heads' costs and the contracts import torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cellbench import startup
from cellbench.config.cards import BackboneCard, Card, HeadCard
from cellbench.config.options import DoctorOptions
from cellbench.config.registry import Registry
from cellbench.console import WIDE, Column, format_table, number_columns, say, shortened
from cellbench.errors import CellbenchError, WeightsUnavailable, one_line, unknown_name
from cellbench.file_cache import FileFactCache, sha256
from cellbench.files import compute_sha256
from cellbench.models.backbones.weight_files import check_whole
from cellbench.models.backbones.weights import (
    LOCAL,
    download_path,
    find_in_hub_cache,
    find_in_package,
    folder_file,
    how_to_get,
    locate,
    package_name,
    weights_folder,
)

if TYPE_CHECKING:
    from cellbench.hardware import Hardware

HASHED_BYTES = 128 * 2**20
"""Files up to this size are hashed for the table without --deep: half a second each on a slow disk, once."""


def doctor(options: DoctorOptions) -> int:
    """Prints the table, the self-test of named backbones, the cost of named heads, the contracts, or the services. Returns exit code 0, or 1 if a check failed.

    Raises CellbenchError for an unknown name, and WeightsUnavailable, with the remedy, for missing weights.
    """
    if options.services:
        from cellbench.cli.services import services

        return services()
    startup.set_cache(options.cache)
    registry = Registry(options.registry)
    if options.contracts:
        return _contracts(_parts(registry, options.names, options.registry))
    if not options.names:
        return _table(registry, weights_folder(options.weights), options.deep, options.wide)
    known = {kind: registry.names(kind) for kind in ("backbones", "heads")}
    for name in options.names:
        if not any(name in names for names in known.values()):
            raise unknown_name("backbone or head", name, known["backbones"] + known["heads"], all_with="cellbench list")
    heads = [registry.head(name) for name in options.names if name in known["heads"]]
    backbones = [registry.backbone(name) for name in options.names if name in known["backbones"]]
    if heads:
        _head_costs(heads, options.device)
    return _self_tests(backbones, options.weights, options.device) if backbones else 0


# --- the table ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table. ``problem``: an error in the file or the card, with the remedy."""

    name: str
    here: str
    mib: str = ""
    hash: str = ""
    license: str = ""
    where: str = ""
    problem: str = ""


# In the order of the table: available backbones come first. The texts below the table explain the states.
HERE = {
    "needs nothing": "",
    "in the folder": "",
    "in a package": "",
    "downloaded": "",
    "in the hub cache": "",
    "would download": "at its first use, from the page named; nothing is downloaded for this table.",
    "to be made": "no readable file is published; docs/backbones.md says how to make it.",
    "not installed": "its weights come in a Python package, installed by the command named.",
    "gated": "accept the licence at the page named and log in (hf auth login), or put the file into a --weights folder.",
    "broken": "see below.",
}
HASH = {
    "recorded": "the card has no sha256; that of the file was recorded at its first use, and another file will be refused.",
    "not read": "a large file: compared at its first use, or now with --deep.",
    "unknown": "the card has no sha256; that of the first file will be recorded.",
}


def row(card: BackboneCard, folder: Path | None, deep: bool = False) -> Row:
    """The row of a card, without network access. The hash of a large file is compared only if already computed, or with ``deep``."""
    license = card.license.split(" (")[0] + (" ?" if "(" in card.license else "")
    mib = card.file_mib or card.params_m * 4e6 / 2**20
    size = f"~{mib:,.0f}" if mib else ""
    if card.weights == "none":
        return Row(name=card.id, here="needs nothing", license=license)
    found = _file(card, folder)
    if found is None:
        try:
            locate(card, folder, download=False)
        except WeightsUnavailable:
            hash = "on the card" if card.sha256 else "unknown"
            if package_name(card):
                where = how_to_get(card, folder).removeprefix("Run `").removesuffix("`.")
                return Row(name=card.id, here="not installed", mib=size, hash=hash, license=license, where=where)
            page = (card.page or card.weights).removeprefix("https://").replace("huggingface.co/", "hf.co/", 1)
            here = "gated" if card.gated else "to be made" if card.weights == LOCAL else "would download"
            return Row(name=card.id, here=here, mib=size, hash=hash, license=license, where=page)
        except CellbenchError as error:
            return Row(name=card.id, here="broken", license=license, problem=one_line(error))
    assert found is not None, "else locate would have raised"
    here, path = found
    line = partial(Row, name=card.id, mib=f"{path.stat().st_size / 2**20:,.0f}", license=license, where=_short(path))
    try:
        check_whole(path)
    except WeightsUnavailable as error:
        return line(here="broken", hash="", problem=f"{card.id}: {one_line(error)}")
    path = path.resolve()  # hashes are stored by the real path; in the hub's cache the name is a link
    with FileFactCache("hashes", compute_sha256) as hashes:
        if not deep and path.stat().st_size > HASHED_BYTES and not hashes.knows(path):
            return line(here=here, hash="not read")
    try:
        locate(card, folder, download=False)
    except CellbenchError as error:
        return line(here="broken", hash="WRONG", problem=one_line(error))
    return line(here=here, hash="as on card" if card.sha256 and sha256(path) == card.sha256 else "recorded")


def _file(card: BackboneCard, folder: Path | None) -> tuple[str, Path] | None:
    """The place and path at which ``locate`` would find the card's file on this machine, unchecked."""
    if own := folder_file(card, folder):
        return "in the folder", own
    if packed := find_in_package(card):
        return "in a package", packed
    if card.weights.startswith("http") and download_path(card).is_file():
        return "downloaded", download_path(card)
    return next((("in the hub cache", path) for path, _, _ in find_in_hub_cache(card)), None)


def _short(path: Path) -> str:
    home = f"{Path.home()}/"
    return "~/" + str(path).removeprefix(home) if str(path).startswith(home) and home != "//" else str(path)


def _table(registry: Registry, folder: Path | None, deep: bool, wide: bool) -> int:
    rows = []
    for name in registry.names("backbones"):
        try:
            rows.append(row(registry.backbone(name), folder, deep))
        except CellbenchError as error:  # an unreadable card gets a row of the table
            rows.append(Row(name=name, here="broken", problem=one_line(error)))
    order = list(HERE)
    rows.sort(key=lambda it: (order.index(it.here), it.name))
    lines = _lines(rows, wide)
    say("\n".join(lines))
    counts = [f"{here} {num}" for here in order if (num := sum(it.here == here for it in rows))]
    say(f"\n{len(rows)} backbones: {', '.join(counts)}.")
    hashes = {it.hash for it in rows} if "hash" in lines[0] else set()
    for words, used in ((HERE, {it.here for it in rows}), (HASH, hashes)):
        for word, meaning in words.items():
            if word in used and meaning:
                say(f"{word}: {meaning}")
    if any(it.here == "gated" for it in rows):
        from huggingface_hub import get_token

        say(f"hub: {'logged in' if get_token() else 'not logged in'} on this machine.")
    if os.environ.get("HF_HUB_OFFLINE"):
        say("hub: HF_HUB_OFFLINE is set, so nothing is downloaded from it.")
    if "licence" not in lines[0]:
        say("--wide also shows licences and hashes.")
    if any(it.license.endswith("?") for it in rows) and "licence" in lines[0]:
        say("?: the licence is unclear; the card says why: `show backbones/NAME`.")
    problems = [it.problem for it in rows if it.problem]
    for problem in problems:
        say(f"\n{problem}")
    return 1 if problems else 0


def _lines(rows: list[Row], wide: bool) -> list[str]:
    """The table, with an empty line between states. Of the last column only what need not be typed or opened is shortened."""
    columns = [
        Column("backbone"),
        Column("here and now"),
        Column("MiB", right=True),
        Column("licence", optional=1),
        Column("hash", optional=2),
        Column("file, or page to get it from", folded=True),
    ]
    cells: list[list[str]] = []
    for it, before in zip(rows, [None, *rows], strict=False):
        if before is not None and it.here != before.here:
            cells.append([""] * len(columns))
        where = it.where if wide or it.here in ("gated", "not installed") else shortened(it.where, 36, 23)
        cells.append([it.name, it.here, it.mib, shortened(it.license, 20), it.hash, where])
    return format_table(columns, cells, room=WIDE if wide else None)


# --- the self-test ------------------------------------------------------------------------------------------------------------------


def _self_tests(cards: list[BackboneCard], weights: Path | None, device: str) -> int:
    from cellbench.hardware import detect_hardware

    startup.configure_threads(device)
    here = detect_hardware(device)
    errors: list[CellbenchError] = []
    wrong = 0
    for card in cards:
        try:
            wrong += _self_test(card, weights, here)
        except CellbenchError as error:
            errors.append(error)
            if len(cards) > 1:
                say(f"{card.id}: cannot be tested. {one_line(error).removeprefix(f'{card.id}: ')}\n")
    if errors:
        raise (
            errors[0]
            if len(cards) == 1
            else CellbenchError(f"{len(errors)} of {len(cards)} backbones cannot be tested; the reasons are above.")
        )
    return 1 if wrong else 0


def _self_test(card: BackboneCard, weights: Path | None, here: Hardware) -> int:
    """Prints the report of one backbone; returns the number of failed checks."""
    from cellbench.diagnostics import probe

    path = None if card.weights == "none" else locate(card, weights, download=False)
    report = probe.probe_backbone(card, weights, here)
    say(f"{card.id} on {here.name}")
    if path is not None:
        stated = "the one on the card" if card.sha256 and sha256(path) == card.sha256 else "recorded, the card states none"
        say(f"  weights     {path}, {path.stat().st_size / 2**20:,.0f} MiB; its sha256 is {stated}")
    for check in report.checks:
        say(f"  {check.name:<11} {check.finding}{'' if check.holds is None else '; ok' if check.holds else '; WRONG'}")
    say(f"  speed       {report.tiles_per_s:,.1f} tiles/s of {report.tile_px} px in batches of {report.batch}, last level only")
    say(f"  memory      {report.peak_mib:,.0f} MiB more than before, at the peak of loading and running")
    say(f"  loading     {report.load_s:.2f} s\n")
    return sum(check.holds is False for check in report.checks)


# --- the cost of heads --------------------------------------------------------------------------------------------------------------


def _head_costs(cards: list[HeadCard], device: str) -> None:
    """Prints a table of the heads, the cheapest first."""
    from cellbench.diagnostics import head_cost
    from cellbench.hardware import detect_hardware

    startup.configure_threads(device)
    here = detect_hardware(device)
    found = sorted(((card.id, head_cost.head_cost(card, here)) for card in cards), key=lambda one: one[1].train_ms)
    columns = [Column("head"), *number_columns("parameters", "training, ms a tile", "scoring, ms a tile")]
    rows = [(name, f"{cost.params / 1e6:.2f} M", f"{cost.train_ms:.2f}", f"{cost.score_ms:.2f}") for name, cost in found]
    say("\n".join(format_table(columns, rows)))
    kind = "processor" if here.device.type == "cpu" else "wall"
    say(
        f"on {here.name}: {kind} time of the head alone, for tiles of {head_cost.TILE_PX} px with the maps of a ViT-Ti/{head_cost.STRIDE_PX}, "
        f"{head_cost.NUM_CLASSES} classes, in batches of {head_cost.BATCH}\n"
    )


# --- the contracts ------------------------------------------------------------------------------------------------------------------


CHECKED = ("backbones", "heads", "losses", "augmentations", "metrics")


def _parts(registry: Registry, names: Sequence[str], extra: Path | None) -> list[Card]:
    """The cards with these names; by default those of the user's folder, or all if there is none."""
    known = [(kind, name) for kind in CHECKED for name in registry.names(kind)]
    for name in names:
        if name not in {each for _, each in known}:
            raise unknown_name("component", name, {each for _, each in known}, all_with="cellbench list")
    cards = [registry.card(kind, name) for kind, name in known if not names or name in names]
    if names or extra is None:
        return cards
    own = [card for card in cards if Path(card.path).is_relative_to(extra)]
    if not own:
        raise CellbenchError(
            f"--registry {extra}: holds nothing to check. Put cards into {', '.join(f'{kind}/' for kind in CHECKED)} there."
        )
    return own


def _contracts(cards: list[Card]) -> int:
    from cellbench.diagnostics.plugin_checks import verdicts

    start, num, broken = time.monotonic(), 0, 0
    for card in cards:
        for verdict in verdicts(card):
            reason = f": {verdict.reason}" if verdict.reason else ""
            say(f"{'FAIL' if verdict.reason else 'ok  '}  {verdict.card}  {verdict.contract}{reason}")
            num, broken = num + 1, broken + bool(verdict.reason)
    say(f"\n{len(cards)} cards, {num} contracts, {broken or 'none'} broken, {time.monotonic() - start:.0f} s")
    return 1 if broken else 0
