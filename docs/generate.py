"""Reference tables as Markdown, made from the package itself: settings, options of commands, metrics, cards, experiments, the public API.

A page asks for one with a fenced block: ``{generated} settings run``. ``python docs/generate.py settings run`` prints it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import cellbench
from cellbench.cli import main
from cellbench.config import cards, experiment, run, search_space
from cellbench.config.registry import Registry, shipped
from cellbench.metrics import catalog

RECORDS: dict[str, tuple[type[BaseModel], tuple[str, ...]]] = {
    # name: the record, and the fields that are not keys of its table
    "experiment": (experiment.Experiment, ()),
    "data": (experiment.DataSpec, ()),
    "run": (run.RunSpec, ("backbone", "head", "baseline", "options")),
    "search": (search_space.Settings, ()),
    **{kind: (record, ("id", "title", "path")) for kind, record in cards.KINDS.items()},
}

BETTER = {"maximize": "higher is better", "minimize": "lower is better", "": ""}

BLOCK = re.compile(r"^```\{generated\} *(?P<what>[^\n]*)\n(?:.*?\n)??```$", re.MULTILINE | re.DOTALL)


def fill(text: str) -> str:
    """The text of a page with every ``{generated}`` block replaced."""
    return BLOCK.sub(lambda match: generated(match["what"]), text)


def generated(what: str) -> str:
    """The Markdown of one block, like ``settings run``. Raises KeyError for an unknown one."""
    kind, *more = what.split()
    return MAKERS[kind](*more)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def _plain(text: str) -> str:
    """Docstrings are reStructuredText: roles become code, and what looks like a tag is text."""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", text).replace("``", "`")
    parts = text.split("`")  # every second one is code
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


# --- settings -----------------------------------------------------------------------------------------------------------------------------


def documented(record: type) -> dict[str, str]:
    """The text below each field of a class and of its bases, by the field's name."""
    found: dict[str, str] = {}
    for one in reversed(record.__mro__):
        if one.__module__.startswith("cellbench"):
            body = typing.cast(ast.ClassDef, ast.parse(inspect.cleandoc("\n" + inspect.getsource(one))).body[0]).body
            for field, text in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value))
    return found


def fields(name: str) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a table of a TOML file, with their fields."""
    record, hidden = RECORDS[name]
    return ((key, field) for key, field in record.model_fields.items() if key not in hidden)


def settings(name: str) -> str:
    """The keys of one table: meaning, type and default."""
    texts = documented(RECORDS[name][0])
    rows = []
    for key, field in fields(name):
        facts = "; ".join(filter(None, (kind(field), default(field))))
        rows.append((f"`{key}`", f"{_plain(texts.get(key, ''))}<br>*{facts}*"))
    return _table(("key", "meaning"), rows)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ("", (), {}) or isinstance(value, BaseModel):
        return ""
    return f"default `{_toml(value)}`"


def kind(field: FieldInfo) -> str:
    """What values a field takes, in words: ``number, above 0, at most 1``."""
    low = next((one for one in field.metadata if isinstance(one, annotated_types.Gt | annotated_types.Ge)), None)
    high = next((one for one in field.metadata if isinstance(one, annotated_types.Lt | annotated_types.Le)), None)
    words = [_type(field.annotation)]
    if isinstance(low, annotated_types.Ge) and isinstance(high, annotated_types.Le):
        return f"{words[0]}, {low.ge:,} to {high.le:,}"
    if low is not None:
        words.append(f"above {low.gt}" if isinstance(low, annotated_types.Gt) else f"at least {low.ge}")
    if high is not None and getattr(high, "lt", 0) != 2**31:  # the largest seed is no news
        words.append(f"below {high.lt}" if isinstance(high, annotated_types.Lt) else f"at most {high.le}")
    return ", ".join(words)


def _type(hint: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Any: "any value"}
    if hint in names:
        return names[hint]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f'`"{part}"`' for part in parts)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin in (tuple, list):
        inner = {str(part): part for part in parts if part is not Ellipsis}
        (first, *more) = inner.values()
        return "list" if more or first not in names else f"list of {names[first]}s"
    if origin is dict:
        return "table"
    if inspect.isclass(hint) and issubclass(hint, BaseModel):
        return "table"
    if parts:  # a union
        kinds = dict.fromkeys(_type(part) for part in parts if part is not type(None))
        return "any value" if {"text", "number", "whole number"} <= set(kinds) else " or ".join(kinds)
    return str(hint)


# --- commands -----------------------------------------------------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, as the command line uses it."""
    (action,) = (one for one in main._parser()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def commands() -> str:
    """A section for each command: what it does, how it is called, every argument and option."""
    out = []
    for name, parser in parsers().items():
        shown = [one for one in parser._actions if one.help is not argparse.SUPPRESS and one.dest != "help"]
        usage = " ".join(["cellbench", name, *(_usage(one) for one in shown if not one.option_strings or one.required), "[OPTIONS]"])
        rows = [(f"`{_flags(one)}`", _plain((one.help or "").replace("%%", "%"))) for one in shown]
        out += [
            f"## {name}",
            f"{main.COMMANDS[name].help[:1].upper()}{main.COMMANDS[name].help[1:]}. {main.COMMANDS[name].description}",
            f"```text\n{usage}\n\nfor example: cellbench {main.COMMANDS[name].example}\n```",
            _table(("argument or option", "meaning"), rows),
        ]
    return "\n\n".join(out)


def _value(one: argparse.Action) -> str:
    if one.choices is not None:
        return "{" + ",".join(map(str, one.choices)) + "}"
    return str(one.metavar or one.dest.upper())


def _flags(one: argparse.Action) -> str:
    if not one.option_strings:
        return _usage(one)
    return ", ".join(one.option_strings) + (f" {_value(one)}" if one.nargs != 0 else "")


def _usage(one: argparse.Action) -> str:
    if one.option_strings:
        return _flags(one)
    return {"?": "[{0}]", "*": "[{0} …]", "+": "{0} …"}.get(str(one.nargs), "{0}").format(_value(one))


# --- metrics ------------------------------------------------------------------------------------------------------------------------------


def metrics() -> str:
    """Every metric that a run logs, by its names in MLflow."""
    rows = []
    for one in catalog.METRICS:
        facts = ", ".join(filter(None, (one.unit and f"in {one.unit}", BETTER[one.direction])))
        rows.append(("<br>".join(f"`{name}`" for name in one.names), _plain(one.meaning) + (f"<br>*{facts}*" if facts else "")))
    return _table(("name in MLflow", "meaning"), rows)


def objectives() -> str:
    """What a search may optimise or bound."""
    return _table(("objective", "direction"), ((f"`{name}`", BETTER[direction]) for name, direction in catalog.objectives().items()))


# --- cards and experiments ----------------------------------------------------------------------------------------------------------------


def components(folder: str) -> str:
    """The shipped cards of a kind."""
    registry = Registry()
    found = [getattr(registry, cards_of(folder))(name) for name in registry.names(folder)]
    if folder == "backbones":
        rows = []
        for one in found:
            size = f"{one.params_m:g} M parameters, " if one.params_m else ""
            domain = f"{one.domain}, " if one.domain else ""
            facts = f"{domain}{size}patches of {one.patch_px} px, {one.license}" + (", gated" if one.gated else "")
            rows.append((f"`{one.id}`", f"{one.title}<br>*{facts}*"))
        return _table(("backbone", "what it is"), rows)
    rows = [(f"`{one.id}`", one.title + (f"<br>*{one.notes}*" if folder == "heads" else ""), *_options(one)) for one in found]
    return _table((cards_of(folder), "what it is", "options and defaults")[: len(rows[0])], rows)


def _options(card: cards.Card) -> tuple[str, ...]:
    """The cell of a card's options; none for a kind of card without options."""
    if not isinstance(card, cards.HeadCard | cards.BaselineCard):
        return ()
    return (", ".join(f"`{name} = {_toml(value)}`" for name, value in card.options.items()),)


def cards_of(folder: str) -> str:
    """The registry's method for a kind of card."""
    return {"losses": "loss"}.get(folder, folder.rstrip("s"))


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def experiments() -> str:
    """The shipped experiment files and the question that each asks."""
    rows = []
    for path in sorted(shipped("experiments").glob("*.toml")):
        rows.append((f"`{path.stem}`", path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")))
    return _table(("name", "question"), rows)


# --- the public API -----------------------------------------------------------------------------------------------------------------------


def api() -> str:
    """Every public name of ``cellbench``, documented by its docstring; the fields of a card are on the page of settings."""
    out = []
    for name in cellbench.__all__:
        thing = getattr(cellbench, name)
        card = next((kind for kind, record in cards.KINDS.items() if record is thing), "")
        members = "   :members:\n" if inspect.isclass(thing) and not card else ""
        what = "class" if inspect.isclass(thing) else "function"
        place = "cellbench.api.searches.search" if inspect.ismodule(thing) else f"cellbench.{name}"  # a package that is called
        out.append(f"## {name}\n\n```{{eval-rst}}\n.. auto{what}:: {place}\n{members}```\n")
        if card:
            out.append(
                f"Its fields are the [keys of such a card](settings.md#{card.removesuffix('s')}-cards{'-and-datasettoml' * (card == 'datasets')}).\n"
            )
    return "\n".join(out)


MAKERS: dict[str, Callable[..., str]] = {
    one.__name__: one for one in (settings, commands, metrics, objectives, components, experiments, api)
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(generated(" ".join(sys.argv[1:])))
