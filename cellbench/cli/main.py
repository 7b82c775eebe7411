"""The command line: ``python -m cellbench.run COMMAND``, also installed as ``cellbench``.

A command is a line of :data:`COMMANDS`: its options (:mod:`cellbench.config.options`), from which its parser is derived, and the function that takes
them, imported when it is called. So ``--help`` and ``list`` answer at once. Exit code 0, or 2 with one line that says what was asked, what is wrong
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
        "masks of your images by a run: `best`, a run's name or id, or an exported folder",
        "The same command resumes where it stopped. Files that cannot be read are skipped and named, and the exit code is then 1.",
    ),
    "evaluate": Command(
        options.EvaluateOptions,
        "evaluate:evaluate",
        "test a run again, on any labelled folder",
        "Logged in MLflow as a child of the run that it tests; the tables of a report stay as they are.",
    ),
    "export": Command(
        options.ExportOptions,
        "export:export",
        "a run as a folder that works elsewhere; as ONNX; as a model that MLflow serves",
        "The folder holds safetensors, cards and settings. `predict DIR IMAGE` and Segmenter.load(DIR) use it without MLflow.",
    ),
    "report": Command(
        options.ReportOptions,
        "report:report",
        "the results of an experiment: one HTML file, and tables as Markdown, CSV and LaTeX",
        "Reads finished runs from MLflow; trains nothing. Several experiments make one report; different test images are never paired.",
    ),
    "explore": Command(
        options.ExploreOptions,
        "explore:explore",
        "pictures and statistics of a dataset, or the feature maps of backbones",
        "Reads images and masks; writes nothing to their folder. `check` says whether they are fit to train on.",
    ),
    "ui": Command(
        options.UiOptions,
        "ui:ui",
        "MLflow's UI for the runs of this folder, with one worker and on this machine alone",
        "Ends with Ctrl-C. If the folder was moved, the paths of the artifacts are corrected first.",
    ),
    "bench": Command(
        options.BenchOptions,
        "bench:bench",
        "the speed of this machine, as ratios within one run",
        "Measures in one process, checks equalities on the way, and prints ratios, which hold where seconds do not. Exit code 1 where a check fails.",
    ),
    "check": Command(
        options.CheckOptions,
        "check:check",
        "is this data fit to train on? reads every image once, finds faults and leaks",
        "Exit code 0 where the data is fit, 1 where a finding would falsify a result, 2 where the data cannot be read. Nothing is written into DIR.",
    ),
    "cache": Command(options.CacheOptions, "catalog:cache", "list the cached features, and remove them"),
    "list": Command(options.ListOptions, "catalog:list_components", "all backbones, heads, baselines, datasets and experiments"),
    "show": Command(options.ShowOptions, "catalog:show_component", "one card or experiment, like backbones/uni"),
    "doctor": Command(
        options.DoctorOptions,
        "doctor:doctor",
        "which backbones are available here; with names, a self-test",
        "Nothing is downloaded. Exit code 0, or 1 where a file, a card, an output or a contract is wrong.",
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
    # As an exception, so that open runs are marked and files closed; MLflow would leave them RUNNING for ever.
    raise SystemExit(128 + number)


# --- parsers from records of options ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cellbench: {message}. `{self.prog} --help` lists the possibilities.\n")  # one line, without argparse's usage


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cellbench",
        description="Which frozen foundation model, with which segmentation head, outlines your cells best?",
        epilog="Results: `cellbench ui` in this folder. Experiment files: experiments/*.toml.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        # What is not given is left to the record's own default.
        own = commands.add_parser(name, help=command.help, description=command.description, argument_default=argparse.SUPPRESS)
        hints = typing.get_type_hints(command.options)
        local = command.options.__annotations__  # a command's own options stand before those that it shares
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
    """The help of a field with its default; a field without help is not shown."""
    text: str = one.metadata["help"]
    if not text:
        return argparse.SUPPRESS
    plain = one.default is not MISSING and one.default is not None and not isinstance(one.default, bool) and one.default not in ("", ())
    default = f"{one.default:g}" if isinstance(one.default, float) else one.default
    return f"{text} (default: {default})" if plain and "(default" not in text else text
