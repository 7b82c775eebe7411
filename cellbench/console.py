"""Output to a terminal: lines folded at words, tables that fit its width, and progress bars, which :func:`silent` turns off.

tqdm is imported by the first progress bar, so that commands without one start at once.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import IO, TYPE_CHECKING, Any

from cellbench.escaping import readable, to_printable

if TYPE_CHECKING:
    from tqdm import tqdm

WIDE = 10_000
"""As a width: no table is cut."""
_silent = False


def width() -> int:
    """The number of columns of the terminal; ``COLUMNS`` overrides it, and a pipe has 80."""
    return shutil.get_terminal_size((80, 24)).columns


def sentence_width() -> int:
    """The width for tables of sentences on standard output: like sentences, they are folded for a terminal alone."""
    return width() if sys.stdout.isatty() else WIDE


def say(text: str = "", *, file: IO[str] | None = None) -> None:
    """Prints lines without breaking a progress bar, by default to standard output. A terminal gets them folded, a file or pipe as they are."""
    file, text = file or sys.stdout, readable(text)
    if _silent and file is sys.stdout:
        return
    if file.isatty():
        text = fold(text, width())
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=file)
    else:
        file.write(f"{text}\n")
    file.flush()


def say_lines(lines: Iterable[str]) -> None:
    """Prints each line as :func:`say` does; nothing for none."""
    for line in lines:
        say(line)


def warn(text: str) -> None:
    """Prints one line to standard error. Characters of file names that a terminal would interpret are escaped."""
    say(to_printable(text), file=sys.stderr)


def fold(text: str, columns: int) -> str:
    """Breaks longer lines at spaces; what follows is indented by two columns more than the line. Paths and URLs are not broken.

    >>> print(fold("  a note that is long", 12))
      a note
        that is
        long
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= columns:
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


# --- tables ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table, and what becomes of it on a narrow terminal."""

    heading: str
    _: KW_ONLY
    right: bool = False
    """Aligned to the right, for numbers."""
    optional: int = 0
    """Left out where it is empty or the table too wide: the column with the highest number first. 0: never."""
    cut: bool = False
    """Shortened with ``…`` where leaving out columns is not enough."""
    folded: bool = False
    """Text that continues on the next lines. Of the last column only."""


def number_columns(*headings: str, optional: int = 0) -> list[Column]:
    """Columns of numbers."""
    return [Column(heading, right=True, optional=optional) for heading in headings]


def format_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, room: int | None = None, headings: bool = True) -> list[str]:
    r"""The lines of a table of at most ``room`` columns of text, by default the width of the terminal.

    >>> table = [Column("name", cut=True), Column("n", right=True), Column("note", optional=1)]
    >>> print("\n".join(format_table(table, [("a-long-name", "7", "x")], room=12)))
    name       n
    ------------
    a-long-n…  7
    """
    room = width() if room is None else room
    widths = [max([len(one.heading) * headings, *(len(row[k]) for row in rows)]) for k, one in enumerate(columns)]
    least = [max([24, *(len(word) for row in rows for word in row[k].split())]) for k in range(len(columns))]  # words are not broken
    shown = [k for k, one in enumerate(columns) if not one.optional or any(row[k] for row in rows)]

    def total() -> int:
        return sum(min(widths[k], least[k]) if columns[k].folded else widths[k] for k in shown) + 2 * (len(shown) - 1)

    while total() > room and (rest := [k for k in shown if columns[k].optional]):
        shown.remove(max(rest, key=lambda k: columns[k].optional))
    for k in shown:
        if columns[k].cut and total() > room:
            widths[k] = max(8, widths[k] - (total() - room))
    lines = [_line(columns, [one.heading for one in columns], shown, widths, room)] if headings else []
    body = [line for row in rows for line in _line(columns, row, shown, widths, room)]
    if not headings:
        return body
    (head,) = lines
    rule = max(len(line) for line in (*head, *body))
    return [*head, "-" * rule, *body]


def _line(columns: Sequence[Column], row: Sequence[str], shown: Sequence[int], widths: Sequence[int], room: int) -> list[str]:
    """A row of a table; several lines where its last column is folded."""
    cells = []
    for k in shown:
        text = row[k] if columns[k].folded else shortened(row[k], widths[k])
        cells.append(text.rjust(widths[k]) if columns[k].right else text.ljust(widths[k]))
    last = columns[shown[-1]]
    if not last.folded:
        return ["  ".join(cells).rstrip()]
    start = "".join(f"{cell}  " for cell in cells[:-1])
    space = max(24, room - len(start))
    more = textwrap.wrap(row[shown[-1]], space, break_long_words=False, break_on_hyphens=False) or [""]
    return [(start + more[0]).rstrip(), *(" " * len(start) + text for text in more[1:])]


def shortened(text: str, room: int, end: int = 0) -> str:
    """The text in ``room`` characters: its beginning, ``…`` and ``end`` characters of its end.

    >>> shortened("registry/backbones/uni.toml", 18, 8)
    'registry/…uni.toml'
    """
    return text if len(text) <= room else f"{text[: room - 1 - end]}…{text[len(text) - end :]}"


# --- progress -------------------------------------------------------------------------------------------------------------------------


def progress_bar(items: Any = None, **named: Any) -> tqdm[Any]:
    """Tqdm's bar on a terminal. Nothing is shown in a pipe or file, or inside :func:`silent`."""
    from tqdm import tqdm

    named.setdefault("disable", None)  # None: shown on a terminal
    if _silent:
        named["disable"] = True
    return tqdm(items, **{"ncols": width(), "nrows": 24, "leave": False, **named})  # a terminal may say that it has no rows


@contextlib.contextmanager
def silent(wanted: bool = True) -> Iterator[None]:
    """No line and no progress bar of this process is shown inside ``with``, if that is ``wanted``."""
    global _silent
    before, _silent = _silent, _silent or wanted
    try:
        yield
    finally:
        _silent = before
