"""The command line: ``python -m cellbench.run COMMAND``, also installed as ``cellbench``.

A command is an entry of :data:`COMMANDS`: its options (:mod:`cellbench.config.options`), from which its parser is derived, and the function that takes
them. The function is imported when it is called, so ``--help`` and ``list`` are fast. Exit code 0, or 2 with a one-line error that says what is wrong
and what to do.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import types
import typing
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NoReturn

from cellbench import startup
from cellbench.config import options
from cellbench.errors import CellbenchError
from cellbench.escaping import to_printable


@dataclass(frozen=True)
class Command:
    options: type[Any]
    function: str
    """``module:name`` below ``cellbench.cli``; takes the options, returns the exit code."""
    help: str
    description: str = ""


COMMANDS = {
    "grid": Command(
        options.GridOptions,
        "grid:grid",
        "train, test and compare every run of an experiment",
        "Runs every combination of an experiment's lists. Finished runs are not repeated; interrupted ones are resumed.",
    ),
    "search": Command(
        options.SearchOptions,
        "search:search",
        "find the best setting within a search space",
        "Trains trials in batches that share passes of a backbone; the best one alone is tested at the end. The same command resumes a search.",
    ),
    "predict": Command(
        options.PredictOptions,
        "predict:predict",
        "segment images with a trained run: `best`, a run's name or id, or an exported folder",
        "The same command resumes where it stopped. Files that cannot be read are skipped and named, and the exit code is then 1.",
    ),
    "evaluate": Command(
        options.EvaluateOptions,
        "evaluate:evaluate",
        "evaluate a trained run on any labelled folder",
        "Logged in MLflow as a child of the evaluated run; reports do not change.",
    ),
    "export": Command(
        options.ExportOptions,
        "export:export",
        "export a run as a portable folder, as ONNX, or as a model for MLflow serving",
        "The folder holds safetensors, cards and settings. `predict DIR IMAGE` and Segmenter.load(DIR) use it without MLflow.",
    ),
    "report": Command(
        options.ReportOptions,
        "report:report",
        "report the results of an experiment: one HTML file, and tables as Markdown, CSV and LaTeX",
        "Reads finished runs from MLflow; trains nothing. Several experiments make one report; different test images are never paired.",
    ),
    "explore": Command(
        options.ExploreOptions,
        "explore:explore",
        "plot samples and statistics of a dataset, or feature maps of backbones",
        "Reads images and masks; writes nothing to their folder. `check` says whether they are fit to train on.",
    ),
    "ui": Command(
        options.UiOptions,
        "ui:ui",
        "start MLflow's UI for the runs of this folder, with one worker and for this machine only",
        "Ends with Ctrl-C. If the folder was moved, the paths of the artifacts are corrected first.",
    ),
    "bench": Command(
        options.BenchOptions,
        "bench:bench",
        "measure the speed of this machine",
        "Measures in one process, checks that the faster ways give equal results, and prints ratios, which depend less on the machine than seconds. "
        "Exit code 1 if a check fails.",
    ),
    "check": Command(
        options.CheckOptions,
        "check:check",
        "audit a dataset: read every image once, find faults and leaks",
        "Exit code 0 if the data is fit to train on, 1 if a finding would falsify a result or images are too few to compare, "
        "2 if the data cannot be read. Writes nothing to DIR.",
    ),
    "cache": Command(options.CacheOptions, "catalog:cache", "list or remove cached features"),
    "list": Command(options.ListOptions, "catalog:list_components", "list backbones, heads, baselines, datasets and experiments"),
    "show": Command(options.ShowOptions, "catalog:show_component", "show one card or experiment, like backbones/uni"),
    "doctor": Command(
        options.DoctorOptions,
        "doctor:doctor",
        "list which backbones are available here; with names, test them",
        "Downloads nothing. Exit code 0, or 1 if a file, a card, an output or a contract is wrong.",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    given = vars(_parser().parse_args(argv))
    command = COMMANDS[given.pop("command")]
    startup.prepare_process()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        filled = command.options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
        module, _, name = command.function.partition(":")
        function = getattr(importlib.import_module(f"cellbench.cli.{module}"), name)
        startup.freeze_imports()
        code: int = function(filled)
        return code
    except CellbenchError as error:
        print(to_printable(f"cellbench: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cellbench: stopped. What is finished is kept; the same command resumes.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
        return 0


def _terminated(number: int, frame: object) -> NoReturn:
    # Raised as an exception, so that open runs are marked and files are closed; otherwise MLflow would show them as RUNNING forever.
    raise SystemExit(128 + number)


# --- parsers from records of options ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cellbench: {message}. `{self.prog} --help` lists the possibilities.\n")  # one line, without argparse's usage


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cellbench",
        description="Compares frozen foundation models and segmentation heads on cell segmentation.",
        epilog="Results: `cellbench ui` in this folder. Experiment files: experiments/*.toml.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        # Omitted options keep the default of the record.
        own = commands.add_parser(name, help=command.help, description=command.description, argument_default=argparse.SUPPRESS)
        hints = typing.get_type_hints(command.options)
        local = command.options.__annotations__  # a command's own options come before shared ones
        for one in sorted(fields(command.options), key=lambda one: not one.metadata.get("positional") and one.name not in local):
            _add(own, one, hints[one.name])
    return parser


def _add(parser: argparse.ArgumentParser, one: Field[Any], hint: Any) -> None:
    """One field of a record as an argument of a parser."""
    required, positional = one.default is MISSING, one.metadata.get("positional", False)
    facts: dict[str, Any] = {"help": _help(one)}
    if typing.get_origin(hint) is types.UnionType:
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    if hint is bool:
        facts["action"] = "store_true"
    elif typing.get_origin(hint) is typing.Literal:
        facts["choices"] = typing.get_args(hint)
    else:
        facts |= {"type": hint, "metavar": one.metadata["metavar"]}
    if positional:
        if many or not required:
            facts["nargs"] = ("+" if required else "*") if many else "?"
        if not required:
            facts["default"] = one.default  # argparse would convert SUPPRESS, which is a string, by the type
        parser.add_argument(one.name, **facts)
        return
    if many:
        facts["action"] = "append"
    parser.add_argument(f"--{one.metadata['flag'] or one.name.replace('_', '-')}", dest=one.name, required=required, **facts)


def _help(one: Field[Any]) -> str:
    """The help of a field, with its default; a field without help is hidden."""
    text: str = one.metadata["help"]
    if not text:
        return argparse.SUPPRESS
    plain = one.default is not MISSING and one.default is not None and not isinstance(one.default, bool) and one.default not in ("", ())
    default = f"{one.default:g}" if isinstance(one.default, float) else one.default
    return f"{text} (default: {default})" if plain and "(default" not in text else text
