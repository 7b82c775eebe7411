"""Errors in the input: one sentence with the request, the fault and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class CellbenchError(Exception):
    """An error in the input. The command line prints it as one line and ends with exit code 2."""


class WeightsUnavailable(CellbenchError):
    """The weights of a backbone are unavailable. A grid marks the run as skipped, with this reason, and continues."""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> CellbenchError:
    """The error for a misspelt name, with the nearest known one.

    >>> print(unknown_name("head", "bilinaer", ["fpn", "bilinear"]))
    no head called 'bilinaer'. Did you mean 'bilinear'? Known: bilinear, fpn.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    known_names = f" Known: {', '.join(names)}." if names else " None is known."
    return CellbenchError(f"{where + ': ' if where else ''}no {kind} called '{name}'.{hint}{known_names}")


def one_line(error: BaseException) -> str:
    """The message of an error as one line, for reasons in tables and tags."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def redact_passwords(text: str) -> str:
    """The text without the passwords of URLs in it.

    >>> redact_passwords("postgresql://lab:secret@db/mlflow does not answer")
    'postgresql://lab:***@db/mlflow does not answer'
    """
    return re.sub(r"(\w+://[^\s/:@]*):\S*@", r"\1:***@", text)


def quote_name(name: object) -> str:
    """A name from a file, for a message of one line: quoted, shortened, printable."""
    text = str(name)
    text = text if len(text) <= 100 else f"{text[:99]}…"
    return f"'{text}'" if text.isprintable() else ascii(text)
