"""Errors in the input: one sentence with the request, the fault and the remedy. And whose fault an error of several runs was."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from cellbench.escaping import to_printable


class CellbenchError(Exception):
    """An error in the input. The command line prints it as one line and ends with exit code 2."""


class SystemFault(CellbenchError):
    """A fault of the machine or of a store, such as a full disk. Whatever follows would meet it too, so a grid stops; the same command continues."""


class WeightsUnavailable(CellbenchError):
    """The weights of a backbone are unavailable. A grid marks the run as skipped, with this reason, and continues."""


class Terminated(SystemExit):
    """SIGTERM, raised as an exception, so that open runs are marked and files are closed."""


MOST_NAMES = 16
"""Up to this number of known names is listed in full."""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "", all_with: str = "") -> CellbenchError:
    """The error for a misspelt name, with the nearest known one. ``all_with``: the command that lists all names, where there are many.

    >>> print(unknown_name("head", "bilinaer", ["fpn", "bilinear"]))
    no head called 'bilinaer'. Did you mean 'bilinear'? Known: bilinear, fpn.
    """
    names = sorted(known)
    near = nearest(name, names)
    hint = f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
    known_names = f" Known: {', '.join(names)}." if names else " None is known."
    if all_with and len(names) > MOST_NAMES:
        known_names = f" `{all_with}` lists all {len(names)}."
    return CellbenchError(f"{where + ': ' if where else ''}no {kind} called '{name}'.{hint}{known_names}")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known name most like ``name``; else up to three names that contain it or of which it is the end; else nothing.

    >>> nearest("bilinaer", ["fpn", "bilinear"]), nearest("vit", ["uni", "vit-small", "vit-tiny"]), nearest("x", ["uni"])
    (['bilinear'], ['vit-small', 'vit-tiny'], [])
    """
    names = list(known)
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        return near
    return [one for one in names if len(name) > 2 and name.lower() in one.lower()][:3]


@contextlib.contextmanager
def keeping_on() -> Iterator[None]:
    """Inside ``with``, code of others that calls ``sys.exit`` raises an error like any other: it must not end what else is under way."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error, Terminated) or hasattr(error, "ray_terminate_msg"):  # Ray's own, for SIGTERM
            raise
        raise RuntimeError(f"its code calls sys.exit({error.code!r})").with_traceback(error.__traceback__) from None


@contextlib.contextmanager
def blaming(culprit: object) -> Iterator[None]:
    """Marks an error inside ``with`` as that of ``culprit``, for :func:`culprit_of`, unless it has one already."""
    try:
        with keeping_on():
            yield
    except Exception as error:
        if culprit_of(error) is None:
            error.__dict__["culprit"] = culprit
        raise


def culprit_of(error: BaseException) -> object | None:
    """What :func:`blaming` marked as the cause of an error; None if nothing is."""
    return error.__dict__.get("culprit")


def one_line(error: BaseException) -> str:
    """The message of an error as one line, for reasons in tables and tags."""
    text = to_printable(" ".join(str(error).split()))
    return text or type(error).__name__


def last_line(text: str) -> str:
    """The last line of a traceback: the error's type and message."""
    return to_printable(text.strip().rpartition("\n")[2])


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


def quantity(num: int, noun: str) -> str:
    """The number with its noun.

    >>> quantity(1, "run"), quantity(3, "test image")
    ('1 run', '3 test images')
    """
    return f"{num} {noun}{'s' * (num != 1)}"


def first_names(names: Sequence[str], most: int = 20) -> str:
    """The first names, and the number of others.

    >>> first_names(["a.png", "b.png"], 1)
    'a.png and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quoted(names: Sequence[str], most: int = 5) -> str:
    """The same of names in quotes."""
    return first_names([quote_name(name) for name in names], most)
