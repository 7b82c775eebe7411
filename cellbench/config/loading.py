"""Experiment files: found by path or name, changed by --set, read and checked."""

from __future__ import annotations

import itertools
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from cellbench.config.base import checked
from cellbench.config.experiment import DataSpec, Experiment, expand
from cellbench.config.registry import Registry, shipped
from cellbench.config.search_space import Space
from cellbench.errors import CellbenchError, unknown_name

CHANGED = "# Changed by the call: "


def experiment_path(name: str) -> Path:
    """The file of that path, or the shipped one of that name. Raises CellbenchError."""
    path = Path(name)
    if path.is_file():
        return path
    inside = shipped("experiments") / f"{path.name.removesuffix('.toml')}.toml"
    if not inside.is_file() or path.parent != Path("."):
        raise unknown_name("experiment file", name, [p.stem for p in shipped("experiments").glob("*.toml")])
    return inside


def read_experiment(
    name: str, changes: Sequence[str] = (), data: Path | None = None, limit: int | None = None, registry: Registry | None = None
) -> Experiment:
    """The experiment of a file, or of a shipped file's name, with ``--set`` changes. Raises CellbenchError.

    A drawn dataset gives way to ``--data``: the same questions are then asked of the person's own folder.
    """
    return read_request(name, changes, data, limit, registry)[0]


def read_request(
    name: str, changes: Sequence[str] = (), data: Path | None = None, limit: int | None = None, registry: Registry | None = None
) -> tuple[Experiment, str]:
    """As :func:`read_experiment`, and the experiment as a file that asks the same without any change of the call. The file is read once."""
    asked = read_tree(name, changes, limit)
    path, tree = asked.path, asked.tree
    if "space" in tree:
        raise CellbenchError(f"{path}: asks for a search. `cellbench search {shlex.quote(str(name))}` runs it.")
    experiment = Experiment.of(tree, str(path))
    registry = registry or Registry()
    card = registry.dataset(experiment.dataset)
    # Names and options now, before any image is drawn or read. Tables of parts that do not run are not used, but must name something.
    for name in experiment.head:
        registry.head(name)
    for name in experiment.baseline:
        registry.baseline(name)
    for run in expand(experiment, str(path)):
        registry.complete(run)
    if data is not None and card.draw:
        asked = asked.on(data)
        experiment = Experiment.of(asked.tree, str(path))
    return experiment, asked.resolved


@dataclass(frozen=True, kw_only=True)
class GridRequest:
    """What a call asks, read once when it starts: a file that is edited or deleted later changes nothing."""

    path: Path
    text: str
    """The file as it was read."""
    tree: dict[str, Any]
    """Its settings with the changes of the call."""
    changes: tuple[str, ...] = ()
    """Those changes, as they were given."""

    def on(self, data: Path) -> GridRequest:
        """The same question on a folder of one's own in place of drawn data."""
        settings = {name: value for name, value in self.tree.get("data", {}).items() if name != "draw"}
        tree = {**self.tree, "dataset": "folder", "experiment": f"{self.tree['experiment']} on {data.absolute().name}"}
        if "data" in tree:
            tree["data"] = settings
        return replace(self, tree=tree, changes=(*self.changes, f"--data {data}"))

    @property
    def resolved(self) -> str:
        """A file that asks the same without any change: the text itself, or its first comments, the changes, and the settings as they ran."""
        if not self.changes:
            return self.text
        lines = self.text.lstrip().splitlines()
        head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
        return "\n".join([*head, f"{CHANGED}{' '.join(' '.join(self.changes).split())}\n", tomli_w.dumps(self.tree)])


def read_tree(name: str, changes: Sequence[str] = (), limit: int | None = None) -> GridRequest:
    """What an experiment's or search's file asks, with ``--set`` changes. Raises CellbenchError."""
    path = experiment_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # the shell ate the quotes of a string
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise CellbenchError(f"--set {change}: '{part}' is not a table.")
    tree[parts[-1]] = value


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
    """The space of a file, or of a shipped file's name, and a file that asks the same without any change. Raises CellbenchError."""
    asked = read_tree(file, changes, limit)
    path, tree = asked.path, asked.tree
    if "space" not in tree:
        raise CellbenchError(f"{path}: has no [space] in which to search. `cellbench grid {shlex.quote(str(file))}` runs it as it is.")
    space = Space.of(tree, str(path), registry, objectives)
    if data is not None and registry.dataset(space.dataset).draw:
        asked = asked.on(data)
        space = Space.of(asked.tree, str(path), registry, objectives)
    return space, asked.resolved
