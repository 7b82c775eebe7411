"""Experiment and search files: found by path or name, changed by --set, checked."""

from __future__ import annotations

import itertools
import os
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from cellbench.config.base import checked
from cellbench.config.experiment import GRID_KEYS, DataSpec, Experiment, expand
from cellbench.config.registry import Registry, shipped
from cellbench.config.run import RUN_KEYS
from cellbench.config.search_space import Settings, Space
from cellbench.errors import CellbenchError, nearest, unknown_name
from cellbench.escaping import readable
from cellbench.files import parse_toml, read_text

CHANGED = "# Changed by the call: "
DATA_NAME = "{data}"
"""In the name of an experiment: the name of the folder that ``--data`` names."""


def experiment_path(name: str) -> Path:
    """The file of that path, or the shipped one of that name. Raises CellbenchError."""
    path = Path(name)
    if os.path.isfile(name):  # False also for what cannot be a file's name
        return path
    inside = shipped("experiments") / f"{path.name.removesuffix('.toml')}.toml"
    if not os.path.isfile(inside) or path.parent != Path("."):
        raise unknown_name("experiment file", name, [p.stem for p in shipped("experiments").glob("*.toml")])
    return inside


def read_experiment(
    name: str | Mapping[str, Any],
    changes: Sequence[str] = (),
    data: Path | None = None,
    limit: int | None = None,
    registry: Registry | None = None,
) -> tuple[Experiment, str]:
    """The experiment of a file, or of a shipped file's name, with ``--set`` changes; and a file of the same that needs no options.

    Instead of a name, a mapping with the keys of such a file. ``--data`` replaces a synthetic dataset by the user's folder. Raises CellbenchError.
    """
    request = read_tree(name, changes, limit)
    path, tree = request.path, request.tree
    if "space" in tree:
        raise CellbenchError(f"{path}: is a search. `cellbench search {shlex.quote(str(name))}` runs it.")
    experiment = Experiment.of(tree, str(path))
    registry = registry or Registry()
    card = registry.dataset(experiment.dataset)
    # Checked before any image is drawn or read. Tables of heads and baselines that do not run are unused, but must name existing ones.
    for name in experiment.head:
        registry.head(name)
    for name in experiment.baseline:
        registry.baseline(name)
    for run in expand(experiment, str(path)):
        registry.complete(run)
    if data is not None and (card.draw or DATA_NAME in experiment.experiment):
        request = request.on(data, instead=bool(card.draw))
        experiment = Experiment.of(request.tree, str(path))
    return experiment, request.resolved


def changed_experiment(text: str, changes: Sequence[str], where: str) -> tuple[Experiment, str]:
    """The experiment of ``text``, as :func:`read_experiment` returns it, with more changes. Raises CellbenchError."""
    tree = parse_toml(text)
    for change in changes:
        _change(tree, change)
    request = GridRequest(path=Path(where), text=text, tree=tree, changes=tuple(f"--set {shlex.quote(change)}" for change in changes))
    return Experiment.of(tree, where), request.resolved


@dataclass(frozen=True, kw_only=True)
class GridRequest:
    """A file, or a mapping with its keys, and the changes of a call. The file is read once at the start, so later edits have no effect."""

    path: Path
    """For messages."""
    text: str
    """The file as it was read."""
    tree: dict[str, Any]
    """Its settings with the changes."""
    changes: tuple[str, ...] = ()
    """As options of the command line."""

    def on(self, data: Path, instead: bool = True) -> GridRequest:
        """The same experiment on the user's folder, named after it; ``instead``: of synthetic data."""
        name = self.tree["experiment"] if DATA_NAME in self.tree["experiment"] else f"{self.tree['experiment']} on {DATA_NAME}"
        tree = {**self.tree, "experiment": name.replace(DATA_NAME, readable(data.absolute().name))[:200]}
        if instead:
            tree["dataset"] = "folder"
            if "data" in tree:
                tree["data"] = {name: value for name, value in tree["data"].items() if name != "draw"}
        return replace(self, tree=tree, changes=(*self.changes, f"--data {readable(str(data))}"))

    @property
    def resolved(self) -> str:
        """A file that needs no options: the text itself, or its first comments, the changes, and the resulting settings."""
        if not self.changes:
            return self.text
        lines = self.text.lstrip().splitlines()
        head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
        return "\n".join([*head, f"{CHANGED}{' '.join(' '.join(self.changes).split())}\n", tomli_w.dumps(self.tree)])


def read_tree(name: str | Mapping[str, Any], changes: Sequence[str] = (), limit: int | None = None) -> GridRequest:
    """The file of an experiment or search, or a mapping with its keys, with ``--set`` changes. Raises CellbenchError."""
    path = experiment_path(name) if isinstance(name, str) else Path("the experiment")
    try:
        text = read_text(path) if isinstance(name, str) else tomli_w.dumps(name)
        tree = parse_toml(text)
    except (OSError, UnicodeDecodeError, TypeError, tomllib.TOMLDecodeError) as error:
        raise CellbenchError(f"{path}: cannot be read as an experiment: {error}.") from None
    for change in changes:
        _change(tree, change)
    if limit is not None:
        _change(tree, f"data.limit={limit}")
    given = [*(f"--set {shlex.quote(change)}" for change in changes), *([f"--limit {limit}"] if limit is not None else [])]
    return GridRequest(path=path, text=text, tree=tree, changes=tuple(given))


def _change(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise CellbenchError(f"--set {change}: expected KEY=VALUE, like run.epochs=3.")
    _check_key(parts, tree, change)
    try:
        value = parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # the shell removed the quotes of a string
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise CellbenchError(f"--set {change}: '{part}' is not a table.")
    tree[parts[-1]] = value


KEYS: dict[str, Sequence[str]] = {
    "run": RUN_KEYS,
    "data": tuple(DataSpec.model_fields),
    "search": tuple(Settings.model_fields),
    "grid": GRID_KEYS,
}
"""The settings of each table that has a fixed set of them."""
OPEN_TABLES = ("head", "baseline", "space")
"""Tables whose keys depend on cards. Their records check them."""


def _check_key(parts: Sequence[str], tree: Mapping[str, Any], change: str) -> None:
    """Raises CellbenchError for a key that no table has, with the nearest ones."""
    table, key = parts[0], ".".join(parts)
    if table in OPEN_TABLES or (len(parts) == 1 and (key in Experiment.model_fields or key in KEYS)):
        return
    if len(parts) > 1 and parts[1] in KEYS.get(table, ()):
        return
    near = nearest_settings(key, tree)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise CellbenchError(
        f"--set {change}: no setting called '{key}'.{hint} A setting is named with its table, like run.epochs or data.folds."
    )


def nearest_settings(key: str, tree: Mapping[str, Any] | None = None) -> list[str]:
    """The full keys that ``key`` may mean, where it lacks its table or is misspelt. Those that the ``tree`` of a file holds come first.

    >>> nearest_settings("epochs"), nearest_settings("rnu.epohcs"), nearest_settings("fold", {"grid": {"fold": [0]}})
    (['run.epochs'], ['run.epochs'], ['grid.fold'])
    """
    table, _, name = key.rpartition(".")
    held = {f"{each}.{one}" for each, values in (tree or {}).items() if isinstance(values, Mapping) for one in values}
    known = [f"{each}.{one}" for each, names in KEYS.items() for one in names]
    found = [one for one in known if one.split(".")[1] == name]
    if not found:
        names = list(dict.fromkeys(one.split(".")[1] for one in known))
        near = nearest(name, [*KEYS.get(table, ())] or names) or nearest(name, names)
        found = [one for one in known if one.split(".")[1] in near]
    exact = [one for one in found if one.split(".")[0] in nearest(table, KEYS)] if table else []
    first = exact or [one for one in found if one in held] or found
    return list({one.split(".")[1]: one for one in reversed(first)}.values())[::-1]


def data_spec(changes: Sequence[str]) -> DataSpec:
    """The settings of ``[data]`` by ``--set data.KEY=VALUE`` alone. Raises CellbenchError."""
    tree: dict[str, Any] = {}
    for change in changes:
        _change(tree, change)
    for key in tree:
        if key != "data":
            raise unknown_name("table", key, ["data"], where="--set")
    return checked(DataSpec, tree.get("data", {}), "[data]")


def read_space(
    file: str, changes: Sequence[str], data: Path | None, limit: int | None, registry: Registry, objectives: Mapping[str, str]
) -> tuple[Space, str]:
    """The search space of a file, or of a shipped file's name, as :func:`read_experiment`. Raises CellbenchError."""
    request = read_tree(file, changes, limit)
    path, tree = request.path, request.tree
    if "space" not in tree:
        raise CellbenchError(f"{path}: has no [space] to search. `cellbench grid {shlex.quote(str(file))}` runs it as it is.")
    space = Space.of(tree, str(path), registry, objectives)
    drawn = bool(registry.dataset(space.dataset).draw)
    if data is not None and (drawn or DATA_NAME in space.experiment):
        request = request.on(data, instead=drawn)
        space = Space.of(request.tree, str(path), registry, objectives)
    return space, request.resolved
