"""The command line: ``cellbench COMMAND``, or ``python -m cellbench COMMAND``.

A command is an entry of :data:`COMMANDS`: its options (:mod:`cellbench.config.options`), from which its parser is derived, and the function that takes
them. The function is imported when it is called, so ``--help`` and ``list`` are fast. Without a command, the five that people need most are printed.
Exit code 0, or 2 with a one-line error that says what is wrong and what to do.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NoReturn

from cellbench import __version__, startup
from cellbench.config import options
from cellbench.console import Column, format_table, say, warn
from cellbench.errors import CellbenchError, Terminated, nearest, unknown_name


@dataclass(frozen=True)
class Command:
    options: type[Any]
    function: str
    """``module:name`` below ``cellbench.cli``; takes the options, returns the exit code."""
    example: str
    help: str
    description: str = ""


COMMANDS = {
    "grid": Command(
        options.GridOptions,
        "grid:grid",
        "grid --data BCCD",
        "train, test and compare every run of an experiment",
        "Runs every combination of an experiment's lists. Finished runs are not repeated; interrupted ones are resumed.",
    ),
    "check": Command(
        options.CheckOptions,
        "check:check",
        "check BCCD",
        "audit a dataset: read every image once, find faults and leaks",
        "Exit code 0 if the data is fit to train on, 1 if a finding would falsify a result or images are too few to compare, "
        "2 if the data cannot be read. Writes nothing to DIR.",
    ),
    "report": Command(
        options.ReportOptions,
        "report:report",
        "report quickstart",
        "report the results of an experiment: one HTML file, and tables as Markdown, CSV and LaTeX",
        "Reads finished runs from MLflow; trains nothing. Several experiments make one report; different test images are never paired.",
    ),
    "predict": Command(
        options.PredictOptions,
        "predict:predict",
        "predict best smears/ --out masks --overlay",
        "segment images with a trained run: `best`, a run's name or id, or an exported folder",
        "The same command resumes where it stopped. Files that cannot be read are skipped and named, and the exit code is then 1.",
    ),
    "ui": Command(
        options.UiOptions,
        "ui:ui",
        "ui",
        "start MLflow's UI for the runs of this folder, with one worker and for this machine only",
        "Ends with Ctrl-C. If the folder was moved, the paths of the artifacts are corrected first.",
    ),
    "search": Command(
        options.SearchOptions,
        "search:search",
        "search --data BCCD --trials 20",
        "find the best setting within a search space",
        "Trains trials in batches that share passes of a backbone; the best one alone is tested at the end. The same command resumes a search.",
    ),
    "evaluate": Command(
        options.EvaluateOptions,
        "evaluate:evaluate",
        "evaluate best --data other-smears/",
        "evaluate a trained run on any labelled folder",
        "Logged in MLflow as a child of the evaluated run. Reports list counts of images without masks, and no other evaluation.",
    ),
    "score": Command(
        options.ScoreOptions,
        "score:score",
        "score cellpose cellpose-masks/ --data BCCD",
        "score another tool's masks on the test images of an experiment, as a row beside its models",
        "Every test image needs a mask. The row stands in the leaderboard, the paired tests and the report; it has no model to predict with.",
    ),
    "next": Command(
        options.NextOptions,
        "next_images:next_images",
        "next unlabelled/",
        "rank unlabelled images by what labelling them would teach",
        "The best models of an experiment predict the images. High in the ranking are those on which they disagree and which look unlike all labelled "
        "images and those that rank higher.",
    ),
    "export": Command(
        options.ExportOptions,
        "export:export",
        "export best --out model",
        "export a run as a portable folder, as ONNX, or as a model for MLflow serving",
        "The folder holds safetensors, cards and settings. `predict DIR IMAGE` and Segmenter.load(DIR) use it without MLflow.",
    ),
    "explore": Command(
        options.ExploreOptions,
        "explore:explore",
        "explore BCCD",
        "plot samples and statistics of a dataset, or feature maps of backbones",
        "Reads images and masks; writes nothing to their folder. `check` says whether they are fit to train on.",
    ),
    "list": Command(
        options.ListOptions, "catalog:list_components", "list backbones", "list backbones, heads, baselines, datasets and experiments"
    ),
    "show": Command(options.ShowOptions, "catalog:show_component", "show backbones/uni", "show one card or experiment"),
    "doctor": Command(
        options.DoctorOptions,
        "doctor:doctor",
        "doctor dinobloom-s",
        "list which backbones are available here; with names, test them",
        "Downloads nothing. Exit code 0, or 1 if a file, a card, an output or a contract is wrong.",
    ),
    "bench": Command(
        options.BenchOptions,
        "bench:bench",
        "bench --quick",
        "measure the speed of this machine",
        "Measures in one process, checks that the faster ways give equal results, and prints ratios, which depend less on the machine than seconds. "
        "Exit code 1 if a check fails.",
    ),
    "cache": Command(options.CacheOptions, "catalog:cache", "cache --prune --older-than 30", "list or remove cached features"),
}
FIRST_STEPS = {
    "check DIR": "find faults in your images and masks",
    "grid --data DIR": "compare models on your images",
    "report": "the newest comparison as a web page",
    "predict best IMAGES --out DIR": "segment images with the best model",
    "ui": "all runs and curves in the browser",
}
"""Printed without a command."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    startup.prepare_process()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        arguments = sys.argv[1:] if argv is None else argv
        if not arguments:
            _say_first_steps()
            return 0
        command, filled = read_arguments(arguments)
        module, _, name = command.function.partition(":")
        function = getattr(importlib.import_module(f"cellbench.cli.{module}"), name)
        startup.freeze_imports()
        code: int = function(filled)
        return code
    except CellbenchError as error:
        warn(f"cellbench: {error}")
        return 2
    except KeyboardInterrupt:
        warn("cellbench: stopped. What is finished is kept; the same command resumes.")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
        return 0


def _terminated(number: int, frame: object) -> NoReturn:
    raise Terminated(128 + number)  # otherwise MLflow would show open runs as RUNNING forever


def _say_first_steps() -> None:
    say(f"cellbench {__version__}: which backbone and head segment your cells best?\n")
    columns = [Column(""), Column("", folded=True)]
    say("\n".join(format_table(columns, [(f"  cellbench {call}", text) for call, text in FIRST_STEPS.items()], headings=False)))
    say("\nTo try it: `cellbench grid` compares models on drawn smears, in two minutes.")
    say("All commands: `cellbench --help`. The options of one: `cellbench grid --help`.")


# --- the call -------------------------------------------------------------------------------------------------------------------------


def read_arguments(arguments: Sequence[str]) -> tuple[Command, Any]:
    """The command of a call and its filled options. Raises CellbenchError for what argparse would answer with its usage."""
    first = arguments[0]
    if first not in COMMANDS and first not in ("-h", "--help", "--version"):
        if first.startswith("-"):
            raise CellbenchError(
                f"{first}: the command comes first, as in `cellbench grid {first}`. `cellbench --help` lists the commands."
            )
        raise unknown_name("command", first, COMMANDS)
    parsed, unknown = _parser().parse_known_args(arguments)
    given = vars(parsed)
    command = COMMANDS[name := given.pop("command")]
    if unknown:
        raise CellbenchError(_describe_unknown(name, command, unknown[0]))
    return command, command.options(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def _describe_unknown(name: str, command: Command, argument: str) -> str:
    """What is wrong with an argument that the command does not take, and what may be meant."""
    if not argument.startswith("-"):
        return f"{name} takes no further argument '{argument}'. A path with spaces and a pattern need quotes. `cellbench {name} --help` explains."
    option = argument.partition("=")[0]
    known = {_flag(one): one for one in fields(command.options) if one.metadata["help"] and not one.metadata.get("positional")}
    hint = ""
    if near := nearest(option, known):
        hint = f" Did you mean {' or '.join(near)}?"
    elif issubclass(command.options, options.SettingOptions):
        from cellbench.config.loading import nearest_settings  # imports pydantic

        if keys := nearest_settings(option.lstrip("-").replace("-", "_")):
            hint = f" Did you mean --set {keys[0]}=VALUE?"
    return f"{name} has no option {option}.{hint} `cellbench {name} --help` lists them."


# --- parsers from records of options ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    example = ""

    def error(self, message: str) -> NoReturn:
        example = f" Example: `{self.example}`." if self.example else ""
        raise CellbenchError(f"{message.removeprefix('the following ')}.{example} `{self.prog} --help` explains.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cellbench",
        description="Compares frozen foundation models and segmentation heads on cell segmentation.",
        epilog="Results: `cellbench ui` in this folder. Experiment files: `cellbench list experiments`.",
    )
    parser.add_argument("--version", action="version", version=f"cellbench {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        # Omitted options keep the default of the record.
        own = commands.add_parser(
            name,
            help=command.help,
            description=command.description or f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"Example: cellbench {command.example}",
            argument_default=argparse.SUPPRESS,
        )
        own.example = f"cellbench {command.example}"
        hints = typing.get_type_hints(command.options)
        local = command.options.__annotations__  # a command's own options come before shared ones
        for one in sorted(fields(command.options), key=lambda one: not one.metadata.get("positional") and one.name not in local):
            _add(own, one, hints[one.name])
    return parser


def _flag(one: Field[Any]) -> str:
    return f"--{one.metadata['flag'] or one.name.replace('_', '-')}"


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
    parser.add_argument(_flag(one), dest=one.name, required=required, **facts)


def _help(one: Field[Any]) -> str:
    """The help of a field, with its default; a field without help is hidden."""
    text: str = one.metadata["help"]
    if not text:
        return argparse.SUPPRESS
    plain = one.default is not MISSING and one.default is not None and not isinstance(one.default, bool) and one.default not in ("", ())
    default = f"{one.default:g}" if isinstance(one.default, float) else one.default
    return f"{text} (default: {default})" if plain and "(default" not in text else text
